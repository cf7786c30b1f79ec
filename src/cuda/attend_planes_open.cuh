// The open page of a step of one position (attend_planes_solo.cuh): the four warps of the block
// whose unit has it take 16 of its tokens each, before the unit's pages. DecodeWarp's walk would do
// too, but for one page its code comes from memory: it took a warp 75 to 100 us. This is short,
// goes through no ring of copies, and relies on being the first that is added to empty sums.
#pragma once

#include "cuda/attend_planes_pages.cuh"

namespace thriftattn::cuda {

inline constexpr int kOpenTokens = 16;  // of a warp
static_assert(kOpenTokens * kOpenWalks == kPage);

// A warp's tokens of an open page.
struct OpenTokens {
  const uint8_t *k = nullptr, *v = nullptr;  // their rows; of a token that does not exist, anything
  int page = 0;
  int from = 0, to = 0;  // those that are seen
  __device__ bool any() const { return from < to; }
};

__device__ inline void prefetch_rows(const uint8_t* rows, int bytes, int lane) {
  for (int at = 128 * lane; at < bytes; at += 32 * 128) prefetch_l2(rows + at);
}

// Scores of 16 rows of BF16 in device memory, in mma's layout: rows as token_of_row() has them.
template <int D>
__device__ __forceinline__ void open_scores(const uint8_t* rows, const uint4* q, int lane,
                                            float (&s)[4]) {
  const uint8_t* at = rows + token_of_row(lane / 4) * (2 * D) + 16 * (lane % 4);
  float rest[4] = {};  // what BF16 left of q: two chains of products
#pragma unroll
  for (int c = 0; c < D / 32; ++c) {
    const uint4 x = *reinterpret_cast<const uint4*>(at + 64 * c);
    const uint4 y = *reinterpret_cast<const uint4*>(at + 8 * (2 * D) + 64 * c);
    const uint32_t first[4] = {x.x, y.x, x.y, y.y}, second[4] = {x.z, y.z, x.w, y.w};
    const uint4 b0 = q[2 * c * 32], b1 = q[(2 * c + 1) * 32];
    mma_bf16(s, first, b0.x, b0.y);
    mma_bf16(s, second, b1.x, b1.y);
    mma_bf16(rest, first, b0.z, b0.w);
    mma_bf16(rest, second, b1.z, b1.w);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) s[e] += rest[e];
}

// o += V.P of 16 rows of BF16 in device memory, of which the first `held` exist.
template <int D>
__device__ __forceinline__ void open_values(const uint8_t* rows, int held, const BrainPair (&p)[2],
                                            int lane, float (&o)[D / 16][1][4]) {
  constexpr int kWords = D / 64;
  const int g = lane / 4, j = lane % 4;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    uint32_t x[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = token_of_row(2 * j + (i & 1)) + 4 * (i & 2);
      uint4 y = make_uint4(0, 0, 0, 0);
      if (token < held)
        y = *reinterpret_cast<const uint4*>(rows + token * (2 * D) + 16 * (g * kWords + w));
      x[i][0] = y.x, x[i][1] = y.y, x[i][2] = y.z, x[i][3] = y.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t v[4] = {
          __byte_perm(x[0][i], x[1][i], 0x5410), __byte_perm(x[0][i], x[1][i], 0x7632),
          __byte_perm(x[2][i], x[3][i], 0x5410), __byte_perm(x[2][i], x[3][i], 0x7632)};
      mma_bf16(o[4 * w + i][0], v, p[0].high, p[1].high);
      mma_bf16(o[4 * w + i][0], v, p[0].low, p[1].low);
    }
  }
}

}  // namespace thriftattn::cuda
