// The engine's matrix products (src/engine/cublas_lt.h) without cuBLASLt. Like it, products of few rows
// and of many add up in different orders.
#include <vector>

#include "base/float_convert.h"
#include "emulator/emulator.h"
#include "engine/cublas_lt.h"

namespace thriftattn::device {
namespace {

std::vector<float> widen(cuda::Element element, const void* from, int64_t count) {
  const auto n = static_cast<size_t>(count);
  std::vector<float> to(n);
  for (size_t i = 0; i < n; ++i) {
    to[i] = element == cuda::Element::f32 ? static_cast<const float*>(from)[i]
                                          : bf16_to_f32(static_cast<const uint16_t*>(from)[i]);
  }
  return to;
}

template <int kParts>
float dot(const float* a, const float* b, int64_t n) {
  float sums[kParts] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % kParts] += a[i] * b[i];
  float sum = 0;
  for (const float s : sums) sum += s;
  return sum;
}

void multiply_now(const Product& p) {
  const std::vector<float> x = widen(p.element, p.x, p.m * p.k), w = widen(p.element, p.w, p.n * p.k);
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < p.n; ++j) {
      const float *a = x.data() + i * p.k, *b = w.data() + j * p.k;
      p.y[i * p.n + j] = p.m < 16 ? dot<8>(a, b, p.k) : dot<16>(a, b, p.k);
    }
  }
}

}  // namespace

struct MatrixMultiplier::Choice {};

MatrixMultiplier::MatrixMultiplier() = default;
MatrixMultiplier::~MatrixMultiplier() = default;
void MatrixMultiplier::prepare(const Product&) {}
void MatrixMultiplier::multiply(const Product& product, cuda::Stream stream) {
  emulator::submit(stream, [product] { multiply_now(product); });
}
int64_t MatrixMultiplier::version() const { return 0; }

}  // namespace thriftattn::device
