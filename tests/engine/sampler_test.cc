// Greedy and top-p sampling: distribution, determinism, refusals.
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "thriftattn/error.h"

namespace thriftattn {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::array<int, 4> draw(const SamplerOptions& options, int count) {
  const std::array<float, 4> logits = {std::log(4.0f), std::log(3.0f), std::log(2.0f), 0.0f};
  Sampler sampler(options);
  std::array<int, 4> seen{};
  for (int i = 0; i < count; ++i) ++seen[static_cast<size_t>(sampler.sample(logits))];
  return seen;
}

TEST(Sampler, GreedyTakesTheLowestIdOfATie) {
  Sampler sampler({});
  EXPECT_EQ(sampler.sample(std::array<float, 4>{1.0f, 3.0f, 3.0f, -kInf}), 1);
}

TEST(Sampler, TemperatureOneFollowsTheSoftmax) {
  const auto seen = draw({.temperature = 1.0f, .seed = 5}, 20000);
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(seen[i] / 20000.0, (4.0 - i) / 10.0, 0.012) << i;
}

TEST(Sampler, TemperatureSharpens) {
  // Weights to the power of 2: 16, 9, 4, 1.
  const auto seen = draw({.temperature = 0.5f, .seed = 5}, 20000);
  EXPECT_NEAR(seen[0] / 20000.0, 16.0 / 30.0, 0.012);
  EXPECT_NEAR(seen[3] / 20000.0, 1.0 / 30.0, 0.006);
}

TEST(Sampler, TopPKeepsTheSmallestSufficientSet) {
  const auto two = draw({.temperature = 1.0f, .top_p = 0.65f, .seed = 1}, 5000);
  EXPECT_EQ(two[2] + two[3], 0);
  EXPECT_NEAR(two[0] / 5000.0, 4.0 / 7.0, 0.03);
  const auto three = draw({.temperature = 1.0f, .top_p = 0.75f, .seed = 1}, 5000);
  EXPECT_GT(three[2], 0);
  EXPECT_EQ(three[3], 0);
  const auto one = draw({.temperature = 1.0f, .top_p = 0.01f, .seed = 1}, 100);
  EXPECT_EQ(one[0], 100);
}

TEST(Sampler, SeedDecides) {
  const std::array<float, 4> logits = {0.0f, 0.1f, 0.2f, 0.3f};
  const auto sequence = [&](uint64_t seed) {
    Sampler sampler({.temperature = 1.0f, .top_p = 0.95f, .seed = seed});
    std::vector<int32_t> ids;
    for (int i = 0; i < 32; ++i) ids.push_back(sampler.sample(logits));
    return ids;
  };
  EXPECT_EQ(sequence(42), sequence(42));
  EXPECT_NE(sequence(42), sequence(43));
  // Golden: the same on every platform.
  Sampler sampler({.temperature = 1.0f, .seed = 1});
  std::vector<int32_t> first;
  for (int i = 0; i < 8; ++i) first.push_back(sampler.sample(logits));
  EXPECT_EQ(first, (std::vector<int32_t>{0, 0, 2, 0, 1, 3, 2, 0}));
}

TEST(Sampler, Refuses) {
  EXPECT_THROW(Sampler({.temperature = -1.0f}), Error);
  EXPECT_THROW(Sampler({.temperature = kNan}), Error);
  EXPECT_THROW(Sampler({.top_p = 0.0f}), Error);
  EXPECT_THROW(Sampler({.top_p = 1.5f}), Error);
  for (const float temperature : {0.0f, 1.0f}) {
    Sampler sampler({.temperature = temperature});
    EXPECT_THROW(sampler.sample(std::array<float, 2>{1.0f, kNan}), Error);
    EXPECT_THROW(sampler.sample(std::array<float, 2>{-kInf, -kInf}), Error);
    EXPECT_THROW(sampler.sample(std::array<float, 2>{kInf, 0.0f}), Error);
    EXPECT_THROW(sampler.sample({}), Error);
    EXPECT_EQ(sampler.sample(std::array<float, 2>{-kInf, 0.0f}), 1);
  }
}

}  // namespace
}  // namespace thriftattn
