// The two products over a plane, base or residual, by one warp (attend_decode_warp.cuh says how
// tokens and dims lie in the fragments): of NVFP4 codes if not told otherwise (plane_formats.cuh).
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "cuda/plane_formats.cuh"

namespace thriftattn::cuda {

// Row r of 16 tokens is token r ^ (r >> 1 & 1), so that V's four rows fall on different banks.
__device__ inline int token_of_row(int r) { return r ^ (r >> 1 & 1); }

// Where a lane reads K of 16 tokens: codes and scales of its first row; the second is 8 tokens on.
struct SliceAddress {
  const uint8_t *codes, *scales;
  int half = 0;  // of a group of 32: the lane's first 16 dims are its second half
};
template <int D, class Format = Nvfp4Plane>
__device__ inline SliceAddress k_slice(const uint8_t* plane, int lane) {
  constexpr int kRow = Format::row_bytes(D), kBlocks = Format::kGroup / 16;
  const int token = token_of_row(lane / 4), j = lane % 4, block = j * (D / 64);
  return {plane + token * kRow + j * (kRow / 4),
          plane + 64 * kRow + token * (D / Format::kGroup) + block / kBlocks, block % kBlocks};
}

// The words of a lane's D / 4 dims of a token.
template <int D, class Format>
__device__ __forceinline__ void load_key_words(const uint8_t* at, uint32_t (&x)[D / 32]) {
  constexpr int kWords = D / 32;
  if constexpr (Format::row_bytes(8) == 3) {
    // Words of 3 bytes, of which pairs or fours begin where something can be loaded.
    using Unit = std::conditional_t<D % 128 == 0, uint32_t, uint16_t>;
    constexpr int kUnit = sizeof(Unit), kUnits = 3 * kWords / kUnit;
    uint32_t bits[(3 * kWords + 3) / 4 + 1] = {};
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      bits[i * kUnit / 4] |= uint32_t{reinterpret_cast<const Unit*>(at)[i]} << i * kUnit % 4 * 8;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      x[w] = __funnelshift_r(bits[3 * w / 4], bits[3 * w / 4 + 1], 3 * w % 4 * 8);
    }
  } else if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 y = *reinterpret_cast<const uint4*>(at + 4 * w);
      x[w] = y.x, x[w + 1] = y.y, x[w + 2] = y.z, x[w + 3] = y.w;
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWords; w += 2) {
      const uint2 y = *reinterpret_cast<const uint2*>(at + 4 * w);
      x[w] = y.x, x[w + 1] = y.y;
    }
  }
}

// s[n] += K'.q' of 16 tokens, K' in the format's units (NVFP4: without page scale, times 2^-7);
// query(n, step) is the fragment of 8 query rows and 16 dims; top is the plane's largest_scale().
template <int D, int NT, class Format = Nvfp4Plane, class Query>
__device__ __forceinline__ void score_slice(const SliceAddress& from, const Query& query,
                                            float (&s)[NT][4], int top = 0) {
  constexpr int kWords = D / 32;
  uint32_t x[2][kWords], scale[2][D / 64];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    load_key_words<D, Format>(from.codes + 8 * r * Format::row_bytes(D), x[r]);
    const uint8_t* sc = from.scales + 8 * r * (D / Format::kGroup);
    if constexpr (Format::kGroup == 32) {
#pragma unroll
      for (int i = 0; i < D / 64; ++i) {
        const int half = D % 128 == 0 ? 0 : from.half;  // known where lanes have whole groups
        scale[r][i] = Format::key_scale(sc[(half + i) / 2], top);
      }
    } else if constexpr (D == 128) {
      const uint32_t both = *reinterpret_cast<const uint16_t*>(sc);
      scale[r][0] = scale_both(both & 0xffu);
      scale[r][1] = scale_both(both >> 8);
    } else {
#pragma unroll
      for (int i = 0; i < D / 64; ++i) scale[r][i] = scale_both(sc[i]);
    }
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const Expanded lo = Format::expand(Format::nibbles(x[0][w]));
    const Expanded hi = Format::expand(Format::nibbles(x[1][w]));
    const uint32_t s0 = scale[0][w / 2], s1 = scale[1][w / 2];
    const uint32_t even[4] = {hmul2(lo.even_low, s0), hmul2(hi.even_low, s1),
                              hmul2(lo.even_high, s0), hmul2(hi.even_high, s1)};
    const uint32_t odd[4] = {hmul2(lo.odd_low, s0), hmul2(hi.odd_low, s1), hmul2(lo.odd_high, s0),
                             hmul2(hi.odd_high, s1)};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint2 b0 = query(n, 2 * w), b1 = query(n, 2 * w + 1);
      mma_f16(s[n], even, b0.x, b0.y);
      mma_f16(s[n], odd, b1.x, b1.y);
    }
  }
}

// P as a BF16 number and what that leaves of FP16, exactly: half2 in, pairs out.
struct BrainPair {
  uint32_t high, low;
};
__device__ inline BrainPair split_weights(uint32_t p) {
  const float2 y = __half22float2(reinterpret_cast<const __half2&>(p));
  const __nv_bfloat162 top = __floats2bfloat162_rn(y.x, y.y);
  const float2 back = __bfloat1622float2(top);
  const __nv_bfloat162 rest = __floats2bfloat162_rn(y.x - back.x, y.y - back.y);
  return {reinterpret_cast<const uint32_t&>(top), reinterpret_cast<const uint32_t&>(rest)};
}

// d += V.P of 16 tokens and 16 dims, V in the format's numbers.
template <class Format>
__device__ __forceinline__ void multiply_values(float (&d)[4], const uint32_t (&v)[4],
                                                const BrainPair (&p)[2]) {
  if constexpr (Format::kBrainValues) {
    mma_bf16(d, v, p[0].high, p[1].high);
    mma_bf16(d, v, p[0].low, p[1].low);
  } else {
    mma_f16(d, v, p[0].high, p[1].high);
  }
}

// kCount words of 8 dims, next to each other from word `word` of a row on. Rows begin at multiples
// of 4 bytes; of 3-byte words two begin at an even one.
template <class Format, int kCount>
__device__ __forceinline__ void load_value_words(const uint8_t* row, int word,
                                                 uint32_t (&x)[kCount]) {
  if constexpr (Format::row_bytes(8) == 3) {
    const auto* at = reinterpret_cast<const uint32_t*>(row + (3 * word & ~3));
    const int shift = 3 * word % 4 * 8;
    const uint32_t low = at[0], high = at[1];
    x[0] = __funnelshift_r(low, high, shift);
    if constexpr (kCount == 2) x[1] = __funnelshift_r(x[0], high >> shift, 24);
  } else if constexpr (kCount == 2) {
    const uint2 y = *reinterpret_cast<const uint2*>(row + 4 * word);
    x[0] = y.x, x[1] = y.y;
  } else {
    x[0] = *reinterpret_cast<const uint32_t*>(row + 4 * word);
  }
}

// o += factor * V'.P of 64 tokens, V' in the format's units (NVFP4: without page scale, times
// 2^-7); weights(slice, n) is the fragment of P of 16 tokens and 8 query rows.
template <int D, int NT, int kUnroll, class Format = Nvfp4Plane, class Weights>
__device__ __forceinline__ void add_values(const uint8_t* plane, int lane, const Weights& weights,
                                           const float (&factor)[2 * NT],
                                           float (&o)[D / 16][NT][4]) {
  constexpr int kWords = D / 64;
  constexpr int kChunk = NT == 1 && kWords % 2 == 0 ? 2 : 1;  // words of 8 dims at a time
  constexpr int kRow = Format::row_bytes(D), kScales = D / Format::kGroup;
  const int g = lane / 4, j = lane % 4;
  const int t0 = token_of_row(2 * j);
  const int next = token_of_row(2 * j + 1) - t0;  // the neighbour's token: one on, or one back
#pragma unroll
  for (int w0 = 0; w0 < kWords; w0 += kChunk) {
    const int word = g * kWords + w0;
    float acc[4 * kChunk][NT][4];
    clear(acc);
    const uint8_t* at0 = plane + t0 * kRow;
    const uint8_t* at1 = at0 + next * kRow;
    const uint8_t* sc0 = plane + 64 * kRow + t0 * kScales + word / (Format::kGroup / 8);
    const uint8_t* sc1 = sc0 + next * kScales;
#pragma unroll kUnroll
    for (int slice = 0; slice < 4; ++slice) {
      uint32_t x[4][kChunk];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint8_t* at = (i & 1 ? at1 : at0) + (i & 2 ? 8 * kRow : 0);
        load_value_words<Format>(at, word, x[i]);
#pragma unroll
        for (int w = 0; w < kChunk; ++w) x[i][w] = Format::nibbles(x[i][w]);
      }
      const uint32_t s01 = Format::value_scales(sc0[0], sc1[0]);
      const uint32_t s23 = Format::value_scales(sc0[8 * kScales], sc1[8 * kScales]);
      at0 += 16 * kRow, at1 += 16 * kRow;
      sc0 += 16 * kScales, sc1 += 16 * kScales;
      BrainPair p[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint2 both = weights(slice, n);
        if constexpr (Format::kBrainValues) {
          p[n][0] = split_weights(both.x), p[n][1] = split_weights(both.y);
        } else {
          p[n][0].high = both.x, p[n][1].high = both.y;
        }
      }
#pragma unroll
      for (int w = 0; w < kChunk; ++w) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Nibbles 0 to 3: four dims of one token, 4 to 7: of its neighbour.
          const uint32_t select = half == 0 ? 0x5410 : 0x7632;
          const Expanded a = Format::values(__byte_perm(x[0][w], x[1][w], select), s01);
          const Expanded b = Format::values(__byte_perm(x[2][w], x[3][w], select), s23);
          const uint32_t first[4] = {a.even_low, a.odd_low, b.even_low, b.odd_low};
          const uint32_t second[4] = {a.even_high, a.odd_high, b.even_high, b.odd_high};
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            multiply_values<Format>(acc[4 * w + 2 * half][n], first, p[n]);
            multiply_values<Format>(acc[4 * w + 2 * half + 1][n], second, p[n]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kChunk; ++i) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& sum = o[4 * w0 + i][n][e];
          sum = fmaf(acc[i][n][e], factor[2 * n + (e & 1)], sum);
        }
      }
    }
  }
}

// o += mass * mean(V), BF16 [D].
template <int D, int NT>
__device__ __forceinline__ void add_mean(const uint8_t* mean, int lane, const float (&mass)[2 * NT],
                                         float (&o)[D / 16][NT][4]) {
  constexpr int kWords = D / 64;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint4 y = *reinterpret_cast<const uint4*>(mean + 16 * (lane / 4 * kWords + w));
    const uint32_t x[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = __uint_as_float(x[i] << 16), high = __uint_as_float(x[i] & 0xffff0000u);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& sum = o[4 * w + i][n][e];
          sum = fmaf(mass[2 * n + (e & 1)], e < 2 ? low : high, sum);
        }
      }
    }
  }
}

// The sums of a warp, [n][w][row parity][half][lane] of four dims each.
template <int D, int NT>
__device__ __forceinline__ float4* state_at(uint8_t* state, int n, int w, int parity, int half,
                                            int lane) {
  return reinterpret_cast<float4*>(state) + (((n * (D / 64) + w) * 2 + parity) * 2 + half) * 32 +
         lane;
}
// Calls body(four dims of the state, row parity e, the tile n, o's first of two fragments i).
template <int D, int NT, class Body>
__device__ __forceinline__ void for_state(uint8_t* state, int lane, const Body& body) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int w = 0; w < D / 64; ++w) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          body(*state_at<D, NT>(state, n, w, e, half, lane), e, n, 4 * w + 2 * half);
        }
      }
    }
  }
}
template <int D, int NT>
__device__ void store_state(uint8_t* state, int lane, const float (&o)[D / 16][NT][4]) {
  for_state<D, NT>(state, lane, [&](float4& x, int e, int n, int i) {
    x = make_float4(o[i][n][e], o[i][n][e + 2], o[i + 1][n][e], o[i + 1][n][e + 2]);
  });
}
// o += mass * state.
template <int D, int NT>
__device__ void add_state(uint8_t* state, int lane, const float (&mass)[2 * NT],
                          float (&o)[D / 16][NT][4]) {
  for_state<D, NT>(state, lane, [&](float4 x, int e, int n, int i) {
    const float m = mass[2 * n + e];
    o[i][n][e] = fmaf(x.x, m, o[i][n][e]);
    o[i][n][e + 2] = fmaf(x.y, m, o[i][n][e + 2]);
    o[i + 1][n][e] = fmaf(x.z, m, o[i + 1][n][e]);
    o[i + 1][n][e + 2] = fmaf(x.w, m, o[i + 1][n][e + 2]);
  });
}
template <int D, int NT>
__device__ void scale_output(const float (&factor)[2 * NT], float (&o)[D / 16][NT][4]) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[i][n][e] *= factor[2 * n + (e & 1)];
    }
  }
}

}  // namespace thriftattn::cuda
