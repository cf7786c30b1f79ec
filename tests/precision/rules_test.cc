// The decision rules in isolation: strictness, forcing, reach, ties, and read costs.
#include <gtest/gtest.h>

#include <cmath>

#include "support/attention_case.h"
#include "precision/budget_rule.h"
#include "precision/mass_rule.h"

namespace thriftattn {
namespace {

TEST(MassRule, ComparesStrictly) {
  const MassRule rule{0.02f, 0.001f};
  const PageFacts facts{.has_residual = true, .wholly_visible = true};
  EXPECT_EQ(read_by_mass(rule, facts, 0.02f), PageRead::base);
  EXPECT_EQ(read_by_mass(rule, facts, std::nextafter(0.02f, 1.0f)), PageRead::full);
  EXPECT_EQ(read_by_mass(rule, facts, 0.001f), PageRead::skip);
  EXPECT_EQ(read_by_mass(rule, facts, std::nextafter(0.001f, 1.0f)), PageRead::base);
  EXPECT_EQ(read_by_mass({0.02f, 0.0f}, facts, 0.0f), PageRead::base);  // 0 = never skip
}

TEST(MassRule, FactsOverrideMass) {
  const MassRule rule{0.02f, 0.001f};
  EXPECT_EQ(read_by_mass(rule, {.forced_full = true, .wholly_visible = true}, 0.0f), PageRead::full);
  EXPECT_EQ(read_by_mass(rule, {.wholly_visible = true}, 0.9f), PageRead::base);
  EXPECT_EQ(read_by_mass(rule, {.has_residual = true, .wholly_visible = false}, 0.0f),
            PageRead::base);
}

TEST(MassRule, ReachDependsOnTheQueryAlone) {
  const LayerPolicy sealed = testing::sealed_policy(64, 128);
  EXPECT_TRUE(residual_in_reach(sealed, 0, 10'000));
  EXPECT_FALSE(residual_in_reach(sealed, 1, 10'000));
  // 640 tokens visible: recent begins at token 512, so page 7 (448..511) is just out of reach.
  EXPECT_FALSE(residual_in_reach(sealed, 7, 640));
  EXPECT_TRUE(residual_in_reach(sealed, 7, 639));
  EXPECT_TRUE(residual_in_reach(testing::layered_policy(0.02, 0), 7, 640));
}

TEST(MassRule, WindowEdgeIsNeverSkipped) {
  const LayerShape shape{.kv_heads = 1, .q_heads = 1, .head_dim_k = 64, .head_dim_v = 64};
  const LayerPolicy policy = testing::layered_policy(0.02, 0.001);
  const PageLayout layout = make_page_layout(shape, policy);
  // 640 visible tokens, window 200: tokens 440..639; page 6 (384..447) is cut, page 7 is whole.
  EXPECT_FALSE(page_facts(layout, policy, 6, 640, 200, true).wholly_visible);
  EXPECT_TRUE(page_facts(layout, policy, 7, 640, 200, true).wholly_visible);
  LayerPolicy uncentred = policy;
  uncentred.center = false;  // no mean of V to stand for a skipped page
  EXPECT_FALSE(page_facts(layout, uncentred, 7, 640, 0, true).wholly_visible);
}

TEST(BudgetRule, TakesTheBestAndTheLowerIndexOfEquals) {
  const std::vector<float> scores{1, 5, 3, 5, 3, 0};
  const std::vector<uint8_t> all(6, 1);
  EXPECT_EQ(select_by_budget(scores, all, {.fraction = 0.5}), (std::vector<uint8_t>{0, 1, 1, 1, 0, 0}));
  EXPECT_EQ(select_by_budget(scores, all, {.fraction = 0.01}), (std::vector<uint8_t>{0, 1, 0, 0, 0, 0}));
  EXPECT_EQ(select_by_budget(scores, all, {.fraction = 0.0}), std::vector<uint8_t>(6, 0));
  EXPECT_EQ(select_by_budget(scores, all, {.fraction = 1.0}), all);
  const std::vector<uint8_t> some{1, 0, 1, 0, 1, 1};
  EXPECT_EQ(select_by_budget(scores, some, {.fraction = 0.5}), (std::vector<uint8_t>{0, 0, 1, 0, 1, 0}));
}

}  // namespace
}  // namespace thriftattn
