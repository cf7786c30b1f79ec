// The forward pass of each family against plain FP64 loops, under the f32 policy; steps of any
// size; errors that must leave nothing behind.
#include "engine/transformer.h"

#include <gtest/gtest.h>
#include <oneapi/tbb/task_arena.h>

#include <cmath>
#include <limits>

#include "engine/differences.h"
#include "engine/gguf.h"
#include "engine/tiny_model.h"
#include "thriftattn/error.h"
#include "thriftattn/policy.h"

namespace thriftattn {
namespace {

using test::make_tiny;
using test::random_tokens;
using test::tiny_spec;
using test::TinyModel;
using test::TinySpec;

const char* const kFamilies[] = {"llama", "qwen2", "qwen3", "gemma3"};

KvCache make_cache(const Model& model, const char* policy = "f32") {
  return KvCache({.layers = layer_shapes(model.config()),
                  .policy = resolve(parse_policy(policy), policy_context(model.config())),
                  .equalizer = {}});
}

// Feeds tokens in steps of `step` and returns the logits of all of them, [tokens][vocab].
std::vector<float> run(const Model& model, const std::vector<int32_t>& tokens, int64_t step,
                       AttendMode mode, const char* policy = "f32") {
  KvCache cache = make_cache(model, policy);
  const SequenceId sequence = cache.create();
  const int64_t n = static_cast<int64_t>(tokens.size());
  const int64_t width = model.config().width;
  std::vector<float> hidden(static_cast<size_t>(n * width));
  ForwardOptions options;
  options.mode = mode;
  for (int64_t at = 0; at < n; at += step) {
    const int64_t count = std::min(step, n - at);
    forward(model, cache, sequence, std::span(tokens).subspan(at, count), options,
            hidden.data() + at * width);
  }
  EXPECT_EQ(cache.length(sequence), n);
  // The LM head in steps too: one row is another kernel than many.
  const int64_t vocab = model.config().vocab;
  std::vector<float> out(static_cast<size_t>(n * vocab));
  for (int64_t at = 0; at < n; at += step) {
    logits(model, hidden.data() + at * width, std::min(step, n - at), out.data() + at * vocab);
  }
  return out;
}

std::vector<float> flat(const std::vector<test::Row>& rows) {
  std::vector<float> out;
  for (const test::Row& row : rows) out.insert(out.end(), row.begin(), row.end());
  return out;
}

class EachFamily : public ::testing::TestWithParam<const char*> {};

TEST_P(EachFamily, MatchesPlainFp64) {
  const TinyModel tiny = make_tiny(tiny_spec(GetParam()));
  const auto tokens = random_tokens(150, tiny.spec.vocab);
  const std::vector<float> expected = flat(test::reference_logits(tiny, tokens));
  double scale = 0.0;
  for (const float v : expected) scale = std::max(scale, std::fabs(static_cast<double>(v)));
  EXPECT_GT(scale, 0.5);  // the test would be blind if the logits were all near zero
  const auto model = tiny.load();
  EXPECT_LT(largest_difference(run(*model, tokens, 150, AttendMode::prefill), expected), 1e-4);
  EXPECT_LT(largest_difference(run(*model, tokens, 64, AttendMode::prefill), expected), 1e-4);
  EXPECT_LT(largest_difference(run(*model, tokens, 37, AttendMode::decode), expected), 1e-4);
  EXPECT_LT(largest_difference(run(*model, tokens, 1, AttendMode::decode), expected), 1e-4);
}

// YaRN in both layouts, with Llama 3's frequency factors too, and beside local layers.
TEST_P(EachFamily, YarnMatchesPlainFp64) {
  TinySpec spec = tiny_spec(GetParam());
  spec.linear = 8.0;
  spec.yarn_context = 300;
  const TinyModel tiny = make_tiny(spec);
  const auto tokens = random_tokens(150, tiny.spec.vocab);
  const std::vector<float> expected = flat(test::reference_logits(tiny, tokens));
  const auto model = tiny.load();
  EXPECT_LT(largest_difference(run(*model, tokens, 64, AttendMode::prefill), expected), 1e-4);
  EXPECT_LT(largest_difference(run(*model, tokens, 1, AttendMode::decode), expected), 1e-4);
  // The same scaling asked for by the user, on the model as it was before.
  spec.linear = 1.0;
  spec.yarn_context = 0;
  spec.context = 300;
  const TinyModel unscaled = make_tiny(spec);
  const auto stretched =
      Model::load(unscaled.file(), {.rope = RopeOverride{RopeScaling::yarn, 8.0, 0}});
  EXPECT_EQ(stretched->config().context, 2400);
  EXPECT_LT(largest_difference(run(*stretched, tokens, 64, AttendMode::prefill), expected), 1e-4);
  EXPECT_GT(largest_difference(run(*unscaled.load(), tokens, 64, AttendMode::prefill), expected),
            1e-2);
}

// BF16 weights: the same model whose matrices were rounded beforehand.
TEST_P(EachFamily, Bf16Weights) {
  const auto round = [](std::map<std::string, std::vector<float>>& tensors) {
    for (auto& [name, values] : tensors) {
      for (float& v : values) {
        uint32_t bits;
        std::memcpy(&bits, &v, sizeof bits);
        bits &= 0xffff0000u;
        std::memcpy(&v, &bits, sizeof bits);
      }
    }
  };
  const TinyModel tiny = make_tiny(tiny_spec(GetParam()), {.tensors = round});
  const auto tokens = random_tokens(70, tiny.spec.vocab);
  const auto model = tiny.load(ComputeType::bf16);
  const std::vector<float> expected = flat(test::reference_logits(tiny, tokens));
  EXPECT_LT(largest_difference(run(*model, tokens, 1, AttendMode::decode), expected), 1e-4);
  // Many rows: native BF16 arithmetic rounds the activations too. A value next to a rounding
  // boundary may then fall on the other side, which costs one BF16 step of one activation (six layers: 0.025 seen).
  const bool native = bf16_is_native();
  const std::vector<float> many =
      native ? flat(test::reference_logits(tiny, tokens, nullptr, true)) : expected;
  const double tolerance = native ? 0.05 : 1e-4;
  EXPECT_LT(largest_difference(run(*model, tokens, 70, AttendMode::prefill), many), tolerance);
  EXPECT_LT(model->weight_bytes(), tiny.load()->weight_bytes());
}

// Weights read from the file: FP32 ones, so decode is as exact as with a copy.
TEST_P(EachFamily, StoredWeights) {
  const TinyModel tiny = make_tiny(tiny_spec(GetParam()));
  const auto tokens = random_tokens(70, tiny.spec.vocab);
  const auto file = tiny.file();
  const auto model = Model::load(file, {.compute = ComputeType::stored});
  const std::vector<float> expected = flat(test::reference_logits(tiny, tokens));
  EXPECT_LT(largest_difference(run(*model, tokens, 1, AttendMode::decode), expected), 1e-4);
  EXPECT_LT(largest_difference(run(*model, tokens, 16, AttendMode::decode), expected), 1e-4);
  EXPECT_EQ(model->weight_bytes(), tiny.load()->weight_bytes());
  EXPECT_NE(model->explain().find("as the file stores them"), std::string::npos);
}

TEST_P(EachFamily, ThreadsDoNotMatter) {
  const TinyModel tiny = make_tiny(tiny_spec(GetParam()));
  const auto tokens = random_tokens(200, tiny.spec.vocab);
  const auto model = tiny.load();
  for (const char* policy : {"f32", "balanced"}) {
    std::vector<std::vector<float>> results;
    for (const int threads : {1, 2, 3}) {
      tbb::task_arena arena(threads);
      arena.execute(
          [&] { results.push_back(run(*model, tokens, 90, AttendMode::prefill, policy)); });
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

INSTANTIATE_TEST_SUITE_P(Transformer, EachFamily, ::testing::ValuesIn(kFamilies),
                         [](const auto& info) { return std::string(info.param); });

TEST(Transformer, WindowOnEveryLayerOfOtherFamilies) {
  TinySpec spec = tiny_spec("qwen3");
  spec.window = 9;
  const TinyModel tiny = make_tiny(spec);
  const auto tokens = random_tokens(90, spec.vocab);
  EXPECT_LT(largest_difference(run(*tiny.load(), tokens, 50, AttendMode::prefill),
                               flat(test::reference_logits(tiny, tokens))),
            1e-4);
}

TEST(Transformer, ReportsAndHooks) {
  const TinyModel tiny = make_tiny(tiny_spec("qwen2"));
  const auto model = tiny.load();
  KvCache cache = make_cache(*model);
  const SequenceId sequence = cache.create();
  const auto tokens = random_tokens(20, tiny.spec.vocab);
  AttendStats sum;
  std::vector<AttendStats> layers;
  ForwardTimes times;
  std::vector<int64_t> seen;
  ForwardOptions options;
  options.stats = &sum;
  options.layer_stats = &layers;
  options.times = &times;
  test::TinyTrace trace;
  test::reference_logits(tiny, tokens, &trace);
  options.on_qk = [&](int64_t layer, TensorView<const float> q, TensorView<const float> k) {
    seen.push_back(layer);
    ASSERT_EQ(q.tokens, 20);
    ASSERT_EQ(q.heads, 4);
    ASSERT_EQ(k.heads, 2);
    EXPECT_NEAR(q.row(19, 3)[5], trace.q[layer][19][3 * 32 + 5], 1e-4);
    EXPECT_NEAR(k.row(7, 1)[30], trace.k[layer][7][1 * 32 + 30], 1e-4);
  };
  forward(*model, cache, sequence, tokens, options, nullptr);
  EXPECT_EQ(seen, (std::vector<int64_t>{0, 1}));
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(sum.rows, 2 * 20 * 2);
  EXPECT_EQ(layers[0].rows + layers[1].rows, sum.rows);
  EXPECT_GT(times.dense, 0.0);
  EXPECT_GT(times.attention, 0.0);
  EXPECT_LE(times.dense + times.attention, times.total);
}

// Weights that are finite but overflow: layer 1 sees Inf in K, or nothing does until the end.
TEST(Transformer, OverflowRollsTheStepBack) {
  for (const std::string name : {"blk.0.ffn_", "blk.1.ffn_"}) {
    bool poison = false;
    const auto edit = [&](std::map<std::string, std::vector<float>>& tensors) {
      if (!poison) return;
      for (float& v : tensors[name + "up.weight"]) v *= 1e15f;
      for (float& v : tensors[name + "down.weight"]) v *= 1e30f;
    };
    const TinyModel sound = make_tiny({}, {.tensors = edit});
    poison = true;
    const TinyModel broken = make_tiny({}, {.tensors = edit});
    const auto model = sound.load();
    const auto bad = broken.load();
    KvCache cache = make_cache(*model);
    const SequenceId sequence = cache.create();
    const auto tokens = random_tokens(70, 61);
    std::vector<float> before(64), after(64);
    forward(*model, cache, sequence, tokens, {}, nullptr);
    const SequenceId other = cache.fork(sequence);
    try {
      forward(*bad, cache, sequence, tokens, {}, nullptr);
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::non_finite) << error.what();
    }
    EXPECT_EQ(cache.length(sequence), 70);
    const int32_t next = 9;
    forward(*model, cache, sequence, {&next, 1}, {}, after.data());
    forward(*model, cache, other, {&next, 1}, {}, before.data());
    EXPECT_EQ(before, after);
  }
}

TEST(Transformer, WrongTokensAndCachesChangeNothing) {
  const TinyModel tiny = make_tiny({});
  const auto model = tiny.load();
  KvCache cache = make_cache(*model);
  const SequenceId sequence = cache.create();
  for (const int32_t token : {-1, 61}) {
    const std::vector<int32_t> tokens = {1, 2, token};
    EXPECT_THROW(forward(*model, cache, sequence, tokens, {}, nullptr), Error);
    EXPECT_EQ(cache.length(sequence), 0);
  }
  TinySpec deeper;
  deeper.layers = 3;
  const TinyModel other = make_tiny(deeper);
  const std::vector<int32_t> tokens = {1, 2};
  EXPECT_THROW(forward(*other.load(), cache, sequence, tokens, {}, nullptr), Error);
  forward(*model, cache, sequence, tokens, {}, nullptr);
  EXPECT_EQ(cache.length(sequence), 2);
}

TEST(ModelLoad, RefusesWhatDoesNotFit) {
  using Tensors = std::map<std::string, std::vector<float>>;
  const auto refusal = [](const std::function<void(Tensors&)>& edit) {
    const TinyModel tiny = make_tiny({}, {.tensors = edit});
    try {
      tiny.load();
    } catch (const Error& error) {
      const bool named = std::string(error.what()).find("tiny.gguf") != std::string::npos;
      EXPECT_TRUE(named || error.code() == ErrorCode::non_finite) << error.what();
      return std::pair(error.code(), std::string(error.what()));
    }
    return std::pair(ErrorCode::io, std::string("nothing was thrown"));
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const char* name : {"blk.1.attn_k.weight", "blk.0.ffn_norm.weight", "token_embd.weight",
                           "output.weight", "output_norm.weight"}) {
    const auto missing = refusal([&](Tensors& t) { t.erase(name); });
    // Without output.weight the embedding is the head: that is a model, too.
    if (std::string(name) != "output.weight") {
      EXPECT_EQ(missing.first, ErrorCode::not_found) << missing.second;
      EXPECT_NE(missing.second.find(name), std::string::npos) << missing.second;
    }
    const auto poisoned = refusal([&](Tensors& t) { t[name][3] = nan; });
    EXPECT_EQ(poisoned.first, ErrorCode::non_finite) << poisoned.second;
    EXPECT_NE(poisoned.second.find(name), std::string::npos) << poisoned.second;
    const auto shape = refusal([&](Tensors& t) { t[name].resize(t[name].size() - 1); });
    EXPECT_EQ(shape.first, ErrorCode::corrupt) << shape.second;
  }
  const auto unused = refusal([](Tensors& t) { t["blk.0.attn_q_norm.weight"].resize(32); });
  EXPECT_EQ(unused.first, ErrorCode::unsupported);
  EXPECT_NE(unused.second.find("attn_q_norm"), std::string::npos) << unused.second;
  EXPECT_EQ(refusal([](Tensors& t) { t["rope_freqs.weight"].resize(16); }).first,
            ErrorCode::corrupt);
}

TEST(ModelLoad, ExplainsItself) {
  const TinyModel tiny = make_tiny(tiny_spec("gemma3"));
  const auto model = tiny.load();
  const std::string text = model->explain();
  EXPECT_NE(text.find("gemma3"), std::string::npos);
  EXPECT_NE(text.find("5 layers with a sliding window"), std::string::npos) << text;
  EXPECT_EQ(model->hash(), tiny.file()->content_hash());
}

}  // namespace
}  // namespace thriftattn
