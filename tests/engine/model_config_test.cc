// What read_model_config() makes of metadata: every family, the defaults, and refusals.
#include "engine/model_config.h"

#include <gtest/gtest.h>

#include <cmath>

#include "engine/tiny_model.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using test::GgufWriter;
using test::make_tiny;
using test::tiny_spec;
using test::TinySpec;

ModelConfig read(const TinySpec& spec, const std::function<void(GgufWriter&)>& edit = {}) {
  const test::TinyModel tiny = make_tiny(spec, {.keys = edit});
  return read_model_config(*tiny.file());
}

// The message of the Error that reading must throw.
std::string refusal(const TinySpec& spec, ErrorCode code,
                    const std::function<void(GgufWriter&)>& edit) {
  try {
    read(spec, edit);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(ModelConfig, Llama) {
  const ModelConfig c = read(tiny_spec("llama"));
  EXPECT_EQ(c.family, Family::llama);
  EXPECT_EQ(c.layer_count(), 2);
  EXPECT_EQ(c.width, 64);
  EXPECT_EQ(c.vocab, 61);
  EXPECT_EQ(c.context, 4096);
  EXPECT_EQ(c.layers[1].head_dim_k, 32);
  EXPECT_EQ(c.layers[1].head_dim_v, 64);
  EXPECT_EQ(c.layers[0].rope.layout, RopeLayout::interleaved);
  EXPECT_EQ(c.layers[0].rope.dims, 24);
  EXPECT_EQ(c.layers[0].rope.freq_base, 500000.0);
  EXPECT_TRUE(c.layers[0].rope.freq_factors);
  EXPECT_EQ(c.layers[0].window, 0);
  EXPECT_FALSE(c.qkv_bias || c.qk_norm || c.post_norms || c.tied_embeddings);
  EXPECT_FLOAT_EQ(c.attention_scale, 1.0f / std::sqrt(32.0f));
  EXPECT_EQ(c.embedding_scale, 1.0f);
  EXPECT_EQ(c.activation, Activation::silu);
}

TEST(ModelConfig, Qwen) {
  const ModelConfig two = read(tiny_spec("qwen2"));
  EXPECT_TRUE(two.qkv_bias && two.tied_embeddings);
  EXPECT_FALSE(two.qk_norm);
  EXPECT_EQ(two.layers[0].rope.layout, RopeLayout::halves);
  const ModelConfig three = read(tiny_spec("qwen3"));
  EXPECT_TRUE(three.qk_norm);
  EXPECT_FALSE(three.qkv_bias || three.tied_embeddings);
  EXPECT_EQ(three.layers[0].rope.linear_factor, 2.0);
  EXPECT_EQ(three.attention_softcap, 5.0f);
}

TEST(ModelConfig, Gemma3LocalAndGlobalLayers) {
  const ModelConfig c = read(tiny_spec("gemma3"));
  EXPECT_TRUE(c.qk_norm && c.post_norms && c.tied_embeddings);
  EXPECT_EQ(c.activation, Activation::gelu_tanh);
  EXPECT_FLOAT_EQ(c.embedding_scale, 8.0f);
  EXPECT_EQ(c.final_softcap, 3.0f);
  for (int i = 0; i < 6; ++i) {
    const LayerConfig& layer = c.layers[static_cast<size_t>(i)];
    const bool global = i == 5;
    EXPECT_EQ(layer.window, global ? 0 : 70) << i;
    EXPECT_EQ(layer.rope.freq_base, global ? 1e6 : 1e4) << i;
    EXPECT_EQ(layer.rope.linear_factor, global ? 8.0 : 1.0) << i;
  }
  const PolicyContext context = policy_context(c);
  EXPECT_EQ(context.sliding_window, (std::vector<bool>{true, true, true, true, true, false}));
  EXPECT_EQ(layer_shapes(c)[0].window, 70);
  EXPECT_EQ(layer_shapes(c)[5].window, 0);

  const ModelConfig swa = read(tiny_spec("gemma3"), [](GgufWriter& w) {
    w.f32("gemma3.rope.freq_base_swa", 777.0f).u32("gemma3.attention.sliding_window_pattern", 2);
  });
  EXPECT_EQ(swa.layers[0].rope.freq_base, 777.0);
  EXPECT_EQ(swa.layers[1].window, 0);
}

TEST(ModelConfig, Gemma27BScalesByWidth) {
  TinySpec spec = tiny_spec("gemma3");
  spec.layers = 62;
  EXPECT_FLOAT_EQ(read(spec).attention_scale, 1.0f / std::sqrt(64.0f / 4.0f));
  spec.layers = 61;
  EXPECT_FLOAT_EQ(read(spec).attention_scale, 1.0f / std::sqrt(32.0f));
}

TEST(ModelConfig, DefaultsAndArrays) {
  TinySpec spec;
  spec.width = 128;
  const ModelConfig c = read(spec, [](GgufWriter& w) {
    for (const char* key : {"attention.key_length", "attention.value_length",
                            "rope.dimension_count", "rope.freq_base", "attention.head_count_kv"}) {
      w.erase(std::string("llama.") + key);
    }
  });
  EXPECT_EQ(c.layers[0].head_dim_k, 32);
  EXPECT_EQ(c.layers[0].head_dim_v, 32);
  EXPECT_EQ(c.layers[0].rope.dims, 32);
  EXPECT_EQ(c.layers[0].rope.freq_base, 10000.0);
  EXPECT_EQ(c.layers[0].kv_heads, 4);
  const ModelConfig arrays = read(spec, [](GgufWriter& w) {
    w.erase("llama.attention.head_count_kv").i32s("llama.attention.head_count_kv", {1, 4});
  });
  EXPECT_EQ(arrays.layers[0].kv_heads, 1);
  EXPECT_EQ(arrays.layers[1].kv_heads, 4);
}

TEST(ModelConfig, RefusesUnsupported) {
  const auto has = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  const ErrorCode unsupported = ErrorCode::unsupported;
  TinySpec spec;
  spec.arch = "mamba";
  has(refusal(spec, unsupported, {}), "supported: llama, qwen2, qwen3, gemma3");
  spec = {};
  has(refusal(spec, unsupported,
              [](GgufWriter& w) { w.string("llama.rope.scaling.type", "longrope"); }),
      "longrope");
  has(refusal(spec, unsupported, [](GgufWriter& w) { w.u32("llama.expert_count", 8); }), "experts");
  has(refusal(spec, unsupported, [](GgufWriter& w) { w.boolean("llama.attention.causal", false); }),
      "causal");
  spec.dim_k = 48;
  has(refusal(spec, unsupported, {}), "key_length is 48, supported: multiples of 32 up to 256");
}

TEST(ModelConfig, RefusesAbsurd) {
  const auto set = [](const char* key, uint32_t value) {
    return [=](GgufWriter& w) {
      w.erase(std::string("llama.") + key).u32(std::string("llama.") + key, value);
    };
  };
  const ErrorCode corrupt = ErrorCode::corrupt;
  for (const char* key : {"block_count", "context_length", "embedding_length",
                          "feed_forward_length", "attention.head_count", "attention.head_count_kv",
                          "rope.freq_base", "attention.layer_norm_rms_epsilon"}) {
    EXPECT_NE(refusal({}, corrupt, set(key, 0)).find(key), std::string::npos);
  }
  for (const char* key : {"block_count", "context_length", "embedding_length",
                          "feed_forward_length", "attention.head_count"}) {
    EXPECT_NE(refusal({}, corrupt, set(key, 4000000000u)).find(key), std::string::npos);
  }
  EXPECT_NE(refusal({}, corrupt, set("attention.head_count_kv", 3)).find("multiple"),
            std::string::npos);
  EXPECT_NE(refusal({}, corrupt, set("rope.dimension_count", 33)).find("even"), std::string::npos);
  EXPECT_NE(refusal({}, corrupt, set("rope.dimension_count", 64)).find("head size 32"),
            std::string::npos);
  EXPECT_NE(refusal({}, corrupt, set("embedding_length", 96)).find("token_embd.weight"),
            std::string::npos);
  refusal({}, corrupt, [](GgufWriter& w) {
    w.erase("llama.attention.head_count_kv").i32s("llama.attention.head_count_kv", {1, 2, 4});
  });
  refusal({}, ErrorCode::not_found, [](GgufWriter& w) { w.erase("llama.block_count"); });
  TinySpec gemma = tiny_spec("gemma3");
  gemma.window = 0;
  refusal(gemma, ErrorCode::not_found, {});
}

void yarn_keys(GgufWriter& w) {
  w.string("llama.rope.scaling.type", "yarn");
  w.f32("llama.rope.scaling.factor", 4.0f);
}

TEST(ModelConfig, Yarn) {
  const ModelConfig least = read({}, yarn_keys);
  EXPECT_EQ(least.layers[1].rope.linear_factor, 4.0);
  EXPECT_EQ(least.layers[1].rope.yarn, (YarnConfig{.original_context = 4096}));
  EXPECT_EQ(least.context, 4096);
  EXPECT_EQ(explain_rope_scaling(least), "YaRN, 4 times 4096 tokens");
  const ModelConfig all = read({}, [](GgufWriter& w) {
    yarn_keys(w);
    w.u32("llama.rope.scaling.original_context_length", 1024);
    w.f32("llama.rope.scaling.attn_factor", 0.5f);
    w.f32("llama.rope.scaling.yarn_attn_factor", 3.0f);
    w.f32("llama.rope.scaling.yarn_beta_fast", 16.0f);
    w.f32("llama.rope.scaling.yarn_beta_slow", 2.0f);
    w.f32("llama.rope.scaling.yarn_ext_factor", 1.0f);
  });
  EXPECT_EQ(all.layers[0].rope.yarn, (YarnConfig{.original_context = 1024,
                                                 .attn_factor = 1.5,
                                                 .beta_fast = 16.0,
                                                 .beta_slow = 2.0}));
  EXPECT_EQ(explain_rope_scaling(read({})), "");
  EXPECT_EQ(explain_rope_scaling(read(tiny_spec("qwen3"))), "linear, 2 times");
}

TEST(ModelConfig, YarnRefusals) {
  const auto with = [](const char* name, float value) {
    return [name, value](GgufWriter& w) {
      yarn_keys(w);
      w.erase(name).f32(name, value);
    };
  };
  const auto says = [](const std::string& message, const char* part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  const ErrorCode corrupt = ErrorCode::corrupt;
  const ErrorCode unsupported = ErrorCode::unsupported;
  says(refusal({}, corrupt, with("llama.rope.scaling.factor", 0.5f)), "factor 0.5");
  says(refusal({}, corrupt, with("llama.rope.scaling.yarn_beta_fast", 1.0f)), "beta_fast 1");
  says(refusal({}, unsupported, with("llama.rope.scaling.yarn_log_multiplier", 0.1f)),
       "yarn_log_multiplier");
  says(refusal({}, unsupported, with("llama.rope.scaling.yarn_ext_factor", 0.5f)),
       "yarn_ext_factor");
  says(refusal({}, ErrorCode::not_found,
               [](GgufWriter& w) { w.string("llama.rope.scaling.type", "yarn"); }),
       "rope.scaling.factor");
}

TEST(ModelConfig, RopeOverride) {
  ModelConfig c = read({});
  apply_rope_override({.scaling = RopeScaling::yarn, .factor = 2.5}, c);
  EXPECT_EQ(c.context, 10240);
  EXPECT_EQ(c.layers[0].rope.linear_factor, 2.5);
  EXPECT_EQ(c.layers[0].rope.yarn, (YarnConfig{.original_context = 4096}));
  // What is asked for next starts from the original context, not from the stretched one.
  apply_rope_override({.scaling = RopeScaling::linear, .factor = 2.0}, c);
  EXPECT_EQ(c.context, 8192);
  EXPECT_FALSE(c.layers[0].rope.yarn);
  ModelConfig named = read({});
  apply_rope_override({.scaling = RopeScaling::yarn, .factor = 4.0, .original_context = 2048},
                      named);
  EXPECT_EQ(named.context, 8192);
  apply_rope_override({.scaling = RopeScaling::none}, named);
  EXPECT_EQ(named.layers[1].rope, read({}).layers[1].rope);

  ModelConfig gemma = read(tiny_spec("gemma3"));
  apply_rope_override({.scaling = RopeScaling::yarn, .factor = 4.0}, gemma);
  EXPECT_FALSE(gemma.layers[0].rope.yarn);  // local
  EXPECT_EQ(gemma.layers[0].rope.linear_factor, 1.0);
  EXPECT_TRUE(gemma.layers[5].rope.yarn);

  for (const RopeOverride& bad :
       {RopeOverride{RopeScaling::yarn, 0.5}, {RopeScaling::yarn, std::nan("")},
        {RopeScaling::yarn, 1e6, int64_t{1} << 30}, {RopeScaling::yarn, 2.0, -5}}) {
    EXPECT_THROW(apply_rope_override(bad, c), Error) << bad.factor;
  }
}

}  // namespace
}  // namespace thriftattn
