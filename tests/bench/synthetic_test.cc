// The synthetic data: the policy's own rule finds the fractions that were asked for.
#include "bench/synthetic.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "thriftattn/error.h"

namespace thriftattn::bench {
namespace {

struct Case {
  std::string policy;
  int64_t tokens = 4096, queries = 1;
  int64_t q_heads = 8, kv_heads = 2, head_dim = 64;
  double promoted = 0, skipped = 0;
};

SyntheticSpec spec_of(const Case& c) {
  return {.shape = {.kv_heads = c.kv_heads,
                    .q_heads = c.q_heads,
                    .head_dim_k = c.head_dim,
                    .head_dim_v = c.head_dim},
          .policy = resolve(parse_policy(c.policy), {.layers = 1}).front(),
          .tokens = c.tokens,
          .queries = c.queries,
          .promoted = c.promoted,
          .skipped = c.skipped};
}

AttendStats attend_over(const SyntheticData& data, const SyntheticSpec& spec) {
  using View = TensorView<const float>;
  const LayerShape& shape = spec.shape;
  KvCache cache({.layers = {shape}, .policy = {spec.policy}});
  const SequenceId sequence = cache.create();
  const auto stage = [&](int64_t first, int64_t n) {
    std::vector<float> k(static_cast<size_t>(n * shape.kv_heads * shape.head_dim_k)), v(k.size());
    data.fill(0, first, n, k.data(), v.data());
    cache.begin_step(sequence, n);
    cache.append(sequence, 0, View::dense(k.data(), n, shape.kv_heads, shape.head_dim_k),
                 View::dense(v.data(), n, shape.kv_heads, shape.head_dim_v));
  };
  const int64_t stored = spec.tokens - spec.queries;
  if (stored > 0) {
    stage(0, stored);
    cache.commit(sequence);
  }
  stage(stored, spec.queries);
  const std::vector<float> q = data.queries();
  std::vector<float> out(q.size());
  AttendStats stats;
  attend(
      cache,
      {.sequence = sequence,
       .layer = 0,
       .config = {.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim_k))},
       .q = View::dense(q.data(), spec.queries, shape.q_heads, shape.head_dim_k),
       .out = TensorView<float>::dense(out.data(), spec.queries, shape.q_heads, shape.head_dim_v),
       .stats = &stats});
  return stats;
}

TEST(SyntheticData, TheRuleFindsWhatWasAskedFor) {
  for (const Case& c : std::vector<Case>{
           {.policy = "balanced"},
           {.policy = "balanced", .promoted = 0.04},
           {.policy = "balanced", .promoted = 0.04, .skipped = 0.5},
           {.policy = "balanced", .skipped = 0.9},
           {.policy = "swift", .tokens = 8192, .promoted = 0.1, .skipped = 0.3},
           {.policy = "balanced", .tokens = 16384, .promoted = 0.1, .skipped = 0.2},
           {.policy = "thrifty", .skipped = 0.5},
           {.policy = "balanced", .tokens = 1000, .skipped = 0.2},
           {.policy = "balanced", .tokens = 2048},  // fewer pages than 1 / promote
           {.policy = "balanced", .q_heads = 2, .promoted = 0.04},
           {.policy = "balanced",
           .q_heads = 128,
           .kv_heads = 1,
           .promoted = 0.1},  // 2 per direction
           {.policy = "balanced", .q_heads = 4, .kv_heads = 1, .head_dim = 256, .promoted = 0.05},
       }) {
    const SyntheticSpec spec = spec_of(c);
    const SyntheticData data(spec);
    const AttendStats stats = attend_over(data, spec);
    SCOPED_TRACE(c.policy + ", " + std::to_string(c.tokens) + " tokens, " +
                 std::to_string(c.q_heads) + " heads");
    const double half_a_page = 0.5 / static_cast<double>((c.tokens - 1) / kPageTokens) + 1e-9;
    EXPECT_NEAR(stats.skipped_fraction(), c.skipped, half_a_page);
    if (c.policy != "thrifty") {
      EXPECT_NEAR(stats.promoted_fraction(), c.promoted, half_a_page);
    }
    EXPECT_NO_THROW(data.check(stats));
  }
}

// Eight of the 63 pages hold the first 64 or the last 512 tokens: the policy reads them in full.
TEST(SyntheticData, SealedPagesInReachAreNoSurprise) {
  const SyntheticSpec spec = spec_of({.policy = "thrifty"});
  const SyntheticData data(spec);
  const AttendStats stats = attend_over(data, spec);
  EXPECT_DOUBLE_EQ(stats.promoted_fraction(), 8.0 / 63.0);
  EXPECT_NO_THROW(data.check(stats));
}

TEST(SyntheticData, SeveralQueriesFindTheSame) {
  const SyntheticSpec spec = spec_of(
      {.policy = "balanced", .tokens = 4096, .queries = 16, .promoted = 0.1, .skipped = 0.3});
  const SyntheticData data(spec);
  const AttendStats stats = attend_over(data, spec);
  EXPECT_NEAR(stats.promoted_fraction(), 0.1, 0.02);
  EXPECT_NEAR(stats.skipped_fraction(), 0.3, 0.02);
  EXPECT_NO_THROW(data.check(stats));
}

TEST(SyntheticData, OtherFractionsAreRefused) {
  const SyntheticSpec asked = spec_of({.policy = "balanced", .promoted = 0.1, .skipped = 0.5});
  const SyntheticData data(asked);
  AttendStats stats = attend_over(data, asked);
  data.check(stats);
  AttendStats more = stats;
  more.pages_promoted = more.pages_promoted * 4 / 3;
  EXPECT_THROW(data.check(more), Error);
  AttendStats fewer = stats;
  fewer.pages_skipped = fewer.pages_skipped * 7 / 10;
  EXPECT_THROW(data.check(fewer), Error);
  AttendStats nearly = stats;
  nearly.pages_skipped = nearly.pages_skipped * 9 / 10;
  EXPECT_NO_THROW(data.check(nearly));
}

std::string refusal(const Case& c) {
  try {
    const SyntheticData data(spec_of(c));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    return error.what();
  }
  return "";
}

TEST(SyntheticData, ImpossibleFractionsSaySo) {
  // 255 pages above 0.02 each need a mass of more than 5; two heads have 2.
  const std::string heavy =
      refusal({.policy = "balanced", .tokens = 16384, .q_heads = 4, .promoted = 1.0});
  EXPECT_NE(heavy.find("255 of 255 pages"), std::string::npos) << heavy;
  EXPECT_NE(heavy.find("2 query heads"), std::string::npos) << heavy;
  // One head cannot hold 8191 pages above 0.0003.
  EXPECT_NE(refusal({.policy = "balanced", .tokens = 524288, .q_heads = 2}), "");
  EXPECT_EQ(refusal({.policy = "balanced,skip=0", .tokens = 524288, .q_heads = 2}), "");
  EXPECT_EQ(refusal({.policy = "balanced", .tokens = 524288, .q_heads = 8}), "");
  EXPECT_NE(refusal({.policy = "balanced", .promoted = 0.6, .skipped = 0.6}), "");
  const SyntheticSpec tiny = spec_of({.policy = "balanced", .tokens = 64, .skipped = 0.5});
  EXPECT_THROW(SyntheticData(tiny).check({}), Error);
}

TEST(SyntheticData, ContentDoesNotDependOnTheChunks) {
  const Case c{.policy = "balanced", .tokens = 300, .skipped = 0.5};
  const SyntheticData data(spec_of(c));
  const int64_t row = c.kv_heads * c.head_dim;
  std::vector<float> k(static_cast<size_t>(300 * row)), v(k.size()), k2(k.size()), v2(k.size());
  data.fill(3, 0, 300, k.data(), v.data());
  data.fill(3, 0, 77, k2.data(), v2.data());
  data.fill(3, 77, 223, k2.data() + 77 * row, v2.data() + 77 * row);
  EXPECT_EQ(k, k2);
  EXPECT_EQ(v, v2);
  data.fill(4, 0, 300, k2.data(), v2.data());
  EXPECT_NE(k, k2);  // another sequence
}

// What a device adds to noise of its own: the rest of K is noise of mean 0, of every kind of page.
TEST(SyntheticData, PageMeanIsWhatFillAdds) {
  const Case c{.policy = "balanced", .tokens = 4096, .promoted = 0.1, .skipped = 0.5};
  const SyntheticData data(spec_of(c));
  const int64_t row = c.kv_heads * c.head_dim;
  std::vector<float> k(static_cast<size_t>(kPageTokens * row)), v(k.size());
  std::vector<float> mean(static_cast<size_t>(row));
  int lifted = 0;
  for (int64_t page = 0; page < c.tokens / kPageTokens; ++page) {
    data.fill(0, page * kPageTokens, kPageTokens, k.data(), v.data());
    data.page_mean(page, mean.data());
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      double norm = 0, along = 0;
      for (int64_t d = h * c.head_dim; d < (h + 1) * c.head_dim; ++d) {
        const double m = mean[static_cast<size_t>(d)];
        double left = 0;
        for (int64_t t = 0; t < kPageTokens; ++t) left += k[static_cast<size_t>(t * row + d)] - m;
        norm += m * m;
        along += m * left / static_cast<double>(kPageTokens);
      }
      if (norm == 0) continue;
      ++lifted;
      norm = std::sqrt(norm);
      EXPECT_GT(norm, 1.5);
      EXPECT_LT(std::fabs(along / norm), 5.0 / 8.0);  // of 64 numbers: a deviation of 1/8
    }
  }
  EXPECT_EQ(lifted, 2 * (64 - 32));  // half of 63 pages are skipped: they have no mean
}

TEST(SyntheticData, WhichPoliciesPromoteAndSkip) {
  const auto layer = [](const char* text) {
    return resolve(parse_policy(text), {.layers = 1}).front();
  };
  for (const char* text : {"balanced", "swift"}) {
    EXPECT_TRUE(can_promote(layer(text)) && can_skip(layer(text))) << text;
  }
  for (const char* text : {"exact", "q8_0", "fp8", "f32"}) {
    EXPECT_FALSE(can_promote(layer(text)) || can_skip(layer(text))) << text;
  }
  EXPECT_FALSE(can_promote(layer("thrifty")));
  EXPECT_TRUE(can_skip(layer("thrifty")));
  EXPECT_FALSE(can_promote(layer("paper-budget")));
  EXPECT_FALSE(can_skip(layer("balanced,skip=0")));
  EXPECT_FALSE(can_promote(layer("balanced,promote=1")));
}

}  // namespace
}  // namespace thriftattn::bench
