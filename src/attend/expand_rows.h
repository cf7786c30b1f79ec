// Rows of one side of a page as the dot products take them. Formats without score and weigh kernels
// of their own are expanded first, 64 rows at a time, into a buffer that stays in the caches.
//
// For BF16 dot products, where all codes are exact: FP8 and FP6 become rows of BF16, and what is
// common to a row multiplies scores and weights, in FP32. MXFP4, Q4_0 and INT3 become codes of 4 bits
// in the order of NVFP4, Q8_0 BF16 in the order in which those come out of the registers; NVFP4's
// kernels then take them with FP32 scales of 32 elements.
#pragma once

#include <cstddef>
#include <cstdint>

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

// Left uninitialised.
struct ExpandedRows {
  enum class Form : uint8_t {
    rows,     // `values`, [64][stride] in the element and stride of the kernels that expanded them,
              // times `scale`; rows without a token are not written, their scale is 0
    codes,    // `codes` times `group_scale` and `page_scale`
    ordered,  // BF16 `values`, [64][chunk of 128][4][32]: element 4 w + s of a chunk is word w of
              // vector s; times `group_scale`
  };
  alignas(64) std::byte values[kPageTokens * kMaxHeadDim * sizeof(float)];
  alignas(64) float scale[kPageTokens];
  // Of tokens a and b of a pair, by chunk: [pair][chunk][4 groups of 32][a a b b].
  alignas(64) float group_scale[kPageTokens / 2 * (kMaxHeadDim / 128) * 16];
  Form form;
  int64_t tokens;
  float page_scale;
  const uint8_t* codes;         // [64][dim / 2], here or in the page; element 2i in the low nibble
  const uint16_t* code_values;  // [32]: BF16 of the 16 codes, twice
};

#if defined(__x86_64__)
// In any form; rows are expanded_bf16_stride() elements apart, undefined behind dim. Any format but
// bf16 itself and NVFP4, which have kernels of their own, and f32 and fp16, which BF16 would take
// digits from (throws Error). Only where cpu_has_avx512_bf16().
constexpr int64_t expanded_bf16_stride(int64_t dim) { return (dim + 63) / 64 * 64; }
void expand_rows_bf16(const StoredRows& in, int64_t dim, ExpandedRows& out);
// The same values without byte permutes (VBMI), whatever the machine has: what tests compare with.
void expand_rows_bf16_without_vbmi(const StoredRows& in, int64_t dim, ExpandedRows& out);
#endif

// FP32 [64][dim] of any format by the codecs of src/formats, every scale in the values.
void expand_rows_f32(const StoredRows& in, int64_t dim, ExpandedRows& out);

}  // namespace thriftattn
