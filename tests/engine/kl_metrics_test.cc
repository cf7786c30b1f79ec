// KL metrics against values worked out by hand and against a plain long-double evaluation.
#include "engine/kl_metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "thriftattn/error.h"

namespace thriftattn {
namespace {

PositionMetrics compare_one(const std::vector<float>& reference, const std::vector<float>& policy,
                            int32_t target) {
  ReferenceBlock block;
  block.set(reference, std::vector<int32_t>{target}, static_cast<int64_t>(reference.size()));
  std::vector<PositionMetrics> out(1);
  block.compare(policy, out);
  return out[0];
}

TEST(KlMetrics, HandComputed) {
  // Reference {1/2, 1/4, 1/4}, policy {1/4, 1/4, 1/2}: KL = 1/2 ln 2 + 0 - 1/4 ln 2.
  const auto ln = [](double x) { return static_cast<float>(std::log(x)); };
  const auto m = compare_one({ln(.5), ln(.25), ln(.25)}, {ln(.25), ln(.25), ln(.5)}, 2);
  EXPECT_NEAR(m.kl, 0.25 * std::log(2.0), 1e-7);
  EXPECT_NEAR(m.nll, std::log(2.0), 1e-7);
  EXPECT_NEAR(m.nll_ref, std::log(4.0), 1e-7);
  EXPECT_FALSE(m.same_top1);
}

TEST(KlMetrics, DirectionIsReferenceToPolicy) {
  // Reference certain of token 0, policy undecided: KL(ref||policy) = ln 2, the other way is huge.
  const auto m = compare_one({50.0f, 0.0f}, {0.0f, 0.0f}, 0);
  EXPECT_NEAR(m.kl, std::log(2.0), 1e-12);
  EXPECT_TRUE(m.same_top1);  // a tie goes to the lower token
}

TEST(KlMetrics, EqualLogitsGiveExactlyZero) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 9);
  std::vector<float> x(50021);
  for (float& v : x) v = normal(random);
  const auto m = compare_one(x, x, 17);
  EXPECT_EQ(m.kl, 0.0);
  EXPECT_EQ(m.nll, m.nll_ref);
  EXPECT_TRUE(m.same_top1);
}

TEST(KlMetrics, ShiftOfAllLogitsIsNoChange) {
  std::vector<float> a, b;
  for (int i = 0; i < 1000; ++i) a.push_back(static_cast<float>(i % 37) * 0.25f);
  for (const float v : a) b.push_back(v + 64.0f);  // exact in FP32
  EXPECT_EQ(compare_one(a, b, 3).kl, 0.0);
}

TEST(KlMetrics, NeverNegativeAndSeesTinyDifferences) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 3);
  for (int round = 0; round < 20; ++round) {
    std::vector<float> a(4001);
    for (float& v : a) v = normal(random);
    auto b = a;
    for (float& v : b) v += 1e-4f * normal(random);
    long double za = 0, zb = 0, kl = 0;
    for (const float v : a) za += std::exp(static_cast<long double>(v));
    for (const float v : b) zb += std::exp(static_cast<long double>(v));
    for (size_t i = 0; i < a.size(); ++i) {
      const long double la = a[i] - std::log(za), lb = b[i] - std::log(zb);
      kl += std::exp(la) * (la - lb);
    }
    const double got = compare_one(a, b, 0).kl;
    EXPECT_GE(got, 0.0);
    EXPECT_GT(got, 1e-9);
    EXPECT_NEAR(got, static_cast<double>(kl), 1e-13);
  }
}

// Differences of one unit in the last place: the true KL is below the rounding of its sum.
TEST(KlMetrics, RoundingDoesNotMakeItNegative) {
  std::mt19937 random(6);
  std::normal_distribution<float> normal(0, 3);
  for (int round = 0; round < 200; ++round) {
    std::vector<float> a(31);
    for (float& v : a) v = normal(random);
    auto b = a;
    const size_t at = random() % b.size();
    b[at] = std::nextafter(b[at], round % 2 == 0 ? 100.0f : -100.0f);
    EXPECT_GE(compare_one(a, b, 0).kl, 0.0);
  }
}

TEST(KlMetrics, LargeLogitsDoNotOverflow) {
  const auto m = compare_one({1e30f, 0.0f, -1e30f}, {1e30f, 5.0f, -1e30f}, 0);
  EXPECT_EQ(m.kl, 0.0);
  EXPECT_EQ(m.nll, 0.0);
}

TEST(KlMetrics, MinusInfinityIsATokenThatCannotCome) {
  const float none = -std::numeric_limits<float>::infinity();
  const auto m = compare_one({0.0f, 0.0f, none}, {0.0f, 0.0f, 0.0f}, 1);
  EXPECT_NEAR(m.kl, std::log(1.5), 1e-12);
  EXPECT_EQ(compare_one({0.0f, none}, {0.0f, none}, 0).kl, 0.0);
  // The policy rules out what the reference expects.
  EXPECT_EQ(compare_one({0.0f, 0.0f}, {0.0f, none}, 0).kl, std::numeric_limits<double>::infinity());
}

TEST(KlMetrics, NonFiniteLogitsAreErrors) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> good = {1.0f, 2.0f, 3.0f};
  for (const std::vector<float>& bad : std::vector<std::vector<float>>{{nan, 1, 2},
                                                                       {1, nan, 2},
                                                                       {1, 2, nan},
                                                                       {nan, nan, nan},
                                                                       {inf, 0, 0},
                                                                       {-inf, -inf, -inf}}) {
    EXPECT_THROW(compare_one(bad, good, 0), Error);
    EXPECT_THROW(compare_one(good, bad, 0), Error);
  }
}

TEST(KlMetrics, ShapesAndTargetsAreChecked) {
  EXPECT_THROW(compare_one({1.0f, 2.0f}, {1.0f, 2.0f}, 2), Error);
  EXPECT_THROW(compare_one({1.0f, 2.0f}, {1.0f, 2.0f}, -1), Error);
  EXPECT_THROW(compare_one({1.0f, 2.0f}, {1.0f}, 0), Error);
}

TEST(KlMetrics, RowsKeepTheirOwnTargets) {
  ReferenceBlock block;
  const std::vector<float> logits = {0, 1, 2, 3, 2, 1};
  block.set(logits, std::vector<int32_t>{0, 2}, 3);
  std::vector<PositionMetrics> out(2);
  block.compare(logits, out);
  const double z0 = std::log(1 + std::exp(1.0) + std::exp(2.0));
  const double z1 = std::log(std::exp(1.0) + std::exp(2.0) + std::exp(3.0));
  EXPECT_NEAR(out[0].nll, z0 - 0, 1e-12);
  EXPECT_NEAR(out[1].nll, z1 - 1, 1e-12);
}

TEST(KlMetrics, Summary) {
  MetricsCollector collector;
  std::vector<PositionMetrics> metrics;
  for (int i = 1; i <= 100; ++i) {
    metrics.push_back({.kl = i * 0.01, .nll = 1.5, .nll_ref = 1.25, .same_top1 = i % 4 != 0});
  }
  collector.add(std::span(metrics).first(30));
  collector.add(std::span(metrics).last(70));
  const MetricsSummary s = collector.summary();
  EXPECT_EQ(s.positions, 100);
  EXPECT_NEAR(s.kl_mean, 0.505, 1e-12);
  EXPECT_NEAR(s.kl_p99, 0.9901, 1e-12);
  EXPECT_NEAR(s.kl_p999, 0.99901, 1e-12);
  EXPECT_NEAR(s.delta_nll, 0.25, 1e-12);
  EXPECT_NEAR(s.perplexity, std::exp(1.5), 1e-12);
  EXPECT_NEAR(s.top1_agreement, 0.75, 1e-12);
  EXPECT_THROW(MetricsCollector().summary(), Error);
}

TEST(KlMetrics, Quantile) {
  EXPECT_EQ(quantile({7}, 0.99), 7);
  EXPECT_EQ(quantile({3, 1, 2}, 0), 1);
  EXPECT_EQ(quantile({3, 1, 2}, 1), 3);
  EXPECT_EQ(quantile({3, 1, 2}, 0.5), 2);
  EXPECT_DOUBLE_EQ(quantile({4, 1, 2, 3}, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(quantile({10, 0}, 0.75), 7.5);
  EXPECT_THROW(quantile({}, 0.5), Error);
  EXPECT_THROW(quantile({1}, 1.5), Error);
  EXPECT_THROW(quantile({1}, std::nan("")), Error);
}

}  // namespace
}  // namespace thriftattn
