// Rows of one side of a page as the dot products take them. Formats without score and weigh kernels
// of their own are expanded first, 64 rows at a time, into a buffer that stays in the caches.
//
// For BF16 dot products: FP8, FP6 and Q8_0 become rows of BF16, where their codes are exact; what is
// common to a row multiplies scores and weights, in FP32. Q8_0's code x scale of the block is rounded
// to BF16 once. MXFP4, Q4_0 and INT3 become codes of 4 bits in the order of NVFP4, whose kernels then
// take them with scales of 32 elements in FP32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attend/next_rows.h"
#include "cache/page_layout.h"
#include "thriftattn/policy.h"

namespace thriftattn {

// Rows as a page stores them: a plain side (scales and all within the rows), or a base plane.
struct StoredRows {
  Format format = Format::bf16;
  const uint8_t* rows = nullptr;  // row t at rows + t * row_bytes
  int64_t row_bytes = 0;
  const uint8_t* scales = nullptr;  // planes: row t at scales + t * row_scales
  int64_t row_scales = 0;
  float page_scale = 1.0f;  // planes
  int64_t tokens = 0;       // rows that hold a token; others are never read
};

// Left uninitialised. Either values, [64][stride] in the element and stride of the kernels that
// expanded them, scale[t] multiplying row t; rows without a token are not written, their scale is 0.
// Or codes, [64][dim / 2], with what they stand for.
struct ExpandedRows {
  alignas(64) std::byte values[kPageTokens * kMaxHeadDim * sizeof(float)];
  alignas(64) float scale[kPageTokens];
  int64_t tokens;

  const uint8_t* codes;         // null = values; else these or the page's own, element 2i low
  const uint16_t* code_values;  // [32]: BF16 of the 16 codes, twice
  float page_scale;
  // Of tokens a and b of a pair, by chunk of 128 elements: [pair][chunk][4 groups of 32][a a b b].
  alignas(64) float group_scale[kPageTokens / 2 * (kMaxHeadDim / 128) * 16];
};

#if defined(__x86_64__)
// Codes, or BF16 in rows expanded_bf16_stride() elements apart, undefined behind dim. Any format but
// bf16 itself and NVFP4, which have kernels of their own, and f32 and fp16, which BF16 would take
// digits from (throws Error). Only where cpu_has_avx512_bf16().
constexpr int64_t expanded_bf16_stride(int64_t dim) { return (dim + 63) / 64 * 64; }
void expand_rows_bf16(const StoredRows& in, int64_t dim, const NextRows& next, ExpandedRows& out);
// The same values without byte permutes (VBMI), whatever the machine has: what tests compare with.
void expand_rows_bf16_without_vbmi(const StoredRows& in, int64_t dim, const NextRows& next,
                                   ExpandedRows& out);
#endif

// FP32 [64][dim] of any format by the codecs of src/formats, every scale in the values.
void expand_rows_f32(const StoredRows& in, int64_t dim, const NextRows& next, ExpandedRows& out);

}  // namespace thriftattn
