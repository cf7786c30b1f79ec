// Stages of asynchronous copies, codes to numbers and the other steps that kernels share, above the
// instructions of ptx.cuh.
#pragma once

#include "cuda/ptx.cuh"

namespace thriftattn::cuda {

// 2^e, of -126 <= e <= 127.
__device__ inline float power_of_two(int e) { return __uint_as_float((127 + e) << 23); }

// On sm_90 and later one lane starts a bulk copy; before, lanes copy 16 bytes each (cp.async), and
// each lane is an arrival of the same barrier.
#ifdef THRIFTATTN_SM90
inline constexpr bool kBulkCopy = true;
#else
inline constexpr bool kBulkCopy = false;
#endif

// For the copies of one stage.
__device__ inline void barrier_init(uint64_t* bar) { barrier_init(bar, kBulkCopy ? 1 : 32); }
// How many lanes of a warp arrive where warps meet. One does, after __syncwarp(); compute-sanitizer's
// racecheck does not see what other lanes did before that, so in a build for it all do.
#ifdef THRIFTATTN_ARRIVE_EACH
inline constexpr int kWarpArrivals = 32;
#else
inline constexpr int kWarpArrivals = 1;
#endif
__device__ inline void barrier_arrive_warp(uint64_t* bar, int lane) {
  __syncwarp();
  if (kWarpArrivals == 32 || lane == 0) barrier_arrive(bar);
}
// The arrivals of a warp of which StageCopy::begin() is none, kStageArrivals with it.
inline constexpr int kStageArrivals = kBulkCopy ? kWarpArrivals : 64;
__device__ inline void barrier_arrive_rest(uint64_t* bar, [[maybe_unused]] int lane) {
  if constexpr (!kBulkCopy) {
    barrier_arrive(bar);
  } else if constexpr (kWarpArrivals == 32) {
    if (lane != 0) barrier_arrive(bar);
  }
}

// The copies of one stage: begin(bytes), any number of copy(), end(). By the whole warp.
struct StageCopy {
  uint64_t* bar;
  int lane;

  // More bytes than those of begin(), before it.
  __device__ void expect([[maybe_unused]] int bytes) const {
#ifdef THRIFTATTN_SM90
    if (lane == 0) barrier_expect(bar, bytes);
#endif
  }
  __device__ void begin([[maybe_unused]] int bytes) const {
#ifdef THRIFTATTN_SM90
    if (lane == 0) barrier_arrive_expect(bar, bytes);
#endif
  }
  // `count` pieces of `bytes` (a multiple of 16), strides apart; 16-byte aligned. kOnce: of bytes that
  // nobody reads again soon.
  template <bool kOnce = false>
  __device__ void copy(uint8_t* to, int to_stride, const uint8_t* from, int64_t from_stride,
                       int bytes, int count) const {
#ifdef THRIFTATTN_SM90
    if (lane < count) {
      const uint32_t at = shared_address(to + lane * to_stride);
      if constexpr (kOnce) {
        bulk_load_once(at, from + lane * from_stride, bytes, bar);
      } else {
        bulk_load(at, from + lane * from_stride, bytes, bar);
      }
    }
#else
    const int per = bytes / 16;
    for (int i = lane; i < per * count; i += 32) {
      copy_async_16(shared_address(to + i / per * to_stride + i % per * 16),
                    from + i / per * from_stride + i % per * 16);
    }
#endif
  }
  // One piece, likewise.
  __device__ void copy_once(uint8_t* to, const uint8_t* from, int bytes) const {
#ifdef THRIFTATTN_SM90
    if (lane == 0) bulk_load_once(shared_address(to), from, bytes, bar);
#else
    copy(to, 0, from, 0, bytes, 1);
#endif
  }
  __device__ void end() const {
#ifndef THRIFTATTN_SM90
    barrier_arrive_after_copies(bar);
#endif
  }
};

// Writes by ordinary stores come before later bulk copies into the same place.
__device__ inline void fence_stores_before_copies() { fence_async_proxy(); }

// ---- expanding codes

// 8 E2M1 codes of a word to FP16 halves of value * 2^-14: `even` gets nibbles (0, 4) and (2, 6),
// `odd` nibbles (1, 5) and (3, 7). The exponent and mantissa bits of E2M1 are put where FP16 has
// the low bits of its exponent and the first of its mantissa, the sign on top: exact, zero and the
// subnormal 0.5 included. 11 instructions.
struct Expanded {
  uint32_t even_low, even_high, odd_low, odd_high;
};
__device__ inline Expanded expand_e2m1(uint32_t x) {
  const uint32_t even = (x << 1 & 0x0e0e0e0eu) | (x << 4 & 0x80808080u);
  const uint32_t odd = (x >> 3 & 0x0e0e0e0eu) | (x & 0x80808080u);
  return {__byte_perm(even, 0, 0x2404), even & 0xff00ff00u, __byte_perm(odd, 0, 0x2404),
          odd & 0xff00ff00u};
}

// An E4M3 scale (no sign) in both halves of a word, times 2^7; two scales likewise.
__device__ inline uint32_t scale_pair(uint32_t a, uint32_t b) {
  return hmul2((a | b << 16) << 7, 0x78007800u);  // times 2^15: the bits alone are value * 2^-8
}
__device__ inline uint32_t scale_both(uint32_t a) { return hmul2(a * 0x00800080u, 0x78007800u); }

// Bytes 0 and 2 of a word of E4M3 codes to FP16 halves of value * 2^-8.
__device__ inline uint32_t expand_e4m3(uint32_t x) {
  return ((x & 0x007f007fu) << 7) | ((x & 0x00800080u) << 8);
}

// Accumulators of products start from zeros.
template <int I, int N>
__device__ inline void clear(float (&x)[I][N][4]) {
#pragma unroll
  for (int i = 0; i < I; ++i) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][n][e] = 0;
    }
  }
}

}  // namespace thriftattn::cuda
