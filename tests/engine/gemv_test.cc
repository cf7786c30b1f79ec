// Products of few rows straight from every tensor type, against FP64 on the dequantised values: the
// Highway kernels on every target of this machine, and the integer kernels where it has them.
#include "engine/gemv.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/float_convert.h"
#include "engine/gemv_vnni.h"
#include "engine/random_blocks.h"
#include "formats/test_util.h"

namespace thriftattn {
namespace {

using test::kTensorTypes;
using test::random_rows;

struct Shape {
  int64_t n, k, m;
};

std::vector<Shape> shapes_of(GgmlType type) {
  switch (ggml_type_info(type).block_elements) {
    case 256:
      return {{1, 256, 1}, {9, 768, 1}, {4, 512, 2}, {7, 256, 3}, {6, 1280, 16}};
    case 32:
      return {{1, 32, 1}, {9, 288, 1}, {4, 544, 2}, {7, 224, 3}, {6, 1120, 16}, {5, 64, 5}};
    default:
      return {{1, 1, 1}, {9, 77, 1}, {4, 515, 2}, {7, 16, 3}, {6, 1030, 16}, {2, 31, 4}};
  }
}

// What y is off by, relative to the norms of the vectors that it is the product of.
double worst_error(const GemvArgs& a, const std::vector<float>& y) {
  std::vector<float> w(static_cast<size_t>(a.n * a.k));
  dequantize(a.type, a.w, a.n * a.k, w.data());
  double worst = 0.0;
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t j = 0; j < a.n; ++j) {
      double sum = 0.0, norm = 1e-30;
      for (int64_t d = 0; d < a.k; ++d) {
        const double term =
            static_cast<double>(w[static_cast<size_t>(j * a.k + d)]) * a.x[i * a.k + d];
        sum += term;
        norm += std::fabs(term);
      }
      const double error = std::fabs(y[static_cast<size_t>(i * a.y_stride + j)] - sum) / norm;
      if (!(error <= worst)) worst = error;  // also NaN
    }
  }
  return worst;
}

struct Case {
  std::string w;
  std::vector<float> x, y;
  GemvArgs args;

  Case(GgmlType type, const Shape& s, uint32_t seed)
      : w(random_rows(type, s.n, s.k, seed)),
        x(test::gaussian(s.m * s.k, seed + 1)),
        y(static_cast<size_t>(s.m * (s.n + 3)), -77.0f) {
    args = {.type = type,
            .w = reinterpret_cast<const uint8_t*>(w.data()),
            .n = s.n,
            .k = s.k,
            .x = x.data(),
            .m = s.m,
            .y = y.data(),
            .y_stride = s.n + 3};
  }
  void run_integers() { gemv_vnni(args, FixedRows(x.data(), args.m, args.k)); }
  void expect_nothing_else_written() const {
    for (size_t i = 0; i < y.size(); ++i) {
      if (static_cast<int64_t>(i) % args.y_stride >= args.n) {
        ASSERT_EQ(y[i], -77.0f);
      }
    }
  }
};

#define SKIP_WITHOUT_VNNI() \
  if (!gemv_vnni_available()) GTEST_SKIP() << "this CPU has no AVX-512 VNNI"

TEST(Gemv, EveryTypeMatchesFp64OnEveryTarget) {
  test::for_each_target([] {
    for (const GgmlType type : kTensorTypes) {
      for (const Shape& s : shapes_of(type)) {
        Case c(type, s, 5);
        gemv(c.args);
        EXPECT_LT(worst_error(c.args, c.y), 4e-7)
            << ggml_type_info(type).name << " " << s.n << " x " << s.k << ", " << s.m << " rows";
        c.expect_nothing_else_written();
      }
    }
  });
}

TEST(Gemv, IntegersMatchFp64) {
  SKIP_WITHOUT_VNNI();
  for (const GgmlType type : kTensorTypes) {
    if (!gemv_vnni_takes(type)) continue;
    for (const Shape& s : shapes_of(type)) {
      Case c(type, s, 5);
      c.run_integers();
      EXPECT_LT(worst_error(c.args, c.y), 4e-7)
          << ggml_type_info(type).name << " " << s.n << " x " << s.k << ", " << s.m << " rows";
      c.expect_nothing_else_written();
    }
  }
}

// Bit for bit the same whatever is computed beside it: other rows of x, other rows of W.
TEST(Gemv, RowsAreIndependent) {
  const auto check = [](GgmlType type, bool integers) {
    Case all(type, {7, 1280, 16}, 8);
    integers ? all.run_integers() : gemv(all.args);
    for (const int64_t m : {1, 2, 3}) {
      for (const int64_t row : {0, 5, 13}) {
        GemvArgs part = all.args;
        std::vector<float> y(static_cast<size_t>(m * part.y_stride));
        part.x += row * part.k;
        part.m = m;
        part.y = y.data();
        part.w +=
            2 * ggml_type_info(type).block_bytes * (part.k / ggml_type_info(type).block_elements);
        part.n = 3;
        integers ? gemv_vnni(part, FixedRows(part.x, m, part.k)) : gemv(part);
        for (int64_t i = 0; i < m; ++i) {
          EXPECT_EQ(std::memcmp(y.data() + i * part.y_stride,
                                all.y.data() + (row + i) * part.y_stride + 2, 3 * sizeof(float)),
                    0)
              << ggml_type_info(type).name << " rows " << row << " to " << row + m;
        }
      }
    }
  };
  test::for_each_target([&] {
    for (const GgmlType type : kTensorTypes) {
      // Without blocks, a pair of rows of W and a single one are the same chain.
      check(type, false);
    }
  });
  for (const GgmlType type : kTensorTypes) {
    if (gemv_vnni_available() && gemv_vnni_takes(type)) check(type, true);
  }
}

// With scales of 1 and x of small integers every step is exact, whatever the codes are.
TEST(Gemv, SmallIntegersAreExact) {
  for (const GgmlType type : kTensorTypes) {
    if (ggml_type_info(type).block_elements == 1) continue;
    Case c(type, {5, 512, 4}, 3);
    c.w = random_rows(type, 5, 512, 3, 1.0f);
    c.args.w = reinterpret_cast<const uint8_t*>(c.w.data());
    for (size_t i = 0; i < c.x.size(); ++i) c.x[i] = static_cast<float>(i * 7 % 5) - 2.0f;
    gemv(c.args);
    EXPECT_EQ(worst_error(c.args, c.y), 0.0) << ggml_type_info(type).name;
    if (!gemv_vnni_available()) continue;
    c.run_integers();
    EXPECT_EQ(worst_error(c.args, c.y), 0.0) << ggml_type_info(type).name << ", integers";
  }
}

// The largest codes against the largest x, of equal and of opposite signs: sums of four must not
// overflow, also where rounding x gives 2^22.
TEST(Gemv, IntegersDoNotOverflow) {
  SKIP_WITHOUT_VNNI();
  for (const uint8_t byte : {uint8_t{0x00}, uint8_t{0x7f}, uint8_t{0x80}, uint8_t{0xff}}) {
    for (const GgmlType type : kTensorTypes) {
      if (!gemv_vnni_takes(type)) continue;
      for (const float x : {0x1.fffffep0f, -0x1.fffffep0f, 1.0f, -1.0f}) {
        Case c(type, {4, 256, 1}, 3);
        c.w = random_rows(type, 4, 256, 3, 1.0f, byte);
        c.args.w = reinterpret_cast<const uint8_t*>(c.w.data());
        c.x.assign(c.x.size(), x);
        c.run_integers();
        EXPECT_LT(worst_error(c.args, c.y), 6e-7) << ggml_type_info(type).name << " " << x;
      }
    }
  }
}

// An outlier costs its own 32 elements precision, not the others.
TEST(Gemv, IntegersKeepOutliersApart) {
  SKIP_WITHOUT_VNNI();
  Case c(GgmlType::q8_0, {3, 288, 1}, 3);
  for (int64_t j = 0; j < 3; ++j) {
    std::memset(&c.w[static_cast<size_t>((j * 9 + 4) * 34)], 0, 34);  // zeros meet the outlier
  }
  c.x[4 * 32 + 7] = 3e9f;
  c.run_integers();
  EXPECT_LT(worst_error(c.args, c.y), 4e-7);
}

TEST(Gemv, IntegersOfZeroTinyAndLargeValues) {
  SKIP_WITHOUT_VNNI();
  Case c(GgmlType::q4_k, {3, 256, 1}, 3);
  c.x.assign(256, 0.0f);
  c.run_integers();
  EXPECT_EQ(c.y[0], 0.0f);
  for (const float size : {1e-30f, 1e30f}) {
    const std::vector<float> x = test::gaussian(256, 4, size);
    std::copy(x.begin(), x.end(), c.x.begin());
    c.run_integers();
    EXPECT_LT(worst_error(c.args, c.y), 4e-7) << size;
  }
  c.x.assign(256, 1e-44f);  // subnormal: gone, but not wrong
  c.run_integers();
  EXPECT_LT(std::fabs(c.y[0]), 1e-38f);
}

// A NaN must arrive where the engine looks for it, not as a plausible number.
TEST(Gemv, WhatIsNotFiniteStaysVisible) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const GgmlType type : kTensorTypes) {
      const int64_t k = 256;
      for (const int64_t at : {int64_t{0}, k - 1}) {
        Case c(type, {5, k, 2}, 3);
        c.x[static_cast<size_t>(k + at)] = bad;
        gemv(c.args);
        for (int64_t j = 0; j < 5; ++j) {
          EXPECT_TRUE(std::isfinite(c.y[static_cast<size_t>(j)]));
          EXPECT_FALSE(std::isfinite(c.y[static_cast<size_t>(c.args.y_stride + j)]));
        }
        if (!gemv_vnni_available() || !gemv_vnni_takes(type)) continue;
        c.run_integers();
        for (int64_t j = 0; j < 5; ++j) {
          EXPECT_TRUE(std::isfinite(c.y[static_cast<size_t>(j)]));
          EXPECT_FALSE(std::isfinite(c.y[static_cast<size_t>(c.args.y_stride + j)]));
        }
      }
    }
  }
}

TEST(Expand, IsBitEqualToTheScalarTruthOnEveryTarget) {
  test::for_each_target([] {
    for (const GgmlType type : kTensorTypes) {
      for (const Shape& s : shapes_of(type)) {
        const std::string data = random_rows(type, s.n, s.k, 9);
        const auto* blocks = reinterpret_cast<const uint8_t*>(data.data());
        const auto count = static_cast<size_t>(s.n * s.k);
        std::vector<float> want(count), wide(count + 1, 5.0f);
        std::vector<uint16_t> narrow(count + 1, uint16_t{7});
        dequantize(type, blocks, s.n * s.k, want.data());
        expand(type, blocks, s.n * s.k, wide.data());
        expand(type, blocks, s.n * s.k, narrow.data());
        ASSERT_EQ(std::memcmp(want.data(), wide.data(), count * sizeof(float)), 0)
            << ggml_type_info(type).name << " " << s.n << " x " << s.k;
        for (size_t i = 0; i < count; ++i) {
          ASSERT_EQ(narrow[i], f32_to_bf16(want[i])) << ggml_type_info(type).name << " " << i;
        }
        EXPECT_EQ(wide[count], 5.0f);
        EXPECT_EQ(narrow[count], 7);
      }
    }
  });
}

}  // namespace
}  // namespace thriftattn
