// attend_prefill: attention of many query rows, a block for each tile of 128 rows (positions x
// heads of the group: row = i * group + head, so that one KV head's pages serve all of its query
// heads).
//
// One or two warpgroups fill K's and V's tiles, a page at a time, each in a ring of stages: with
// bulk copies of what prefill_tiles() made for all blocks (attend_prefill_copies.cuh), or by
// expanding pages themselves (attend_prefill_pages.cuh) where few blocks share them. Two warpgroups
// of 64 rows each attend (attend_prefill_rows.cuh): S = Q'.K^T, P = 2^(S - m + 8) in FP16, O +=
// P.V, with S, P and O in registers. What was stored as a product with a page's scale comes back as
// a factor of the scores, or of O where it changes; so do softmax_scale and log2(e), which leaves
// queries of 16 bits as they are. Where FP16 does not hold q', what it left is multiplied too.
// q'.mean(K) is added to the scores in FP32, mean(V) is part of V's tile.
//
// The warpgroups meet at barriers of the ring only, so that one's softmax falls into another's
// products; up to 128 dims there are registers for P.V of a page to run beside the softmax of the
// next.
//
// Longest tiles come first. A row's reference m moves only where a score is far above it.
#pragma once

#include "cuda/attend_launch.h"
#include "cuda/attend_prefill_copies.cuh"
#include "cuda/attend_prefill_make.cuh"
#include "cuda/attend_prefill_pages.cuh"
#include "cuda/attend_prefill_rows.cuh"
#include "cuda/attend_query.cuh"
#include "cuda/dependent_launch.cuh"

namespace thriftattn::cuda {

// Of 128 a thread of two fillers, 168 of one.
template <int kFillers>
__device__ inline void set_registers_of_filler() {
#ifdef THRIFTATTN_WGMMA
  registers_down<kFillers == 2 ? 96 : 88>();
#endif
}
template <int kFillers>
__device__ inline void set_registers_of_attenders() {
#ifdef THRIFTATTN_WGMMA
  registers_up<kFillers == 2 ? 160 : 208>();
#endif
}

// q' of the tile's rows as FP16 and what that left (q_low may be null); rows that do not exist are
// 0. The number of terms that scores need.
template <int D, int kThreads>
__device__ int load_queries(const AttendArgs& a, const TileView& v, int head, uint8_t* q,
                            uint8_t* q_low, PrefillShared& shared) {
  const int lane = threadIdx.x % 32;
  bool left = false;
  for (int r = threadIdx.x / 32; r < kPrefillRows; r += kThreads / 32) {
    float x[D / 32] = {};
    if (v.first_row + r < v.end_row) {
      transform_row(a, read_row<D / 32>(a, v, head, v.first_row + r, lane), lane, x);
    }
    const int exponent = row_exponent(x);
    const float up = exp2f(static_cast<float>(exponent));
    if (lane == 0) {
      shared.row_factor[r] = exp2f(static_cast<float>(-exponent)) * (a.softmax_scale * kLog2e);
    }
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      const int d = chunk_place(k * 32 + lane);
      const int at = tile_offset(kPrefillRows, r, d >> 3) + (d & 7) * 2;
      const __half h = __float2half_rn(x[k] * up);
      *reinterpret_cast<__half*>(q + at) = h;
      if (q_low == nullptr) continue;
      const float rest = x[k] * up - __half2float(h);
      left |= rest != 0;
      *reinterpret_cast<__half*>(q_low + at) = __float2half_rn(rest);
    }
  }
  return __syncthreads_or(a.two_terms != 0 && left) ? 2 : 1;
}

template <int D, bool kMade>
__global__ void __launch_bounds__(prefill_threads(prefill_fillers<D, kMade>()), 1)
    attend_prefill(const __grid_constant__ AttendArgs a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
  constexpr bool kServed = true;
#else
  constexpr bool kServed = D <= 128 && !kMade;  // prefill_stages()
#endif
  if constexpr (kServed) {
    THRIFTATTN_DYNAMIC_SHARED(uint8_t, shared_bytes, 1024);
    __shared__ TileView view;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int tile = a.row_tiles - 1 - static_cast<int>(blockIdx.x) / a.pass_heads;
    const int seq_head = a.first_head + static_cast<int>(blockIdx.x) % a.pass_heads;
    const int head = seq_head % a.g.kv_heads;
    {
      const TileView v = tile_view(a, seq_head / a.g.kv_heads, tile);
      if (v.items == 0) return;
      if (threadIdx.x == 0) view = v;
    }
    uint8_t* q = shared_bytes + (-shared_address(shared_bytes) & 1023u);
    const bool has_low = a.g.k.layered() || a.two_terms != 0;
    uint8_t* q_low = has_low ? q + prefill_query_bytes(D) : nullptr;
    uint8_t* k = q + prefill_query_bytes(D) * (has_low ? 2 : 1);
    uint8_t* values = k + a.stages * prefill_tile_bytes(D);
    uint8_t* behind = values + a.stages * prefill_tile_bytes(D);
    PrefillShared& shared = *reinterpret_cast<PrefillShared*>(behind);
    uint8_t* means = behind + sizeof(PrefillShared);
    constexpr int kFillers = prefill_fillers<D, kMade>();
    if (threadIdx.x == 0) {
      barrier_init(&shared.offsets_full[0], 128);
      barrier_init(&shared.offsets_full[1], 128);
      for (int i = 0; i < a.stages; ++i) {
        // Of copies: one arrival with the bytes, one with what else attending warps need.
        barrier_init(&shared.k_full[i], kMade ? 2 : 128);
        barrier_init(&shared.v_full[i], kMade ? 1 : 128);
        barrier_init(&shared.k_empty[i], 8 * kWarpArrivals);
        barrier_init(&shared.v_empty[i], 8 * kWarpArrivals);
      }
      if (kMade) fence_barrier_init();
    }
    __syncthreads();
    const PrefillTiles tiles{shared_address(q),
                             shared_address(q_low == nullptr ? q : q_low),
                             shared_address(k),
                             shared_address(values),
                             means,
                             means + prefill_k_mean_bytes(D)};
    [[maybe_unused]] MadeTiles<D, kMade> made(a, view, seq_head, shared, tiles);
    if (threadIdx.x < 32) made.start();
    const int terms = load_queries<D, prefill_threads(kFillers)>(a, view, head, q, q_low, shared);
    fence_stores_before_products();
    __syncthreads();
    if (threadIdx.x < 128 * kFillers) {
      set_registers_of_filler<kFillers>();
      const auto fill = [&]<int kSides>() {
        PrefillPages<D, kSides>(a, view, seq_head, shared, tiles).run(view);
      };
      if constexpr (kMade) {
        made.run(view);
      } else if constexpr (kFillers == 1) {
        fill.template operator()<kFillKeys | kFillValues>();
      } else if (threadIdx.x < 128) {
        fill.template operator()<kFillKeys>();
      } else {
        fill.template operator()<kFillValues>();
      }
    } else {
      set_registers_of_attenders<kFillers>();
      PrefillRows<D, kFillers> rows(a, view, head);
      const typename PrefillRows<D, kFillers>::Tiles from{{tiles.q, tiles.q_low}, tiles.k, tiles.v};
      if (prefill_k_tiles(a) == 2) {
        rows.template run<2, 2>(shared, from);
      } else if (terms == 2) {
        rows.template run<2, 1>(shared, from);
      } else {
        rows.template run<1, 1>(shared, from);
      }
      if (a.g.v.rotated) rows.rotate_back();
      rows.store();
    }
  }
}

template <int D, bool kMade>
void launch_prefill_as(const AttendArgs& a, cudaStream_t stream) {
  const auto kernel = attend_prefill<D, kMade>;
  const int bytes = prefill_shared_bytes(D, a.g.k.layered() || a.two_terms != 0, a.stages);
  allow_shared(kernel, bytes, "attend_prefill");
  // They depend on the device's code (prefill_fillers()).
  const dim3 block(static_cast<unsigned>(
      launch_bounds_of(kernel, prefill_threads(prefill_fillers<D, kMade>()), "attend_prefill")));
  const dim3 grid(static_cast<unsigned>(int64_t{a.row_tiles} * a.pass_heads));
  launch_after_previous(kernel, {grid, block, static_cast<size_t>(bytes)}, a, stream,
                        "attend_prefill");
}

template <int D>
void launch_prefill(const AttendArgs& a, bool made, cudaStream_t stream) {
  if (!made) return launch_prefill_as<D, false>(a, stream);
  launch_prefill_tiles<D>(a, stream);
  launch_prefill_as<D, true>(a, stream);
}

}  // namespace thriftattn::cuda
