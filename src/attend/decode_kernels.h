// Kernels of the decode path (decode_tile.h): one page of 64 tokens against blocks of four query
// rows. docs/budget-cpu.md counts their bytes and instructions.
//
// Scores and weights of a block are stored as [32 token pairs][4 rows][2 tokens] (256 floats): the
// order in which 16 lanes come out of the reduction, and in which pairs of tokens are multiplied.
// Every row is computed by the same operations in the same order whatever its neighbours are, so a
// row's result does not depend on what shares its block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attend/expand_rows.h"
#include "attend/next_rows.h"
#include "formats/nvfp4.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn {

inline constexpr int64_t kRowBlock = 4;                            // query rows of a block
inline constexpr int64_t kMaxBlocks = 16;                          // of a tile
inline constexpr int64_t kBlockScores = kPageTokens * kRowBlock;  // floats
inline constexpr uint32_t kAllRows = (1u << kRowBlock) - 1;

constexpr int64_t score_index(int64_t token, int64_t row) {
  return token / 2 * 8 + row * 2 + token % 2;
}

// Rows of a page in 16 bits: a plain BF16 side or an open page.
struct Bf16Rows {
  const uint16_t* data = nullptr;  // row t at data + t * stride
  int64_t stride = 0;              // elements
  int64_t tokens = 0;              // rows that hold a token; others are never read
};

// Tokens of a page that each row of a block sees: [first, end).
struct BlockMask {
  int32_t first[kRowBlock] = {0, 0, 0, 0};
  int32_t end[kRowBlock] = {kPageTokens, kPageTokens, kPageTokens, kPageTokens};
};

struct DecodeKernels {
  const char* name;

  // Queries of one block, packed as this set of kernels wants them; the rows are FP32 [dim],
  // transformed as K is and multiplied by softmax_scale. A null row counts as zeros.
  int64_t (*query_bytes)(int64_t dim);
  void (*pack_queries)(const float* const* rows, int64_t dim, std::byte* packed);

  // s[row] (+)= q . k for `blocks` blocks: packed queries and scores lie one after the other.
  // `accumulate` adds to s (the residual after the base), else s = offset[4 * block + row] + q . k.
  void (*score_nvfp4)(const Nvfp4ConstPlane& k, int64_t dim, const std::byte* q, int64_t blocks,
                      const float* offset, float* s, bool accumulate, const NextRows& next);
  void (*score_bf16)(const Bf16Rows& k, int64_t dim, const std::byte* q, int64_t blocks,
                     const float* offset, float* s, const NextRows& next);
  // What has no kernels of its own: expanded first, then scored and weighed as often as needed.
  void (*expand)(const StoredRows& rows, int64_t dim, ExpandedRows& out);
  void (*score_expanded)(const ExpandedRows& k, int64_t dim, const std::byte* q, int64_t blocks,
                         const float* offset, float* s, const NextRows& next);
  // out[r] = rows[r] . v in FP32 for one block, rows [4][dim], v in BF16: q'.mean(page).
  void (*dot_bf16)(const uint16_t* v, int64_t dim, const float* rows, float* out);

  // One block's page state: softcap (0 = none), mask (null = all visible), m = max, s = exp(s - m),
  // l = sum. A row that sees nothing gets m = -inf, l = 0 and zeros.
  void (*page_softmax)(float* s, float softcap, const BlockMask* mask, float* m, float* l);

  // One block's weights of a page as they are kept until the values are read: the whole context's
  // go out to memory and back, so they are as narrow as these kernels' own rounding allows.
  int64_t weights_bytes;
  // Those of the rows whose bit is set; the others stay.
  void (*store_weights)(const float* s, uint32_t rows, std::byte* p);

  // (m, l) of `pages` pages [pages][4] merged into total_m[4], total_l[4], which hold the sink or
  // the empty state.
  void (*merge_pages)(const float* m, const float* l, int64_t pages, float* total_m,
                      float* total_l);
  // mass[page][4] = l * exp(m - lse[4]); factor[page][4] = exp(m - lse); 0 where lse is -inf.
  void (*page_masses)(const float* m, const float* l, int64_t pages, const float* lse, float* mass,
                      float* factor);

  // Accumulators of one block; start from zeros.
  int64_t (*accumulator_floats)(int64_t dim);
  // One block: acc[row] += sum_t p[t][row] * factor[row] * v[t].
  void (*weigh_nvfp4)(const Nvfp4ConstPlane& v, int64_t dim, const std::byte* p,
                      const float* factor, float* acc, const NextRows& next);
  void (*weigh_bf16)(const Bf16Rows& v, int64_t dim, const std::byte* p, const float* factor,
                     float* acc, const NextRows& next);
  void (*weigh_expanded)(const ExpandedRows& v, int64_t dim, const std::byte* p,
                         const float* factor, float* acc, const NextRows& next);
  // acc[row] += weight[row] * mean.
  void (*add_mean)(const uint16_t* mean, int64_t dim, const float* weight, float* acc);
  // out[d] += the accumulated sum of one row.
  void (*add_row)(const float* acc, int64_t dim, int64_t row, float* out);
};

// BF16 dot products (AVX-512 BF16): q' and P x scale are rounded to BF16, P to FP16 before, sums are
// FP32. Null where this build or machine has none.
const DecodeKernels* decode_kernels_bf16();

// FP32 throughout, for the best SIMD target of this machine.
const DecodeKernels* decode_kernels_f32();

}  // namespace thriftattn
