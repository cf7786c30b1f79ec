// What attend_prefill's filling warps are made of: chunks of 8 numbers to FP16 in the order of
// attend_prefill_shape.h.
#pragma once

#include "cuda/mma.cuh"

namespace thriftattn::cuda {

__device__ inline uint32_t half_pair(float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(x);
}

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
