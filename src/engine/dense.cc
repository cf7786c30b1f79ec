// Loading and multiplying of DenseMatrix. oneDNN is built with OpenMP on Debian, whose threads
// spin after each call and would fight with oneTBB for the cores: so it runs single-threaded
// inside oneTBB tasks over fixed tiles, which also makes results independent of the threads.
#include "engine/dense.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <oneapi/dnnl/dnnl.hpp>
#include <span>

#include "base/float_convert.h"
#include "engine/gemv.h"
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
constexpr int64_t kTileRows = 256;         // of x
constexpr int64_t kTileColumns = 256;      // rows of W
constexpr int64_t kTileDepth = 1024;       // BF16 widened at a time: 1 MiB of FP32
constexpr int64_t kGemvBytes = 256 << 10;  // of W in a task

// One OpenMP thread for the calls of this scope. The functions are looked up at run time: a
// oneDNN without OpenMP brings none, and needs none.
class OneThread {
 public:
  OneThread() {
    if (set() == nullptr || get() == nullptr) return;
    before_ = get()();
    set()(1);
  }
  ~OneThread() {
    if (before_ > 0) set()(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  using Set = void (*)(int);
  using Get = int (*)();
  static Set set() {
    static const Set function = reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
    return function;
  }
  static Get get() {
    static const Get function = reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    return function;
  }
  int before_ = 0;
};

void check(dnnl_status_t status, int64_t m, int64_t n, int64_t k) {
  if (status == dnnl_success) return;
  throw Error(status == dnnl_out_of_memory ? ErrorCode::out_of_memory : ErrorCode::unsupported,
              fmt::format("oneDNN failed with status {} on a {} x {} x {} product; check the "
                          "installed libdnnl (2.6 or later)",
                          static_cast<int>(status), m, n, k));
}

struct Product {
  const float* x;
  int64_t ldx;
  const float* w;
  int64_t ldw;
  float* y;
  int64_t ldy;
  int64_t m, n, k;
  bool accumulate;
};

void sgemm(const Product& p) {
  check(dnnl_sgemm('N', 'T', p.m, p.n, p.k, 1.0f, p.x, p.ldx, p.w, p.ldw,
                   p.accumulate ? 1.0f : 0.0f, p.y, p.ldy),
        p.m, p.n, p.k);
}

// y[m][ldy] = x[m][k] w[n][k]^T in BF16 with FP32 accumulation.
void bf16_gemm(const uint16_t* x, const uint16_t* w, const Product& p) {
  using dnnl::memory;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc xd({p.m, p.k}, memory::data_type::bf16, memory::dims{p.k, 1});
  const memory::desc wd({p.k, p.n}, memory::data_type::bf16, memory::dims{1, p.k});
  const memory::desc yd({p.m, p.n}, memory::data_type::f32, memory::dims{p.ldy, 1});
  try {
    // oneDNN caches primitives by shape, so only the first tile of a shape pays.
    const dnnl::matmul product({dnnl::matmul::desc(xd, wd, yd), engine});
    product.execute(stream, {{DNNL_ARG_SRC, memory(xd, engine, const_cast<uint16_t*>(x))},
                             {DNNL_ARG_WEIGHTS, memory(wd, engine, const_cast<uint16_t*>(w))},
                             {DNNL_ARG_DST, memory(yd, engine, p.y)}});
    stream.wait();
  } catch (const dnnl::error& error) {
    check(error.status, p.m, p.n, p.k);
  }
}

void add_bias(const float* bias, int64_t m, int64_t n, float* y, int64_t ldy) {
  if (bias == nullptr) return;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) y[i * ldy + j] += bias[j];
  }
}

// Runs task(m0, m, n0, n) for every tile of an m x n result.
template <typename Task>
void for_tiles(int64_t m, int64_t n, int64_t tile_m, int64_t tile_n, const Task& task) {
  const int64_t columns = (n + tile_n - 1) / tile_n;
  const int64_t tiles = columns * ((m + tile_m - 1) / tile_m);
  tbb::parallel_for(int64_t{0}, tiles, [&](int64_t i) {
    const int64_t m0 = i / columns * tile_m;
    const int64_t n0 = i % columns * tile_n;
    task(m0, std::min(tile_m, m - m0), n0, std::min(tile_n, n - n0));
  });
}

enum class Bf16Support { native, cpu_without, self_test_failed };

// Small integers, whose products and sums are exact in any order, with a row stride that is not
// the width: a oneDNN that gets them wrong, or refuses, is not used.
bool bf16_self_test() {
  const int64_t m = 33, n = 40, k = 96, ldy = 50;
  std::vector<uint16_t> x(m * k), w(n * k);
  for (int64_t i = 0; i < m * k; ++i) x[i] = f32_to_bf16(static_cast<float>(i * 7 % 15 - 7));
  for (int64_t i = 0; i < n * k; ++i) w[i] = f32_to_bf16(static_cast<float>(i * 5 % 13 - 6));
  std::vector<float> y(m * ldy, -1.0f);
  const OneThread one_thread;
  try {
    bf16_gemm(x.data(), w.data(),
              {.x = nullptr,
               .ldx = k,
               .w = nullptr,
               .ldw = k,
               .y = y.data(),
               .ldy = ldy,
               .m = m,
               .n = n,
               .k = k,
               .accumulate = false});
  } catch (const Error&) {
    return false;
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < ldy; ++j) {
      float want = j < n ? 0.0f : -1.0f;
      for (int64_t d = 0; j < n && d < k; ++d) {
        want += bf16_to_f32(x[i * k + d]) * bf16_to_f32(w[j * k + d]);
      }
      if (y[i * ldy + j] != want) return false;
    }
  }
  return true;
}

Bf16Support bf16_support() {
  static const Bf16Support support = [] {
    const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
    const auto bf16 = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
    if ((isa & bf16) != bf16) return Bf16Support::cpu_without;
    return bf16_self_test() ? Bf16Support::native : Bf16Support::self_test_failed;
  }();
  return support;
}

}  // namespace

std::string_view to_string(ComputeType type) { return type == ComputeType::f32 ? "f32" : "bf16"; }

bool bf16_is_native() { return bf16_support() == Bf16Support::native; }

std::string explain_compute(ComputeType type) {
  if (type == ComputeType::f32) return "dense layers: weights FP32, arithmetic FP32";
  if (bf16_is_native()) {
    return fmt::format(
        "dense layers: weights BF16; activations rounded to BF16 in prefill (more "
        "than {} tokens at once), FP32 in decode; sums FP32",
        kFewRowsBf16);
  }
  const char* why = bf16_support() == Bf16Support::cpu_without
                        ? "native BF16 needs AVX-512 BF16 or AMX; this CPU has neither"
                        : "oneDNN's BF16 product failed its self-test on this CPU";
  return fmt::format("dense layers: weights BF16, arithmetic FP32 ({})", why);
}

void DenseMatrix::AlignedDelete::operator()(void* p) const { std::free(p); }

DenseMatrix::DenseMatrix(int64_t n, int64_t k, ComputeType type) : n_(n), k_(k), type_(type) {
  const size_t wanted = static_cast<size_t>(bytes());
  const size_t align = wanted >= kAlign ? kAlign : 64;
  const size_t size = (wanted + align - 1) / align * align;
  data_.reset(std::aligned_alloc(align, std::max(size, align)));
  if (data_ == nullptr) {
    throw Error(ErrorCode::out_of_memory,
                fmt::format("no memory for a {} x {} weight matrix ({} MiB); use a smaller model "
                            "or the compute type bf16",
                            n, k, wanted >> 20));
  }
  if (align == kAlign) madvise(data_.get(), size, MADV_HUGEPAGE);  // a hint: failure is harmless
}

int64_t DenseMatrix::bytes() const {
  return n_ * k_ * (type_ == ComputeType::f32 ? int64_t{4} : int64_t{2});
}

void DenseMatrix::set_rows(int64_t first, int64_t count, const float* values) {
  if (type_ == ComputeType::f32) {
    std::copy_n(values, count * k_, static_cast<float*>(data_.get()) + first * k_);
  } else {
    narrow_bf16(values, count * k_, static_cast<uint16_t*>(data_.get()) + first * k_);
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
  DenseMatrix matrix(n, k, type);
  int64_t first = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    const GgufTensor& tensor = file.require(names[i]);
    const tbb::blocked_range<int64_t> range(0, rows[i], std::max<int64_t>(1, (64 << 10) / k));
    tbb::parallel_for(range, [&](const tbb::blocked_range<int64_t>& part) {
      check_finite(tensor, part.begin(), static_cast<int64_t>(part.size()));
      std::vector<float> row(static_cast<size_t>(k));
      for (int64_t r = part.begin(); r < part.end(); ++r) {
        dequantize_rows(tensor, r, 1, row.data());
        matrix.set_rows(first + r, 1, row.data());
      }
    });
    first += rows[i];
  }
  return matrix;
}

void DenseMatrix::multiply(const float* x, int64_t m, float* y, const float* bias) const {
  if (m <= (type_ == ComputeType::f32 ? kFewRowsF32 : kFewRowsBf16)) {
    multiply_few(x, m, y, bias);
  } else if (type_ == ComputeType::f32) {
    multiply_f32(x, m, y, bias);
  } else if (bf16_is_native()) {
    multiply_bf16(x, m, y, bias);
  } else {
    multiply_widened(x, m, y, bias);
  }
}

void DenseMatrix::multiply_few(const float* x, int64_t m, float* y, const float* bias) const {
  const int64_t row_bytes = std::max<int64_t>(1, bytes() / std::max<int64_t>(1, n_));
  // A multiple of 4, the rows that the kernel takes at a time.
  const int64_t tile = std::max<int64_t>(4, kGemvBytes / row_bytes / 4 * 4);
  for_tiles(m, n_, m, tile, [&](int64_t, int64_t, int64_t n0, int64_t n) {
    GemvArgs args{.w = nullptr, .n = n, .k = k_, .x = x, .m = m, .y = y + n0, .y_stride = n_};
    if (type_ == ComputeType::f32) {
      args.w = f32() + n0 * k_;
      gemv_f32(args);
    } else {
      args.w = bf16() + n0 * k_;
      gemv_bf16(args);
    }
    add_bias(bias == nullptr ? nullptr : bias + n0, m, n, y + n0, n_);
  });
}

void DenseMatrix::multiply_f32(const float* x, int64_t m, float* y, const float* bias) const {
  for_tiles(m, n_, kTileRows, kTileColumns, [&](int64_t m0, int64_t tm, int64_t n0, int64_t tn) {
    const OneThread one_thread;
    float* out = y + m0 * n_ + n0;
    sgemm({.x = x + m0 * k_,
           .ldx = k_,
           .w = f32() + n0 * k_,
           .ldw = k_,
           .y = out,
           .ldy = n_,
           .m = tm,
           .n = tn,
           .k = k_,
           .accumulate = false});
    add_bias(bias == nullptr ? nullptr : bias + n0, tm, tn, out, n_);
  });
}

// All of x for each tile of W, so that W is widened once.
void DenseMatrix::multiply_widened(const float* x, int64_t m, float* y, const float* bias) const {
  for_tiles(m, n_, m, kTileColumns, [&](int64_t, int64_t, int64_t n0, int64_t tn) {
    const OneThread one_thread;
    std::vector<float> w(static_cast<size_t>(tn * std::min(kTileDepth, k_)));
    for (int64_t k0 = 0; k0 < k_; k0 += kTileDepth) {
      const int64_t tk = std::min(kTileDepth, k_ - k0);
      for (int64_t j = 0; j < tn; ++j) {
        widen_bf16(bf16() + (n0 + j) * k_ + k0, tk, w.data() + j * tk);
      }
      sgemm({.x = x + k0,
             .ldx = k_,
             .w = w.data(),
             .ldw = tk,
             .y = y + n0,
             .ldy = n_,
             .m = m,
             .n = tn,
             .k = tk,
             .accumulate = k0 > 0});
    }
    add_bias(bias == nullptr ? nullptr : bias + n0, m, tn, y + n0, n_);
  });
}

void DenseMatrix::multiply_bf16(const float* x, int64_t m, float* y, const float* bias) const {
  std::vector<uint16_t> narrow(static_cast<size_t>(m * k_));
  tbb::parallel_for(int64_t{0}, m,
                    [&](int64_t i) { narrow_bf16(x + i * k_, k_, narrow.data() + i * k_); });
  for_tiles(m, n_, kTileRows, kTileColumns, [&](int64_t m0, int64_t tm, int64_t n0, int64_t tn) {
    const OneThread one_thread;
    float* out = y + m0 * n_ + n0;
    bf16_gemm(narrow.data() + m0 * k_, bf16() + n0 * k_,
              {.x = nullptr,
               .ldx = k_,
               .w = nullptr,
               .ldw = k_,
               .y = out,
               .ldy = n_,
               .m = tm,
               .n = tn,
               .k = k_,
               .accumulate = false});
    add_bias(bias == nullptr ? nullptr : bias + n0, tm, tn, out, n_);
  });
}

}  // namespace thriftattn
