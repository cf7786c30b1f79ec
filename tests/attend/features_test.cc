// Non-causal steps, strided tensors, sinks with softcap, LSE in every mode, the cap of the mass
// rule, the scores of the budget rule, policies by KV head - each against the reference, and bit by
// bit where two ways must give one result.
#include <gtest/gtest.h>
#include <tbb/global_control.h>

#include <algorithm>
#include <limits>

#include "attend/attend_test_util.h"

namespace thriftattn {
namespace {

using namespace testing;

TEST(NonCausal, MatchesReference) {
  for (const LayerPolicy& policy :
       {layered_policy(0.1, 0.02), sealed_policy(64, 64), plain_policy(Format::fp8_e4m3),
        budget_policy(0.3, BlockScore::mean), mixed(Format::nvfp4, Format::bf16)}) {
    for (const AttendMode mode : {AttendMode::prefill, AttendMode::decode}) {
      for (const auto& [length, queries] : {std::pair{0, 1}, {0, 100}, {300, 5}, {333, 150}}) {
        CaseOptions o{.policy = policy, .length = length, .queries = queries, .sink_logits = true};
        o.softcap = 6.0f;
        o.mode = mode;
        o.causal = false;
        expect_matches_reference(o, "non-causal after " + std::to_string(length));
      }
    }
  }
}

TEST(NonCausal, SeesEveryStagedToken) {
  CaseOptions o{.policy = plain_policy(Format::f32), .length = 70, .queries = 90};
  o.causal = false;
  for (const AttendMode mode : {AttendMode::prefill, AttendMode::decode}) {
    o.mode = mode;
    AttentionCase c(o);
    EXPECT_LT(row_error(c.attend(), c.exact(), 64), 1e-5);
  }
  o.causal = true;
  AttentionCase causal(o);
  EXPECT_GT(row_error(
                AttentionCase(o).attend(),
                [&] {
                  CaseOptions all = o;
                  all.causal = false;
                  return AttentionCase(all).attend();
                }(),
                64),
            0.1);
}

// With queries and cached values that are BF16 numbers, fast arithmetic rounds weights only.
constexpr double kBf16Weights = 3.9e-3;

void expect_fast_matches_reference(CaseOptions o, const std::string& what) {
  o.math = AttendMath::fast;
  o.bf16_queries = true;
  o.policy.rotate = o.equalizer = false;
  AttentionCase c(o);
  EXPECT_LT(row_error(c.attend(), c.attend_reference(), o.shape.head_dim_v), kBf16Weights) << what;
}

TEST(NonCausal, FastArithmeticMatchesReference) {
  for (const AttendMode mode : {AttendMode::prefill, AttendMode::decode}) {
    for (const LayerPolicy& policy : {layered_policy(0.1, 0.02), plain_policy(Format::bf16)}) {
      // Prefill adds base and residual before it rounds to BF16: only a BF16 cache stays exact.
      if (mode == AttendMode::prefill && is_layered(policy.k_format)) continue;
      for (const auto& [length, queries] : {std::pair{0, 1}, {0, 100}, {300, 5}, {333, 150}}) {
        CaseOptions o{.policy = policy, .length = length, .queries = queries, .sink_logits = true};
        o.mode = mode;
        o.causal = false;
        expect_fast_matches_reference(o, "after " + std::to_string(length));
      }
    }
  }
}

// Each query reads what the step's last token reads, whatever queries it comes with.
TEST(NonCausal, QueriesDoNotDependOnEachOther) {
  CaseOptions o{.policy = layered_policy(0.1, 0.02), .length = 500, .queries = 80};
  o.causal = false;
  o.q_gain = 5.0f;
  AttentionCase c(o);
  AttendStats stats;
  const auto all = c.attend(&stats);
  EXPECT_GT(stats.pages_promoted, 0);
  EXPECT_GT(stats.pages_skipped, 0);
  EXPECT_EQ(stats.pages_visible, stats.rows * (579 / 64));
  std::vector<float> buffer;
  const AttendRequest whole = c.request(buffer);
  // Only trailing queries can be asked for alone: the last 13 again.
  AttendRequest last = rows_of(whole, 67, 13);
  attend(c.cache(), last);
  for (size_t i = 67 * 8 * 64; i < all.size(); ++i) ASSERT_EQ(buffer[i], all[i]);
}

TEST(NonCausal, WindowsAreRefused) {
  CaseOptions o{.policy = layered_policy(0.1, 0.02), .length = 200, .queries = 2};
  o.shape.window = 100;
  o.causal = false;
  AttentionCase c(o);
  expect_refusal(ErrorCode::unsupported, "sliding window of 100; required:", [&] { c.attend(); });
  expect_refusal(ErrorCode::unsupported, "supported: causal = true", [&] { c.attend_reference(); });
}

// A copy with padding of NaN between heads and tokens, tokens outermost or heads outermost.
class Strided {
 public:
  Strided(TensorView<const float> from, int64_t pad, bool heads_outside) {
    view_ = {nullptr, from.tokens, from.heads, from.head_dim, 0, 0};
    const int64_t row = from.head_dim + pad;
    view_.token_stride = heads_outside ? row : from.heads * row + pad;
    view_.head_stride = heads_outside ? from.tokens * row + pad : row;
    memory_.assign(
        static_cast<size_t>(from.tokens * from.heads * row + (from.tokens + from.heads) * pad + 8),
        std::numeric_limits<float>::quiet_NaN());
    view_.data = memory_.data() + 3;  // on no vector's boundary
    if (from.data == nullptr) return;
    for (int64_t t = 0; t < from.tokens; ++t) {
      for (int64_t h = 0; h < from.heads; ++h) {
        std::copy_n(from.row(t, h), from.head_dim, view_.row(t, h));
      }
    }
  }
  TensorView<float> out() const { return view_; }
  TensorView<const float> in() const {
    return {view_.data,     view_.tokens,       view_.heads,
            view_.head_dim, view_.token_stride, view_.head_stride};
  }
  int64_t written() const {
    return std::count_if(memory_.begin(), memory_.end(), [](float x) { return !std::isnan(x); });
  }

 private:
  std::vector<float> memory_;
  TensorView<float> view_;
};

TEST(Strides, PaddingIsNeitherReadNorWritten) {
  for (const LayerPolicy& policy : {layered_policy(0.1, 0.02), plain_policy(Format::q8_0),
                                    mixed(Format::fp8_e4m3, Format::nvfp4)}) {
    for (const bool heads_outside : {false, true}) {
      for (const auto& [mode, queries] :
           {std::pair{AttendMode::decode, 3}, {AttendMode::prefill, 140}}) {
        CaseOptions o{.policy = policy, .length = 213, .queries = queries};
        o.mode = mode;
        o.equalizer = true;
        AttentionCase dense(o);
        std::vector<float> lse;
        const auto want = dense.attend(nullptr, &lse);

        KvCache cache(dense.cache().config());
        const SequenceId seq = cache.create();
        for (const auto& [first, n] :
             {std::pair{int64_t{0}, o.length}, {o.length, int64_t{queries}}}) {
          cache.begin_step(seq, n);
          cache.append(seq, 0, Strided(dense.k_view(first, n), 5, heads_outside).in(),
                       Strided(dense.v_view(first, n), 7, heads_outside).in());
          if (first == 0) cache.commit(seq);
        }
        std::vector<float> buffer;
        AttendRequest r = dense.request(buffer);
        const Strided q(r.q, 3, heads_outside);
        const Strided out({nullptr, queries, 8, 64}, 9, heads_outside);
        const Strided lse_out({nullptr, queries, 8, 1}, 2, heads_outside);
        r.sequence = seq;
        r.q = q.in();
        r.out = out.out();
        r.lse = lse_out.out();
        attend(cache, r);
        for (int64_t t = 0; t < queries; ++t) {
          for (int64_t h = 0; h < 8; ++h) {
            const size_t row = static_cast<size_t>(t * 8 + h);
            ASSERT_EQ(*r.lse.row(t, h), lse[row]);
            for (int64_t d = 0; d < 64; ++d)
              ASSERT_EQ(r.out.row(t, h)[d], want[row * 64 + static_cast<size_t>(d)]);
          }
        }
        EXPECT_EQ(out.written(), queries * 8 * 64);
        EXPECT_EQ(lse_out.written(), queries * 8);
      }
    }
  }
}

// LSE in every mode, with sink logits, softcap and window together, against exact math: the
// denominator that merging with other parts needs.
TEST(Lse, IsTheLogOfTheDenominatorInEveryMode) {
  for (const AttendMode mode : {AttendMode::prefill, AttendMode::decode}) {
    for (const bool causal : {true, false}) {
      for (const int64_t queries : {1, 40}) {
        for (const int64_t window : {0, 90}) {
          if (!causal && window > 0) continue;
          CaseOptions o{.policy = layered_policy(0.05, 0.002), .length = 260, .queries = queries};
          o.shape.window = window;
          o.mode = mode;
          o.causal = causal;
          o.sink_logits = true;
          o.softcap = 5.0f;
          expect_matches_reference(o, "lse, window " + std::to_string(window));
          // A sink far above every score is all of the denominator.
          AttentionCase c(o);
          std::vector<float> out, lse(static_cast<size_t>(queries * 8), NAN);
          const std::vector<float> sinks(8, 500.0f);
          AttendRequest r = c.request(out);
          r.sink_logits = sinks.data();
          r.lse = TensorView<float>::dense(lse.data(), queries, 8, 1);
          attend(c.cache(), r);
          for (const float x : lse) EXPECT_EQ(x, 500.0f);
          for (const float x : out) EXPECT_EQ(x, 0.0f);
        }
      }
    }
  }
}

TEST(Cap, MatchesReferenceAndHolds) {
  CaseOptions o{.policy = layered_policy(0.005, 0.0), .length = 64 * 40 + 5, .queries = 20};
  o.q_gain = 2.0f;
  AttendStats free_stats;
  const auto uncapped = AttentionCase(o).attend(&free_stats);
  EXPECT_EQ(free_stats.rows_capped, 0);
  EXPECT_EQ(free_stats.wanted_mass, 0);
  ASSERT_GT(free_stats.promoted_fraction(), 0.3);

  o.policy.max_promoted = 0.1;
  AttentionCase c(o);
  AttendStats stats;
  const auto out = c.attend(&stats);
  EXPECT_LT(row_error(out, c.attend_reference(), 64), kTight);
  EXPECT_GT(row_error(out, uncapped, 64), 1e-4);
  // Masses differ, so the cap is reached exactly: ceil(0.1 * 40) pages of each row.
  EXPECT_EQ(stats.pages_promoted, 4 * stats.rows);
  EXPECT_EQ(stats.rows_capped, stats.rows);
  EXPECT_EQ(stats.capped_fraction(), 1.0);
  EXPECT_GT(stats.wanted_mass, 0);
  EXPECT_GT(stats.max_mass_4bit, 0.005);

  CaseOptions fast = o;
  expect_fast_matches_reference(fast, "capped");
  fast.math = AttendMath::fast;
  AttendStats fast_stats;
  AttentionCase(fast).attend(&fast_stats);
  EXPECT_EQ(fast_stats.pages_promoted, 4 * fast_stats.rows);
  EXPECT_EQ(fast_stats.rows_capped, fast_stats.rows);

  // A cap that nobody reaches changes nothing.
  o.policy.max_promoted = 0.99;
  AttendStats loose_stats;
  EXPECT_TRUE(same_bits(AttentionCase(o).attend(&loose_stats), uncapped));
  EXPECT_EQ(loose_stats.rows_capped, 0);
  o.policy.max_promoted = 0;
  AttendStats none;
  AttentionCase(o).attend(&none);
  EXPECT_EQ(none.pages_promoted, 0);
}

TEST(Scores, EveryScoreMatchesReference) {
  for (const BlockScore score : {BlockScore::mean, BlockScore::oracle, BlockScore::quest,
                                 BlockScore::variance, BlockScore::local}) {
    for (const int64_t window : {0, 300}) {
      CaseOptions o{.policy = budget_policy(0.25, score), .length = 64 * 20 + 30, .queries = 6};
      o.shape.window = window;
      o.equalizer = true;
      expect_matches_reference(o, "score " + std::to_string(static_cast<int>(score)));
    }
  }
}

TEST(Scores, ChooseDifferentPages) {
  std::vector<std::vector<float>> outs;
  for (const BlockScore score : {BlockScore::mean, BlockScore::oracle, BlockScore::quest,
                                 BlockScore::variance, BlockScore::local}) {
    CaseOptions o{.policy = budget_policy(0.2, score), .length = 64 * 20 + 30, .queries = 2};
    AttendStats stats;
    outs.push_back(AttentionCase(o).attend(&stats));
    EXPECT_EQ(stats.pages_promoted, 4 * stats.rows);  // ceil(0.2 * 20)
    for (size_t i = 0; i + 1 < outs.size(); ++i) EXPECT_FALSE(same_bits(outs[i], outs.back()));
  }
}

TEST(Scores, ABudgetMayBeANumberOfPages) {
  CaseOptions o{.policy = budget_policy(0, BlockScore::mean), .length = 64 * 20, .queries = 2};
  o.policy.budget_pages = 3;
  AttentionCase c(o);
  AttendStats stats;
  EXPECT_LT(row_error(c.attend(&stats), c.attend_reference(), 64), kTight);
  EXPECT_EQ(stats.pages_promoted, 3 * stats.rows);
  o.policy.budget_pages = 1000;  // more than there are: all
  AttendStats all;
  AttentionCase(o).attend(&all);
  EXPECT_EQ(all.pages_promoted, all.pages_visible);
}

// A chunk equals decode bit for bit with a window, a cap and each score too.
TEST(Scores, ChunkOfQueriesEqualsDecodeBitwise) {
  LayerPolicy capped = layered_policy(0.01, 0.002);
  capped.max_promoted = 0.2;
  for (const LayerPolicy& policy :
       {capped, budget_policy(0.3, BlockScore::quest), budget_policy(0.3, BlockScore::variance),
        budget_policy(0.3, BlockScore::oracle), budget_policy(0.3, BlockScore::local)}) {
    for (const int64_t window : {0, 200, 1}) {
      CaseOptions o{.policy = policy, .length = 300, .queries = 100};
      o.shape.window = window == 1 ? 0 : window;
      o.math = window == 1 ? AttendMath::fast : AttendMath::f32;
      AttentionCase c(o);
      const auto together = c.attend();
      KvCache cache(c.cache().config());
      const SequenceId seq = cache.create();
      std::vector<float> buffer;
      const AttendRequest whole = c.request(buffer);
      cache.begin_step(seq, o.length);
      cache.append(seq, 0, c.k_view(0, o.length), c.v_view(0, o.length));
      cache.commit(seq);
      for (int64_t i = 0; i < o.queries; ++i) {
        cache.begin_step(seq, 1);
        cache.append(seq, 0, c.k_view(o.length + i, 1), c.v_view(o.length + i, 1));
        AttendRequest one = rows_of(whole, i, 1);
        one.sequence = seq;
        attend(cache, one);
        cache.commit(seq);
      }
      EXPECT_TRUE(same_bits(together, buffer)) << "window " << window;
    }
  }
}

// ---- policies by KV head

const std::vector<LayerPolicy> kHeads = {layered_policy(0.1, 0.02), plain_policy(Format::bf16),
                                         layered_policy(0.1, 0.02), sealed_policy(64, 64),
                                         mixed(Format::fp8_e4m3, Format::nvfp4)};

CaseOptions heads_case(const LayerPolicy& policy) {
  CaseOptions o{.shape = {.kv_heads = 5, .q_heads = 15, .head_dim_k = 64, .head_dim_v = 96},
                .policy = policy,
                .length = 64 * 9 + 21,
                .queries = 4};
  o.sink_logits = true;
  o.equalizer = true;
  o.scramble = true;
  return o;
}

TEST(HeadPolicies, MatchReference) {
  for (const AttendMode mode : {AttendMode::decode, AttendMode::prefill}) {
    for (const int64_t window : {0, 100}) {
      CaseOptions o = heads_case(by_head(kHeads));
      o.mode = mode;
      o.shape.window = window;
      expect_matches_reference(o, "heads");
    }
  }
}

// Each head computes what it computes in a layer where every head has its policy.
TEST(HeadPolicies, EachHeadEqualsAUniformLayerBitwise) {
  for (const AttendMath math : {AttendMath::f32, AttendMath::fast}) {
    for (const int64_t queries : {4, 40}) {
      for (const AttendMode mode : {AttendMode::decode, AttendMode::prefill}) {
        CaseOptions o = heads_case(by_head(kHeads));
        o.math = math;
        o.mode = mode;
        o.queries = queries;
        AttentionCase c(o);
        std::vector<float> lse;
        AttendStats stats;
        const auto out = c.attend(&stats, &lse);
        double bits = 0;
        for (size_t h = 0; h < kHeads.size(); ++h) {
          CaseOptions uniform = o;
          uniform.policy = kHeads[h];
          std::vector<float> want_lse;
          AttendStats uniform_stats;
          AttentionCase u(uniform);
          const auto want = u.attend(&uniform_stats, &want_lse);
          bits += uniform_stats.bits_read / static_cast<double>(kHeads.size());
          for (int64_t t = 0; t < o.queries; ++t) {
            for (size_t g = 0; g < 3; ++g) {
              const size_t row = static_cast<size_t>(t) * 15 + h * 3 + g;
              ASSERT_EQ(lse[row], want_lse[row]) << "head " << h;
              for (size_t d = 0; d < 96; ++d)
                ASSERT_EQ(out[row * 96 + d], want[row * 96 + d]) << "head " << h;
            }
          }
        }
        EXPECT_EQ(stats.rows, o.queries * 5);
        EXPECT_NEAR(stats.bits_read / bits, 1.0, 0.1);  // masses differ from head to head
      }
    }
  }
}

TEST(HeadPolicies, StoreWhatEachFormatStores) {
  const auto bits = [](const LayerPolicy& policy) {
    CaseOptions o = heads_case(policy);
    o.length = 64 * 40;
    AttentionCase c(o);
    c.cache().rollback(c.sequence());
    return c.cache().bits_stored_per_element();
  };
  double mean = 0;
  for (const LayerPolicy& policy : kHeads) mean += bits(policy) / 5;
  const double mixed_bits = bits(by_head(kHeads));
  EXPECT_NEAR(mixed_bits, mean, 0.02 * mean);
  EXPECT_GT(mixed_bits, 1.1 * bits(kHeads[3]));
}

TEST(HeadPolicies, ForksTruncationAndErrorsKnowTheHeads) {
  CaseOptions o = heads_case(by_head(kHeads));
  o.queries = 0;
  AttentionCase c(o);
  KvCache& cache = c.cache();
  const int64_t total = cache.usage().total();
  const SequenceId child = cache.fork(c.sequence());
  cache.truncate(child, 64 * 5 + 3);
  cache.free(child);
  EXPECT_EQ(cache.usage().total(), total);
  std::vector<float> k(5 * 64, 1.0f), v(5 * 96, 1.0f);
  v[4 * 96 + 2] = NAN;
  cache.begin_step(c.sequence(), 1);
  expect_refusal(ErrorCode::non_finite, "V of layer 0, KV head 4, token 597", [&] {
    cache.append(c.sequence(), 0, TensorView<const float>::dense(k.data(), 1, 5, 64),
                 TensorView<const float>::dense(v.data(), 1, 5, 96));
  });
  cache.rollback(c.sequence());
  EXPECT_EQ(cache.usage().total(), total);
  KvCacheConfig bad = cache.config();
  bad.policy[0].heads.pop_back();
  expect_refusal(ErrorCode::invalid_argument, "layer 0 has 5 KV heads, its policy 4",
                 [&] { KvCache x(bad); });
  bad = cache.config();
  bad.policy[0].heads[2].heads = {plain_policy(Format::bf16)};
  expect_refusal(ErrorCode::invalid_argument, "policies of heads itself", [&] { KvCache x(bad); });
}

}  // namespace
}  // namespace thriftattn
