// Loading and multiplying of DenseMatrix: products are cut into fixed tiles, which run as oneTBB
// tasks.
#include "engine/dense.h"

#include <fmt/format.h>
#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "engine/gemv.h"
#include "engine/gemv_vnni.h"
#include "engine/gguf.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

constexpr size_t kAlign = size_t{2} << 20;  // a huge page: fewer TLB misses while streaming
// Up to so many rows of x the matrix-vector kernel beats a GEMM, by weight type (measured on two
// Zen cores: FP32 29 against 35 GFLOP/s a core at 8 rows, 38 against 48 at 16; BF16 49 against 35
// at 16).
constexpr int64_t kFewRowsF32 = 8;
constexpr int64_t kFewRowsBf16 = 16;
constexpr int64_t kFewRowsStored = kGemvRows;
constexpr int64_t kTileRows = 256;         // of x
constexpr int64_t kTileColumns = 256;      // rows of W
constexpr int64_t kTileDepth = 1024;       // expanded to FP32 at a time: 1 MiB
constexpr int64_t kGemvBytes = 256 << 10;  // of W in a task

GgmlType kept_as(ComputeType type) {
  return type == ComputeType::f32 ? GgmlType::f32 : GgmlType::bf16;
}

int64_t bytes_of(GgmlType type, int64_t elements) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  return elements / info.block_elements * info.block_bytes;
}

}  // namespace

std::string_view to_string(ComputeType type) {
  switch (type) {
    case ComputeType::f32:
      return "f32";
    case ComputeType::bf16:
      return "bf16";
    case ComputeType::stored:
      break;
  }
  return "stored";
}

std::string explain_compute(ComputeType type) {
  if (type == ComputeType::f32) return "dense layers: weights FP32, arithmetic FP32";
  const int64_t few = few_rows(type);
  if (type == ComputeType::bf16) {
    if (!bf16_is_native()) {
      return fmt::format("dense layers: weights BF16, arithmetic FP32 ({})",
                         why_bf16_is_not_native());
    }
    return fmt::format(
        "dense layers: weights BF16; activations rounded to BF16 in prefill (more "
        "than {} tokens at once), FP32 in decode; sums FP32",
        few);
  }
  const char* decode = gemv_vnni_available()
                           ? "activations in 23-bit fixed point with quantised weights, else FP32"
                           : "arithmetic FP32";
  const std::string prefill = bf16_is_native()
                                  ? "weights and activations rounded to BF16"
                                  : fmt::format("arithmetic FP32 ({})", why_bf16_is_not_native());
  return fmt::format(
      "dense layers: weights as the file stores them; decode (up to {} tokens at once): {}; "
      "prefill: {}; sums FP32",
      few, decode, prefill);
}

int64_t few_rows(ComputeType type) {
  switch (type) {
    case ComputeType::f32:
      return kFewRowsF32;
    case ComputeType::bf16:
      return kFewRowsBf16;
    case ComputeType::stored:
      break;
  }
  return kFewRowsStored;
}

void DenseMatrix::AlignedDelete::operator()(void* p) const { std::free(p); }

DenseMatrix::DenseMatrix(int64_t n, int64_t k, ComputeType type) : k_(k), type_(type) {
  const GgmlType kept = kept_as(type);
  const auto wanted = static_cast<size_t>(bytes_of(kept, n * k));
  const size_t align = wanted >= kAlign ? kAlign : 64;
  const size_t size = (wanted + align - 1) / align * align;
  data_.reset(static_cast<uint8_t*>(std::aligned_alloc(align, std::max(size, align))));
  if (data_ == nullptr) {
    throw Error(ErrorCode::out_of_memory,
                fmt::format("no memory for a {} x {} weight matrix ({} MiB); use a smaller model "
                            "or the compute type auto",
                            n, k, wanted >> 20));
  }
  if (align == kAlign) madvise(data_.get(), size, MADV_HUGEPAGE);  // a hint: failure is harmless
  add_part(kept, data_.get(), n);
}

void DenseMatrix::add_part(GgmlType type, const uint8_t* data, int64_t rows) {
  parts_.push_back(
      {.type = type, .data = data, .first = n_, .rows = rows, .row_bytes = bytes_of(type, k_)});
  n_ += rows;
}

int64_t DenseMatrix::bytes() const {
  int64_t sum = 0;
  for (const Part& part : parts_) sum += part.rows * part.row_bytes;
  return sum;
}

void DenseMatrix::set_rows(int64_t first, int64_t count, const float* values) {
  uint8_t* to = data_.get() + first * parts_.front().row_bytes;
  if (type_ == ComputeType::f32) {
    std::copy_n(values, count * k_, reinterpret_cast<float*>(to));
  } else {
    narrow_bf16(values, count * k_, reinterpret_cast<uint16_t*>(to));
  }
}

void DenseMatrix::expand_rows(int64_t first, int64_t count, float* values) const {
  for (const Part& part : parts_) {
    const int64_t from = std::max(first, part.first);
    const int64_t to = std::min(first + count, part.first + part.rows);
    for (int64_t r = from; r < to; ++r) {
      expand(part.type, part.data + (r - part.first) * part.row_bytes, k_,
             values + (r - first) * k_);
    }
  }
}

DenseMatrix DenseMatrix::load(const GgufFile& file, const std::vector<std::string>& names,
                              const std::vector<int64_t>& rows, int64_t k, ComputeType type) {
  int64_t n = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    const GgufTensor& tensor = file.require(names[i]);
    if (tensor.n_dims > 2 || tensor.ne[0] != k || tensor.rows() != rows[i]) {
      file.fail(ErrorCode::corrupt, fmt::format("tensor {} is {}, required: {} x {}; the file does "
                                                "not fit its own metadata",
                                                names[i], tensor.shape(), k, rows[i]));
    }
    n += rows[i];
  }
  const bool stored = type == ComputeType::stored;
  DenseMatrix matrix;
  if (stored) {
    matrix.k_ = k;
    matrix.type_ = type;
  } else {
    matrix = DenseMatrix(n, k, type);
  }
  int64_t first = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    const GgufTensor& tensor = file.require(names[i]);
    const tbb::blocked_range<int64_t> range(0, rows[i], std::max<int64_t>(1, (64 << 10) / k));
    tbb::parallel_for(range, [&](const tbb::blocked_range<int64_t>& part) {
      check_finite(tensor, part.begin(), static_cast<int64_t>(part.size()));
      if (stored) return;
      std::vector<float> row(static_cast<size_t>(k));
      for (int64_t r = part.begin(); r < part.end(); ++r) {
        dequantize_rows(tensor, r, 1, row.data());
        matrix.set_rows(first + r, 1, row.data());
      }
    });
    if (stored) {
      matrix.add_part(tensor.type, reinterpret_cast<const uint8_t*>(tensor.data.data()), rows[i]);
    }
    first += rows[i];
  }
  return matrix;
}

// The rows of W in pieces of at most rows_of(part) rows. They depend on nothing else.
template <typename RowsOf>
std::vector<DenseMatrix::Tile> DenseMatrix::tiles(const RowsOf& rows_of) const {
  std::vector<Tile> tiles;
  for (const Part& part : parts_) {
    const int64_t step = rows_of(part);
    for (int64_t i = 0; i < part.rows; i += step) {
      tiles.push_back({&part, part.first + i, std::min(step, part.rows - i)});
    }
  }
  return tiles;
}

void DenseMatrix::add_bias(const Product& p, int64_t m0, int64_t m, const Tile& tile) const {
  if (p.bias == nullptr) return;
  for (int64_t i = m0; i < m0 + m; ++i) {
    for (int64_t j = tile.first; j < tile.first + tile.rows; ++j) p.y[i * n_ + j] += p.bias[j];
  }
}

void DenseMatrix::multiply(const float* x, int64_t m, float* y, const float* bias) const {
  const Product p{.x = x, .m = m, .y = y, .bias = bias};
  if (m <= few_rows(type_)) return multiply_few(p);
  if (type_ == ComputeType::f32) return multiply_kept(x, p);
  if (!bf16_is_native()) return multiply_expanded(x, p);
  std::vector<uint16_t> narrow(static_cast<size_t>(m * k_));
  tbb::parallel_for(int64_t{0}, m,
                    [&](int64_t i) { narrow_bf16(x + i * k_, k_, narrow.data() + i * k_); });
  if (type_ == ComputeType::bf16) return multiply_kept(narrow.data(), p);
  multiply_expanded(narrow.data(), p);
}

void DenseMatrix::multiply_few(const Product& p) const {
  // A multiple of 4, the rows that the kernels take at a time.
  const auto pieces = tiles([](const Part& part) {
    return std::max<int64_t>(4, kGemvBytes / std::max<int64_t>(1, part.row_bytes) / 4 * 4);
  });
  FixedRows fixed;
  const bool integers = gemv_vnni_available() &&
                        std::any_of(parts_.begin(), parts_.end(),
                                    [](const Part& part) { return gemv_vnni_takes(part.type); });
  if (integers) fixed = FixedRows(p.x, p.m, k_);
  tbb::parallel_for(size_t{0}, pieces.size(), [&](size_t i) {
    const Tile& tile = pieces[i];
    const GemvArgs args{.type = tile.part->type,
                        .w = tile.data(),
                        .n = tile.rows,
                        .k = k_,
                        .x = p.x,
                        .m = p.m,
                        .y = p.y + tile.first,
                        .y_stride = n_};
    if (integers && gemv_vnni_takes(args.type)) {
      gemv_vnni(args, fixed);
    } else {
      gemv(args);
    }
    add_bias(p, 0, p.m, tile);
  });
}

template <typename T>
GemmArgs<T> DenseMatrix::gemm_args(const T* x, const Product& p, int64_t m0,
                                   const Tile& tile) const {
  return {.x = x + m0 * k_,
          .ldx = k_,
          .w = reinterpret_cast<const T*>(tile.data()),
          .ldw = k_,
          .y = p.y + m0 * n_ + tile.first,
          .ldy = n_,
          .m = std::min(kTileRows, p.m - m0),
          .n = tile.rows,
          .k = k_};
}

// W is kept as T.
template <typename T>
void DenseMatrix::multiply_kept(const T* x, const Product& p) const {
  const auto columns = tiles([](const Part&) { return kTileColumns; });
  const auto count = static_cast<int64_t>(columns.size());
  tbb::parallel_for(int64_t{0}, (p.m + kTileRows - 1) / kTileRows * count, [&](int64_t i) {
    const Tile& tile = columns[static_cast<size_t>(i % count)];
    const int64_t m0 = i / count * kTileRows;
    const GemmArgs<T> args = gemm_args(x, p, m0, tile);
    gemm(args);
    add_bias(p, m0, args.m, tile);
  });
}

// All of x for each tile of W, so that W is expanded once: to BF16 as a whole, to FP32 in pieces
// that stay in L2.
template <typename T>
void DenseMatrix::multiply_expanded(const T* x, const Product& p) const {
  constexpr bool kPieces = std::is_same_v<T, float>;
  const int64_t depth = kPieces ? std::min(kTileDepth, k_) : k_;
  const auto columns = tiles([](const Part&) { return kTileColumns; });
  tbb::parallel_for(size_t{0}, columns.size(), [&](size_t i) {
    const Tile& tile = columns[i];
    const auto w = std::make_unique_for_overwrite<T[]>(static_cast<size_t>(tile.rows * depth));
    for (int64_t k0 = 0; k0 < k_; k0 += depth) {
      const int64_t tk = std::min(depth, k_ - k0);
      for (int64_t j = 0; j < tile.rows; ++j) {
        const uint8_t* row = tile.data() + j * tile.part->row_bytes;
        expand(tile.part->type, row + bytes_of(tile.part->type, k0), tk, w.get() + j * tk);
      }
      if constexpr (kPieces) {
        GemmArgs<T> args = gemm_args(x + k0, p, 0, tile);
        args.w = w.get();
        args.ldw = tk;
        args.m = p.m;
        args.k = tk;
        gemm(args, k0 > 0);
      } else {
        for (int64_t m0 = 0; m0 < p.m; m0 += kTileRows) {
          GemmArgs<T> args = gemm_args(x, p, m0, tile);
          args.w = w.get();
          gemm(args);
        }
      }
    }
    add_bias(p, 0, p.m, tile);
  });
}

}  // namespace thriftattn
