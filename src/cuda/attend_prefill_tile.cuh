// Products of attend_prefill over tiles in shared memory (attend_prefill_shape.h has their layout).
// On sm_90a a warpgroup multiplies its 64 rows (wgmma); elsewhere each warp its 16 (ldmatrix, mma).
// Both leave the same fragments: of a warp's 16 rows, lane (g, j) = (lane / 4, lane % 4) holds rows
// g (elements 0, 1) and g + 8 (elements 2, 3), columns 8n + 2j, + 1 of every n; and P's fragments
// as the left factor are its scores, two columns a word. So nothing else depends on the
// instruction.
#pragma once

#include "cuda/attend_prefill_shape.h"
#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"

namespace thriftattn::cuda {

// Warpgroups that fill tiles: one that copies those made before (kMade); else one of K and one of
// V, or one of both where the attending threads need the registers. Host code asks the kernel
// (launch_prefill()).
template <int D, bool kMade>
__host__ __device__ constexpr int prefill_fillers() {
#ifdef THRIFTATTN_WGMMA
  return D <= 128 && !kMade ? 2 : 1;
#else
  return 1;
#endif
}

// Byte of 16-byte chunk `chunk` (8 dims) of a row in a tile of `rows` rows.
__device__ inline int tile_offset(int rows, int row, int chunk) {
  return (chunk >> 3) * rows * 128 + row * 128 + (((chunk ^ row) & 7) << 4);
}
// The place of a dim inside its chunk, and the other way round: its three bits reversed.
__device__ inline int chunk_place(int d) {
  return (d & ~7) | (d & 1) << 2 | (d & 2) | (d >> 2 & 1);
}

// The left fragment of 16 rows from `row` on, dims 16 * step ...
__device__ inline void load_left(uint32_t (&x)[4], uint32_t tile, int rows, int row, int step,
                                 int lane) {
  load_matrices(x, tile + tile_offset(rows, row + (lane & 15), 2 * step + (lane >> 4)));
}

// Ordinary stores into shared memory are seen by the tensor cores' own reads.
__device__ inline void fence_stores_before_products() {
#ifdef THRIFTATTN_WGMMA
  fence_async_proxy();
#endif
}

// Products are issued between products_begin() and products_end(), in the order of their groups;
// all but the last N groups are done after products_wait<N>(). Without wgmma they are done at once.
__device__ inline void products_begin() {
#ifdef THRIFTATTN_WGMMA
  wgmma_fence();
#endif
}
__device__ inline void products_end() {
#ifdef THRIFTATTN_WGMMA
  wgmma_commit();
#endif
}
template <int N>
__device__ inline void products_wait() {
#ifdef THRIFTATTN_WGMMA
  wgmma_wait<N>();
#endif
}

// The warp's 16 rows of Q in registers: shared memory is then read for K alone.
template <int D>
struct HeldQueries {
  uint32_t x[D / 16][4];

  __device__ void load(uint32_t q, int row) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      load_left(x[i], q, kPrefillRows, row, i, static_cast<int>(threadIdx.x % 32));
    }
  }
};
template <int D>
__device__ void begin_scores(const HeldQueries<D>& q, uint32_t k, float (&s)[8][4]) {
#ifdef THRIFTATTN_WGMMA
  const PanelDescriptor from_k(k);
  hold(s);
  products_begin();
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    wgmma_held(s, q.x[i], from_k.behind(i / 4 * 64 * 128 + i % 4 * 32), i > 0);
  }
  products_end();
#endif
}

// Begins S (`add`: +)= Q.K^T: 16 rows of the warp (of its warpgroup's 64 from q_row on) x 64
// tokens; Q is the sum of kTerms tiles.
template <int D, int kTerms>
__device__ void begin_scores(const uint32_t (&q)[2], int q_row, uint32_t k, float (&s)[8][4],
                             bool add = false) {
#ifdef THRIFTATTN_WGMMA
  const PanelDescriptor from_k(k);
  hold(s);
  products_begin();
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    const PanelDescriptor from_q(q[term] + q_row * 128);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int panel = i / 4, step = i % 4 * 32;
      wgmma_shared(s, from_q.behind(panel * kPrefillRows * 128 + step),
                   from_k.behind(panel * 64 * 128 + step), add || i > 0 || term > 0);
    }
  }
  products_end();
#else
  const int lane = threadIdx.x % 32;
  const int row = q_row + threadIdx.x / 32 % 4 * 16;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (!add) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
  }
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t a[kTerms][4];
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      load_left(a[term], q[term], kPrefillRows, row, i, lane);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];  // tokens 16n to 16n + 7, then the next 8
      load_matrices(
          b, k + tile_offset(64, 16 * n + (lane & 7) + (lane >> 4 << 3), 2 * i + (lane >> 3 & 1)));
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        mma_f16(s[2 * n], a[term], b[0], b[1]);
        mma_f16(s[2 * n + 1], a[term], b[2], b[3]);
      }
    }
  }
#endif
}
__device__ inline void end_scores(float (&s)[8][4]) {
#ifdef THRIFTATTN_WGMMA
  hold(s);
#endif
}

// What values are made of keeps its registers until they are there.
template <int D>
__device__ void hold_values(uint32_t (&p)[4][4], float (&o)[D / 64][8][4]) {
#ifdef THRIFTATTN_WGMMA
  hold(p);
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) hold(o[panel]);
#else
  (void)p;
  (void)o;
#endif
}

// Begins O += P.V, between two hold_values().
template <int D>
__device__ void begin_values(uint32_t (&p)[4][4], uint32_t v, float (&o)[D / 64][8][4]) {
#ifdef THRIFTATTN_WGMMA
  const PanelDescriptor from_v(v);
  products_begin();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel) {
      wgmma_fragment(o[panel], p[i], from_v.behind(panel * 64 * 128 + i * 16 * 128));
    }
  }
  products_end();
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];  // dims 16n to 16n + 7, then the next 8
      load_matrices_transposed(b, v + tile_offset(64, 16 * i + (lane & 15), 2 * n + (lane >> 4)));
      mma_f16(o[n / 4][2 * n % 8], p[i], b[0], b[1]);
      mma_f16(o[n / 4][2 * n % 8 + 1], p[i], b[2], b[3]);
    }
  }
#endif
}
}  // namespace thriftattn::cuda
