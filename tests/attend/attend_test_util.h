// Shared by the tests of attention: the tight bound, policies by name, and one comparison of a
// case with the reference.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "support/attention_case.h"
#include "thriftattn/error.h"

namespace thriftattn::testing {

// The kernel against FP64 on the values as stored.
inline constexpr double kTight = 2e-5;

inline LayerPolicy budget_policy(double fraction, BlockScore score) {
  LayerPolicy p = layered_policy(1.0, 0.0);
  p.rule = PromoteRule::budget;
  p.budget = fraction;
  p.score = score;
  return p;
}

inline LayerPolicy mixed(Format k, Format v, LayerPolicy base = layered_policy(0.03, 0.0)) {
  base.k_format = k;
  base.v_format = v;
  return base;
}

// One policy for each KV head; the layer's own fields are those of head 0.
inline LayerPolicy by_head(std::vector<LayerPolicy> heads) {
  LayerPolicy layer = heads.front();
  layer.heads = std::move(heads);
  return layer;
}

inline void expect_near_lse(const std::vector<float>& lse, const std::vector<float>& ref,
                            const std::string& what) {
  ASSERT_EQ(lse.size(), ref.size()) << what;
  for (size_t i = 0; i < lse.size(); ++i) {
    EXPECT_NEAR(lse[i], ref[i], 1e-4 + 2e-6 * std::fabs(ref[i])) << what << ", row " << i;
  }
}

// out and lse of the whole request against attend_reference().
inline void expect_matches_reference(const CaseOptions& options, const std::string& what) {
  AttentionCase c(options);
  std::vector<float> lse, lse_ref;
  const auto out = c.attend(nullptr, &lse);
  const auto ref = c.attend_reference(&lse_ref);
  EXPECT_LT(row_error(out, ref, options.shape.head_dim_v), kTight) << what;
  expect_near_lse(lse, lse_ref, what);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Throws on the way: the message has this code and part, on one line.
template <typename F>
void expect_refusal(ErrorCode code, const std::string& part, F&& f) {
  try {
    f();
    ADD_FAILURE() << "no error; expected one about " << part;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
  }
}

// attend() against attend_reference(): out by rows, and the LSE.
inline void expect_within(const CaseOptions& options, double bound, const std::string& what) {
  AttentionCase c(options);
  std::vector<float> lse, lse_ref;
  const auto out = c.attend(nullptr, &lse);
  const auto ref = c.attend_reference(&lse_ref);
  EXPECT_LT(row_error(out, ref, options.shape.head_dim_v), bound) << what;
  for (size_t i = 0; i < lse.size(); ++i) {
    EXPECT_NEAR(lse[i], lse_ref[i], bound * (1 + 0.1 * std::fabs(lse_ref[i]))) << what;
  }
}

}  // namespace thriftattn::testing
