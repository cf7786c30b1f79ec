// AttendMath::fast in decode: the BF16 kernels against the FP64 reference over the values as stored.
//
// q' and P x scale are rounded to BF16 (2^-9 relative each), sums are FP32. Two bounds: with queries
// that are BF16 numbers (no rotation, a scale that is a power of two) only P x scale is rounded, each
// product by itself, which judges the kernels tightly; with any queries the rounding of q' moves
// scores of 10 by up to 0.02, which is what BF16 arithmetic costs anywhere.
#include <gtest/gtest.h>
#include <tbb/global_control.h>

#include <cmath>
#include <string>

#include "attend/attend_test_util.h"
#include "attend/decode_kernels.h"
#include "support/attention_case.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using namespace testing;

constexpr double kTight = 3.9e-3;  // 2^-8, the largest relative rounding of a weight
constexpr double kBf16Queries = 2e-2;

LayerPolicy mixed(Format k, Format v) {
  LayerPolicy p = layered_policy(0.03, 0.0);
  p.k_format = k;
  p.v_format = v;
  return p;
}

class DecodeFast : public ::testing::Test {
 protected:
  void SetUp() override {
    if (decode_kernels_bf16() == nullptr) GTEST_SKIP() << "no AVX-512 BF16 on this machine";
  }
};

CaseOptions fast(CaseOptions o) {
  o.math = AttendMath::fast;
  return o;
}

void expect_close(CaseOptions options, const std::string& what) {
  expect_within(fast(options), kBf16Queries, what);
  options.bf16_queries = true;
  options.policy.rotate = options.equalizer = false;
  expect_within(fast(options), kTight, what + ", BF16 queries");
}

TEST_F(DecodeFast, MatchesReferenceOverPoliciesAndLengths) {
  const std::pair<const char*, LayerPolicy> policies[] = {
      {"bf16", plain_policy(Format::bf16)},
      {"balanced", layered_policy(0.02, 0.0003)},
      {"coarse", layered_policy(0.08, 0.02)},
      {"never", layered_policy(1.0, 0.0)},
      {"x2", mixed(Format::nvfp4x2, Format::nvfp4x2)},
      {"sealed", sealed_policy(64, 128)},
      {"sealed0", sealed_policy(0, 0)},
      {"k nvfp4 v bf16", mixed(Format::nvfp4, Format::bf16)},
      {"k bf16 v nvfp4", mixed(Format::bf16, Format::nvfp4)},
  };
  for (const auto& [name, policy] : policies) {
    for (int64_t length : {0, 1, 63, 64, 65, 191, 517}) {
      CaseOptions o{.policy = policy, .length = length, .seed = static_cast<uint32_t>(length + 7)};
      o.scramble = length > 100;
      expect_close(o, std::string(name) + " after " + std::to_string(length));
    }
  }
}

TEST_F(DecodeFast, MatchesReferenceOverShapes) {
  struct Shape {
    int64_t kv, q, dk, dv;
  };
  for (const Shape& s : {Shape{1, 1, 64, 64}, Shape{2, 12, 128, 128}, Shape{1, 4, 256, 256},
                         Shape{3, 6, 96, 64}, Shape{1, 7, 80, 80}, Shape{2, 64, 64, 128},
                         Shape{1, 5, 192, 96}}) {
    for (const LayerPolicy& policy : {layered_policy(0.1, 0.02), plain_policy(Format::bf16)}) {
      CaseOptions o{
          .shape = {.kv_heads = s.kv, .q_heads = s.q, .head_dim_k = s.dk, .head_dim_v = s.dv},
          .policy = policy,
          .length = 330,
          .queries = 2};
      o.equalizer = true;
      o.scramble = true;
      expect_close(o, "D " + std::to_string(s.dk) + " heads " + std::to_string(s.q));
    }
  }
}

TEST_F(DecodeFast, MatchesReferenceWithWindowSoftcapAndSinks) {
  for (int64_t window : {0, 50, 100, 256}) {
    for (float softcap : {0.0f, 4.0f}) {
      for (bool sinks : {false, true}) {
        for (const LayerPolicy& policy :
             {layered_policy(0.1, 0.02), sealed_policy(64, 64), plain_policy(Format::bf16),
              mixed(Format::nvfp4x2, Format::nvfp4x2)}) {
          CaseOptions o{.policy = policy, .length = 450, .queries = 5};
          o.shape.window = window;
          o.softcap = softcap;
          o.sink_logits = sinks;
          expect_close(o, "window " + std::to_string(window) + " softcap " +
                                    std::to_string(softcap));
        }
      }
    }
  }
}

TEST_F(DecodeFast, MatchesReferenceAcrossSplits) {
  CaseOptions o{.policy = layered_policy(0.02, 0.0005), .length = 64 * 70 + 9, .queries = 3};
  o.q_gain = 3.0f;
  expect_close(o, "splits");
}

// Promotion must be partial here, and the same pages must be chosen as in FP32: the statistics of
// both paths agree but for pages within rounding of a threshold.
TEST_F(DecodeFast, DecidesAsTheFp32PathDoes) {
  CaseOptions o{.policy = layered_policy(0.1, 0.02), .length = 1500, .queries = 12};
  o.q_gain = 4.0f;
  AttentionCase exact(o), quick(fast(o));
  AttendStats a, b;
  exact.attend(&a);
  quick.attend(&b);
  EXPECT_GT(b.promoted_fraction(), 0.05);
  EXPECT_GT(b.skipped_fraction(), 0.05);
  EXPECT_LT(b.skipped_fraction() + b.promoted_fraction(), 0.95);
  EXPECT_EQ(a.pages_visible, b.pages_visible);
  EXPECT_NEAR(a.promoted_fraction(), b.promoted_fraction(), 0.01);
  EXPECT_NEAR(a.skipped_fraction(), b.skipped_fraction(), 0.01);
  EXPECT_NEAR(a.bits_read, b.bits_read, 0.01 * a.bits_read);
  EXPECT_NEAR(a.sum_mass_4bit, b.sum_mass_4bit, 0.02 * a.sum_mass_4bit);
  EXPECT_NEAR(a.final_mass_4bit, b.final_mass_4bit, 0.02 * a.final_mass_4bit);
  EXPECT_LE(b.max_mass_4bit, 0.1 + 1e-6);
  EXPECT_LE(b.max_mass_skipped, 0.02 + 1e-6);
}

// Verify: every query of a step reads what it would read if its token were decoded alone, bit for
// bit, whatever shares its block of rows.
TEST_F(DecodeFast, VerifyEqualsDecodeBitwise) {
  for (const int64_t q_heads : {2, 8, 14}) {
    for (const LayerPolicy& policy :
         {layered_policy(0.1, 0.02), sealed_policy(64, 128), plain_policy(Format::bf16),
          plain_policy(Format::fp8_e4m3), mixed(Format::q8_0, Format::fp6_e3m2),
          mixed(Format::mxfp4, Format::int3)}) {
      CaseOptions o{.policy = policy, .length = 700, .queries = 40};
      o.shape.q_heads = q_heads;
      o.q_gain = 4.0f;
      AttentionCase chunk(fast(o));
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
              << "query " << i << " element " << d << " heads " << q_heads;
        }
      }
    }
  }
}

TEST_F(DecodeFast, ResultDoesNotDependOnThreads) {
  for (const LayerPolicy& policy : {layered_policy(0.05, 0.005), mixed(Format::int3, Format::q4_0)}) {
    CaseOptions o{.policy = policy, .length = 5000, .queries = 3};
    AttentionCase c(fast(o));
    std::vector<float> one;
    {
      tbb::global_control limit(tbb::global_control::max_allowed_parallelism, 1);
      one = c.attend();
    }
    EXPECT_EQ(one, c.attend());
  }
}

}  // namespace
}  // namespace thriftattn
