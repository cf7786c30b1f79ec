// What the public API refuses: null pointers, sizes that overflow, outputs that overlap, strides,
// values, names - always before anything is written, with the values in the message.
#include <gtest/gtest.h>

#include <limits>

#include "attend/attend_test_util.h"

namespace thriftattn {
namespace {

using namespace testing;

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

class Refusals : public ::testing::Test {
 protected:
  Refusals() : case_({.policy = layered_policy(0.1, 0.02), .length = 200, .queries = 2}) {}

  template <typename F>
  void refuses(const std::string& part, F&& change) {
    std::vector<float> lse(16, NAN);
    AttendRequest r = case_.request(out_);
    r.lse = TensorView<float>::dense(lse.data(), 2, 8, 1);
    change(r);
    expect_refusal(ErrorCode::invalid_argument, part, [&] { attend(case_.cache(), r); });
    for (const float x : out_) ASSERT_TRUE(std::isnan(x)) << part;
  }

  AttentionCase case_;
  std::vector<float> out_;
};

TEST_F(Refusals, NullPointersAndShapes) {
  refuses("q is [2][8][64] at a null pointer", [](auto& r) { r.q.data = nullptr; });
  refuses("out is [2][8][64] at a null pointer", [](auto& r) { r.out.data = nullptr; });
  refuses("q is [2][7][64], it must be [2][8][64]", [](auto& r) { r.q.heads = 7; });
  refuses("out is [1][8][64], it must be [2][8][64]", [](auto& r) { r.out.tokens = 1; });
  refuses("lse is [3][8][1], it must be [2][8][1]", [](auto& r) { r.lse.tokens = 3; });
  refuses("lse is [2][4][1]", [](auto& r) { r.lse.heads = 4; });
  refuses("-1 queries", [](auto& r) { r.q.tokens = r.out.tokens = r.lse.tokens = -1; });
  refuses("q begins at address", [](auto& r) {
    r.q.data = reinterpret_cast<const float*>(reinterpret_cast<const char*>(r.q.data) + 2);
  });
}

TEST_F(Refusals, SizesThatOverflow) {
  refuses("queries, but the sequence holds 202", [](auto& r) {
    r.q.tokens = r.out.tokens = r.lse.tokens = 203;
    r.q.token_stride = r.out.token_stride = r.lse.token_stride = 1 << 20;
  });
  refuses("q [2][8][64] with token_stride = 9223372036854775807 and head_stride = 64 ends beyond",
          [](auto& r) { r.q.token_stride = kHuge; });
  refuses("ends beyond the address space", [](auto& r) { r.q.head_stride = kHuge / 4; });
  refuses("ends beyond the address space", [](auto& r) { r.out.token_stride = kHuge / 8; });
  refuses("q [9223372036854775807][8][64] with",
          [](auto& r) { r.q.tokens = kHuge, r.out.tokens = 2; });
}

TEST_F(Refusals, Strides) {
  refuses("q has token_stride = -512", [](auto& r) { r.q.token_stride = -512; });
  refuses("head_stride = -1", [](auto& r) { r.out.head_stride = -1; });
  refuses("out [2][8][64] with token_stride = 512 and head_stride = 63 writes some elements twice",
          [](auto& r) { r.out.head_stride = 63; });
  refuses("writes some elements twice", [](auto& r) { r.out.token_stride = 511; });
  refuses("writes some elements twice", [](auto& r) { r.out.token_stride = 0; });
  refuses("lse [2][8][1] with token_stride = 8 and head_stride = 0",
          [](auto& r) { r.lse.head_stride = 0; });
  // An input may be broadcast.
  AttendRequest r = case_.request(out_);
  r.q.head_stride = 0;
  EXPECT_NO_THROW(attend(case_.cache(), r));
}

TEST_F(Refusals, OverlappingOutputs) {
  refuses("out at", [](auto& r) { r.out.data = const_cast<float*>(r.q.data); });
  refuses("share memory", [](auto& r) { r.out.data = const_cast<float*>(r.q.data) + 1023; });
  refuses("lse at", [](auto& r) { r.lse.data = r.out.data + 100; });
  refuses("share memory", [](auto& r) { r.lse.data = const_cast<float*>(r.q.data); });
  refuses("sink_logits at", [](auto& r) {
    for (int i = 0; i < 8; ++i) r.lse.data[i + 8] = 0.0f;  // finite, so that the place is at fault
    r.sink_logits = r.lse.data + 8;
  });
}

// One buffer holds q and out beside each other in every row: nothing is shared.
TEST_F(Refusals, InterleavedRowsAreNotOverlapping) {
  std::vector<float> want;
  {
    AttendRequest r = case_.request(want);
    attend(case_.cache(), r);
  }
  std::vector<float> both(2 * 8 * 128, 0.0f);
  AttendRequest r = case_.request(out_);
  TensorView<float> q{both.data(), 2, 8, 64, 8 * 128, 128},
      out{both.data() + 64, 2, 8, 64, 8 * 128, 128};
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t h = 0; h < 8; ++h) std::copy_n(r.q.row(t, h), 64, q.row(t, h));
  }
  r.q = {both.data(), 2, 8, 64, 8 * 128, 128};
  r.out = out;
  attend(case_.cache(), r);
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t h = 0; h < 8; ++h) {
      for (int64_t d = 0; d < 64; ++d)
        ASSERT_EQ(out.row(t, h)[d], want[static_cast<size_t>((t * 8 + h) * 64 + d)]);
    }
  }
  r.out.data -= 1;
  expect_refusal(ErrorCode::invalid_argument, "share memory", [&] { attend(case_.cache(), r); });
}

TEST_F(Refusals, NamesAndValues) {
  refuses("layer 1 is not in 0..0", [](auto& r) { r.layer = 1; });
  refuses("layer -1 is not in 0..0", [](auto& r) { r.layer = -1; });
  refuses("there is no sequence 77", [](auto& r) { r.sequence = 77; });
  refuses("there is no sequence -1", [](auto& r) { r.sequence = -1; });
  refuses("softmax_scale = nan", [](auto& r) { r.config.softmax_scale = NAN; });
  refuses("softmax_scale = -0.5", [](auto& r) { r.config.softmax_scale = -0.5f; });
  refuses("softcap = inf", [](auto& r) { r.config.softcap = INFINITY; });
  refuses("mode 9", [](auto& r) { r.config.mode = static_cast<AttendMode>(9); });
  const std::vector<float> sinks = {0, 1, 2, NAN, 4, 5, 6, 7};
  refuses("sink_logits[3] = nan", [&](auto& r) { r.sink_logits = sinks.data(); });
}

TEST_F(Refusals, Append) {
  KvCache& cache = case_.cache();
  const SequenceId seq = cache.create();
  const std::vector<float> x(4 * 2 * 64, 1.0f);
  const auto view = TensorView<const float>::dense(x.data(), 4, 2, 64);
  const auto refuses_append = [&](const std::string& part, auto&& change) {
    TensorView<const float> k = view, v = view;
    change(k, v);
    expect_refusal(ErrorCode::invalid_argument, part, [&] { cache.append(seq, 0, k, v); });
  };
  cache.begin_step(seq, 4);
  refuses_append("append: k is [4][2][64] at a null pointer",
                 [](auto& k, auto&) { k.data = nullptr; });
  refuses_append("append: v is [4][3][64]", [](auto&, auto& v) { v.heads = 3; });
  refuses_append("k has token_stride = -1", [](auto& k, auto&) { k.token_stride = -1; });
  refuses_append("ends beyond the address space",
                 [](auto&, auto& v) { v.token_stride = kHuge / 2; });
  cache.append(seq, 0, view, view);  // the step is as it was
  cache.commit(seq);
  EXPECT_EQ(cache.length(seq), 4);
  expect_refusal(ErrorCode::invalid_argument, "tokens after 4",
                 [&] { cache.begin_step(seq, kHuge); });
  expect_refusal(ErrorCode::invalid_argument, "begin_step: 0", [&] { cache.begin_step(seq, 0); });
  expect_refusal(ErrorCode::invalid_argument, "no sequence 99", [&] { cache.free(99); });
}

TEST_F(Refusals, HandMadePolicies) {
  const auto refuses_policy = [](const std::string& part, auto&& change) {
    LayerPolicy policy = layered_policy(0.1, 0.02);
    change(policy);
    expect_refusal(ErrorCode::invalid_argument, part, [&] {
      KvCache c({.layers = {{.kv_heads = 1, .q_heads = 1, .head_dim_k = 64, .head_dim_v = 64}},
                 .policy = {policy}});
    });
  };
  refuses_policy("the policy of layer 0 has promote = nan", [](auto& p) { p.promote = NAN; });
  refuses_policy("skip = -0.1", [](auto& p) { p.skip = -0.1; });
  refuses_policy("max = 2", [](auto& p) { p.max_promoted = 2; });
  refuses_policy("budget = inf", [](auto& p) { p.budget = INFINITY; });
  refuses_policy("sinks = -5", [](auto& p) { p.sinks = -5; });
  refuses_policy("recent = 9223372036854775807", [](auto& p) { p.recent = kHuge; });
  refuses_policy("pages = -1", [](auto& p) { p.budget_pages = -1; });
  refuses_policy("a format = 200", [](auto& p) { p.v_format = static_cast<Format>(200); });
  expect_refusal(ErrorCode::invalid_argument, "max_bytes = -1", [] {
    KvCache c({.layers = {{.kv_heads = 1, .q_heads = 1, .head_dim_k = 64, .head_dim_v = 64}},
               .policy = {plain_policy(Format::bf16)},
               .max_bytes = -1});
  });
}

}  // namespace
}  // namespace thriftattn
