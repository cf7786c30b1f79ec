// What attend_prefill's filling warps are made of: asynchronous copies into shared memory that a
// thread waits for by itself, and chunks of 8 numbers to FP16 in the order of
// attend_prefill_shape.h.
#pragma once

#include "cuda/mma.cuh"

namespace thriftattn::cuda {

__device__ inline uint32_t half_pair(float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(x);
}
__device__ inline uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// ---- copies

// kBytes at `to`, of which only the first `bytes` are read from `from`; the rest are zeros.
template <int kBytes>
__device__ inline void copy_async(uint32_t to, const uint8_t* from, int bytes = kBytes) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until fewer than `groups` of the thread's groups are on their way; 1 to 4.
__device__ inline void copies_wait(int groups) {
  switch (groups) {
    case 1:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
}
// Of a warpgroup; barrier 0 is the block's.
__device__ inline void filler_barrier(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

__device__ inline uint4 load_chunk(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
__device__ inline uint2 load_half_chunk(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}
__device__ inline void store_chunk(uint32_t at, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

// ---- chunks

// Eight BF16 numbers, times `up` where it is not 1.
template <bool kScaled>
__device__ inline uint4 chunk_of_bf16(const uint4& x, float up) {
  const auto low = [&](uint32_t w) {
    const float y = __uint_as_float(w << 16);
    return kScaled ? y * up : y;
  };
  const auto high = [&](uint32_t w) {
    const float y = __uint_as_float(w & 0xffff0000u);
    return kScaled ? y * up : y;
  };
  return {half_pair(low(x.x), low(x.z)), half_pair(low(x.y), low(x.w)),
          half_pair(high(x.x), high(x.z)), half_pair(high(x.y), high(x.w))};
}

// Eight E4M3 codes times the FP16 pairs s + rest, which have the 2^8 that codes come without. A
// row's scale in FP16 alone would be off by the same part in all of its products, and its scores by
// up to 2^-11; with the rest they are rounded one by one. kLeft: what that rounding left of them.
template <bool kLeft>
__device__ inline uint4 chunk_of_fp8(uint32_t w0, uint32_t w1, uint32_t s, uint32_t rest) {
  const auto two = [&](uint32_t codes) {
    const uint32_t x = expand_e4m3(codes);
    const uint32_t y = hfma2(x, s, hmul2(x, rest));
    if constexpr (!kLeft) return y;
    return hfma2(x, rest, hfma2(x, s, y ^ 0x80008000u));
  };
  return {two(__byte_perm(w0, w1, 0x0400)), two(__byte_perm(w0, w1, 0x0602)),
          two(__byte_perm(w0, w1, 0x0501)), two(__byte_perm(w0, w1, 0x0703))};
}

}  // namespace thriftattn::cuda
