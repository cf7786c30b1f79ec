// Matrix products for few rows of x (decode, speculative verify): W is read once, at memory
// bandwidth. Each y[i][j] is one chain of multiply-adds over k, so it does not depend on how
// many rows are computed together.
#pragma once

#include <cstdint>

namespace thriftattn {

struct GemvArgs {
  const void* w = nullptr;  // [n][k], FP32 or BF16 by the function called
  int64_t n = 0;
  int64_t k = 0;
  const float* x = nullptr;  // [m][k]
  int64_t m = 0;
  float* y = nullptr;  // [m][y_stride]; n values of each row are written
  int64_t y_stride = 0;
};

void gemv_f32(const GemvArgs& args);
void gemv_bf16(const GemvArgs& args);

// count BF16 values to FP32.
void widen_bf16(const uint16_t* from, int64_t count, float* to);
// count FP32 values to BF16, to nearest even; the values are finite.
void narrow_bf16(const float* from, int64_t count, uint16_t* to);

}  // namespace thriftattn
