// Matrix products for few rows of x (decode, speculative verify): W is read once, in the tensor
// type it is stored in, and expanded in registers. The arithmetic is FP32 on the dequantised
// values; the order of each sum depends on k alone, so y[i][j] does not depend on how many rows
// are computed together. Also what the products of many rows need: rows of W as FP32 or BF16.
#pragma once

#include <cstdint>

#include "engine/ggml_types.h"

namespace thriftattn {

struct GemvArgs {
  GgmlType type = GgmlType::f32;
  const uint8_t* w = nullptr;  // [n] rows of k elements in whole blocks; 2 and 4-byte types aligned
  int64_t n = 0;
  int64_t k = 0;
  const float* x = nullptr;  // [m][k]
  int64_t m = 0;             // at most kGemvRows
  float* y = nullptr;        // [m][y_stride]; n values of each row are written
  int64_t y_stride = 0;
};

inline constexpr int64_t kGemvRows = 16;

void gemv(const GemvArgs& args);

// `count` elements in whole blocks to FP32 (bit-equal to dequantize()), or to BF16 by rounding
// those values to nearest even. They are finite.
void expand(GgmlType type, const uint8_t* blocks, int64_t count, float* to);
void expand(GgmlType type, const uint8_t* blocks, int64_t count, uint16_t* to);

// count BF16 values to FP32.
void widen_bf16(const uint16_t* from, int64_t count, float* to);
// count FP32 values to BF16, to nearest even; the values are finite.
void narrow_bf16(const float* from, int64_t count, uint16_t* to);

}  // namespace thriftattn
