// Plain formats: each row (the D elements of one token and head) is encoded on its own, as the
// peers' caches do (FP32, 16-bit, FP8, FP6, q8_0, q4_0; byte maps in docs/formats.md). Inputs
// must be finite and at most format_info(f).range_max in magnitude; the caller checks, since it
// alone can name the layer and token. The _scalar functions are the truth; the others run the
// best SIMD target of this machine and give the same bytes.
#pragma once

#include <cstdint>

#include "thriftattn/policy.h"

namespace thriftattn {

// Bytes of one encoded row. Throws Error for layered formats and for a dim that is not a
// multiple of the format's block.
int64_t row_bytes(Format format, int64_t dim);

// Strides of FP32 rows are in elements, strides of encoded rows in bytes. No alignment is needed.
void encode_rows(Format format, const float* x, int64_t rows, int64_t dim, int64_t x_stride,
                 uint8_t* out, int64_t out_stride);
void decode_rows(Format format, const uint8_t* in, int64_t in_stride, int64_t rows, int64_t dim,
                 float* out, int64_t out_stride);

void encode_rows_scalar(Format format, const float* x, int64_t rows, int64_t dim, int64_t x_stride,
                        uint8_t* out, int64_t out_stride);
void decode_rows_scalar(Format format, const uint8_t* in, int64_t in_stride, int64_t rows,
                        int64_t dim, float* out, int64_t out_stride);

// Scales that would be subnormal or zero are 1 instead (the codes are then zero), so that no
// reader meets a subnormal scale and flush-to-zero hardware decodes the same values.
constexpr float usable_scale(float scale) { return scale >= 0x1p-126f ? scale : 1.0f; }

// 1/d of the ggml formats; 0 where it would be infinite. (ggml's cast of an infinity to int8 is
// undefined there; FP16 d is zero long before, so the decoded values agree.)
constexpr float ggml_inverse(float d) {
  const float magnitude = d < 0 ? -d : d;
  return magnitude > 0x1p-128f ? 1.0f / d : 0.0f;
}

inline constexpr int64_t kGgmlBlock = 32;
inline constexpr int64_t kQ8BlockBytes = 34;
inline constexpr int64_t kQ4BlockBytes = 18;

}  // namespace thriftattn
