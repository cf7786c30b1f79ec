// attend() against both references: FP64 on the values as stored (tight: judges the kernel) and
// exact FP64 math on the inputs (two-sided: judges the format), with partial promotion and
// skipping, shuffled block tables, poisoned free pages, odd lengths.
#include <gtest/gtest.h>
#include <tbb/global_control.h>

#include <cmath>
#include <string>

#include "attend/attend_test_util.h"

namespace thriftattn {
namespace {

using namespace testing;

TEST(Attend, MatchesReferenceOverPoliciesAndLengths) {
  const std::pair<const char*, LayerPolicy> policies[] = {
      {"f32", plain_policy(Format::f32)},
      {"bf16", plain_policy(Format::bf16)},
      {"fp16", plain_policy(Format::fp16)},
      {"fp8", plain_policy(Format::fp8_e4m3)},
      {"q8_0", plain_policy(Format::q8_0)},
      {"q4_0", plain_policy(Format::q4_0)},
      {"balanced", layered_policy(0.02, 0.0003)},
      {"coarse", layered_policy(0.08, 0.02)},
      {"never", layered_policy(1.0, 0.0)},
      {"x2", mixed(Format::nvfp4x2, Format::nvfp4x2)},
      {"sealed", sealed_policy(64, 128)},
      {"sealed0", sealed_policy(0, 0)},
      {"budget", budget_policy(0.2, BlockScore::mean)},
      {"oracle", budget_policy(0.2, BlockScore::oracle)},
      {"k nvfp4 v bf16", mixed(Format::nvfp4, Format::bf16)},
      {"k fp8 v nvfp4", mixed(Format::fp8_e4m3, Format::nvfp4)},
      {"e5m2", plain_policy(Format::fp8_e5m2)},
      {"e3m2", plain_policy(Format::fp6_e3m2)},
      {"e2m3", plain_policy(Format::fp6_e2m3)},
      {"mxfp4", mixed(Format::mxfp4, Format::mxfp4, layered_policy(0.02, 0.0003))},
      {"int3", mixed(Format::int3, Format::int3, layered_policy(0.02, 0.0003))},
      {"max-savings", mixed(Format::nvfp4, Format::int3, sealed_policy(64, 128))},
      {"max-savings-mx", mixed(Format::mxfp4, Format::int3, sealed_policy(64, 128))},
      {"k nvfp4 v int3", mixed(Format::nvfp4, Format::int3, layered_policy(0.05, 0.005))},
      {"k int3 v mxfp4", mixed(Format::int3, Format::mxfp4, layered_policy(0.08, 0.02))},
      {"k fp6 v int3", mixed(Format::fp6_e2m3, Format::int3)},
      {"k int3 v q8_0", mixed(Format::int3, Format::q8_0)},
      {"budget int3", mixed(Format::int3, Format::int3, budget_policy(0.2, BlockScore::mean))},
  };
  for (const auto& [name, policy] : policies) {
    for (int64_t length : {0, 1, 63, 64, 65, 191, 517}) {
      CaseOptions o{.policy = policy, .length = length, .seed = static_cast<uint32_t>(length + 7)};
      o.scramble = length > 100;
      expect_matches_reference(o, std::string(name) + " after " + std::to_string(length));
    }
  }
}

TEST(Attend, MatchesReferenceOverShapes) {
  struct Shape {
    int64_t kv, q, dk, dv;
  };
  for (const Shape& s : {Shape{1, 1, 64, 64}, Shape{2, 12, 128, 128}, Shape{1, 4, 256, 256},
                         Shape{3, 6, 96, 64}, Shape{1, 7, 80, 80}, Shape{2, 64, 64, 128}}) {
    CaseOptions o{.shape = {.kv_heads = s.kv, .q_heads = s.q, .head_dim_k = s.dk, .head_dim_v = s.dv},
                  .policy = layered_policy(0.1, 0.02),
                  .length = 330,
                  .queries = 2};
    o.equalizer = true;
    o.scramble = true;
    expect_matches_reference(o, "D " + std::to_string(s.dk) + " heads " + std::to_string(s.q));
  }
}

// V's own basis again after the merge: dims whose rotation has blocks, and K unlike V.
TEST(Attend, RotatedValuesMatchReferenceOverShapes) {
  struct Shape {
    int64_t kv, q, dk, dv;
  };
  for (const Shape& s : {Shape{1, 4, 64, 32}, Shape{2, 12, 128, 128}, Shape{1, 4, 64, 256},
                         Shape{3, 6, 64, 96}, Shape{1, 7, 80, 192}}) {
    for (const bool rotate : {true, false}) {
      LayerPolicy policy = mixed(Format::nvfp4, Format::int3, layered_policy(0.1, 0.02));
      policy.rotate = rotate;
      CaseOptions o{
          .shape = {.kv_heads = s.kv, .q_heads = s.q, .head_dim_k = s.dk, .head_dim_v = s.dv},
          .policy = policy,
          .length = 330,
          .queries = 2};
      o.sink_logits = true;
      o.scramble = true;
      const std::string what = "D " + std::to_string(s.dv) + (rotate ? " rotated" : "");
      expect_matches_reference(o, what);
      o.mode = AttendMode::prefill;
      expect_matches_reference(o, what + " prefill");
    }
  }
}

TEST(Attend, MatchesReferenceWithWindowSoftcapAndSinks) {
  for (int64_t window : {0, 50, 100, 256}) {
    for (float softcap : {0.0f, 4.0f}) {
      for (bool sinks : {false, true}) {
        for (const LayerPolicy& policy :
             {layered_policy(0.1, 0.02), sealed_policy(64, 64), plain_policy(Format::bf16),
              mixed(Format::nvfp4x2, Format::nvfp4x2), budget_policy(0.3, BlockScore::oracle),
              mixed(Format::mxfp4, Format::int3, layered_policy(0.1, 0.02))}) {
          CaseOptions o{.policy = policy, .length = 450, .queries = 5};
          o.shape.window = window;
          o.softcap = softcap;
          o.sink_logits = sinks;
          expect_matches_reference(o, "window " + std::to_string(window) + " softcap " +
                                          std::to_string(softcap));
        }
      }
    }
  }
}

TEST(Attend, MatchesReferenceAcrossSplits) {
  CaseOptions o{.policy = layered_policy(0.02, 0.0005), .length = 64 * 70 + 9, .queries = 3};
  o.q_gain = 3.0f;
  expect_matches_reference(o, "splits");
}

TEST(Attend, PrefillMatchesReference) {
  for (const LayerPolicy& policy :
       {layered_policy(0.02, 0.0003), sealed_policy(64, 64), plain_policy(Format::q8_0),
        mixed(Format::nvfp4, Format::bf16),
        mixed(Format::nvfp4, Format::int3, sealed_policy(64, 64)),
        mixed(Format::mxfp4, Format::mxfp4, layered_policy(0.02, 0.0003))}) {
    CaseOptions o{.policy = policy, .length = 333, .queries = 150};
    o.mode = AttendMode::prefill;
    o.equalizer = true;
    expect_matches_reference(o, "prefill");
  }
}

// The regimes must really occur in the tests above: some pages promoted, some 4-bit, some
// skipped - for one position and within one tile of many.
TEST(Attend, PromotionAndSkippingArePartial) {
  CaseOptions o{.policy = layered_policy(0.1, 0.02), .length = 1500, .queries = 40};
  o.q_gain = 4.0f;
  AttentionCase c(o);
  AttendStats stats;
  const auto out = c.attend(&stats);
  EXPECT_LT(row_error(out, c.attend_reference(), o.shape.head_dim_v), kTight);
  EXPECT_GT(stats.promoted_fraction(), 0.05);
  EXPECT_LT(stats.promoted_fraction(), 0.6);
  EXPECT_GT(stats.skipped_fraction(), 0.05);
  EXPECT_LT(stats.skipped_fraction() + stats.promoted_fraction(), 0.95);
  EXPECT_LE(stats.max_mass_4bit, 0.1 + 1e-6);
  EXPECT_LE(stats.max_mass_skipped, 0.02 + 1e-6);
  EXPECT_GT(stats.max_mass_4bit, 0.05);
  EXPECT_GT(stats.max_mass_skipped, 0.01);
  EXPECT_GT(stats.sum_mass_4bit, 0);
  EXPECT_LT((stats.sum_mass_4bit + stats.sum_mass_skipped) / stats.query_heads, 1.0);
  EXPECT_EQ(stats.wanted_mass, 0);
}

// Every query of a chunk reads what it would read if its token were decoded alone: bit for bit.
TEST(Attend, ChunkOfQueriesEqualsDecodeBitwise) {
  for (const LayerPolicy& policy :
       {layered_policy(0.1, 0.02), sealed_policy(64, 128), plain_policy(Format::fp8_e4m3),
        budget_policy(0.2, BlockScore::mean),
        mixed(Format::mxfp4, Format::int3, sealed_policy(64, 128))}) {
    CaseOptions o{.policy = policy, .length = 100, .queries = 300};
    AttentionCase chunk(o);
    const auto together = chunk.attend();
    const int64_t row = o.shape.q_heads * o.shape.head_dim_v;

    KvCache cache(chunk.cache().config());
    const SequenceId seq = cache.create();
    cache.begin_step(seq, o.length);
    cache.append(seq, 0, chunk.k_view(0, o.length), chunk.v_view(0, o.length));
    cache.commit(seq);
    for (int64_t i = 0; i < o.queries; ++i) {
      cache.begin_step(seq, 1);
      cache.append(seq, 0, chunk.k_view(o.length + i, 1), chunk.v_view(o.length + i, 1));
      std::vector<float> out(static_cast<size_t>(row)), unused;
      AttendRequest r = chunk.request(unused);
      r.sequence = seq;
      r.q.data += i * o.shape.q_heads * o.shape.head_dim_k;
      r.q.tokens = 1;
      r.out = TensorView<float>::dense(out.data(), 1, o.shape.q_heads, o.shape.head_dim_v);
      attend(cache, r);
      cache.commit(seq);
      for (int64_t d = 0; d < row; ++d) {
        ASSERT_EQ(out[static_cast<size_t>(d)], together[static_cast<size_t>(i * row + d)])
            << "query " << i << " element " << d;
      }
    }
  }
}

TEST(Attend, ResultDoesNotDependOnThreads) {
  CaseOptions o{.policy = layered_policy(0.05, 0.005), .length = 5000, .queries = 20};
  AttentionCase c(o);
  std::vector<float> one, two;
  {
    tbb::global_control limit(tbb::global_control::max_allowed_parallelism, 1);
    one = c.attend();
  }
  two = c.attend();
  EXPECT_EQ(one, two);
}

// Formats against exact math, bounded on both sides: a result too good is as wrong as one too
// bad (it would mean that the cache was not read).
TEST(Attend, FormatErrorAgainstExactMath) {
  struct Bound {
    LayerPolicy policy;
    double low, high;
  };
  const Bound bounds[] = {
      {plain_policy(Format::f32), 0, 1e-5},
      {plain_policy(Format::bf16), 5e-4, 2e-2},
      {plain_policy(Format::fp8_e4m3), 1e-2, 0.25},
      {plain_policy(Format::q8_0), 1e-3, 4e-2},
      {plain_policy(Format::q4_0), 3e-2, 0.9},
      {layered_policy(1.0, 0.0), 3e-2, 0.9},
      {mixed(Format::nvfp4x2, Format::nvfp4x2), 1e-3, 4e-2},
      {layered_policy(0.02, 0.0), 1e-3, 0.2},
      {plain_policy(Format::fp8_e5m2), 2e-2, 0.5},
      {plain_policy(Format::fp6_e3m2), 2e-2, 0.5},
      {plain_policy(Format::fp6_e2m3), 1e-2, 0.25},
      {mixed(Format::mxfp4, Format::mxfp4, layered_policy(1.0, 0.0)), 5e-2, 1.2},
      {mixed(Format::nvfp4, Format::int3, layered_policy(1.0, 0.0)), 5e-2, 1.0},
      {mixed(Format::int3, Format::int3, layered_policy(1.0, 0.0)), 8e-2, 1.5},
      // The residual brings each of them near to the fp4x2 tier.
      {mixed(Format::mxfp4, Format::int3, layered_policy(0.02, 0.0)), 1e-3, 0.3},
  };
  for (const Bound& b : bounds) {
    CaseOptions o{.policy = b.policy, .length = 64 * 12 + 5, .queries = 4};
    AttentionCase c(o);
    const double error = row_error(c.attend(), c.exact(), o.shape.head_dim_v);
    EXPECT_GE(error, b.low) << to_string(b.policy.k_format);
    EXPECT_LE(error, b.high) << to_string(b.policy.k_format);
  }
}

// With every page promoted, base + residual is better than 8 bits whatever the base is.
TEST(Attend, TheResidualIsOfTheBaseThatIsStored) {
  for (const auto& [k, v] : {std::pair{Format::nvfp4, Format::int3},
                             {Format::mxfp4, Format::mxfp4},
                             {Format::int3, Format::int3}}) {
    CaseOptions o{.policy = mixed(k, v, sealed_policy(0, 1 << 20)), .length = 64 * 6 + 5};
    AttentionCase c(o);
    AttendStats stats;
    const double error = row_error(c.attend(&stats), c.exact(), o.shape.head_dim_v);
    EXPECT_EQ(stats.promoted_fraction(), 1.0);
    EXPECT_GT(error, 1e-3) << to_string(k);
    EXPECT_LT(error, 0.1) << to_string(k);
    o.policy = mixed(k, v, sealed_policy(0, 0));
    AttentionCase base(o);
    EXPECT_GT(row_error(base.attend(), base.exact(), o.shape.head_dim_v), 5 * error);
  }
}

// A constant offset in K, as a K bias gives, costs the layered cache little (the first page's
// open form has no reference yet: it is BF16 of the offset) and breaks FP8.
TEST(Attend, CentringRemovesAnOffsetOfK) {
  CaseOptions o{.policy = mixed(Format::nvfp4x2, Format::nvfp4x2), .length = 600, .queries = 2};
  o.q_gain = 1.0f;
  AttentionCase plain(o);
  const double without = row_error(plain.attend(), plain.exact(), o.shape.head_dim_v);
  o.k_offset = 40.0f;
  AttentionCase biased(o);
  const double with = row_error(biased.attend(), biased.exact(), o.shape.head_dim_v);
  EXPECT_LT(with, 6 * without);
  o.policy = plain_policy(Format::fp8_e4m3);
  AttentionCase fp8(o);
  EXPECT_GT(row_error(fp8.attend(), fp8.exact(), o.shape.head_dim_v), 10 * with);
}

TEST(Attend, BitsReadFollowTheDecisions) {
  CaseOptions o{.policy = layered_policy(1.0, 0.0), .length = 64 * 8};
  o.shape = {.kv_heads = 1, .q_heads = 4, .head_dim_k = 128, .head_dim_v = 128};
  AttentionCase c(o);
  AttendStats stats;
  c.attend(&stats);
  // Per page: 2 * 64 * 128 * 4.5 bits of codes and scales, two BF16 means, 36 bytes of metadata
  // and two table entries; the open token: 2 * 128 * 16 bits and K's reference.
  const double page = 2 * 64 * 128 * 4.5 + 2 * 128 * 16 + 8 * (36 + 8);
  const double open = 2 * 128 * 16 + 128 * 16;
  EXPECT_DOUBLE_EQ(stats.bits_read, 8 * page + open);
  EXPECT_DOUBLE_EQ(stats.elements_visible, 2 * 128 * (64 * 8 + 1));

  o.policy = mixed(Format::nvfp4x2, Format::nvfp4x2);
  AttentionCase full(o);
  AttendStats full_stats;
  full.attend(&full_stats);
  EXPECT_DOUBLE_EQ(full_stats.bits_read, stats.bits_read + 8 * 2 * 64 * 128 * 4.5);

  o.policy = layered_policy(1.0, 0.999);  // everything but the open page is skipped
  AttentionCase none(o);
  AttendStats none_stats;
  none.attend(&none_stats);
  EXPECT_EQ(none_stats.pages_skipped, 8);
  EXPECT_DOUBLE_EQ(none_stats.bits_read, stats.bits_read - 8 * 64 * 128 * 4.5);

  // MXFP4: 4.25 bits. INT3: 3.25; its residual is an NVFP4 plane as any other.
  o.policy = mixed(Format::mxfp4, Format::int3, layered_policy(1.0, 0.0));
  AttentionCase mx(o);
  AttendStats mx_stats;
  mx.attend(&mx_stats);
  EXPECT_DOUBLE_EQ(mx_stats.bits_read, stats.bits_read - 8 * 64 * 128 * (0.25 + 1.25));
  o.policy = mixed(Format::mxfp4, Format::int3, sealed_policy(0, 1 << 20));
  AttentionCase mx_full(o);
  AttendStats mx_full_stats;
  mx_full.attend(&mx_full_stats);
  EXPECT_DOUBLE_EQ(mx_full_stats.bits_read, mx_stats.bits_read + 8 * 2 * 64 * 128 * 4.5);

  o.policy = plain_policy(Format::bf16);
  AttentionCase bf16(o);
  AttendStats bf16_stats;
  bf16.attend(&bf16_stats);
  EXPECT_NEAR(bf16_stats.bits_read_per_element(), 16.0, 0.01);
}

TEST(Attend, SealedPolicyReportsWantedMass) {
  CaseOptions o{.policy = sealed_policy(64, 64), .length = 1200, .queries = 3};
  o.q_gain = 4.0f;
  AttentionCase c(o);
  AttendStats stats;
  c.attend(&stats);
  EXPECT_GT(stats.wanted_mass, 0);
  EXPECT_GT(stats.max_mass_4bit, 0.02);
}

// A fork and its parent share pages; what one does never changes what the other reads.
TEST(Attend, ForkedSequencesAreIndependent) {
  for (const LayerPolicy& policy : {layered_policy(0.1, 0.02), sealed_policy(64, 128),
                                    plain_policy(Format::bf16)}) {
    CaseOptions o{.policy = policy, .length = 411, .queries = 0};
    AttentionCase c(o);
    KvCache& cache = c.cache();
    const SequenceId parent = c.sequence(), child = cache.fork(parent);

    CaseOptions more = o;  // other tokens, from another seed
    more.seed = 99;
    more.length = 0;
    more.queries = 300;
    AttentionCase source(more);
    // The parent goes on with tokens 0..99 of the source, the child with 100..199.
    const auto grow = [&](SequenceId seq, int64_t first) {
      for (int64_t at = first; at < first + 100; at += 10) {
        cache.begin_step(seq, 10);
        cache.append(seq, 0, source.k_view(at, 10), source.v_view(at, 10));
        if (at < first + 90) cache.commit(seq);
      }
    };
    const auto read = [&](SequenceId seq) {
      std::vector<float> out, unused;
      AttendRequest r = source.request(unused);
      out.assign(static_cast<size_t>(10 * o.shape.q_heads * o.shape.head_dim_v), 0);
      r.sequence = seq;
      r.q.tokens = 10;
      r.out = TensorView<float>::dense(out.data(), 10, o.shape.q_heads, o.shape.head_dim_v);
      attend(cache, r);
      std::vector<float> ref(out.size());
      r.out.data = ref.data();
      attend_reference(cache, r);
      EXPECT_LT(row_error(out, ref, o.shape.head_dim_v), kTight);
      return out;
    };
    grow(parent, 0);
    const auto before = read(parent);
    grow(child, 100);
    EXPECT_NE(read(child), before);
    EXPECT_EQ(read(parent), before);
    cache.rollback(child);
    cache.free(child);
    EXPECT_EQ(read(parent), before);
  }
}

TEST(Attend, RefusesWhatItCannotDo) {
  CaseOptions o{.policy = layered_policy(0.1, 0.02), .length = 200, .queries = 2};
  AttentionCase c(o);
  std::vector<float> out;
  const auto refuses = [&](const char* part, auto&& change) {
    AttendRequest r = c.request(out);
    change(r);
    try {
      attend(c.cache(), r);
      ADD_FAILURE() << part;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  refuses("layer 3", [](AttendRequest& r) { r.layer = 3; });
  refuses("no sequence 77", [](AttendRequest& r) { r.sequence = 77; });
  refuses("null pointer", [](AttendRequest& r) { r.q.data = nullptr; });
  refuses("q is [2][8][32]", [](AttendRequest& r) { r.q.head_dim = 32; });
  refuses("out is", [](AttendRequest& r) { r.out.tokens = 1; });
  refuses("softmax_scale", [](AttendRequest& r) { r.config.softmax_scale = 0; });
  refuses("softcap", [](AttendRequest& r) { r.config.softcap = -1; });
  std::vector<float> bad(static_cast<size_t>(2 * 8 * 64), 1.0f);
  bad[8 * 64 + 3 * 64 + 5] = NAN;
  refuses("head 3, token 201", [&](AttendRequest& r) { r.q.data = bad.data(); });
  c.cache().commit(c.sequence());
  refuses("holds", [](AttendRequest& r) { r.q.tokens = 2000, r.out.tokens = 2000; });
}

}  // namespace
}  // namespace thriftattn
