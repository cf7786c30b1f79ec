// MXFP4 and INT3 of a thread's 16 elements, half of a group of 32 whose other half the lane beside
// it has: the same codes and scales as formats/mxfp4_scalar.cc and formats/int3_scalar.cc. Included
// by append.cuh alone, as append_block.cuh is.
//
// What stands in for what:
//   MXFP4: x / scale     a product, the scale being a power of two: exact where a code depends on
//                        it.
//   INT3: trunc(t / s)   comparisons of t with s, 2 s and 3 s. These are exact, and no t below k s
//                        is so near to it that its quotient rounds to k: an E4M3 scale has 4 bits,
//                        so for the next FP32 number below, the quotient is at least 2^-24 of it
//                        below k.
#pragma once

#include "cuda/append_block.cuh"
#include "cuda/geometry.h"
#include "formats/int3.h"
#include "formats/mxfp4.h"

namespace thriftattn::cuda {

// The page scale of a base plane whose largest magnitude is amax.
__device__ __forceinline__ float group_page_scale(SideKind kind, float amax) {
  return kind == SideKind::int3 ? usable_scale(amax / kInt3Max) : 1.0f;
}

template <class Keep>
__device__ __forceinline__ EncodedBlock encode_mxfp4(float (&x)[16], float amax, Keep keep) {
  EncodedBlock out;
  out.scale = mxfp4_scale(amax);
  const float scale = __uint_as_float(out.scale << 23);
  const float inverse = __uint_as_float((254 - out.scale) << 23);
  float code[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float nearest = nearest_code(fabsf(x[i]) * inverse * kCodeUnit);
    code[i] = copysignf(fminf(nearest, 6.0f * kCodeUnit), x[i]);
  }
  out.codes = {pack_codes(code), pack_codes(code + 8)};
#pragma unroll
  for (int i = 0; i < 16; ++i) code[i] *= 1.0f / kCodeUnit;
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const float4 v = {code[i] * scale, code[i + 1] * scale, code[i + 2] * scale,
                      code[i + 3] * scale};
    keep(i / 4, v);
    x[i] -= v.x, x[i + 1] -= v.y, x[i + 2] -= v.z, x[i + 3] -= v.w;
  }
  return out;
}

// trunc(min(t / s, 3)), of s > 0.
__device__ __forceinline__ float int3_step(float t, float s) {
  return (t >= s ? 1.0f : 0.0f) + (t >= 2 * s ? 1.0f : 0.0f) + (t >= 3 * s ? 1.0f : 0.0f);
}

template <class Keep>
__device__ __forceinline__ EncodedBlock encode_int3(float (&x)[16], float amax, float page_scale,
                                                    const ScaleFacts* facts, Keep keep) {
  float t[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) t[i] = fabsf(x[i]) / page_scale;
  const float whole = amax / page_scale / kInt3CodeMax;  // rounding is monotonous
  static_assert(kInt3Shares.size() == 4);
  constexpr float kShare0 = kInt3Shares[0], kShare1 = kInt3Shares[1], kShare2 = kInt3Shares[2],
                  kShare3 = kInt3Shares[3];
  const uint32_t candidates = e4m3_pair(whole * kShare0, whole * kShare1) |
                              e4m3_pair(whole * kShare2, whole * kShare3) << 16;
  EncodedBlock out = {};
  float least = 0, scale = 0;
#pragma unroll 1
  for (int c = 0; c < 4; ++c) {
    const uint32_t candidate = candidates >> 8 * c & 255u;
    const float s = facts[candidate].scale * kCodeUnit;
    float e[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float diff = __fmaf_rn(-(int3_step(t[i], s) + 0.5f), s, t[i]);  // the product is exact
      e[i] = diff * diff;
    }
    const float half = tree_sum(e);
    const float error = half + __shfl_xor_sync(0xffffffffu, half, 1);
    if (c > 0 && !(error < least)) continue;  // a tie takes the earlier
    least = error;
    scale = s;
    out.scale = candidate;
  }
  uint32_t bits[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    // A zero scale has zero codes, without signs.
    const float step = scale > 0 ? int3_step(t[i], scale) : 0.0f;
    const uint32_t sign = scale > 0 ? __float_as_uint(x[i]) >> 31 : 0u;
    bits[i / 8] |= (static_cast<uint32_t>(step) | sign << 2) << 3 * (i % 8);
    t[i] = (step + 0.5f) * scale * page_scale;
    if (sign != 0) t[i] = -t[i];
  }
  out.codes = {bits[0] | bits[1] << 24, bits[1] >> 8};
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    keep(i / 4, make_float4(t[i], t[i + 1], t[i + 2], t[i + 3]));
#pragma unroll
    for (int n = i; n < i + 4; ++n) x[n] -= t[n];
  }
  return out;
}

// Half a group; `largest` is of its 16 elements.
template <class Keep>
__device__ __forceinline__ EncodedBlock encode_half_group(SideKind kind, float (&x)[16],
                                                          float largest, float page_scale,
                                                          const ScaleFacts* facts, Keep keep) {
  const float amax = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  if (kind == SideKind::int3) return encode_int3(x, amax, page_scale, facts, keep);
  return encode_mxfp4(x, amax, keep);
}

// Block `at` of 16 among the page's.
__device__ __forceinline__ void store_half_group(SideKind kind, const EncodedBlock& block, int at,
                                                 uint8_t* codes, uint8_t* scales) {
  if (kind == SideKind::int3) {
    auto* to = reinterpret_cast<uint16_t*>(codes + 6 * at);
    to[0] = static_cast<uint16_t>(block.codes.x);
    to[1] = static_cast<uint16_t>(block.codes.x >> 16);
    to[2] = static_cast<uint16_t>(block.codes.y);
  } else {
    reinterpret_cast<uint2*>(codes)[at] = block.codes;
  }
  if (at % 2 == 0) scales[at / 2] = static_cast<uint8_t>(block.scale);
}

}  // namespace thriftattn::cuda
