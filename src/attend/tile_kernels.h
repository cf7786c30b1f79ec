// SIMD kernels of the attention tile (Highway, run-time dispatch). A tile holds `cols` query
// rows side by side: scores are stored as S[token][cols], so that softmax runs along tokens
// with one query row a lane, and K rows are broadcast as stored, never transposed.
#pragma once

#include <cstdint>

namespace thriftattn {

// C[m][n] (+)= sum_k A(m, k) * B[k][n] in FP32, k in order; A(m, k) = a[m * a_row + k * a_k].
// n is a multiple of tile_lanes(); rows of B and C are n apart unless ldb / ldc say else.
struct TileMatmul {
  const float* a = nullptr;
  int64_t a_row = 0, a_k = 0;
  const float* b = nullptr;
  int64_t ldb = 0;
  float* c = nullptr;
  int64_t ldc = 0;
  int64_t m = 0, n = 0, k = 0;
  bool accumulate = false;
};
void tile_matmul(const TileMatmul& args);

// Lanes of the FP32 vector in use: what the number of columns is padded to.
int64_t tile_lanes();

// The scores of one page against the tile's query rows.
struct ScoreBlock {
  float* s = nullptr;  // [tokens][cols]
  int64_t tokens = 0, cols = 0;
};

// s[t][c] = offset[c]: what a score starts from before the codes' part is accumulated.
void tile_fill_rows(const ScoreBlock& block, const float* offset);

// s = softcap * tanh(s / softcap).
void tile_softcap(const ScoreBlock& block, float softcap);

// The softmax state (m, l) of the block's tokens alone, per column.
void tile_page_state(const ScoreBlock& block, float* m, float* l);

// m[c] = max(m[c], max_t s[t][c]).
void tile_max_update(const ScoreBlock& block, float* m);

// In place: s = exp(s - m[c]); sum[c] = sum_t of it. A column with m = -inf gives zeros.
void tile_exp_sum(const ScoreBlock& block, const float* m, float* sum);

}  // namespace thriftattn
