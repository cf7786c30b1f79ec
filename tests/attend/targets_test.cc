// Attention on every SIMD target that this machine can run, the portable one included: within the
// tight bound of the reference, and with the same decisions about pages.
#include <gtest/gtest.h>

#include "attend/attend_test_util.h"
#include "formats/test_util.h"

namespace thriftattn {
namespace {

using namespace testing;

TEST(AttendTargets, EveryTargetMatchesReference) {
  int targets = 0;
  bool portable = false;
  AttendStats first;
  test::for_each_target([&] {
    ++targets;
    const int64_t now = hwy::SupportedTargets();
    portable = portable || now == HWY_SCALAR || now == HWY_EMU128;
    for (const auto& [name, policy] : {std::pair{"layered", layered_policy(0.08, 0.01)},
                                       {"sealed", sealed_policy(64, 64)},
                                       {"x2", mixed(Format::nvfp4x2, Format::nvfp4x2)},
                                       {"fp8", plain_policy(Format::fp8_e4m3)},
                                       {"k q8_0 v q4_0", mixed(Format::q8_0, Format::q4_0)},
                                       {"quest", budget_policy(0.2, BlockScore::quest)}}) {
      for (const AttendMode mode : {AttendMode::decode, AttendMode::prefill}) {
        CaseOptions o{.shape = {.kv_heads = 2, .q_heads = 6, .head_dim_k = 96, .head_dim_v = 64},
                      .policy = policy,
                      .length = 64 * 6 + 11,
                      .queries = mode == AttendMode::decode ? 3 : 70,
                      .softcap = 8.0f,
                      .sink_logits = true,
                      .equalizer = true};
        o.mode = mode;
        expect_matches_reference(o, name);
      }
    }
    CaseOptions o{.policy = layered_policy(0.08, 0.01), .length = 64 * 6 + 11, .queries = 3};
    AttendStats stats;
    AttentionCase(o).attend(&stats);
    if (targets == 1) first = stats;
    EXPECT_EQ(stats.pages_promoted, first.pages_promoted);
    EXPECT_EQ(stats.pages_skipped, first.pages_skipped);
    EXPECT_EQ(stats.bits_read, first.bits_read);
  });
  EXPECT_GE(targets, 1);
#if HWY_ARCH_X86
  EXPECT_GE(targets, 2);  // the portable one and at least one with instructions of the machine
  EXPECT_TRUE(portable);
#endif
}

}  // namespace
}  // namespace thriftattn
