// The decision rules in isolation: strictness, forcing, reach, ties, and read costs.
#include <gtest/gtest.h>

#include <cmath>

#include "support/attention_case.h"
#include "precision/block_score.h"
#include "precision/budget_rule.h"
#include "precision/mass_cap.h"
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

TEST(BudgetRule, ANumberOfPagesStandsInForTheFraction) {
  const std::vector<float> scores{1, 5, 3, 5, 3, 0};
  const std::vector<uint8_t> all(6, 1);
  EXPECT_EQ(select_by_budget(scores, all, {.pages = 1}), (std::vector<uint8_t>{0, 1, 0, 0, 0, 0}));
  EXPECT_EQ(select_by_budget(scores, all, {.fraction = 1.0, .pages = 2}),
            (std::vector<uint8_t>{0, 1, 0, 1, 0, 0}));
  EXPECT_EQ(select_by_budget(scores, all, {.pages = int64_t{1} << 40}), all);
  EXPECT_EQ(select_by_budget({}, {}, {.pages = 3}), std::vector<uint8_t>{});
}

TEST(MassCap, RaisesTheThresholdToTheBestPageLeftOut) {
  const std::vector<float> masses{0.1f, 0.4f, 0.05f, 0.3f, 0.02f};
  EXPECT_EQ(capped_promote(masses, 0.02f, 5), 0.02f);
  EXPECT_EQ(capped_promote(masses, 0.02f, 4), 0.02f);  // 0.02 itself is not above
  EXPECT_EQ(capped_promote(masses, 0.02f, 3), 0.05f);
  EXPECT_EQ(capped_promote(masses, 0.02f, 1), 0.3f);
  EXPECT_EQ(capped_promote(masses, 0.02f, 0), 0.4f);  // nothing is strictly above the best
  EXPECT_EQ(capped_promote({}, 0.02f, 0), 0.02f);
  // Equals at the edge: promoting one of them would need a tie-break, so none is.
  EXPECT_EQ(capped_promote({0.2f, 0.2f, 0.2f, 0.5f}, 0.02f, 2), 0.2f);
}

TEST(MassCap, IsRoundedUpAsBudgetsAre) {
  EXPECT_EQ(promotion_cap(0.05, 100), 5);
  EXPECT_EQ(promotion_cap(0.05, 101), 6);
  EXPECT_EQ(promotion_cap(0.05, 1), 1);
  EXPECT_EQ(promotion_cap(0.05, 0), 0);
  EXPECT_EQ(promotion_cap(0.0, 100), 0);
  EXPECT_EQ(promotion_cap(1.0, 100), 100);
}

// Hand-made page of two tokens and two dimensions, two query columns.
TEST(BlockScores, FollowTheirDefinitions) {
  const float k[] = {1, -2, 3, 6};       // tokens (1, -2) and (3, 6)
  const float q[] = {2, -1, 1, 0.5f};    // columns (2, 1) and (-1, 0.5)
  const float offset[] = {10, 20};
  float out[2];
  const ScoredPage page{.k = k, .tokens = 2, .dim = 2, .index = 7};
  const ScoredQueries queries{.q = q, .cols = 2, .offset = offset};
  block_scores(BlockScore::mean, page, queries, out);
  EXPECT_EQ(out[0], 10);
  EXPECT_EQ(out[1], 20);
  block_scores(BlockScore::local, page, queries, out);
  EXPECT_EQ(out[0], 7);
  // Bounds: d0 in [1, 3], d1 in [-2, 6].
  block_scores(BlockScore::quest, page, queries, out);
  EXPECT_EQ(out[0], 10 + 2 * 3 + 1 * 6);
  EXPECT_EQ(out[1], 20 + -1 * 1 + 0.5f * 6);
  // Means 2 and 2, variances 1 and 16.
  block_scores(BlockScore::variance, page, queries, out);
  EXPECT_EQ(out[0], 10 + (2 * 2 + 1 * 2) + 0.5f * (4 * 1 + 1 * 16));
  EXPECT_EQ(out[1], 20 + (-1 * 2 + 0.5f * 2) + 0.5f * (1 * 1 + 0.25f * 16));
}

}  // namespace
}  // namespace thriftattn
