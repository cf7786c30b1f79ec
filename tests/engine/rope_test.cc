// RoPE against its formula, in both layouts.
#include "engine/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <tuple>

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

// The pair that turns `turns` times within the original context, found by bisection.
double pair_by_bisection(double base, double dims, double context, double turns) {
  double low = -1000.0, high = 1000.0;
  for (int i = 0; i < 200; ++i) {
    const double middle = (low + high) / 2;
    const double have = context / (2.0 * M_PI * std::pow(base, 2.0 * middle / dims));
    (have > turns ? low : high) = middle;
  }
  return low;
}

TEST(Rope, YarnFollowsTheFormula) {
  for (const auto& [dims, base, context, factor] :
       {std::tuple{128, 1e6, 32768, 4.0}, {64, 1e4, 2048, 16.0}, {32, 500000.0, 16384, 2.0},
        {32, 1e4, 150, 8.0}}) {
    for (const bool freq_factors : {false, true}) {
      RopeConfig config{.dims = dims, .freq_base = base, .linear_factor = factor};
      config.yarn = YarnConfig{.original_context = context, .beta_fast = 20.0, .beta_slow = 1.5};
      config.freq_factors = freq_factors;
      std::vector<float> divisors(static_cast<size_t>(dims / 2));
      for (size_t i = 0; i < divisors.size(); ++i) divisors[i] = 1.0f + 0.25f * (i % 3);
      const std::vector<double> f = rope_frequencies(config, divisors);
      ASSERT_EQ(f.size(), static_cast<size_t>(dims / 2));
      const double from =
          std::max(0.0, std::floor(pair_by_bisection(base, dims, context, 20.0)));
      const double to =
          std::min(dims - 1.0, std::ceil(pair_by_bisection(base, dims, context, 1.5)));
      ASSERT_LT(from, to);
      for (int i = 0; i < dims / 2; ++i) {
        const double theta = 1.0 / std::pow(base, 2.0 * i / dims) /
                             (freq_factors ? divisors[static_cast<size_t>(i)] : 1.0);
        const double share = i <= from ? 0.0 : i >= to ? 1.0 : (i - from) / (to - from);
        EXPECT_NEAR(f[static_cast<size_t>(i)] / theta, 1.0 - share + share / factor, 1e-9) << i;
      }
    }
  }
}

// What Qwen's models are stretched with, from the paper's numbers: with base 10^6 and 128 elements,
// 32 turns in 32768 tokens are at pair 23.6 and one turn at pair 39.7.
TEST(Rope, YarnOfQwen) {
  RopeConfig config{.dims = 128, .freq_base = 1e6, .linear_factor = 4.0};
  config.yarn = YarnConfig{.original_context = 32768};
  const std::vector<double> f = rope_frequencies(config, {});
  const auto ratio = [&](int i) { return f[static_cast<size_t>(i)] * std::pow(1e6, i / 64.0); };
  EXPECT_NEAR(ratio(0), 1.0, 1e-12);
  EXPECT_NEAR(ratio(23), 1.0, 1e-12);
  EXPECT_NEAR(ratio(24), 1.0 - 0.75 / 17, 1e-12);
  EXPECT_NEAR(ratio(39), 1.0 - 0.75 * 16 / 17, 1e-12);
  EXPECT_NEAR(ratio(40), 0.25, 1e-12);
  EXPECT_NEAR(ratio(63), 0.25, 1e-12);
  EXPECT_NEAR(rope_magnitude(config), 1.1386294361119891, 1e-12);
  config.yarn->attn_factor = 0.5;
  EXPECT_NEAR(rope_magnitude(config), 0.5693147180559945, 1e-12);
  EXPECT_EQ(rope_magnitude({.dims = 128, .linear_factor = 4.0}), 1.0);
}

TEST(Rope, MagnitudeGrowsTheTurnedPart) {
  const RopeConfig config{.dims = 6, .freq_base = 100.0};
  const RopeTable plain(rope_frequencies(config, {}), 10, 3);
  const RopeTable grown(rope_frequencies(config, {}), 10, 3, 1.25);
  std::vector<float> a = ramp(8), b = ramp(8);
  apply_rope(plain, 2, RopeLayout::halves, a.data());
  apply_rope(grown, 2, RopeLayout::halves, b.data());
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(b[i], 1.25 * a[i], 1e-5);
  EXPECT_EQ(b[6], 7.0f);
}

}  // namespace
}  // namespace thriftattn
