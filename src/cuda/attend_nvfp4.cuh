// The two products over an NVFP4 plane, base or residual, by one warp (attend_decode_warp.cuh says
// how tokens and dims lie in the fragments).
#pragma once

#include "cuda/mma.cuh"

namespace thriftattn::cuda {

// Row r of 16 tokens is token r ^ (r >> 1 & 1), so that V's four rows fall on different banks.
__device__ inline int token_of_row(int r) { return r ^ (r >> 1 & 1); }

// Where a lane reads K of 16 tokens: codes and scales of its first row; the second is 8 tokens on.
struct SliceAddress {
  const uint8_t *codes, *scales;
};
template <int D>
__device__ inline SliceAddress k_slice(const uint8_t* plane, int lane) {
  const int token = token_of_row(lane / 4), j = lane % 4;
  return {plane + token * (D / 2) + j * (D / 8), plane + 32 * D + token * (D / 16) + j * (D / 64)};
}

// s[n] += K'.q' of 16 tokens, K' without page scale, times 2^-7; query(n, step) is the fragment of
// 8 query rows and 16 dims.
template <int D, int NT, class Query>
__device__ __forceinline__ void score_slice(const SliceAddress& from, const Query& query,
                                            float (&s)[NT][4]) {
  constexpr int kWords = D / 32;
  uint32_t x[2][kWords], scale[2][D / 64];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint8_t* at = from.codes + 8 * r * (D / 2);
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        const uint4 y = *reinterpret_cast<const uint4*>(at + 4 * w);
        x[r][w] = y.x, x[r][w + 1] = y.y, x[r][w + 2] = y.z, x[r][w + 3] = y.w;
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; w += 2) {
        const uint2 y = *reinterpret_cast<const uint2*>(at + 4 * w);
        x[r][w] = y.x, x[r][w + 1] = y.y;
      }
    }
    const uint8_t* sc = from.scales + 8 * r * (D / 16);
    if constexpr (D == 128) {
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
    const Expanded lo = expand_e2m1(x[0][w]), hi = expand_e2m1(x[1][w]);
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

// o += factor * V'.P of 64 tokens, V' without page scale, times 2^-7; weights(slice, n) is the
// fragment of P of 16 tokens and 8 query rows.
template <int D, int NT, int kUnroll, class Weights>
__device__ __forceinline__ void add_values(const uint8_t* plane, int lane, const Weights& weights,
                                           const float (&factor)[2 * NT],
                                           float (&o)[D / 16][NT][4]) {
  constexpr int kWords = D / 64;
  constexpr int kChunk = NT == 1 && kWords % 2 == 0 ? 2 : 1;  // words of 8 dims at a time
  const int g = lane / 4, j = lane % 4;
  const int t0 = token_of_row(2 * j);
  const int next = token_of_row(2 * j + 1) - t0;  // the neighbour's token: one on, or one back
#pragma unroll
  for (int w0 = 0; w0 < kWords; w0 += kChunk) {
    const int word = g * kWords + w0;
    float acc[4 * kChunk][NT][4];
    clear(acc);
    const uint8_t* at0 = plane + t0 * (D / 2) + 4 * word;
    const uint8_t* at1 = at0 + next * (D / 2);
    const uint8_t* sc0 = plane + 32 * D + t0 * (D / 16) + word / 2;
    const uint8_t* sc1 = sc0 + next * (D / 16);
#pragma unroll kUnroll
    for (int slice = 0; slice < 4; ++slice) {
      uint32_t x[4][kChunk];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint8_t* at = (i & 1 ? at1 : at0) + (i & 2 ? 8 * (D / 2) : 0);
        if constexpr (kChunk == 2) {
          const uint2 y = *reinterpret_cast<const uint2*>(at);
          x[i][0] = y.x, x[i][1] = y.y;
        } else {
          x[i][0] = *reinterpret_cast<const uint32_t*>(at);
        }
      }
      const uint32_t s01 = scale_pair(sc0[0], sc1[0]);
      const uint32_t s23 = scale_pair(sc0[8 * (D / 16)], sc1[8 * (D / 16)]);
      at0 += 16 * (D / 2), at1 += 16 * (D / 2);
      sc0 += D, sc1 += D;
      uint2 p[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) p[n] = weights(slice, n);
#pragma unroll
      for (int w = 0; w < kChunk; ++w) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Nibbles 0 to 3: four dims of one token, 4 to 7: of its neighbour.
          const uint32_t select = half == 0 ? 0x5410 : 0x7632;
          const Expanded a = expand_e2m1(__byte_perm(x[0][w], x[1][w], select));
          const Expanded b = expand_e2m1(__byte_perm(x[2][w], x[3][w], select));
          const uint32_t first[4] = {hmul2(a.even_low, s01), hmul2(a.odd_low, s01),
                                     hmul2(b.even_low, s23), hmul2(b.odd_low, s23)};
          const uint32_t second[4] = {hmul2(a.even_high, s01), hmul2(a.odd_high, s01),
                                      hmul2(b.even_high, s23), hmul2(b.odd_high, s23)};
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            mma_f16(acc[4 * w + 2 * half][n], first, p[n].x, p[n].y);
            mma_f16(acc[4 * w + 2 * half + 1][n], second, p[n].x, p[n].y);
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
