// Every head dimension and GQA ratio, in every kind of format, against the reference; and what a
// format cannot do at a dimension, refused with what is required, supported and missing.
#include <gtest/gtest.h>

#include <string>

#include "attend/attend_test_util.h"

namespace thriftattn {
namespace {

using namespace testing;

CaseOptions shape_case(int64_t kv, int64_t ratio, int64_t dk, int64_t dv,
                       const LayerPolicy& policy) {
  CaseOptions o{
      .shape = {.kv_heads = kv, .q_heads = kv * ratio, .head_dim_k = dk, .head_dim_v = dv},
      .policy = policy,
      .length = 64 * 5 + 17,
      .queries = 3};
  o.equalizer = true;
  o.scramble = true;
  return o;
}

TEST(AttendShapes, EveryHeadDimInEveryKindOfFormat) {
  for (const int64_t dim : {64, 80, 96, 128, 192, 256}) {
    for (const auto& [name, policy] : {std::pair{"layered", layered_policy(0.1, 0.02)},
                                       {"sealed", sealed_policy(64, 64)},
                                       {"x2", mixed(Format::nvfp4x2, Format::nvfp4x2)},
                                       {"bf16", plain_policy(Format::bf16)},
                                       {"fp8", plain_policy(Format::fp8_e4m3)},
                                       {"q8_0", plain_policy(Format::q8_0)},
                                       {"k nvfp4 v q4_0", mixed(Format::nvfp4, Format::q4_0)}}) {
      const std::string what = std::string(name) + ", head_dim " + std::to_string(dim);
      const bool blocks = policy.v_format == Format::q8_0 || policy.v_format == Format::q4_0;
      const CaseOptions o = shape_case(2, 3, dim, dim, policy);
      if (!blocks || dim % 32 == 0) {
        expect_matches_reference(o, what);
      } else {
        expect_refusal(ErrorCode::unsupported, "a multiple of 32", [&] { AttentionCase c(o); });
      }
    }
  }
}

TEST(AttendShapes, HeadDimsOfKAndVMayDiffer) {
  for (const int64_t dk : {64, 80, 192, 256}) {
    for (const int64_t dv : {64, 80, 128, 192}) {
      if (dk == dv) continue;
      for (const AttendMode mode : {AttendMode::decode, AttendMode::prefill}) {
        CaseOptions o = shape_case(2, 2, dk, dv, layered_policy(0.1, 0.02));
        o.mode = mode;
        expect_matches_reference(o, std::to_string(dk) + "/" + std::to_string(dv));
      }
    }
  }
}

TEST(AttendShapes, EveryGqaRatioUpTo64) {
  for (int64_t ratio = 1; ratio <= 64; ++ratio) {
    CaseOptions o = shape_case(1, ratio, 64, 64, layered_policy(0.1, 0.02));
    o.length = 64 * 2 + ratio;
    expect_matches_reference(o, "ratio " + std::to_string(ratio));
  }
  for (const int64_t ratio : {1, 5, 16, 64}) {
    expect_matches_reference(shape_case(3, ratio, 96, 96, sealed_policy(64, 64)),
                             "3 KV heads, ratio " + std::to_string(ratio));
  }
}

TEST(AttendShapes, RefusalsSayWhatIsRequiredSupportedAndMissing) {
  const auto refuses = [](const LayerShape& shape, const LayerPolicy& policy, const char* part,
                          ErrorCode code = ErrorCode::unsupported) {
    expect_refusal(code, part, [&] { KvCache c({.layers = {shape}, .policy = {policy}}); });
  };
  const LayerShape ok{.kv_heads = 2, .q_heads = 4, .head_dim_k = 80, .head_dim_v = 128};
  const auto with = [&](auto member, int64_t value) {
    LayerShape shape = ok;
    shape.*member = value;
    return shape;
  };
  refuses(ok, plain_policy(Format::q4_0),
          "K in q4_0 with head_dim_k = 80; required: a multiple of 32, its group; supported at 80: "
          "f32, bf16, fp16, fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, nvfp4, nvfp4x2; missing:");
  const LayerPolicy bf16 = plain_policy(Format::bf16);
  refuses(with(&LayerShape::head_dim_v, 72), bf16, "head_dim_v = 72; required: 72; supported:");
  refuses(with(&LayerShape::head_dim_v, 16), bf16, "from 32 to 256");
  refuses(with(&LayerShape::head_dim_k, 272), bf16, "from 32 to 256");
  refuses(with(&LayerShape::head_dim_k, -64), bf16, "head_dim_k = -64");
  refuses(with(&LayerShape::q_heads, int64_t{1} << 62), bf16, "at most 65536");
  const auto invalid = ErrorCode::invalid_argument;
  refuses(with(&LayerShape::q_heads, 5), bf16, "q_heads = 5", invalid);
  refuses(with(&LayerShape::kv_heads, 0), bf16, "kv_heads = 0", invalid);
  refuses(with(&LayerShape::window, -1), bf16, "window = -1", invalid);
  refuses(with(&LayerShape::window, int64_t{1} << 62), bf16, "window = ", invalid);
}

}  // namespace
}  // namespace thriftattn
