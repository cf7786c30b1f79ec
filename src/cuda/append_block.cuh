// NVFP4 of one block of 16 elements by one thread: search_block() of formats/nvfp4_scalar.cc, the
// same codes and scale, without its divisions and comparisons. Included by append.cuh alone, which
// is compiled without contraction; every fused operation here is written out, and exact where the
// scalar code has two operations.
//
// What stands in for what (all of it checked over every FP32 mantissa; "Append" in
// docs/budget-cuda.md has the arguments):
//   x / page_scale    q = x * (1/p), then one correction by the remainder: RN(x / p) where nothing
//                     underflows; what underflows is squared to zero.
//   t / scale         only decides between codes. t times the FP32 number below RN(1 / s), rounded
//                     up, is on the same side of every threshold, and on it where t / s is: an
//                     E4M3 scale has only eight mantissas.
//   E2M1 rounding     y + M, minus M: the unit in the last place of y + M is the step of the grid,
//                     1/2 below y = 2 and 1 from there on where M = 2^23 - 2, 2 where M = 2^24.
//   the error         first by fused sums; by the tree of adjacent pairs only where the candidates
//                     are closer than those sums are exact, and amax / 4 is one at all.
#pragma once

#include <cuda_fp16.h>

#include <bit>

#include "base/float_convert.h"
#include "cuda/ptx.cuh"
#include "formats/nvfp4.h"

namespace thriftattn::cuda {

// Codes are handled as values times 2^-14: there the upper byte of a value as FP16 has the E2M1
// code in bits 1 to 3, and its sign in bit 7.
constexpr float kCodeUnit = 0x1p-14f;
constexpr float kMagic = (0x1p23f - 2.0f) * kCodeUnit;
constexpr float kMagicStep = (0x1p23f + 2.0f) * kCodeUnit;  // from kMagic to 2^24
// Fused sums of 16 squares differ from the tree by less than this part.
constexpr float kErrorSlack = 0x1p-17f;
// From the fourth scale on a quotient stays below 7, and below 4.5 for the candidate amax / 4.
constexpr uint32_t kLeastScale = 4;

// Facts of an E4M3 scale, by its code: scale * 2^14, and what quotient() multiplies with; zeros for 0.
struct ScaleFacts {
  float scale, inverse;
};

constexpr ScaleFacts scale_facts(uint32_t code) {
  if (code == 0 || code == 0x7f) return {0, 0};
  const float scale = e4m3_to_f32(static_cast<uint8_t>(code));
  const float below = std::bit_cast<float>(std::bit_cast<uint32_t>(1.0f / scale) - 1);
  return {scale / kCodeUnit, below * kCodeUnit};
}
struct ScaleTable {
  ScaleFacts facts[128];
};
constexpr ScaleTable make_scale_table() {
  ScaleTable table = {};
  for (uint32_t code = 0; code < 128; ++code) table.facts[code] = scale_facts(code);
  return table;
}
__device__ const ScaleTable kScaleTable = make_scale_table();

// Division by one page scale. Scales below 2^-26 are used with their page times 2^100, so that a
// remainder which underflows belongs to a quotient below 2^-75, whose square is zero.
struct PageDivisor {
  float scale;  // of the page
  float divisor, inverse;
  bool small;

  __device__ explicit PageDivisor(float page_scale) : scale(page_scale) {
    small = page_scale < 0x1p-26f;
    divisor = small ? page_scale * 0x1p100f : page_scale;
    inverse = 1.0f / divisor;
  }
  __device__ float operator()(float x) const {
    const float q = x * inverse;
    return __fmaf_rn(__fmaf_rn(-q, divisor, x), inverse, q);
  }
};

// usable_scale(amax / kNvfp4Max): the division in the same way, where nothing underflows.
__device__ __forceinline__ float page_scale_of(float amax) {
  if (amax < 0x1p-90f) return usable_scale(amax / kNvfp4Max);
  constexpr float kInverse = 1.0f / kNvfp4Max;
  const float q = amax * kInverse;
  return __fmaf_rn(__fmaf_rn(-q, kNvfp4Max, amax), kInverse, q);
}

// E4M3 codes of two values, saturating: low in bits 0 to 7, high in 8 to 15.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
#ifdef THRIFTATTN_SM89
  return convert_e4m3(low, high);
#else
  return f32_to_e4m3(low) | static_cast<uint32_t>(f32_to_e4m3(high)) << 8;
#endif
}

// t / scale, near enough to decide between codes, times 2^-14.
__device__ __forceinline__ float quotient(float t, const ScaleFacts& s) {
  return __fmul_ru(t, s.inverse);
}
// The nearest E2M1 value of y < 7, times 2^-14; from 7 on at least 8.
__device__ __forceinline__ float nearest_code(float y) {
  const float from_4 = __saturatef(__fmaf_rn(y, 0x1p44f, -0x1p32f));  // 0 up to y = 4, else 1
  const float magic = __fmaf_rn(from_4, kMagicStep, kMagic);
  return (y + magic) - magic;
}

// The same of y up to 4.5.
__device__ __forceinline__ float nearest_code_to_4(float y) { return (y + kMagic) - kMagic; }

// A tree of adjacent pairs; what has no partner moves up.
template <class T, int kCount>
__device__ __forceinline__ T tree_sum(const T (&v)[kCount]) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    T up[(kCount + 1) / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) up[i] = v[2 * i] + v[2 * i + 1];
    if (kCount % 2 == 1) up[kCount / 2] = v[kCount - 1];
    return tree_sum(up);
  }
}

// quantize_block()'s error: squares summed as a tree of adjacent pairs.
__device__ __forceinline__ float tree_error(const float (&t)[16], const float (&code)[16], float scale) {
  float e[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float diff = __fmaf_rn(-code[i], scale, t[i]);  // the product is exact
    e[i] = diff * diff;
  }
  return tree_sum(e);
}

// The two candidates for a block whose largest t is `top`.
struct BlockScales {
  uint32_t pair;  // E4M3
  float top4;

  __device__ uint32_t six() const { return pair & 0xff; }
  __device__ uint32_t four() const { return pair >> 8; }
};
__device__ __forceinline__ BlockScales block_scales(float top) {
  constexpr float kSixth = 1.0f / 6.0f;
  const float guess = top * kSixth;
  const float top6 = __fmaf_rn(__fmaf_rn(-guess, 6.0f, top), kSixth, guess);
  const float top4 = top * 0.25f;
  return {e4m3_pair(top6, top4), top4};
}

// Eight codes, as FP16 values times 2^-14, to nibbles.
__device__ __forceinline__ uint32_t pack_codes(const float* c) {
  uint32_t byte[2];  // upper bytes of the FP16s of even and of odd elements
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const half2 low = __floats2half2_rn(c[odd], c[2 + odd]);
    const half2 high = __floats2half2_rn(c[4 + odd], c[6 + odd]);
    byte[odd] = __byte_perm(*reinterpret_cast<const uint32_t*>(&low),
                            *reinterpret_cast<const uint32_t*>(&high), 0x7531);
  }
  uint32_t word = byte[0] >> 1 & 0x07070707u;
  word |= byte[0] >> 4 & 0x08080808u;
  word |= byte[1] << 3 & 0x70707070u;
  return word | (byte[1] & 0x80808080u);
}

struct EncodedBlock {
  uint2 codes;
  uint32_t scale;
};

// The rare blocks, out of line: pages of small scales, and blocks whose scale is one of the three
// least. Step by step as search_block().
struct ExactBlock {
  float x[16];  // what the decoded values leave of it, then
  float decoded[16];
  EncodedBlock out;
};

inline __device__ __noinline__ void encode_block_exactly(ExactBlock& b, float amax,
                                                         float page_scale,
                                                         const ScaleFacts* facts) {
  const PageDivisor page(page_scale);
  float t[16], six[16], four[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) t[i] = fabsf(b.x[i]);
  if (page.small) {
    amax *= 0x1p100f;
#pragma unroll
    for (int i = 0; i < 16; ++i) t[i] *= 0x1p100f;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) t[i] = page(t[i]);
  const BlockScales scales = block_scales(page(amax));  // rounding is monotonous
  const ScaleFacts s6 = facts[scales.six()], s4 = facts[scales.four()];

#pragma unroll
  for (int i = 0; i < 16; ++i) six[i] = nearest_code(quotient(t[i], s6));
#pragma unroll
  for (int i = 0; i < 16; ++i) four[i] = nearest_code(quotient(t[i], s4));
  // The three smallest scales are rounded down so far that a quotient reaches 7.
#pragma unroll
  for (int i = 0; i < 16; ++i) six[i] = fminf(six[i], 6.0f * kCodeUnit);
  const float e6 = tree_error(t, six, s6.scale), e4 = tree_error(t, four, s4.scale);
  const bool takes_four = e4 < e6 && scales.top4 <= kScale4Limit;  // a tie takes amax / 6
  const float scale = takes_four ? s4.scale : s6.scale;
  const uint32_t sign = scale == 0.0f ? 0u : 0x80000000u;  // a zero scale has codes without signs
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float code = takes_four ? four[i] : six[i];
    six[i] = __uint_as_float(__float_as_uint(code) | (__float_as_uint(b.x[i]) & sign));
    b.decoded[i] = six[i] * scale * page_scale;
    b.x[i] -= b.decoded[i];
  }
  b.out.scale = takes_four ? scales.four() : scales.six();
  b.out.codes = {pack_codes(six), pack_codes(six + 8)};
}

// Encodes x, whose largest magnitude is amax, and takes the decoded values off it. `keep(i, v)`
// gets the decoded values 4 i to 4 i + 3.
template <class Keep>
__device__ __forceinline__ EncodedBlock encode_block(float (&x)[16], float amax,
                                                     const PageDivisor& page,
                                                     const ScaleFacts* facts, Keep keep) {
  const BlockScales scales = block_scales(page(amax));  // rounding is monotonous
  if (page.small || scales.six() < kLeastScale) {
    ExactBlock b;
#pragma unroll
    for (int i = 0; i < 16; ++i) b.x[i] = x[i];
    encode_block_exactly(b, amax, page.scale, facts);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = b.x[i];
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      keep(i / 4, make_float4(b.decoded[i], b.decoded[i + 1], b.decoded[i + 2], b.decoded[i + 3]));
    }
    return b.out;
  }
  const ScaleFacts s6 = facts[scales.six()], s4 = facts[scales.four()];
  float t[16], six[16], four[16], error6[2] = {0, 0}, error4[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    t[i] = page(fabsf(x[i]));
    six[i] = nearest_code(quotient(t[i], s6));
    four[i] = nearest_code_to_4(quotient(t[i], s4));
    const float d6 = __fmaf_rn(-six[i], s6.scale, t[i]), d4 = __fmaf_rn(-four[i], s4.scale, t[i]);
    error6[i % 2] = __fmaf_rn(d6, d6, error6[i % 2]);
    error4[i % 2] = __fmaf_rn(d4, d4, error4[i % 2]);
  }
  float e6 = error6[0] + error6[1], e4 = error4[0] + error4[1];
  const bool both = scales.top4 <= kScale4Limit;
  if (both && fabsf(e6 - e4) <= kErrorSlack * e6) {
    e6 = tree_error(t, six, s6.scale);
    e4 = tree_error(t, four, s4.scale);
  }
  const bool takes_four = both && e4 < e6;  // a tie takes amax / 6
  const float scale = takes_four ? s4.scale : s6.scale;
  EncodedBlock out;
  out.scale = takes_four ? scales.four() : scales.six();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float code = takes_four ? four[i] : six[i];
    six[i] = __uint_as_float(__float_as_uint(code) | (__float_as_uint(x[i]) & 0x80000000u));
  }
  out.codes = {pack_codes(six), pack_codes(six + 8)};
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    float4 v;
    v.x = six[i] * scale * page.scale;
    v.y = six[i + 1] * scale * page.scale;
    v.z = six[i + 2] * scale * page.scale;
    v.w = six[i + 3] * scale * page.scale;
    keep(i / 4, v);
    x[i] -= v.x;
    x[i + 1] -= v.y;
    x[i + 2] -= v.z;
    x[i + 3] -= v.w;
  }
  return out;
}

}  // namespace thriftattn::cuda
