// Products of attend_prefill over tiles in shared memory (attend_prefill_shape.h has their layout).
// On sm_90a a warpgroup multiplies its 64 rows (wgmma); elsewhere each warp its 16 (ldmatrix, mma).
// Both leave the same fragments: of a warp's 16 rows, lane (g, j) = (lane / 4, lane % 4) holds rows
// g (elements 0, 1) and g + 8 (elements 2, 3), columns 8n + 2j, + 1 of every n; and P's fragments
// as the left factor are its scores, two columns a word. So nothing else depends on the
// instruction.
#pragma once

#include "cuda/attend_prefill_shape.h"
#include "cuda/mma.cuh"

namespace thriftattn::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(THRIFTATTN_NO_WGMMA)
#define THRIFTATTN_WGMMA 1
#endif

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

__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

// The left fragment of 16 rows from `row` on, dims 16 * step ...
__device__ inline void load_left(uint32_t (&x)[4], uint32_t tile, int rows, int row, int step,
                                 int lane) {
  load_matrices(x, tile + tile_offset(rows, row + (lane & 15), 2 * step + (lane >> 4)));
}

// Ordinary stores into shared memory are seen by the tensor cores' own reads.
__device__ inline void fence_stores_before_products() {
#ifdef THRIFTATTN_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#ifdef THRIFTATTN_WGMMA

// The descriptor of a panel with the 128-byte swizzle, and the one `bytes` behind it; groups of 8
// rows follow each other, and a product never needs a second step in the other direction. Addresses
// stay below 2^18, so that the upper half is a constant.
struct PanelDescriptor {
  uint32_t low;

  // Opaque, so that the descriptors behind it are sums made where they are used, not registers kept
  // (or spilled) across pages.
  __device__ explicit PanelDescriptor(uint32_t at) : low((1024u >> 4) << 16 | at >> 4) {
    asm volatile("" : "+r"(low));
  }
  __device__ uint64_t behind(int bytes) const {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStep = uint64_t{1024 >> 4} << 32;
    return kSwizzle128 | kStep | (low + (static_cast<uint32_t>(bytes) >> 4));
  }
};

#define THRIFTATTN_EIGHT(d, n)                                                   \
  "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), \
      "+f"(d[n + 1][1]), "+f"(d[n + 1][2]), "+f"(d[n + 1][3])

// d (64 rows of the warpgroup x 64) = or += A (64 x 16, of shared memory) * B (64 x 16)^T.
__device__ inline void wgmma_shared(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}"
      : THRIFTATTN_EIGHT(d, 0), THRIFTATTN_EIGHT(d, 2), THRIFTATTN_EIGHT(d, 4),
        THRIFTATTN_EIGHT(d, 6)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// d += A (64 x 16, fragments) * B (16 x 64, rows of shared memory).
__device__ inline void wgmma_fragment(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
      : THRIFTATTN_EIGHT(d, 0), THRIFTATTN_EIGHT(d, 2), THRIFTATTN_EIGHT(d, 4),
        THRIFTATTN_EIGHT(d, 6)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// d (64 rows of the warpgroup x 64) = or += A (64 x 16, fragments) * B (64 x 16)^T.
__device__ inline void wgmma_held(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
      : THRIFTATTN_EIGHT(d, 0), THRIFTATTN_EIGHT(d, 2), THRIFTATTN_EIGHT(d, 4),
        THRIFTATTN_EIGHT(d, 6)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}
#undef THRIFTATTN_EIGHT

// Registers of a product are neither read nor written between issue and wait.
__device__ inline void hold(float (&d)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
  }
}
__device__ inline void hold(uint32_t (&p)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("" : "+r"(p[i][0]), "+r"(p[i][1]), "+r"(p[i][2]), "+r"(p[i][3])::"memory");
  }
}
#endif

// Products are issued between products_begin() and products_end(), in the order of their groups;
// all but the last N groups are done after products_wait<N>(). Without wgmma they are done at once.
__device__ inline void products_begin() {
#ifdef THRIFTATTN_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void products_end() {
#ifdef THRIFTATTN_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int N>
__device__ inline void products_wait() {
#ifdef THRIFTATTN_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
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
