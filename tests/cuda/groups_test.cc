// attend() over planes in groups of 32, MXFP4 and INT3, against FP64 over the values as stored:
// each with itself, with each other and with sides of other formats, through attend_groups and
// attend_prefill; V in INT3 is stored rotated.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <ostream>
#include <string>

#include "cuda/device_case.h"

namespace thriftattn::testing {
namespace {

// The presets, with fewer tokens whose residuals are held.
LayerPolicy savings(Format k) {
  LayerPolicy p = mix(k, Format::int3, sealed_policy(64, 192));
  p.skip = 0.0003;
  return p;
}

struct NamedPolicy {
  const char* name;
  LayerPolicy policy;
};

const NamedPolicy kPolicies[] = {
    {"max-savings", savings(Format::nvfp4)},
    {"max-savings-mx", savings(Format::mxfp4)},
    {"int3", mix(Format::int3, Format::int3)},
    {"mxfp4", mix(Format::mxfp4, Format::mxfp4)},
    {"int3 K, mxfp4 V, sealed", mix(Format::int3, Format::mxfp4, sealed_policy(64, 64))},
    {"int3 K, nvfp4 V, promote", mix(Format::int3, Format::nvfp4, layered_policy(0.05, 0.004))},
    {"nvfp4 K, int3 V, promote", mix(Format::nvfp4, Format::int3, layered_policy(0.03, 0.004))},
    {"mxfp4, promote", mix(Format::mxfp4, Format::mxfp4, layered_policy(0.05, 0.004))},
    {"bf16 K, int3 V", mix(Format::bf16, Format::int3, layered_policy(0.05, 0.004))},
    {"fp8 K, mxfp4 V", mix(Format::fp8_e4m3, Format::mxfp4)},
    {"int3 K, bf16 V", mix(Format::int3, Format::bf16)},
    {"mxfp4 K, fp8 V", mix(Format::mxfp4, Format::fp8_e4m3, layered_policy(0.05, 0.004))}};

// Letters and digits of the name.
std::string id(const NamedPolicy& p) {
  std::string id;
  for (const char* c = p.name; *c != 0; ++c) {
    if (std::isalnum(static_cast<unsigned char>(*c)) != 0) id += *c;
  }
  return id;
}
void PrintTo(const NamedPolicy& p, std::ostream* out) { *out << id(p); }

class CudaGroupPolicies : public ::testing::TestWithParam<NamedPolicy> {};

INSTANTIATE_TEST_SUITE_P(, CudaGroupPolicies, ::testing::ValuesIn(kPolicies),
                         [](const auto& info) { return id(info.param); });

void check(const CaseOptions& o, const std::string& what) {
  DeviceCase c({o});
  c.check(
      what + ", length " + std::to_string(o.length) + ", " + std::to_string(o.queries) + " queries",
      kTightCuda);
}

TEST_P(CudaGroupPolicies, DecodeMatchesTruth) {
  SKIP_WITHOUT_DEVICE();
  const auto& [name, policy] = GetParam();
  for (const int64_t length : {0, 1, 63, 64, 130, 700, 2111}) check(decode_options(policy, length), name);
}

TEST_P(CudaGroupPolicies, Shapes) {
  SKIP_WITHOUT_DEVICE();
  const auto& [name, policy] = GetParam();
  for (const int64_t dim : {64, 128, 192, 256}) {
    for (const int64_t group : {3, 12, 40}) {
      CaseOptions o = decode_options(policy, 600);
      o.shape = {.kv_heads = 1, .q_heads = group, .head_dim_k = dim, .head_dim_v = dim};
      check(o, std::string(name) + ", head_dim " + std::to_string(dim) + ", group " +
                   std::to_string(group));
    }
  }
}

TEST_P(CudaGroupPolicies, Verify) {
  SKIP_WITHOUT_DEVICE();
  const auto& [name, policy] = GetParam();
  for (const int64_t queries : {2, 8, 16}) {
    for (const int64_t length : {60, 505, 640}) check(decode_options(policy, length, queries), name);
  }
}

TEST_P(CudaGroupPolicies, Prefill) {
  SKIP_WITHOUT_DEVICE();
  const auto& [name, policy] = GetParam();
  for (const auto& [length, queries] : {std::pair<int64_t, int64_t>{0, 17}, {37, 60}, {300, 33}}) {
    CaseOptions o = decode_options(policy, length, queries);
    o.mode = AttendMode::prefill;
    check(o, std::string(name) + ", prefill");
  }
  for (const int64_t dim : {64, 192, 256}) {
    CaseOptions o = decode_options(policy, 150, 40);
    o.shape.head_dim_k = o.shape.head_dim_v = dim;
    o.mode = AttendMode::prefill;
    check(o, std::string(name) + ", prefill, head_dim " + std::to_string(dim));
  }
}

// With 16-bit queries K's base and residual are one tile.
TEST_P(CudaGroupPolicies, PrefillOfBf16Queries) {
  SKIP_WITHOUT_DEVICE();
  const auto& [name, policy] = GetParam();
  CaseOptions o = decode_options(policy, 150, 40);
  o.mode = AttendMode::prefill;
  o.bf16_queries = true;
  DeviceCase c({o});
  c.narrow_queries();
  const auto got = c.attend();
  EXPECT_LT(row_error(got.out, c.truth(got).out, o.shape.head_dim_v), kTightCuda) << name;
}

TEST_P(CudaGroupPolicies, WindowSoftcapSinksOffset) {
  SKIP_WITHOUT_DEVICE();
  const auto& [name, policy] = GetParam();
  for (const int64_t window : {0, 100, 300}) {
    for (const bool prefill : {false, true}) {
      CaseOptions o = decode_options(policy, 777, prefill ? 40 : 1);
      o.mode = prefill ? AttendMode::prefill : AttendMode::decode;
      o.shape.window = window;
      o.sink_logits = window != 100;
      o.softcap = window == 300 ? 20.0f : 0.0f;
      o.k_offset = 3.0f;
      check(o, std::string(name) + ", window " + std::to_string(window));
    }
  }
}

// Neighbouring pages differ by 2^27, and their scales with them.
TEST(CudaGroups, ValuesOfEverySize) {
  SKIP_WITHOUT_DEVICE();
  for (const Format v : {Format::int3, Format::mxfp4}) {
    for (const bool prefill : {false, true}) {
      CaseOptions o = decode_options(mix(Format::mxfp4, v), 400, prefill ? 40 : 1);
      o.mode = prefill ? AttendMode::prefill : AttendMode::decode;
      o.v_spread = 9.0f;
      check(o, "V of every size");
    }
  }
}

// Walks with whole pages and others, pages that are skipped, and ones that are promoted.
TEST(CudaGroups, LongContextsSkipAndPromote) {
  SKIP_WITHOUT_DEVICE();
  int64_t promoted = 0, skipped = 0;
  int64_t base = 0;
  // A floor of the LSE makes masses larger than they are; the pages' are about 0.002.
  for (const double skip : {0.003, 0.004, 0.006, 0.01}) {
    for (const LayerPolicy& policy : {savings(Format::nvfp4), savings(Format::mxfp4),
                                      mix(Format::int3, Format::int3, layered_policy(0.03, 0.0))}) {
      CaseOptions o = decode_options(policy, 30000);
      o.shape = {.kv_heads = 1, .q_heads = 4, .head_dim_k = 128, .head_dim_v = 128};
      o.q_gain = 1.0f;
      o.policy.skip = skip;
      DeviceCase c({o});
      c.check(std::string(to_string(policy.k_format)) + " K, skip " + std::to_string(skip),
              kTightCuda);
      const auto decisions = c.attend().decisions;
      const auto count = [&](cuda::Decision d) {
        return std::count(decisions.begin(), decisions.end(), static_cast<uint8_t>(d));
      };
      skipped += count(cuda::Decision::skip);
      base += count(cuda::Decision::base);
    }
  }
  EXPECT_GT(base, 10);
  EXPECT_GT(skipped, 10);
  skipped = 0;
  for (const Format k : {Format::nvfp4, Format::mxfp4, Format::int3}) {
    std::vector<CaseOptions> cases;
    for (const int64_t length : {5, 1111, 3000, 700}) {
      CaseOptions o = decode_options(mix(k, Format::int3, layered_policy(0.05, 0.04)), length);
      o.q_gain = 0.8f;
      o.equalizer = false;  // it belongs to the model, and differs by seed here
      o.seed = static_cast<uint32_t>(length);
      cases.push_back(o);
    }
    DeviceCase c(cases);
    c.check("ragged", kTightCuda);
    c.check_rule("ragged", &promoted, &skipped);
  }
  EXPECT_GT(promoted, 5);
  EXPECT_GT(skipped, 5);
}

TEST(CudaGroups, PositionsThatDecideDifferently) {
  SKIP_WITHOUT_DEVICE();
  int64_t apart = 0;
  for (const Format k : {Format::nvfp4, Format::mxfp4}) {
    CaseOptions o = decode_options(mix(k, Format::int3, layered_policy(0.05, 0.0)), 3000, 4);
    o.shape = {.kv_heads = 1, .q_heads = 4, .head_dim_k = 128, .head_dim_v = 128};
    o.q_gain = 1.0f;
    DeviceCase c({o});
    c.check(std::string(to_string(k)) + " K", kTightCuda);
    const auto decisions = c.attend().decisions;
    for (int64_t page = 0; page < 3000 / kPageTokens; ++page) {
      int64_t full = 0;
      for (int64_t i = 0; i < o.queries; ++i) {
        full += decisions[static_cast<size_t>(i * c.max_pages() + page)] ==
                static_cast<uint8_t>(cuda::Decision::full);
      }
      apart += full > 0 && full < o.queries;
    }
  }
  EXPECT_GT(apart, 5);
}

// Scores far apart, in walks of eight pages and more: a later page's are often far above the
// reference that the first one set, while an earlier page still waits to be added.
TEST(CudaGroups, ReferencesThatRise) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [k, v] : {std::pair{Format::nvfp4, Format::int3}, {Format::nvfp4, Format::mxfp4},
                             {Format::int3, Format::int3}, {Format::mxfp4, Format::mxfp4}}) {
    CaseOptions o = decode_options(mix(k, v), 8000);
    o.q_gain = 4.0f;
    DeviceCase c({o});
    c.plan_with(0, true);
    c.check(std::string(to_string(k)) + " K, " + std::string(to_string(v)) + " V", kTightCuda);
  }
}

TEST(CudaGroups, RunsAreBitwiseEqual) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = decode_options(savings(Format::mxfp4), 5000);
  DeviceCase c({o, o, o});
  c.check_repeats();
}

TEST(CudaGroups, ExplainNamesTheKernel) {
  SKIP_WITHOUT_DEVICE();
  const LayerShape shape = decode_options(savings(Format::nvfp4), 0).shape;
  const cuda::AttendPlan plan(shape, savings(Format::nvfp4), {.batch = 1, .max_pages = 8});
  EXPECT_EQ(plan.explain().rfind("attend_groups: ", 0), 0U) << plan.explain();
  EXPECT_NE(plan.explain().find("K nvfp4, V int3"), std::string::npos) << plan.explain();
  const cuda::AttendPlan other(shape, layered_policy(1.0, 0.0), {.batch = 1, .max_pages = 8});
  EXPECT_EQ(other.explain().rfind("attend_planes: ", 0), 0U) << other.explain();
}

}  // namespace
}  // namespace thriftattn::testing
