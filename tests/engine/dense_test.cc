// The dense layers against FP64: every path (few rows, GEMM, BF16), odd sizes, threads, loading.
#include "engine/dense.h"

#include <gtest/gtest.h>
#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/task_arena.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "base/float_convert.h"
#include "engine/gemv.h"
#include "engine/gemv_vnni.h"
#include "engine/gguf.h"
#include "engine/gguf_writer.h"
#include "engine/random_blocks.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

std::vector<float> noise(int64_t count, uint32_t seed) {
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) {
    seed = seed * 1664525u + 1013904223u;
    v = static_cast<float>(static_cast<int32_t>(seed) >> 8) * 0x1p-23f;
  }
  return x;
}

struct Shape {
  int64_t m, n, k;
};

// Relative to the norms of the two vectors that an element is the product of.
void expect_product(const Shape& s, ComputeType type, bool bias) {
  const std::vector<float> w = noise(s.n * s.k, 1);
  const std::vector<float> x = noise(s.m * s.k, 2);
  const std::vector<float> b = noise(s.n, 3);
  DenseMatrix matrix(s.n, s.k, type);
  matrix.set_rows(0, s.n, w.data());
  std::vector<float> y(static_cast<size_t>(s.m * s.n), std::numeric_limits<float>::quiet_NaN());
  matrix.multiply(x.data(), s.m, y.data(), bias ? b.data() : nullptr);
  // Where BF16 is native, x is rounded for many rows; elsewhere only W is.
  const bool rounded_x = type == ComputeType::bf16 && bf16_is_native() && s.m > 16;
  double worst = 0.0;
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      double sum = bias ? b[static_cast<size_t>(j)] : 0.0;
      double norm = 1e-30;
      for (int64_t k = 0; k < s.k; ++k) {
        float wv = w[static_cast<size_t>(j * s.k + k)];
        float xv = x[static_cast<size_t>(i * s.k + k)];
        if (type == ComputeType::bf16) wv = bf16_to_f32(f32_to_bf16(wv));
        if (rounded_x) xv = bf16_to_f32(f32_to_bf16(xv));
        sum += static_cast<double>(wv) * xv;
        norm += std::fabs(static_cast<double>(wv) * xv);
      }
      worst = std::max(worst, std::fabs(y[static_cast<size_t>(i * s.n + j)] - sum) / norm);
    }
  }
  EXPECT_LT(worst, 2e-6) << s.m << " x " << s.n << " x " << s.k << " " << to_string(type);
}

TEST(Dense, MatchesFp64) {
  for (const ComputeType type : {ComputeType::f32, ComputeType::bf16}) {
    for (const Shape& s : {Shape{1, 1, 1},
                           {1, 515, 77},
                           {2, 6, 96},
                           {3, 67, 33},
                           {4, 258, 64},
                           {5, 9, 40},
                           {16, 31, 128},
                           {17, 31, 129},
                           {40, 300, 70},
                           {300, 259, 64},
                           {33, 70, 1100},
                           {19, 5, 2050}}) {
      expect_product(s, type, s.n % 2 == 1);
    }
  }
}

// The rows of a step must not see each other: decode of one token and of four agree to the bit.
TEST(Dense, FewRowsAreIndependent) {
  const int64_t n = 131;
  const int64_t k = 203;
  for (const ComputeType type : {ComputeType::f32, ComputeType::bf16}) {
    DenseMatrix matrix(n, k, type);
    matrix.set_rows(0, n, noise(n * k, 5).data());
    const std::vector<float> x = noise(7 * k, 6);
    std::vector<float> all(static_cast<size_t>(7 * n));
    matrix.multiply(x.data(), 7, all.data());
    for (int64_t i = 0; i < 7; ++i) {
      std::vector<float> one(static_cast<size_t>(n));
      matrix.multiply(x.data() + i * k, 1, one.data());
      EXPECT_EQ(std::memcmp(one.data(), all.data() + i * n, sizeof(float) * n), 0) << i;
    }
  }
}

TEST(Dense, ThreadsDoNotMatter) {
  const int64_t n = 700;
  const int64_t k = 1030;
  for (const ComputeType type : {ComputeType::f32, ComputeType::bf16}) {
    DenseMatrix matrix(n, k, type);
    matrix.set_rows(0, n, noise(n * k, 5).data());
    for (const int64_t m : {1, 8, 270}) {
      const std::vector<float> x = noise(m * k, 6);
      std::vector<std::vector<float>> results;
      for (const int threads : {1, 2, 4}) {
        tbb::task_arena arena(threads);
        results.emplace_back(static_cast<size_t>(m * n));
        arena.execute([&] { matrix.multiply(x.data(), m, results.back().data()); });
      }
      EXPECT_EQ(results[0], results[1]);
      EXPECT_EQ(results[0], results[2]);
    }
  }
}

TEST(Dense, Bf16ConversionsMatchTheScalarTruth) {
  std::vector<float> values;
  for (uint32_t bits = 0; bits < 0x7f7f0000u; bits += 0x1235u) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    values.push_back(v);
    values.push_back(-v);
  }
  for (const float tie : {1.00390625f, 1.01171875f, -1.00390625f}) values.push_back(tie);
  const auto count = static_cast<int64_t>(values.size());
  std::vector<uint16_t> narrow(values.size());
  narrow_bf16(values.data(), count, narrow.data());
  std::vector<float> wide(values.size());
  widen_bf16(narrow.data(), count, wide.data());
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(narrow[i], f32_to_bf16(values[i])) << values[i];
    ASSERT_EQ(wide[i], bf16_to_f32(narrow[i])) << values[i];
  }
}

TEST(Dense, LoadStacksAndChecks) {
  const std::vector<float> a = noise(5 * 32, 1);
  const std::vector<float> b = noise(3 * 32, 2);
  std::vector<float> bad = b;
  bad[40] = std::numeric_limits<float>::infinity();
  test::GgufWriter writer;
  writer.f32_tensor("a", {32, 5}, a).f32_tensor("b", {32, 3}, b).f32_tensor("bad", {32, 3}, bad);
  const std::string bytes = writer.build();
  const GgufFile file = GgufFile::from_memory(test::as_bytes(bytes), "dense.gguf");
  const DenseMatrix stacked = DenseMatrix::load(file, {"a", "b"}, {5, 3}, 32, ComputeType::f32);
  EXPECT_EQ(stacked.rows(), 8);
  EXPECT_EQ(stacked.bytes(), 8 * 32 * 4);
  std::vector<float> x(32);
  x[7] = 1.0f;
  std::vector<float> y(8);
  stacked.multiply(x.data(), 1, y.data());
  EXPECT_EQ(y[4], a[4 * 32 + 7]);
  EXPECT_EQ(y[6], b[1 * 32 + 7]);

  const auto code = [&](const std::string& name, int64_t rows, int64_t k) {
    try {
      DenseMatrix::load(file, {name}, {rows}, k, ComputeType::bf16);
    } catch (const Error& error) {
      return error.code();
    }
    return ErrorCode::invalid_argument;
  };
  EXPECT_EQ(code("a", 6, 32), ErrorCode::corrupt);
  EXPECT_EQ(code("a", 5, 64), ErrorCode::corrupt);
  EXPECT_EQ(code("none", 5, 32), ErrorCode::not_found);
  EXPECT_EQ(code("bad", 3, 32), ErrorCode::non_finite);
}

// Two tensors of different types stacked, as they are in a file, and their values.
struct Stored {
  std::string bytes;
  std::unique_ptr<GgufFile> file;
  std::vector<float> values;
  DenseMatrix matrix;

  Stored(GgmlType first, GgmlType second, int64_t n_first, int64_t n_second, int64_t k) {
    const std::string a = test::random_rows(first, n_first, k, 11);
    const std::string b = test::random_rows(second, n_second, k, 12);
    const auto ne = [&](int64_t n) {
      return std::vector<uint64_t>{static_cast<uint64_t>(k), static_cast<uint64_t>(n)};
    };
    test::GgufWriter writer;
    writer.tensor({"a", static_cast<uint32_t>(first), ne(n_first), a});
    writer.tensor({"b", static_cast<uint32_t>(second), ne(n_second), b});
    bytes = writer.build();
    file = std::make_unique<GgufFile>(GgufFile::from_memory(test::as_bytes(bytes), "stored.gguf"));
    values.resize(static_cast<size_t>((n_first + n_second) * k));
    dequantize_rows(file->require("a"), 0, n_first, values.data());
    dequantize_rows(file->require("b"), 0, n_second, values.data() + n_first * k);
    matrix = DenseMatrix::load(*file, {"a", "b"}, {n_first, n_second}, k, ComputeType::stored);
  }
};

TEST(Dense, StoredTypesMatchFp64) {
  for (const GgmlType type : test::kTensorTypes) {
    const int64_t k = ggml_type_info(type).block_elements == 1 ? 1093 : 1280;
    const GgmlType other = k == 1280 ? GgmlType::q6_k : GgmlType::f16;
    const Stored s(type, other, 261, 9, k);
    const int64_t n = 270;
    EXPECT_EQ(s.matrix.rows(), n);
    EXPECT_EQ(s.matrix.bytes(),
              s.file->require("a").row_bytes() * 261 + s.file->require("b").row_bytes() * 9);
    const std::vector<float> bias = noise(n, 3);
    for (const int64_t m : {1, 2, 16, 17, 300}) {
      const bool rounded = m > few_rows(ComputeType::stored) && bf16_is_native();
      const std::vector<float> x = noise(m * k, 2);
      std::vector<float> y(static_cast<size_t>(m * n), std::numeric_limits<float>::quiet_NaN());
      s.matrix.multiply(x.data(), m, y.data(), bias.data());
      double worst = 0.0;
      for (const int64_t i : {int64_t{0}, m / 2, m - 1}) {
        for (int64_t j = 0; j < n; ++j) {
          double sum = bias[static_cast<size_t>(j)], norm = 1e-30;
          for (int64_t d = 0; d < k; ++d) {
            float w = s.values[static_cast<size_t>(j * k + d)];
            float v = x[static_cast<size_t>(i * k + d)];
            if (rounded) w = bf16_to_f32(f32_to_bf16(w));
            if (rounded) v = bf16_to_f32(f32_to_bf16(v));
            sum += static_cast<double>(w) * v;
            norm += std::fabs(static_cast<double>(w) * v);
          }
          const double error = std::fabs(y[static_cast<size_t>(i * n + j)] - sum) / norm;
          if (!(error <= worst)) worst = error;
        }
      }
      EXPECT_LT(worst, m > 16 ? 2e-6 : 4e-7) << ggml_type_info(type).name << ", " << m << " rows";
    }
  }
}

// Tiles of W expanded on the way give the very bits that a BF16 copy of W gives.
TEST(Dense, StoredProductsOfManyRowsEqualThoseOfACopy) {
  if (!bf16_is_native()) GTEST_SKIP() << why_bf16_is_not_native();
  const int64_t n = 530, k = 1536, m = 270;
  const Stored s(GgmlType::q4_k, GgmlType::q6_k, 512, 18, k);
  DenseMatrix copy(n, k, ComputeType::bf16);
  copy.set_rows(0, n, s.values.data());
  const std::vector<float> x = noise(m * k, 6);
  std::vector<float> y(static_cast<size_t>(m * n)), want(y.size());
  s.matrix.multiply(x.data(), m, y.data());
  copy.multiply(x.data(), m, want.data());
  EXPECT_EQ(y, want);
}

TEST(Dense, StoredRowsAndThreadsDoNotMatter) {
  const int64_t n = 700, k = 1280;
  const Stored s(GgmlType::q5_k, GgmlType::q5_0, 512, 188, k);
  for (const int64_t m : {1, 8, 270}) {
    const std::vector<float> x = noise(m * k, 6);
    std::vector<std::vector<float>> results;
    for (const int threads : {1, 2, 4}) {
      tbb::task_arena arena(threads);
      results.emplace_back(static_cast<size_t>(m * n));
      arena.execute([&] { s.matrix.multiply(x.data(), m, results.back().data()); });
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
    if (m != 8) continue;
    for (int64_t i = 0; i < m; ++i) {
      std::vector<float> one(static_cast<size_t>(n));
      s.matrix.multiply(x.data() + i * k, 1, one.data());
      EXPECT_EQ(std::memcmp(one.data(), results[0].data() + i * n, sizeof(float) * n), 0) << i;
    }
  }
}

TEST(Dense, StoredWeightsAreCheckedToo) {
  std::string data = test::random_rows(GgmlType::q4_k, 2, 256, 3);
  data[145] = 0x7c;  // d of the second row: infinite
  data[144] = 0;
  test::GgufWriter writer;
  writer.tensor({"w", static_cast<uint32_t>(GgmlType::q4_k), {256, 2}, data});
  const std::string bytes = writer.build();
  const GgufFile file = GgufFile::from_memory(test::as_bytes(bytes), "dense.gguf");
  try {
    DenseMatrix::load(file, {"w"}, {2}, 256, ComputeType::stored);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::non_finite);
  }
}

TEST(Dense, ExplainsWhatRuns) {
  EXPECT_NE(explain_compute(ComputeType::f32).find("arithmetic FP32"), std::string::npos);
  const std::string bf16 = explain_compute(ComputeType::bf16);
  EXPECT_NE(bf16.find(bf16_is_native() ? "rounded to BF16" : "needs AVX-512 BF16 or AMX"),
            std::string::npos);
  const std::string stored = explain_compute(ComputeType::stored);
  EXPECT_NE(stored.find("as the file stores them"), std::string::npos);
  EXPECT_EQ(stored.find("fixed point") != std::string::npos, gemv_vnni_available());
  EXPECT_EQ(stored.find("rounded to BF16") != std::string::npos, bf16_is_native());
}

}  // namespace
}  // namespace thriftattn
