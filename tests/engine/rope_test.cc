// RoPE against its formula, in both layouts.
#include "engine/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

namespace thriftattn {
namespace {

std::vector<float> ramp(int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  std::iota(x.begin(), x.end(), 1.0f);
  return x;
}

TEST(Rope, FrequenciesFollowTheFormula) {
  const RopeConfig config{.dims = 8, .freq_base = 10000.0, .linear_factor = 4.0};
  const std::vector<double> f = rope_frequencies(config, {});
  ASSERT_EQ(f.size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(f[i], std::pow(10.0, -i) / 4.0, 1e-12);
  RopeConfig llama3 = config;
  llama3.freq_factors = true;
  EXPECT_NEAR(rope_frequencies(llama3, {1, 2, 4, 8})[3], 1e-3 / 32.0, 1e-12);
}

TEST(Rope, Interleaved) {
  const RopeConfig config{.dims = 6, .freq_base = 100.0};
  const RopeTable table(rope_frequencies(config, {}), 10, 3);
  std::vector<float> x = ramp(8);
  apply_rope(table, 2, RopeLayout::interleaved, x.data());
  for (int i = 0; i < 3; ++i) {
    const double angle = 12.0 * std::pow(100.0, -2.0 * i / 6.0);
    const double a = 2 * i + 1;
    const double b = 2 * i + 2;
    EXPECT_NEAR(x[2 * i], a * std::cos(angle) - b * std::sin(angle), 1e-5);
    EXPECT_NEAR(x[2 * i + 1], a * std::sin(angle) + b * std::cos(angle), 1e-5);
  }
  EXPECT_EQ(x[6], 7.0f);  // beyond dims
  EXPECT_EQ(x[7], 8.0f);
}

TEST(Rope, Halves) {
  const RopeConfig config{.dims = 6, .freq_base = 100.0};
  const RopeTable table(rope_frequencies(config, {}), 0, 6);
  std::vector<float> x = ramp(8);
  apply_rope(table, 5, RopeLayout::halves, x.data());
  for (int i = 0; i < 3; ++i) {
    const double angle = 5.0 * std::pow(100.0, -2.0 * i / 6.0);
    const double a = i + 1;
    const double b = i + 4;
    EXPECT_NEAR(x[i], a * std::cos(angle) - b * std::sin(angle), 1e-5);
    EXPECT_NEAR(x[i + 3], a * std::sin(angle) + b * std::cos(angle), 1e-5);
  }
  EXPECT_EQ(x[6], 7.0f);
  EXPECT_EQ(x[7], 8.0f);
}

TEST(Rope, FarPositionsKeepTheirPrecision) {
  const RopeConfig config{.dims = 4, .freq_base = 1e6};
  const int64_t position = 1000001;
  const RopeTable table(rope_frequencies(config, {}), position, 1);
  EXPECT_NEAR(table.cos[0], std::cos(1000001.0), 1e-6);
  EXPECT_NEAR(table.sin[1], std::sin(1000001.0 * 1e-3), 1e-6);
}

}  // namespace
}  // namespace thriftattn
