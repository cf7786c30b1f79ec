// The row operations between matrix products against FP64, at lengths with and without a rest.
#include "engine/vector_ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace thriftattn {
namespace {

std::vector<float> values(int64_t count, double scale) {
  std::vector<float> x;
  for (int64_t i = 0; i < count; ++i) {
    x.push_back(static_cast<float>(scale * std::sin(1.7 * static_cast<double>(i) + 0.3)));
  }
  return x;
}

TEST(VectorOps, RmsNorm) {
  for (const int64_t n : {1, 7, 16, 31, 64, 640}) {
    std::vector<float> x = values(n, 3.0);
    const std::vector<float> w = values(n, 1.5);
    double sum = 0.0;
    for (const float v : x) sum += static_cast<double>(v) * v;
    const double scale = 1.0 / std::sqrt(sum / static_cast<double>(n) + 0.01);
    const std::vector<float> before = x;
    rms_norm(x.data(), w.data(), n, 0.01f, x.data());
    for (int64_t i = 0; i < n; ++i) {
      EXPECT_NEAR(x[i], before[i] * scale * w[i], 3e-6) << n << " " << i;
    }
  }
}

// Squares that overflow FP32 must not turn the row into zeros, nor Inf into numbers.
TEST(VectorOps, RmsNormOfHugeValues) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const int64_t n : {4, 40}) {  // without and with whole vectors
    std::vector<float> x(static_cast<size_t>(n));
    x[0] = 3e25f;
    x[1] = -4e25f;
    const std::vector<float> w(static_cast<size_t>(n), 1.0f);
    std::vector<float> y(static_cast<size_t>(n));
    rms_norm(x.data(), w.data(), n, 1e-6f, y.data());
    EXPECT_NEAR(y[0], 0.6 * std::sqrt(static_cast<double>(n)), 1e-5);
    EXPECT_NEAR(y[1], -0.8 * std::sqrt(static_cast<double>(n)), 1e-5);
    x[2] = inf;
    rms_norm(x.data(), w.data(), n, 1e-6f, y.data());
    EXPECT_FALSE(all_finite(y.data(), n));
  }
}

TEST(VectorOps, Activations) {
  for (const int64_t n : {1, 5, 8, 33}) {
    for (const double scale : {0.01, 2.0, 30.0, 1000.0}) {
      const std::vector<float> gate = values(n, scale);
      const std::vector<float> up = values(n, 0.7);
      std::vector<float> silu(static_cast<size_t>(n)), gelu(static_cast<size_t>(n));
      gated_activation(Activation::silu, gate.data(), up.data(), n, silu.data());
      gated_activation(Activation::gelu_tanh, gate.data(), up.data(), n, gelu.data());
      for (int64_t i = 0; i < n; ++i) {
        const double g = gate[i];
        const double z = std::sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g);
        const double tolerance = 2e-6 * (1.0 + std::fabs(g));
        EXPECT_NEAR(silu[i], g / (1.0 + std::exp(-g)) * up[i], tolerance) << g;
        EXPECT_NEAR(gelu[i], 0.5 * g * (1.0 + std::tanh(z)) * up[i], tolerance) << g;
      }
    }
  }
}

TEST(VectorOps, AddAndSoftCap) {
  std::vector<float> x = values(19, 4.0);
  const std::vector<float> before = x;
  const std::vector<float> y = values(19, 1.0);
  add(x.data(), y.data(), 19);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(x[i], before[i] + y[i]);
  soft_cap(x.data(), 18, 2.0f);
  for (size_t i = 0; i < 18; ++i) {
    EXPECT_NEAR(x[i], 2.0 * std::tanh((before[i] + y[i]) / 2.0), 1e-6);
  }
  EXPECT_EQ(x[18], before[18] + y[18]);
}

TEST(VectorOps, AllFinite) {
  std::vector<float> x = values(20, 1e38);
  EXPECT_TRUE(all_finite(x.data(), 20));
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    x[13] = bad;
    EXPECT_FALSE(all_finite(x.data(), 20));
    EXPECT_TRUE(all_finite(x.data(), 13));
  }
}

}  // namespace
}  // namespace thriftattn
