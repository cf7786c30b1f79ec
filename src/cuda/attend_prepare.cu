// attend_prepare: before the pages' codes are read. One launch that
// - transforms the queries and lays them out as the mma fragments of attend_decode.cuh,
// - computes q'.mean of every page and row in FP32 (so that attend_decode reads no K mean), and
// - gives a floor of each row's LSE (DESIGN section 6): Jensen over the pages' summaries, exact for
//   the first and the open page. With a softcap, which is not convex, only what is exact counts.
// Blocks with blockIdx.x < page_chunks take 128 pages each, one a thread; those behind take a row
// each for the exact pages. Block 0 also writes the fragments.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "base/float_convert.h"
#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/hadamard.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = kPrepareThreads;
constexpr int kPrepareWarps = kThreads / 32;
constexpr int kRowGroup = 32;  // rows of q' in shared memory at a time
constexpr int kRowStep = 8;    // rows accumulated at a time

__device__ float load_q(const AttendCall& c, int64_t i) {
  if (c.q_element == Element::f32) return static_cast<const float*>(c.q)[i];
  const uint16_t bits = static_cast<const uint16_t*>(c.q)[i];
  return c.q_element == Element::bf16 ? bf16_to_f32(bits) : fp16_to_f32(bits);
}

// q' of one row by one warp, element r * 32 + lane in x[r]: H (q / s) * softmax_scale * log2(e).
template <int Regs>
__device__ void transform_row(const AttendArgs& a, const TileView& v, int head, int row, int lane,
                              float (&x)[Regs]) {
  constexpr int kDim = 32 * Regs;
  const int i = row / a.g.group, g = row % a.g.group;
  const int64_t stride = a.call.q_token_stride ? a.call.q_token_stride
                                               : int64_t{a.g.kv_heads} * a.g.group * kDim;
  const int64_t at =
      (v.t.first_row + a.first_q + i) * stride + (int64_t{head} * a.g.group + g) * kDim;
  const float* s = a.g.k.layered() ? a.call.memory.equalizer : nullptr;
#pragma unroll
  for (int r = 0; r < Regs; ++r) {
    x[r] = load_q(a.call, at + r * 32 + lane);
    if (s != nullptr) x[r] /= s[head * kDim + r * 32 + lane];
  }
  if (a.g.k.layered() && a.g.rotate) hadamard_row(x, lane, a.hadamard_factor);
#pragma unroll
  for (int r = 0; r < Regs; ++r) x[r] *= a.softmax_scale * kLog2e;
}

// The fragments of one row (attend_decode.cuh says which dims a thread holds).
template <int Regs>
__device__ void write_fragments(const AttendArgs& a, int64_t seq_head, int row, int lane,
                                const float (&x)[Regs]) {
  constexpr int kDim = 32 * Regs;
  float top = 0;
#pragma unroll
  for (int r = 0; r < Regs; ++r) top = fmaxf(top, fabsf(x[r]));
  for (int step = 16; step > 0; step /= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  }
  // The largest element in [8, 16): products with codes and sums stay in range.
  int exponent = 0;
  if (top > 0 && top < INFINITY) exponent = 3 - ilogbf(top);
  exponent = max(-126, min(126, exponent));
  const float up = exp2f(static_cast<float>(exponent));
  if (lane == 0) {
    workspace_at<float>(a, a.ws.row_factor)[seq_head * a.ws.rows + row] =
        exp2f(static_cast<float>(-exponent));
  }
  const int64_t n_tile = (seq_head * a.ws.rows + row) / 8;
  const int g = row % 8;
  __half* nvfp4 = workspace_at<__half>(a, a.ws.q_nvfp4);
  __half* fp8 = workspace_at<__half>(a, a.ws.q_fp8);
  __nv_bfloat16* bf16 = workspace_at<__nv_bfloat16>(a, a.ws.q_bf16);
#pragma unroll
  for (int r = 0; r < Regs; ++r) {
    const int d = r * 32 + lane;
    const __half h = __float2half_rn(x[r] * up);
    {
      const int word = d / 8, n = d % 8, j = word / (kDim / 32), w = word % (kDim / 32);
      const int64_t step = n_tile * (kDim / 16) + 2 * w + (n & 1);
      nvfp4[(step * 32 + g * 4 + j) * 4 + (n >> 1 & 1) * 2 + (n >> 2)] = h;
    }
    {
      const int j = d / (kDim / 4), c = d % (kDim / 4) / 4, n = d % 4;
      const int64_t step = n_tile * (kDim / 16) + c;
      fp8[(step * 32 + g * 4 + j) * 4 + (n & 1) * 2 + (n >> 1)] = h;
    }
    {
      const int c = d / 32, j = d % 32 / 8, n = d % 8;
      const int64_t step = n_tile * (kDim / 16) + 2 * c + (n >> 2);
      const __nv_bfloat16 high = __float2bfloat16_rn(x[r]);
      __nv_bfloat16* at = bf16 + (step * 32 + g * 4 + j) * 8 + (n >> 1 & 1) * 2 + (n & 1);
      at[0] = high;
      at[4] = __float2bfloat16_rn(x[r] - __bfloat162float(high));
    }
  }
}

// q'.k of one token over the base plane, mean left out.
template <int kDim>
__device__ float dot_token(const AttendArgs& a, const uint8_t* head, float k_scale,
                           const uint16_t* open, int token, const float* q) {
  const SideGeometry& k = a.g.k;
  float sum[4] = {};
  if (open != nullptr || k.kind == SideKind::bf16) {
    const uint16_t* row =
        open ? open + token * kDim
             : reinterpret_cast<const uint16_t*>(head + k.rows + int64_t{token} * k.row_bytes);
#pragma unroll 8
    for (int d = 0; d < kDim; d += 8) {
      const uint4 w = *reinterpret_cast<const uint4*>(row + d);
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] = fmaf(q[d + 2 * i], __uint_as_float(words[i] << 16), sum[i]);
        sum[i] = fmaf(q[d + 2 * i + 1], __uint_as_float(words[i] & 0xffff0000u), sum[i]);
      }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  if (k.kind == SideKind::fp8) {
    const auto* row =
        reinterpret_cast<const uint32_t*>(head + k.rows + int64_t{token} * k.row_bytes);
#pragma unroll 8
    for (int d = 0; d < kDim; d += 4) {
      const uint32_t word = row[1 + d / 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(q[d + i], e4m3_to_f32(word >> (8 * i) & 255u), sum[i]);
    }
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) * __uint_as_float(row[0]);
  }
  const auto* codes = reinterpret_cast<const uint2*>(head + k.codes + token * (kDim / 2));
  const uint8_t* scales = head + k.scales + token * (kDim / 16);
#pragma unroll 8
  for (int block = 0; block < kDim / 16; ++block) {
    const uint2 w = codes[block];
    float part = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t code = (i < 8 ? w.x : w.y) >> (4 * (i % 8));
      // The bits where FP32 has the low bits of its exponent: value * 2^-126.
      const float v = __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
      part = fmaf(q[16 * block + i], v, part);
    }
    sum[block % 4] = fmaf(part, e4m3_to_f32(scales[block]), sum[block % 4]);
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) * k_scale;
}

__device__ float capped(const AttendArgs& a, float s) {
  return a.softcap > 0 ? a.softcap * tanhf(s / a.softcap) : s;
}

// log2 of the sum over the visible tokens of a row's first page (threads 0 to 63) and of its own
// page (the others), by a whole block with q' in shared memory.
template <int kDim>
__device__ float exact_pages(const AttendArgs& a, const TileView& v, int head, const float* q, int i,
                             float (*partial)[kRowStep]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool own = warp >= kPrepareWarps / 2;
  const int first_page = v.begin(i) / kPage, own_page = (v.end(i) - 1) / kPage;
  const int page = own ? own_page : first_page, token = threadIdx.x % kPage;
  float sum = -INFINITY;
  if (own || first_page < own_page) {
    const bool open_form = own && a.g.k.layered();
    uint8_t* slot = open_form ? nullptr : page_slot(a.call.memory, v.t, a.g, page);
    const uint8_t* k = open_form ? nullptr : side_of(slot, a.g.k, head);
    float k_scale = 1;
    const uint16_t* open = nullptr;
    const uint16_t* mean = nullptr;
    if (open_form) {
      const uint8_t* o = open_slot(a.call.memory, v.t, a.g, page);
      open = reinterpret_cast<const uint16_t*>(o) + int64_t{head} * kPage * kDim;
      mean = reinterpret_cast<const uint16_t*>(o + a.g.open_reference) + head * kDim;
    } else if (a.g.k.layered()) {
      mean = reinterpret_cast<const uint16_t*>(k + a.g.k.mean);
      k_scale = meta_of(slot, a.g, head)->k_scale;
    }
    float offset = 0;
    if (mean != nullptr) {
#pragma unroll
      for (int d = 0; d < kDim; d += 32) {
        offset = fmaf(q[d + lane], bf16_to_f32(mean[d + lane]), offset);
      }
      for (int step = 16; step > 0; step /= 2) {
        offset += __shfl_xor_sync(0xffffffffu, offset, step);
      }
    }
    const int at = page * kPage + token;
    if (at >= v.begin(i) && at < v.end(i)) {
      sum = capped(a, dot_token<kDim>(a, k, k_scale, open, token, q) + offset);
    }
  }
  for (int step = 16; step > 0; step /= 2) {
    sum = log2_add(sum, __shfl_xor_sync(0xffffffffu, sum, step));
  }
  if (lane == 0) partial[warp][0] = sum;
  __syncthreads();
  return log2_add(log2_add(partial[0][0], partial[1][0]), log2_add(partial[2][0], partial[3][0]));
}

template <int Regs>
__global__ void __launch_bounds__(kThreads) attend_prepare(const AttendArgs a) {
  constexpr int kDim = 32 * Regs;
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ float q[kRowGroup][kDim];
  __shared__ float norms[kRowGroup];
  __shared__ float tops[kPrepareWarps][kRowStep], sums[kPrepareWarps][kRowStep];
  const int head = blockIdx.y, seq = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t seq_head = int64_t{seq} * a.g.kv_heads + head;
  AttendArgs whole = a;
  whole.tile_rows = static_cast<int>(a.ws.rows);
  const TileView v = tile_view(whole, seq, 0);
  if (v.rows == 0) return;
  float* floors = workspace_at<float>(a, a.ws.floors) + seq_head * a.ws.chunks * a.ws.rows;

  if (blockIdx.x >= a.ws.page_chunks) {  // exact
    const int row = blockIdx.x - static_cast<int>(a.ws.page_chunks);
    if (row >= v.rows) return;
    float sum = -INFINITY;
    if (!v.prefill) {
      if (warp == 0) {
        float x[Regs];
        transform_row(a, v, head, row, lane, x);
#pragma unroll
        for (int r = 0; r < Regs; ++r) q[0][r * 32 + lane] = x[r];
      }
      __syncthreads();
      sum = exact_pages<kDim>(a, v, head, q[0], row / a.g.group, tops);
    }
    if (threadIdx.x == 0) floors[a.ws.page_chunks * a.ws.rows + row] = sum;
    return;
  }

  // Sealed pages that any row reads, then open ones.
  const bool layered_k = a.g.k.layered();
  const int sealed = a.g.any_layered() ? v.open_from(v.i_last) : v.page_end;
  const int open_first = v.open_from(0);
  const int pages = a.g.any_layered() ? sealed + v.page_end - open_first : sealed;
  const int index = blockIdx.x * kThreads + threadIdx.x;
  if (blockIdx.x != 0 && static_cast<int>(blockIdx.x) * kThreads >= pages) {
    for (int row = threadIdx.x; row < v.rows; row += kThreads) {
      floors[blockIdx.x * a.ws.rows + row] = -INFINITY;
    }
    return;
  }
  const bool is_sealed = index < sealed;
  const int page = is_sealed ? index : open_first + index - sealed;
  const bool active = index < pages && page >= v.page_begin;
  const uint16_t* mean = nullptr;
  float norm_bound = 0;
  const int record_index =
      is_sealed ? page : static_cast<int>(a.limits.max_pages) + page - open_first;
  float4 scales = make_float4(1, 1, 1, 1);
  if (active) {
    if (is_sealed && a.g.any_layered()) {
      uint8_t* slot = page_slot(a.call.memory, v.t, a.g, page);
      const PageMeta* meta = meta_of(slot, a.g, head);
      scales = make_float4(meta->k_scale, meta->v_scale, meta->k_res_scale, meta->v_res_scale);
      norm_bound = meta->k_mean_norm;
      mean = reinterpret_cast<const uint16_t*>(side_of(slot, a.g.k, head) + a.g.k.mean);
    } else if (!is_sealed && layered_k) {
      mean = reinterpret_cast<const uint16_t*>(open_slot(a.call.memory, v.t, a.g, page) +
                                               a.g.open_reference) +
             head * kDim;
    }
  }
  if (!layered_k) mean = nullptr;
  const bool jensen = layered_k && a.softcap == 0 && !v.prefill;

  const int rows_end = blockIdx.x == 0 ? static_cast<int>(a.ws.rows) : v.rows;
  for (int base = 0; base < rows_end; base += kRowGroup) {
    __syncthreads();
    for (int r = warp; r < kRowGroup && base + r < rows_end; r += kPrepareWarps) {
      float x[Regs] = {};
      if (base + r < v.rows) transform_row(a, v, head, base + r, lane, x);
      float norm = 0;
#pragma unroll
      for (int k = 0; k < Regs; ++k) {
        q[r][k * 32 + lane] = x[k];
        norm = fmaf(x[k], x[k], norm);
      }
      for (int step = 16; step > 0; step /= 2) norm += __shfl_xor_sync(0xffffffffu, norm, step);
      if (lane == 0) norms[r] = sqrtf(norm);
      if (blockIdx.x == 0) write_fragments(a, seq_head, base + r, lane, x);
    }
    __syncthreads();
    for (int step = 0; step < kRowGroup && base + step < v.rows; step += kRowStep) {
      float acc[kRowStep] = {};
      if (mean != nullptr) {
#pragma unroll 8
        for (int d = 0; d < kDim; d += 8) {
          const uint4 w = *reinterpret_cast<const uint4*>(mean + d);
          const uint32_t words[4] = {w.x, w.y, w.z, w.w};
          float m[8];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            m[2 * n] = __uint_as_float(words[n] << 16);
            m[2 * n + 1] = __uint_as_float(words[n] & 0xffff0000u);
          }
#pragma unroll
          for (int r = 0; r < kRowStep; ++r) {
            const float4 lo = *reinterpret_cast<const float4*>(&q[step + r][d]);
            const float4 hi = *reinterpret_cast<const float4*>(&q[step + r][d + 4]);
            acc[r] = fmaf(lo.x, m[0], acc[r]);
            acc[r] = fmaf(lo.y, m[1], acc[r]);
            acc[r] = fmaf(lo.z, m[2], acc[r]);
            acc[r] = fmaf(lo.w, m[3], acc[r]);
            acc[r] = fmaf(hi.x, m[4], acc[r]);
            acc[r] = fmaf(hi.y, m[5], acc[r]);
            acc[r] = fmaf(hi.z, m[6], acc[r]);
            acc[r] = fmaf(hi.w, m[7], acc[r]);
          }
        }
      }
      if (active) {
        const int tile = (base + step) / a.tile_rows, at = (base + step) % a.tile_rows;
        float* record = page_record(a, seq_head, tile, record_index);
        if (at == 0) *reinterpret_cast<float4*>(record) = scales;
        float4* to = reinterpret_cast<float4*>(record + 4 + at);
        to[0] = make_float4(acc[0], acc[1], acc[2], acc[3]);
        to[1] = make_float4(acc[4], acc[5], acc[6], acc[7]);
      }
      // Jensen: sum over the page's tokens of 2^s >= 64 * 2^(mean of s), and the mean of s is
      // q'.mean + q'.(mean of decoded K') >= q'.mean - |q'| * norm_bound.
      float top[kRowStep];
#pragma unroll
      for (int r = 0; r < kRowStep; ++r) {
        const int row = base + step + r;
        const int i = row / a.g.group;
        float t = -INFINITY;
        if (jensen && active && is_sealed && row < v.rows && page < v.open_from(i) &&
            page * kPage >= v.begin(i) && page != v.begin(i) / kPage) {
          t = 6.0f + acc[r] - norms[step + r] * norm_bound;
          if (!(fabsf(t) < INFINITY)) t = -INFINITY;
        }
        acc[r] = t;
        top[r] = t;
      }
#pragma unroll
      for (int r = 0; r < kRowStep; ++r) {
        for (int s = 16; s > 0; s /= 2) {
          top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], s));
        }
        float sum = top[r] == -INFINITY ? 0.0f : exp2f(acc[r] - top[r]);
        for (int s = 16; s > 0; s /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, s);
        if (lane == 0) {
          tops[warp][r] = top[r];
          sums[warp][r] = sum;
        }
      }
      __syncthreads();
      if (threadIdx.x < kRowStep && base + step + threadIdx.x < v.rows) {
        float t = -INFINITY, s = 0;
        for (int w = 0; w < kPrepareWarps; ++w) t = fmaxf(t, tops[w][threadIdx.x]);
        for (int w = 0; w < kPrepareWarps && t > -INFINITY; ++w) {
          s += sums[w][threadIdx.x] * exp2f(tops[w][threadIdx.x] - t);
        }
        floors[blockIdx.x * a.ws.rows + base + step + threadIdx.x] =
            t == -INFINITY ? t : t + log2f(s);
      }
      __syncthreads();
    }
  }
}

__device__ void store_out(const AttendCall& c, int64_t i, float x) {
  if (c.out_element == Element::f32) {
    static_cast<float*>(c.out)[i] = x;
  } else {
    static_cast<uint16_t*>(c.out)[i] =
        c.out_element == Element::bf16 ? f32_to_bf16(x) : f32_to_fp16(x);
  }
}

constexpr int kMergeGroups = 4;  // of threads, each with every fourth split

// One block a row: the partials of its splits, and the sink. The sums are of fixed groups in a fixed
// order, whatever the batch.
__global__ void attend_merge(const AttendArgs a) {
  __shared__ float factors[kMaxSplits];
  __shared__ float values[kMergeGroups][256];
  __shared__ float total[2];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int dim = a.g.v.dim;
  const int seq = blockIdx.z, head = blockIdx.y, row = blockIdx.x;
  const TileView v = tile_view(a, seq, row / a.tile_rows);
  if (row >= v.rows) return;
  const int64_t seq_head = int64_t{seq} * a.g.kv_heads + head;
  const int splits = static_cast<int>(splits_of(v.items));
  const int q_head = head * a.g.group + row % a.g.group;
  const float2* ml = workspace_at<const float2>(a, a.ws.partial_ml) +
                     seq_head * a.splits * a.ws.rows + row;
  const float* o = workspace_at<const float>(a, a.ws.partial_o) +
                   (seq_head * a.splits * a.ws.rows + row) * dim;
  const int d = threadIdx.x, group = threadIdx.y;
  if (group == 0 && d < 32) {
    const float sink = a.call.sink_logits ? a.call.sink_logits[q_head] * kLog2e : -INFINITY;
    float2 part[2];
    float top = sink;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int s = d + 32 * i;
      part[i] = s < splits ? ml[s * a.ws.rows] : make_float2(-INFINITY, 0);
      if (!(part[i].y > 0)) part[i] = make_float2(-INFINITY, 0);
      top = fmaxf(top, part[i].x);
    }
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float factor = part[i].y > 0 ? exp2f(part[i].x - top) : 0.0f;
      if (d + 32 * i < kMaxSplits) factors[d + 32 * i] = factor;
      sum += part[i].y * factor;
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (d == 0) {
      total[0] = sum + (sink > -INFINITY ? exp2f(sink - top) : 0.0f);
      total[1] = top;
    }
  }
  __syncthreads();
  float value = 0;
#pragma unroll 4
  for (int s = group; s < splits; s += kMergeGroups) {
    if (factors[s] > 0) value = fmaf(o[int64_t{s} * a.ws.rows * dim + d], factors[s], value);
  }
  values[group][d] = value;
  __syncthreads();
  if (group != 0) return;
  const float sum = total[0];
  value = (values[0][d] + values[1][d]) + (values[2][d] + values[3][d]);
  const int64_t token = v.t.first_row + a.first_q + row / a.g.group;
  const int64_t q_heads = int64_t{a.g.kv_heads} * a.g.group;
  const int64_t stride = a.call.out_token_stride ? a.call.out_token_stride : q_heads * dim;
  store_out(a.call, token * stride + int64_t{q_head} * dim + d, sum > 0 ? value / sum : 0.0f);
  if (d == 0 && a.call.lse != nullptr) {
    a.call.lse[token * q_heads + q_head] = sum > 0 ? (total[1] + log2f(sum)) * kLn2 : -INFINITY;
  }
  if (d < 32 && a.call.lse_floor != nullptr) {
    const float floor = row_floor_of_warp(a, seq_head, row, q_head);
    if (d == 0) a.call.lse_floor[token * q_heads + q_head] = floor * kLn2;
  }
}
static_assert(kMaxSplits <= 64 && kMergeGroups == 4);

}  // namespace

void launch_prepare(const AttendArgs& a, cudaStream_t stream) {
  const int exact = a.positions * a.g.group;
  const dim3 grid(static_cast<unsigned>(a.ws.page_chunks) + exact, a.g.kv_heads,
                  static_cast<unsigned>(a.limits.batch));
  switch (a.g.k.dim) {
    case 64:
      launch_after_previous(attend_prepare<2>, {grid, dim3(kThreads), 0}, a, stream, "attend_prepare");
      break;
    case 128:
      launch_after_previous(attend_prepare<4>, {grid, dim3(kThreads), 0}, a, stream, "attend_prepare");
      break;
    case 192:
      launch_after_previous(attend_prepare<6>, {grid, dim3(kThreads), 0}, a, stream, "attend_prepare");
      break;
    default:
      launch_after_previous(attend_prepare<8>, {grid, dim3(kThreads), 0}, a, stream, "attend_prepare");
      break;
  }
}

void launch_merge(const AttendArgs& a, cudaStream_t stream) {
  const dim3 grid(a.positions * a.g.group, a.g.kv_heads, static_cast<unsigned>(a.limits.batch));
  launch_after_previous(attend_merge, {grid, dim3(a.g.v.dim, kMergeGroups), 0}, a, stream,
                        "attend_merge");
}

}  // namespace thriftattn::cuda
