// Rows of one side of a page as the dot products take them. Formats without score and weigh kernels
// of their own are expanded first, 64 rows at a time, into a buffer that stays in the caches.
//
// In BF16 the codes of FP8, FP6, MXFP4 and INT3 are exact with the scale of their group; what is
// common to a row or to the page multiplies scores and weights, in FP32. Q8_0 and Q4_0 have FP16
// scales a group: code x scale is rounded to BF16 once.
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

// The values are [64][stride] in the element and stride of the kernels that expanded them, scale[t]
// multiplies row t. Rows without a token are not written, their scale is 0. Left uninitialised.
struct ExpandedRows {
  alignas(64) std::byte values[kPageTokens * kMaxHeadDim * sizeof(float)];
  alignas(64) float scale[kPageTokens];
  int64_t tokens;
};

#if defined(__x86_64__)
// BF16, rows expanded_bf16_stride() elements apart, undefined behind dim. Any format but bf16 itself,
// NVFP4, which have kernels of their own, and f32 and fp16, which BF16 would take digits from (throws
// Error). Only where cpu_has_avx512_bf16().
constexpr int64_t expanded_bf16_stride(int64_t dim) { return (dim + 63) / 64 * 64; }
void expand_rows_bf16(const StoredRows& in, int64_t dim, const NextRows& next, ExpandedRows& out);
// The same values without byte permutes (VBMI), whatever the machine has: what tests compare with.
void expand_rows_bf16_without_vbmi(const StoredRows& in, int64_t dim, const NextRows& next,
                                   ExpandedRows& out);
#endif

// FP32 [64][dim] of any format by the codecs of src/formats, every scale in the values.
void expand_rows_f32(const StoredRows& in, int64_t dim, const NextRows& next, ExpandedRows& out);

}  // namespace thriftattn
