// Sessions: chunks, decode, forks, truncation, limits and what they report.
#include "engine/session.h"

#include <gtest/gtest.h>

#include <cmath>

#include "engine/tiny_model.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using test::make_tiny;
using test::random_tokens;
using test::tiny_spec;

class SessionTest : public ::testing::Test {
 protected:
  Session session(const char* policy = "f32", SessionOptions options = {}) const {
    return Session(model, parse_policy(policy), std::move(options));
  }

  test::TinyModel tiny = make_tiny(tiny_spec("qwen2"));
  std::shared_ptr<const Model> model = tiny.load();
  std::vector<int32_t> tokens = random_tokens(300, 61);
};

TEST_F(SessionTest, PrefillThenDecodeMatchesTheReference) {
  Session s = session();
  int64_t last = 0;
  s.prefill(std::span(tokens).first(200), [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last);
    EXPECT_EQ(total, 200);
    last = done;
  });
  EXPECT_EQ(last, 200);
  const std::vector<int32_t> first(tokens.begin(), tokens.begin() + 204);
  const auto expected = test::reference_logits(tiny, first);
  for (size_t v = 0; v < 61; ++v) EXPECT_NEAR(s.next_logits()[v], expected[199][v], 1e-4);
  for (size_t i = 200; i < 204; ++i) {
    const std::vector<float>& out = s.decode(tokens[i]);
    ASSERT_EQ(out.size(), 61u);
    for (size_t v = 0; v < 61; ++v) EXPECT_NEAR(out[v], expected[i][v], 1e-4);
  }
  EXPECT_EQ(s.length(), 204);
  EXPECT_EQ(s.prefill_stats().tokens, 200);
  EXPECT_EQ(s.decode_stats().tokens, 4);
  EXPECT_EQ(s.decode_stats().attend.rows, 4 * 2 * 2);
  EXPECT_GT(s.decode_stats().tokens_per_second(), 0.0);
  s.reset_stats();
  EXPECT_EQ(s.prefill_stats().tokens, 0);
}

// Where a text is cut must not matter as long as the cuts are multiples of the chunk.
TEST_F(SessionTest, ChunksAreAlignedToTheSequence) {
  const SessionOptions options{.equalizer = {}, .chunk = 64};
  Session once = session("balanced", options);
  once.prefill(tokens);
  Session twice = session("balanced", options);
  twice.prefill(std::span(tokens).first(128));
  twice.prefill(std::span(tokens).subspan(128));
  EXPECT_EQ(once.next_logits(), twice.next_logits());
  // After an odd start the steps fall back to the multiples.
  Session odd = session("f32", options);
  odd.prefill(std::span(tokens).first(10));
  std::vector<int64_t> ends;
  odd.prefill(std::span(tokens).subspan(10),
              [&](int64_t done, int64_t) { ends.push_back(10 + done); });
  EXPECT_EQ(ends, (std::vector<int64_t>{64, 128, 192, 256, 300}));
}

TEST_F(SessionTest, ForksAreIndependent) {
  Session a = session("balanced");
  a.prefill(std::span(tokens).first(150));
  Session b = a.fork();
  EXPECT_EQ(a.next_logits(), b.next_logits());
  const std::vector<float> a1 = a.decode(7);
  b.decode(8);
  b.decode(9);
  EXPECT_EQ(a.length(), 151);
  EXPECT_EQ(b.length(), 152);
  Session c = session("balanced");
  c.prefill(std::span(tokens).first(150));
  EXPECT_EQ(a1, c.decode(7));
  a = std::move(b);
  EXPECT_EQ(a.length(), 152);
}

TEST_F(SessionTest, TruncateForgets) {
  Session s = session();
  s.prefill(std::span(tokens).first(150));
  const std::vector<float> before = s.decode(7);
  s.decode(8);
  s.truncate(150);
  EXPECT_THROW(s.next_logits(), Error);
  const std::vector<float> again = s.decode(7);
  for (size_t v = 0; v < 61; ++v) EXPECT_NEAR(before[v], again[v], 1e-5);
  s.truncate(151);  // no change: the logits stay
  EXPECT_EQ(s.next_logits(), again);
}

TEST_F(SessionTest, Limits) {
  EXPECT_THROW(session("f32", {.context = 4097, .equalizer = {}}), Error);
  EXPECT_THROW(session("f32", {.context = -1, .equalizer = {}}), Error);
  EXPECT_THROW(session("f32", {.equalizer = {}, .chunk = 0}), Error);
  EXPECT_EQ(session().context(), 4096);
  Session s = session("f32", {.context = 100, .equalizer = {}});
  EXPECT_THROW(s.next_logits(), Error);
  EXPECT_THROW(s.prefill(std::span(tokens).first(101)), Error);
  EXPECT_EQ(s.length(), 0);
  s.prefill(std::span(tokens).first(100));
  try {
    s.decode(1);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("the context is 100"), std::string::npos)
        << error.what();
  }
  EXPECT_EQ(s.length(), 100);
}

TEST_F(SessionTest, MemoryLimitIsAnError) {
  Session s = session("exact", {.equalizer = {}, .chunk = 64, .max_kv_bytes = 64 << 10});
  try {
    s.prefill(tokens);
    ADD_FAILURE() << s.cache().usage().total();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::out_of_memory) << error.what();
  }
  EXPECT_EQ(s.length() % 64, 0);
  EXPECT_LT(s.length(), 300);
}

}  // namespace
}  // namespace thriftattn
