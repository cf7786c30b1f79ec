// AttendMath::fast in prefill: the BF16 kernels against the FP64 reference over the values as stored.
// q', decoded K' and V', and P are rounded to BF16 (2^-9 relative each), sums are FP32. K' and V' of
// a BF16 cache and of open pages are BF16 already; with queries that are BF16 numbers too, only P is
// rounded.
#include <gtest/gtest.h>
#include <tbb/global_control.h>

#include <cmath>
#include <string>

#include "attend/attend_test_util.h"
#include "attend/prefill_kernels.h"
#include "support/attention_case.h"

namespace thriftattn {
namespace {

using namespace testing;

constexpr double kTight = 3.9e-3;  // 2^-8, the largest relative rounding of a weight
// The worst of a thousand rows whose scores reach 15, which BF16 queries move by up to 0.03.
constexpr double kBf16Queries = 3e-2;

class PrefillFast : public ::testing::Test {
 protected:
  void SetUp() override {
    if (prefill_kernels_bf16() == nullptr) GTEST_SKIP() << "no AVX-512 BF16 on this machine";
  }
};

CaseOptions prefill(LayerPolicy policy, int64_t length, int64_t queries) {
  CaseOptions o{.policy = policy, .length = length, .queries = queries};
  o.mode = AttendMode::prefill;
  o.math = AttendMath::fast;
  o.scramble = length > 100;
  return o;
}

LayerPolicy mixed(Format k, Format v) {
  LayerPolicy p = layered_policy(0.03, 0.0);
  p.k_format = k;
  p.v_format = v;
  return p;
}

TEST_F(PrefillFast, Bf16CacheIsTight) {
  for (int64_t length : {0, 1, 63, 64, 200, 517}) {
    CaseOptions o = prefill(plain_policy(Format::bf16), length, 97);
    o.bf16_queries = true;
    expect_within(o, kTight, "after " + std::to_string(length));
  }
}

TEST_F(PrefillFast, MatchesReferenceOverPolicies) {
  for (const LayerPolicy& policy :
       {layered_policy(0.02, 0.0003), sealed_policy(64, 128), sealed_policy(0, 0),
        plain_policy(Format::q8_0), plain_policy(Format::fp8_e4m3), plain_policy(Format::q4_0),
        mixed(Format::nvfp4, Format::bf16), mixed(Format::bf16, Format::nvfp4),
        mixed(Format::nvfp4x2, Format::nvfp4x2), mixed(Format::nvfp4, Format::int3),
        mixed(Format::mxfp4, Format::int3), plain_policy(Format::fp8_e5m2),
        plain_policy(Format::fp6_e2m3)}) {
    for (int64_t length : {0, 65, 333}) {
      CaseOptions o = prefill(policy, length, 150);
      o.equalizer = true;
      expect_within(o, kBf16Queries, std::string(to_string(policy.k_format)) + " after " +
                                         std::to_string(length));
    }
  }
}

// More pages than are decoded at a time, and a last group of four that is cut.
TEST_F(PrefillFast, MatchesReferenceAcrossBlocks) {
  CaseOptions o = prefill(layered_policy(0.02, 0.0003), 64 * 69 + 5, 20);
  o.shape = {.kv_heads = 1, .q_heads = 4, .head_dim_k = 64, .head_dim_v = 64};
  expect_within(o, kBf16Queries, "blocks");
}

TEST_F(PrefillFast, MatchesReferenceOverShapes) {
  struct Shape {
    int64_t kv, q, dk, dv;
  };
  for (const Shape& s : {Shape{1, 1, 64, 64}, Shape{2, 12, 128, 128}, Shape{1, 4, 256, 256},
                         Shape{3, 6, 96, 64}, Shape{1, 7, 80, 80}, Shape{2, 64, 64, 128}}) {
    CaseOptions o = prefill(layered_policy(0.1, 0.02), 330, 33);
    o.shape = {.kv_heads = s.kv, .q_heads = s.q, .head_dim_k = s.dk, .head_dim_v = s.dv};
    expect_within(o, kBf16Queries, "D " + std::to_string(s.dk) + " heads " + std::to_string(s.q));
  }
}

TEST_F(PrefillFast, MatchesReferenceWithWindowSoftcapAndSinks) {
  for (int64_t window : {0, 50, 100, 256}) {
    for (float softcap : {0.0f, 4.0f}) {
      for (bool sinks : {false, true}) {
        for (const LayerPolicy& policy :
             {layered_policy(0.1, 0.02), plain_policy(Format::bf16)}) {
          CaseOptions o = prefill(policy, 450, 80);
          o.shape.window = window;
          o.softcap = softcap;
          o.sink_logits = sinks;
          expect_within(o, kBf16Queries, "window " + std::to_string(window) + " softcap " +
                                             std::to_string(softcap));
        }
      }
    }
  }
}

TEST_F(PrefillFast, StatisticsAreThoseOfTheFp32Path) {
  CaseOptions o = prefill(sealed_policy(64, 128), 700, 40);
  AttendStats fast, slow;
  AttentionCase(o).attend(&fast);
  o.math = AttendMath::f32;
  AttentionCase(o).attend(&slow);
  EXPECT_EQ(fast.rows, slow.rows);
  EXPECT_EQ(fast.query_heads, slow.query_heads);
  EXPECT_EQ(fast.pages_visible, slow.pages_visible);
  EXPECT_EQ(fast.pages_promoted, slow.pages_promoted);
  EXPECT_DOUBLE_EQ(fast.bits_read, slow.bits_read);
  EXPECT_GT(fast.pages_promoted, 0);
  EXPECT_LT(fast.pages_promoted, fast.pages_visible);
}

TEST_F(PrefillFast, ResultDoesNotDependOnThreads) {
  AttentionCase c(prefill(layered_policy(0.05, 0.005), 5000, 100));
  std::vector<float> one;
  {
    tbb::global_control limit(tbb::global_control::max_allowed_parallelism, 1);
    one = c.attend();
  }
  EXPECT_EQ(one, c.attend());
}

}  // namespace
}  // namespace thriftattn
