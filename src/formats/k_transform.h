// The transform of K (and its counterpart of q) before encoding: equalise, then rotate by a
// normalised Hadamard matrix; and the page mean that centring subtracts. The order of operations
// is part of the page format (docs/formats.md): SIMD results are bit-equal to the _scalar truth.
#pragma once

#include <cstdint>

namespace thriftattn {

// The largest power of two that divides dim: rotation works in blocks of it.
constexpr int64_t hadamard_block(int64_t dim) { return dim & -dim; }

// In place, each row on its own: butterflies (a, b) -> (a + b, a - b) of stride 1, 2, 4, ...
// inside each block of n = hadamard_block(dim), then one multiplication by FP32(1 / sqrt(n)).
void hadamard_rows(float* x, int64_t rows, int64_t dim, int64_t stride);
void hadamard_rows_scalar(float* x, int64_t rows, int64_t dim, int64_t stride);

// out = H (in * s) for K, or H (in / s) with `invert` for q; without s a copy, without `rotate`
// no H. out may be in (with the same stride), but must not overlap it otherwise.
void equalize_rotate_rows(const float* in, int64_t in_stride, int64_t rows, int64_t dim,
                          const float* s_or_null, bool invert, bool rotate, float* out,
                          int64_t out_stride);
void equalize_rotate_rows_scalar(const float* in, int64_t in_stride, int64_t rows, int64_t dim,
                                 const float* s_or_null, bool invert, bool rotate, float* out,
                                 int64_t out_stride);

// mean[d] over dense [rows][dim], rows >= 1: a tree of adjacent pairs over the rows (0+1, 2+3,
// ...; a row without a partner moves up as it is), then one division by rows.
void page_mean(const float* x, int64_t rows, int64_t dim, float* mean);
void page_mean_scalar(const float* x, int64_t rows, int64_t dim, float* mean);

}  // namespace thriftattn
