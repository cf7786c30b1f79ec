// prefill_facts: what attend_prefill needs to know of every page before it reads the page's codes, a
// warp for each (page, KV head). Tiles are FP16, whatever pages hold: the page's scale, as a power of
// two, leaves its largest element in [2^-4, 2^4), and is a multiple of 8 so that it seldom changes
// from page to page. FP16 then keeps all digits of BF16 down to 2^-16 of that.
#include "base/float_convert.h"
#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/plane_formats.cuh"
#include "formats/int3.h"
#include "formats/nvfp4.h"

namespace thriftattn::cuda {
namespace {

constexpr int kFactsWarps = 8;

__device__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The largest |x| of n BF16 numbers, 8 at a time; by a whole warp.
__device__ float largest_bf16(const uint8_t* from, int n, int lane) {
  uint32_t top = 0;  // of bit patterns without the sign: in the order of the numbers
#pragma unroll 8
  for (int i = lane; i < n / 8; i += 32) {
    const uint4 w = reinterpret_cast<const uint4*>(from)[i];
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      top = max(top, max(words[k] << 16 & 0x7fff0000u, words[k] & 0x7fff0000u));
    }
  }
  return warp_max(__uint_as_float(top));
}

// The multiple of 8 that brings `top` into [2^-4, 2^4).
__device__ int tile_exponent(float top) {
  if (!(top > 0)) return 0;
  const int e = ilogbf(top) + 4;
  return max(-40, min(124, (e >= 0 ? e / 8 : -((7 - e) / 8)) * 8));
}

// Layered codes of a base plane have values of code * scale * unit (plane_formats.cuh); those of MXFP4,
// without a page scale, are in units of the tile: of the power of two that the largest has.
struct PlaneUnit {
  float unit;     // 0: MXFP4
  float largest;  // a bound of |x|
};
__device__ PlaneUnit plane_unit(const SideGeometry& side, const uint8_t* plane, float page_scale,
                                int lane) {
  if (side.kind == SideKind::nvfp4) return {page_scale * Nvfp4Plane::kUnit, page_scale * kNvfp4Max};
  if (side.kind == SideKind::int3) return {page_scale * Int3Plane::kUnit, page_scale * kInt3Max};
  uint32_t top = 0;
  const auto* words = reinterpret_cast<const uint32_t*>(plane + side.scales - side.codes);
  for (int i = lane; i < side.dim / 2; i += 32) top = __vmaxu4(top, words[i]);
  top = max(max(top & 255u, top >> 8 & 255u), max(top >> 16 & 255u, top >> 24));
  top = __reduce_max_sync(0xffffffffu, top);
  return {0, 6.0f * __uint_as_float(top << 23)};
}

// The scale of a residual over its base's; a residual of zeros may have a larger one.
__device__ float residual_ratio(float residual, float base) {
  const float ratio = residual / base;
  return ratio <= 1.0f ? ratio : 0.0f;
}

// The largest |x| of plain or open rows.
__device__ float largest_of_rows(const SideGeometry& side, bool bf16, const uint8_t* rows, int held,
                                 int lane) {
  if (bf16) return largest_bf16(rows, held * side.dim, lane);
  float top = 0;
  for (int i = lane; i < held; i += 32) {
    top = fmaxf(top, *reinterpret_cast<const float*>(rows + int64_t{i} * side.row_bytes));
  }
  return warp_max(top) * 448.0f;
}

__global__ void __launch_bounds__(32 * kFactsWarps) prefill_facts(const AttendArgs a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x % 32;
  const int page = blockIdx.x * kFactsWarps + threadIdx.x / 32;
  const int head = blockIdx.y, seq = blockIdx.z;
  AttendArgs whole = a;
  whole.tile_rows = a.row_tiles * a.tile_rows;
  const TileView v = tile_view(whole, seq, 0);
  if (v.items == 0 || page < v.page_begin || page >= v.page_end) return;
  const int64_t seq_head = int64_t{seq} * a.g.kv_heads + head;
  const bool open_form = a.g.any_layered() && page >= v.open_from(0);
  const int held = min(kPage, v.length - page * kPage);
  PageFacts f;
  f.slot = v.t.blocks[page];
  const uint8_t* slot = a.call.memory.pages + int64_t{f.slot} * a.g.slot_bytes;
  const uint8_t* open = nullptr;
  PageMeta meta;
  if (open_form) {
    f.open = v.t.open[page % static_cast<int>(v.t.open_pages)];
    open = a.call.memory.open + int64_t{f.open} * a.g.open_bytes;
  } else if (a.g.any_layered()) {
    meta = *meta_of(const_cast<uint8_t*>(slot), a.g, head);
    if (v.t.residuals != nullptr) f.residual = v.t.residuals[int64_t{page} * a.g.kv_heads + head];
  }
  const SideGeometry& k = a.g.k;
  const uint8_t* k_side = slot + k.start + int64_t{head} * k.head_bytes;
  if (k.layered()) {
    const uint8_t* mean = open_form ? open + a.g.open_reference + int64_t{head} * k.dim * 2
                                    : k_side + k.mean;
    f.mean_exponent = tile_exponent(largest_bf16(mean, k.dim, lane));
  }
  if (k.layered() && !open_form) {
    const PlaneUnit plane = plane_unit(k, k_side + k.codes, meta.k_scale, lane);
    f.k_factor = plane.unit > 0 ? plane.unit : power_of_two(tile_exponent(plane.largest));
    f.k_tile = residual_ratio(meta.k_res_scale * Nvfp4Plane::kUnit, f.k_factor);
  } else {
    const bool bf16 = k.kind != SideKind::fp8;
    const uint8_t* rows = k.layered() ? open + int64_t{head} * kPage * k.dim * 2 : k_side + k.rows;
    const int e = tile_exponent(largest_of_rows(k, bf16, rows, held, lane));
    f.k_factor = power_of_two(e);
    f.k_tile = power_of_two(-e);
  }
  const SideGeometry& s = a.g.v;
  const uint8_t* v_side = slot + s.start + int64_t{head} * s.head_bytes;
  if (s.layered() && !open_form) {
    const float mean = largest_bf16(v_side + s.mean, s.dim, lane);
    const PlaneUnit plane = plane_unit(s, v_side + s.codes, meta.v_scale, lane);
    f.v_exponent = tile_exponent(fmaxf(plane.largest, mean));
    const float unit = plane.unit > 0 ? plane.unit : power_of_two(f.v_exponent);
    const float factor = unit * power_of_two(-f.v_exponent);
    const float residual = factor * residual_ratio(meta.v_res_scale * Nvfp4Plane::kUnit, unit);
    const __half2 both = __floats2half2_rn(factor, residual);
    f.v_factors = reinterpret_cast<const uint32_t&>(both);
  } else {
    const bool bf16 = s.kind != SideKind::fp8;
    const uint8_t* rows = s.layered() ? open + a.g.open_v + int64_t{head} * kPage * s.dim * 2
                                      : v_side + s.rows;
    f.v_exponent = tile_exponent(largest_of_rows(s, bf16, rows, held, lane));
  }
  if (lane == 0) {
    workspace_at<PageFacts>(a, a.ws.facts)[seq_head * a.limits.max_pages + page] = f;
  }
}

}  // namespace

void launch_prefill_facts(const AttendArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.limits.max_pages + kFactsWarps - 1) / kFactsWarps),
                  a.g.kv_heads, static_cast<unsigned>(a.limits.batch));
  launch_after_previous(prefill_facts, {grid, dim3(32 * kFactsWarps), 0}, a, stream, "prefill_facts");
}

}  // namespace thriftattn::cuda
