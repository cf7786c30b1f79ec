// The K transform: the Hadamard matrix itself, the order of its sums, equalising that leaves
// q . k as it was, the page mean, and every SIMD target bit-equal to the scalar truth.
#include "formats/k_transform.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <vector>

#include "test_util.h"

namespace thriftattn {
namespace {

using test::for_each_target;
using Floats = std::vector<float>;

TEST(KTransform, Block) {
  EXPECT_EQ(hadamard_block(64), 64);
  EXPECT_EQ(hadamard_block(80), 16);
  EXPECT_EQ(hadamard_block(96), 32);
  EXPECT_EQ(hadamard_block(192), 64);
  EXPECT_EQ(hadamard_block(256), 256);
}

// Row i, column j of the normalised matrix: (-1)^popcount(i & j) / sqrt(n), block by block.
TEST(KTransform, IsTheHadamardMatrix) {
  for (const int64_t dim : {1, 2, 4, 8, 16, 64, 80, 96, 128, 256}) {
    const int64_t n = hadamard_block(dim);
    for_each_target([&] {
      for (int64_t j = 0; j < dim; ++j) {
        Floats x(static_cast<size_t>(dim), 0.0f);
        x[static_cast<size_t>(j)] = 1.0f;
        hadamard_rows(x.data(), 1, dim, dim);
        for (int64_t i = 0; i < dim; ++i) {
          const bool odd = std::popcount(static_cast<uint64_t>(i % n & j % n)) % 2 != 0;
          const double want = i / n != j / n ? 0.0 : (odd ? -1.0 : 1.0) / std::sqrt(n);
          ASSERT_NEAR(x[static_cast<size_t>(i)], want, 5e-8) << dim << ": " << i << ", " << j;
        }
      }
    });
  }
}

TEST(KTransform, TwiceIsTheIdentityAndNormsAreKept) {
  for (const int64_t dim : {64, 80, 96, 128, 192, 256}) {
    const int64_t rows = 9;
    const Floats x = test::gaussian(rows * dim, 1);
    Floats y = x;
    hadamard_rows(y.data(), rows, dim, dim);
    EXPECT_GT(test::relative_rms(x, y), 0.5);  // it does something
    for (int64_t r = 0; r < rows; ++r) {
      double nx = 0.0, ny = 0.0;
      for (int64_t i = r * dim; i < (r + 1) * dim; ++i) {
        nx += static_cast<double>(x[static_cast<size_t>(i)]) * x[static_cast<size_t>(i)];
        ny += static_cast<double>(y[static_cast<size_t>(i)]) * y[static_cast<size_t>(i)];
      }
      EXPECT_NEAR(ny / nx, 1.0, 1e-6);
    }
    hadamard_rows(y.data(), rows, dim, dim);
    EXPECT_LT(test::relative_rms(x, y), 4e-7) << dim;
  }
}

// Stride 1 comes first: 1e8 swallows 1 at once. (Stride 2 first would give 1, -1, 1e8, 1e8.)
TEST(KTransform, ButterfliesStartAtStrideOne) {
  for_each_target([&] {
    Floats x = {1e8f, 1.0f, -1e8f, 1.0f};
    hadamard_rows(x.data(), 1, 4, 4);
    EXPECT_EQ(x, (Floats{0.0f, 0.0f, 1e8f, 1e8f}));
    // And one scaling at the end, by FP32(1 / sqrt(8)).
    Floats y = {3.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    hadamard_rows(y.data(), 1, 8, 8);
    EXPECT_EQ(y[0], 4.0f * 0.353553390593f);
    EXPECT_EQ(y[1], 2.0f * 0.353553390593f);
  });
}

TEST(KTransform, DotProductsAreKept) {
  for (const int64_t dim : {64, 80, 96, 128, 256}) {
    const size_t n = static_cast<size_t>(dim);
    const Floats q = test::gaussian(dim, 2), k = test::gaussian(dim, 3);
    Floats s = test::gaussian(dim, 4), q2(n), k2(n);
    for (float& v : s) v = std::exp(v);
    equalize_rotate_rows(q.data(), dim, 1, dim, s.data(), true, true, q2.data(), dim);
    equalize_rotate_rows(k.data(), dim, 1, dim, s.data(), false, true, k2.data(), dim);
    double dot = 0.0, dot2 = 0.0, size = 0.0, moved = 0.0;
    for (size_t i = 0; i < n; ++i) {
      dot += static_cast<double>(q[i]) * k[i];
      dot2 += static_cast<double>(q2[i]) * k2[i];
      size += std::fabs(static_cast<double>(q[i]) * k[i]);
      moved += std::fabs(static_cast<double>(k2[i]) - k[i]);
    }
    EXPECT_NEAR(dot, dot2, 1e-6 * size) << dim;
    EXPECT_GT(moved, 1.0);
  }
}

TEST(KTransform, EqualizeAlone) {
  const Floats x = {1.0f, 2.0f, 3.0f, -4.0f}, s = {2.0f, 4.0f, 0.5f, 1.0f};
  Floats y(4);
  equalize_rotate_rows(x.data(), 4, 1, 4, s.data(), false, false, y.data(), 4);
  EXPECT_EQ(y, (Floats{2.0f, 8.0f, 1.5f, -4.0f}));
  equalize_rotate_rows(x.data(), 4, 1, 4, s.data(), true, false, y.data(), 4);
  EXPECT_EQ(y, (Floats{0.5f, 0.5f, 6.0f, -4.0f}));
  equalize_rotate_rows(x.data(), 4, 1, 4, nullptr, true, false, y.data(), 4);
  EXPECT_EQ(y, x);
}

TEST(KTransform, SimdGivesTheSameBits) {
  for (const int64_t dim : {1, 2, 4, 12, 16, 64, 80, 96, 128, 192, 256}) {
    const int64_t rows = 3, in_stride = dim + 5, out_stride = dim + 1;
    Floats s = test::gaussian(dim, 6);
    for (float& v : s) v = std::exp(v);
    for (const test::Data& data : test::hostile_data(rows * in_stride, 300)) {
      if (data.name == "huge" || data.name == "bits") continue;  // sums may overflow
      for (int variant = 0; variant < 6; ++variant) {
        const float* scale = variant < 4 ? s.data() : nullptr;
        const bool invert = variant % 2 != 0, rotate = variant / 2 != 1;
        Floats want(static_cast<size_t>(rows * out_stride), -7.0f);
        equalize_rotate_rows_scalar(data.x.data(), in_stride, rows, dim, scale, invert, rotate,
                                    want.data(), out_stride);
        for_each_target([&] {
          Floats got(want.size(), -7.0f);
          equalize_rotate_rows(data.x.data(), in_stride, rows, dim, scale, invert, rotate,
                               got.data(), out_stride);
          EXPECT_TRUE(test::same_bits(got, want)) << data.name << " dim " << dim << " v" << variant;
          Floats in_place = data.x;
          equalize_rotate_rows(in_place.data(), in_stride, rows, dim, scale, invert, rotate,
                               in_place.data(), in_stride);
          for (int64_t r = 0; r < rows; ++r) {
            EXPECT_EQ(std::memcmp(&in_place[static_cast<size_t>(r * in_stride)],
                                  &want[static_cast<size_t>(r * out_stride)],
                                  static_cast<size_t>(dim) * sizeof(float)),
                      0);
          }
        });
      }
    }
  }
}

// Adjacent pairs, level by level; a row without a partner moves up as it is.
TEST(KTransform, PageMeanOrder) {
  const auto mean = [](const Floats& column) {
    float m = -7.0f;
    page_mean(column.data(), static_cast<int64_t>(column.size()), 1, &m);
    return m;
  };
  EXPECT_EQ(mean({5.0f}), 5.0f);
  EXPECT_EQ(mean({1.0f, 2.0f, 4.5f}), 2.5f);
  EXPECT_EQ(mean({1e8f, 1.0f, -1e8f, 1.0f}), 0.0f);        // in sequence: .25; by halves: .5
  EXPECT_EQ(mean({1.0f, 1e8f, -1e8f}), 0.0f);              // 1 + (1e8 - 1e8) would give 1/3
  EXPECT_EQ(mean({0.0f, 0.0f, 1.0f, 1e8f, -1e8f}), 0.0f);  // two and three would give .2
}

TEST(KTransform, PageMeanIsTheMeanOnEveryTarget) {
  for (const int64_t dim : {1, 16, 64, 80, 128, 256}) {
    for (const int64_t rows : {1, 2, 3, 5, 7, 8, 9, 16, 23, 24, 63, 64, 100}) {
      const Floats x = test::gaussian(rows * dim, 8);
      Floats want(static_cast<size_t>(dim));
      page_mean_scalar(x.data(), rows, dim, want.data());
      for (int64_t d = 0; d < dim; ++d) {
        double sum = 0.0;
        for (int64_t r = 0; r < rows; ++r) sum += x[static_cast<size_t>(r * dim + d)];
        ASSERT_NEAR(want[static_cast<size_t>(d)], sum / static_cast<double>(rows), 1e-6);
      }
      for_each_target([&] {
        Floats got(static_cast<size_t>(dim) + 1, -7.0f);
        page_mean(x.data(), rows, dim, got.data());
        EXPECT_EQ(got.back(), -7.0f);
        got.pop_back();
        EXPECT_TRUE(test::same_bits(got, want)) << rows << " x " << dim;
      });
    }
  }
}

}  // namespace
}  // namespace thriftattn
