// The dense layers: y = x W^T (+ bias) with W [n][k], x and y in FP32. Few rows (decode) are
// multiplied with W as it is kept (gemv.h, gemv_vnni.h), many rows go through oneDNN (gemm.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/gemm.h"
#include "engine/ggml_types.h"

namespace thriftattn {

class GgufFile;

// How weights are kept. `f32`: widened to FP32, all arithmetic FP32. `bf16`: rounded to BF16.
// `stored`: as the file has them, read through its mapping; tiles are expanded for products of many
// rows. Where the CPU multiplies BF16 (AVX-512 BF16, AMX), `bf16` and `stored` round the operands
// of many rows to BF16; elsewhere the arithmetic is FP32: see explain_compute().
enum class ComputeType : uint8_t { f32, bf16, stored };

std::string_view to_string(ComputeType type);
// One line: what this machine really does when `type` is asked for.
std::string explain_compute(ComputeType type);
// Up to so many rows of x are multiplied with W as it is kept.
int64_t few_rows(ComputeType type);

class DenseMatrix {
 public:
  DenseMatrix() = default;
  // Uninitialised [n][k] of type f32 or bf16; fill it with set_rows().
  DenseMatrix(int64_t n, int64_t k, ComputeType type);

  // Tensors [n_i][k] of the file, stacked along n; `stored` keeps views, so the file must outlive
  // the matrix. A shape other than ([rows[i]][k]) or a value that is not finite is an Error.
  static DenseMatrix load(const GgufFile& file, const std::vector<std::string>& names,
                          const std::vector<int64_t>& rows, int64_t k, ComputeType type);

  int64_t rows() const { return n_; }
  int64_t columns() const { return k_; }
  ComputeType type() const { return type_; }
  int64_t bytes() const;  // of the weights, in memory or in the file's mapping

  void set_rows(int64_t first, int64_t count, const float* values);
  // Those rows as FP32, whatever they are kept in.
  void expand_rows(int64_t first, int64_t count, float* values) const;
  // y[m][n] = x[m][k] W^T + bias; bias [n] or null. Threaded with oneTBB; the result depends
  // on m (other kernels for few rows), but not on the number of threads.
  void multiply(const float* x, int64_t m, float* y, const float* bias = nullptr) const;

 private:
  struct AlignedDelete {
    void operator()(void* p) const;
  };
  // Consecutive rows that are kept in one type.
  struct Part {
    GgmlType type;
    const uint8_t* data;
    int64_t first, rows, row_bytes;
  };
  // Rows of one part that one task multiplies.
  struct Tile {
    const Part* part;
    int64_t first, rows;  // first counts from the matrix's first row

    const uint8_t* data() const { return part->data + (first - part->first) * part->row_bytes; }
  };
  struct Product {
    const float* x;
    int64_t m;
    float* y;
    const float* bias;
  };

  void add_part(GgmlType type, const uint8_t* data, int64_t rows);
  template <typename RowsOf>
  std::vector<Tile> tiles(const RowsOf& rows_of) const;
  void multiply_few(const Product& p) const;
  template <typename T>
  void multiply_kept(const T* x, const Product& p) const;
  template <typename T>
  void multiply_expanded(const T* x, const Product& p) const;
  template <typename T>
  GemmArgs<T> gemm_args(const T* x, const Product& p, int64_t m0, const Tile& tile) const;
  void add_bias(const Product& p, int64_t m0, int64_t m, const Tile& tile) const;

  int64_t n_ = 0;
  int64_t k_ = 0;
  ComputeType type_ = ComputeType::f32;
  std::vector<Part> parts_;
  std::unique_ptr<uint8_t, AlignedDelete> data_;  // of f32 and bf16
};

}  // namespace thriftattn
