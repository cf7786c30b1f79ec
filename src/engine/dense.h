// The dense layers: y = x W^T (+ bias) with W [n][k] kept in FP32 or BF16, x and y in FP32.
// Many rows go through oneDNN, few rows (decode) through our matrix-vector product (gemv.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace thriftattn {

class GgufFile;

// How weights are kept and multiplied. `bf16` keeps weights in BF16 everywhere; where the CPU
// multiplies BF16 (AVX-512 BF16, AMX) the activations of many rows are rounded to BF16 too,
// elsewhere weights are widened and the arithmetic is FP32: see explain_compute().
enum class ComputeType : uint8_t { f32, bf16 };

std::string_view to_string(ComputeType type);
// One line: what this machine really does when `type` is asked for.
std::string explain_compute(ComputeType type);
// Whether oneDNN multiplies BF16 natively here.
bool bf16_is_native();

class DenseMatrix {
 public:
  DenseMatrix() = default;
  // Uninitialised [n][k]; fill it with set_rows().
  DenseMatrix(int64_t n, int64_t k, ComputeType type);

  // Tensors [n_i][k] of the file, dequantised and stacked along n. A shape other than
  // ([rows[i]][k]) or a value that is not finite is an Error.
  static DenseMatrix load(const GgufFile& file, const std::vector<std::string>& names,
                          const std::vector<int64_t>& rows, int64_t k, ComputeType type);

  int64_t rows() const { return n_; }
  int64_t columns() const { return k_; }
  ComputeType type() const { return type_; }
  int64_t bytes() const;

  void set_rows(int64_t first, int64_t count, const float* values);
  // y[m][n] = x[m][k] W^T + bias; bias [n] or null. Threaded with oneTBB; the result depends
  // on m (other kernels for few rows), but not on the number of threads.
  void multiply(const float* x, int64_t m, float* y, const float* bias = nullptr) const;

 private:
  struct AlignedDelete {
    void operator()(void* p) const;
  };
  const float* f32() const { return static_cast<const float*>(data_.get()); }
  const uint16_t* bf16() const { return static_cast<const uint16_t*>(data_.get()); }
  void multiply_few(const float* x, int64_t m, float* y, const float* bias) const;
  void multiply_f32(const float* x, int64_t m, float* y, const float* bias) const;
  void multiply_bf16(const float* x, int64_t m, float* y, const float* bias) const;
  void multiply_widened(const float* x, int64_t m, float* y, const float* bias) const;

  int64_t n_ = 0;
  int64_t k_ = 0;
  ComputeType type_ = ComputeType::f32;
  std::unique_ptr<void, AlignedDelete> data_;
};

}  // namespace thriftattn
