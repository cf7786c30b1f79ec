// The FP32 decode kernels of every SIMD target that this machine runs, in place of what attend()
// would choose: FP64 reference within FP32's own bound.
#include <gtest/gtest.h>

#include <hwy/targets.h>

#include <cmath>
#include <string>

#include "attend/decode_heads.h"
#include "attend/request.h"
#include "support/attention_case.h"

namespace thriftattn {
namespace {

using namespace testing;

constexpr double kTight = 2e-5;

// Every query as a tile of its own.
std::vector<float> decode(AttentionCase& c, int64_t queries, std::vector<float>& lse) {
  std::vector<float> out;
  AttendRequest request = c.request(out);
  lse.assign(static_cast<size_t>(queries * request.q.heads), 0.0f);
  request.lse = TensorView<float>::dense(lse.data(), queries, request.q.heads, 1);
  const LayerView view = checked_views(c.cache(), {&request, 1}).front().front();
  ScratchPool scratch;
  for (int64_t i = 0; i < queries; ++i) {
    const TileSpec spec{0, i, 1, view.length() - queries + i};
    DecodeHeads(view, request, spec, *decode_kernels_f32(), scratch).run(false, nullptr);
  }
  return out;
}

void expect_matches(const CaseOptions& o, const std::string& what) {
  AttentionCase c(o);
  std::vector<float> lse, lse_ref;
  const auto out = decode(c, o.queries, lse);
  const auto ref = c.attend_reference(&lse_ref);
  EXPECT_LT(row_error(out, ref, o.shape.head_dim_v), kTight) << what;
  for (size_t i = 0; i < lse.size(); ++i) {
    EXPECT_NEAR(lse[i], lse_ref[i], 1e-4 + 2e-6 * std::fabs(lse_ref[i])) << what;
  }
}

LayerPolicy mixed(Format k, Format v) {
  LayerPolicy p = layered_policy(0.03, 0.0);
  p.k_format = k;
  p.v_format = v;
  return p;
}

TEST(DecodeGeneric, MatchesReferenceOnEveryTarget) {
  const int64_t every = hwy::SupportedTargets();
  for (int64_t left = every; left != 0; left &= left - 1) {
    const int64_t target = left & -left;
    hwy::SetSupportedTargetsForTest(target);
    const std::string name = hwy::TargetName(target);
    for (const LayerPolicy& policy :
         {layered_policy(0.1, 0.02), sealed_policy(64, 128), plain_policy(Format::bf16),
          mixed(Format::nvfp4, Format::bf16), mixed(Format::nvfp4x2, Format::nvfp4x2),
          mixed(Format::f32, Format::fp16), mixed(Format::fp8_e4m3, Format::q4_0),
          mixed(Format::q8_0, Format::fp6_e2m3), mixed(Format::mxfp4, Format::int3),
          mixed(Format::int3, Format::fp8_e5m2), mixed(Format::fp6_e3m2, Format::mxfp4)}) {
      for (int64_t length : {0, 65, 517}) {
        CaseOptions o{.policy = policy, .length = length, .queries = 2};
        o.scramble = length > 100;
        expect_matches(o, name + " after " + std::to_string(length));
      }
    }
    CaseOptions o{
        .shape = {.kv_heads = 1, .q_heads = 7, .head_dim_k = 80, .head_dim_v = 96, .window = 100},
        .policy = layered_policy(0.1, 0.02),
        .length = 330,
        .queries = 3};
    o.softcap = 4.0f;
    o.sink_logits = o.equalizer = true;
    expect_matches(o, name + " window, softcap and sinks");
  }
  hwy::SetSupportedTargetsForTest(0);
}

TEST(DecodeGeneric, MatchesReferenceAcrossSplits) {
  CaseOptions o{.policy = layered_policy(0.02, 0.0005), .length = 64 * 70 + 9, .queries = 3};
  o.q_gain = 3.0f;
  expect_matches(o, "splits");
}

}  // namespace
}  // namespace thriftattn
