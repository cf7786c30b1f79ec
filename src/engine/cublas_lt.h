// Matrix products on a device by cuBLASLt, which is loaded when it is first needed: a program that was
// built with CUDA runs on machines without it as long as they compute on the CPU.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

#include "thriftattn/cuda.h"

namespace thriftattn::device {

// y[m][n] = x[m][k] W[n][k]^T, all dense; y FP32, sums FP32. FP32 operands are multiplied as such (no
// TF32).
struct Product {
  cuda::Element element = cuda::Element::bf16;  // of x and w: f32 or bf16
  const void* x = nullptr;
  const void* w = nullptr;
  float* y = nullptr;
  int64_t m = 0, n = 0, k = 0;
};

class MatrixMultiplier {
 public:
  // Throws Error(not_found) naming the library where it is missing.
  MatrixMultiplier();
  ~MatrixMultiplier();
  MatrixMultiplier(const MatrixMultiplier&) = delete;
  MatrixMultiplier& operator=(const MatrixMultiplier&) = delete;

  // Chooses how to multiply such a shape, once; multiply() does by itself, prepare() before a graph
  // is captured.
  void prepare(const Product& product);
  void multiply(const Product& product, cuda::Stream stream);
  int64_t version() const;  // of the library

 private:
  struct Choice;
  struct Shape {
    cuda::Element element;
    int64_t m, n, k;
    auto operator<=>(const Shape&) const = default;
  };
  const Choice& choose(const Product& product);

  void* handle_ = nullptr;
  cuda::DeviceMemory workspace_;
  std::map<Shape, std::unique_ptr<Choice>> choices_;
};

}  // namespace thriftattn::device
