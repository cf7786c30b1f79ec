// Reads ModelConfig from GGUF metadata. Every number is checked against what the rest of the
// engine can hold, because a corrupt file may say anything.
#include "engine/model_config.h"

#include <fmt/format.h>

#include <cmath>
#include <optional>
#include <string_view>

#include "engine/gguf.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxWidth = int64_t{1} << 18;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxContext = int64_t{1} << 31;
constexpr int64_t kGemma3Pattern = 6;  // every 6th layer is global
constexpr double kGemma3LocalBase = 10000.0;
constexpr int64_t kGemma3Layers27B = 62;  // its queries are scaled by width / heads

struct FamilyFacts {
  std::string_view architecture;
  Family family;
  RopeLayout rope;
  Activation activation;
  bool qk_norm;
  bool post_norms;
};

constexpr FamilyFacts kFamilies[] = {
    {"llama", Family::llama, RopeLayout::interleaved, Activation::silu, false, false},
    {"qwen2", Family::qwen2, RopeLayout::halves, Activation::silu, false, false},
    {"qwen3", Family::qwen3, RopeLayout::halves, Activation::silu, true, false},
    {"gemma3", Family::gemma3, RopeLayout::halves, Activation::gelu_tanh, true, true},
};

class Reader {
 public:
  explicit Reader(const GgufFile& file) : file_(file) {}

  ModelConfig read();

 private:
  std::string key(std::string_view pattern) const { return file_.arch_key(pattern); }
  int64_t checked(const std::string& key, int64_t value, int64_t limit) const;
  int64_t count(std::string_view pattern, int64_t limit) const;
  // A number for every layer: a scalar key for all of them, or an array with one each.
  std::vector<int64_t> per_layer(std::string_view pattern, int64_t limit) const;
  double positive(std::string_view pattern, std::optional<double> otherwise) const;
  const FamilyFacts& family() const;
  void refuse_what_is_not_built() const;
  void read_rope_scaling(RopeConfig& rope) const;
  int64_t head_dim(std::string_view pattern, int64_t otherwise) const;
  std::vector<bool> sliding_layers() const;
  void read_layers(const FamilyFacts& facts);
  void read_vocabulary();

  const GgufFile& file_;
  ModelConfig config_;
};

int64_t Reader::checked(const std::string& key, int64_t value, int64_t limit) const {
  if (value < 1 || value > limit) {
    file_.fail(ErrorCode::corrupt,
               fmt::format("{} is {}, required: 1 to {}; the file is damaged, or not a model of "
                           "this kind",
                           key, value, limit));
  }
  return value;
}

int64_t Reader::count(std::string_view pattern, int64_t limit) const {
  return checked(key(pattern), file_.get_i64(key(pattern)), limit);
}

std::vector<int64_t> Reader::per_layer(std::string_view pattern, int64_t limit) const {
  const std::string name = key(pattern);
  const size_t layers = config_.layers.size();
  if (!file_.is_array(name)) return std::vector<int64_t>(layers, count(pattern, limit));
  std::vector<int64_t> values = file_.get_i64_array(name);
  if (values.size() != layers) {
    file_.fail(ErrorCode::corrupt, fmt::format("{} has {} values, required: one for each of the "
                                               "{} layers",
                                               name, values.size(), layers));
  }
  for (const int64_t value : values) checked(name, value, limit);
  return values;
}

double Reader::positive(std::string_view pattern, std::optional<double> otherwise) const {
  const std::string name = key(pattern);
  const double value = otherwise ? file_.find_f64(name).value_or(*otherwise) : file_.get_f64(name);
  if (!(value > 0.0) || value > 1e12) {
    file_.fail(ErrorCode::corrupt,
               fmt::format("{} is {}, required: a positive number", name, value));
  }
  return value;
}

const FamilyFacts& Reader::family() const {
  const std::string_view architecture = file_.architecture();
  std::string supported;
  for (const FamilyFacts& facts : kFamilies) {
    if (facts.architecture == architecture) return facts;
    supported += fmt::format("{}{}", supported.empty() ? "" : ", ", facts.architecture);
  }
  file_.fail(ErrorCode::unsupported,
             fmt::format("general.architecture is '{}', supported: {}; use a model of one of "
                         "these families",
                         printable(architecture), supported));
}

// Settings that change the result and that forward() does not know: better an error than
// plausible nonsense.
void Reader::refuse_what_is_not_built() const {
  if (file_.find_i64(key("%s.expert_count")).value_or(0) > 0) {
    file_.fail(ErrorCode::unsupported,
               "the model has experts (expert_count > 0), supported: "
               "dense models only");
  }
  if (!file_.find_bool(key("%s.attention.causal")).value_or(true)) {
    file_.fail(ErrorCode::unsupported,
               "the model's attention is not causal, supported: causal "
               "language models");
  }
  for (const char* name : {"rope_factors_long.weight", "rope_factors_short.weight"}) {
    if (file_.find(name) != nullptr) {
      file_.fail(ErrorCode::unsupported,
                 fmt::format("{} (LongRoPE) is not supported, supported: none, linear, yarn, Llama "
                             "3's rope_freqs.weight",
                             name));
    }
  }
}

void Reader::read_rope_scaling(RopeConfig& rope) const {
  const std::string name = key("%s.rope.scaling.type");
  const std::string_view type = file_.find_string(name).value_or("linear");
  if (type == "none") return;
  if (type == "linear") {
    // scale_linear is an older key for the same number.
    rope.linear_factor = positive("%s.rope.scaling.factor", positive("%s.rope.scale_linear", 1.0));
    return;
  }
  if (type != "yarn") {
    file_.fail(ErrorCode::unsupported,
               fmt::format("{} is '{}', supported: none, linear, yarn, and Llama 3's through "
                           "rope_freqs.weight",
                           name, printable(type)));
  }
  for (const auto& [pattern, built_in] : {std::pair{"%s.rope.scaling.yarn_log_multiplier", 0.0},
                                          std::pair{"%s.rope.scaling.yarn_ext_factor", 1.0}}) {
    const double value = file_.find_f64(key(pattern)).value_or(built_in);
    if (value == built_in) continue;
    file_.fail(ErrorCode::unsupported, fmt::format("{} is {}, supported: {}; this variant of YaRN "
                                                   "needs a newer version",
                                                   key(pattern), value, built_in));
  }
  rope.linear_factor = positive("%s.rope.scaling.factor", {});
  const std::string original = key("%s.rope.scaling.original_context_length");
  YarnConfig yarn;
  yarn.original_context = file_.has(original)
                              ? count("%s.rope.scaling.original_context_length", kMaxContext)
                              : config_.context;
  // Two keys for factors of the same thing.
  yarn.attn_factor = positive("%s.rope.scaling.attn_factor", 1.0) *
                     positive("%s.rope.scaling.yarn_attn_factor", 1.0);
  yarn.beta_fast = positive("%s.rope.scaling.yarn_beta_fast", yarn.beta_fast);
  yarn.beta_slow = positive("%s.rope.scaling.yarn_beta_slow", yarn.beta_slow);
  if (rope.linear_factor < 1.0 || yarn.beta_fast <= yarn.beta_slow) {
    file_.fail(ErrorCode::corrupt,
               fmt::format("YaRN has factor {}, beta_fast {} and beta_slow {}, required: a factor "
                           "of at least 1 and beta_fast above beta_slow",
                           rope.linear_factor, yarn.beta_fast, yarn.beta_slow));
  }
  rope.yarn = yarn;
}

int64_t Reader::head_dim(std::string_view pattern, int64_t otherwise) const {
  const std::string name = key(pattern);
  const int64_t value = file_.find_i64(name).value_or(otherwise);
  if (value < 32 || value > 256 || value % 32 != 0) {
    file_.fail(ErrorCode::unsupported,
               fmt::format("{} is {}, supported: multiples of 32 up to 256", name, value));
  }
  return value;
}

std::vector<bool> Reader::sliding_layers() const {
  const std::string name = key("%s.attention.sliding_window_pattern");
  const int64_t layers = config_.layer_count();
  std::vector<bool> sliding(static_cast<size_t>(layers), true);
  if (file_.has(name) && file_.is_array(name)) {
    const std::vector<int64_t> values = per_layer("%s.attention.sliding_window_pattern", 1);
    for (size_t i = 0; i < values.size(); ++i) sliding[i] = values[i] != 0;
    return sliding;
  }
  int64_t pattern = config_.family == Family::gemma3 ? kGemma3Pattern : 0;
  if (file_.has(name)) pattern = count("%s.attention.sliding_window_pattern", kMaxLayers);
  for (int64_t i = 0; pattern > 0 && i < layers; ++i) {
    sliding[static_cast<size_t>(i)] = (i + 1) % pattern != 0;
  }
  return sliding;
}

void Reader::read_layers(const FamilyFacts& facts) {
  config_.layers.resize(static_cast<size_t>(count("%s.block_count", kMaxLayers)));
  const std::vector<int64_t> heads = per_layer("%s.attention.head_count", kMaxHeads);
  const std::vector<int64_t> ff = per_layer("%s.feed_forward_length", kMaxWidth);
  std::vector<int64_t> kv_heads = heads;
  if (file_.has(key("%s.attention.head_count_kv"))) {
    kv_heads = per_layer("%s.attention.head_count_kv", kMaxHeads);
  }
  const int64_t dim_k = head_dim("%s.attention.key_length", config_.width / heads[0]);
  const int64_t dim_v = head_dim("%s.attention.value_length", config_.width / heads[0]);

  RopeConfig rope;
  rope.layout = facts.rope;
  rope.dims = file_.find_i64(key("%s.rope.dimension_count")).value_or(dim_k);
  if (rope.dims < 2 || rope.dims > dim_k || rope.dims % 2 != 0) {
    file_.fail(ErrorCode::corrupt,
               fmt::format("{} is {}, required: an even number from 2 to the head size {}",
                           key("%s.rope.dimension_count"), rope.dims, dim_k));
  }
  rope.freq_base = positive("%s.rope.freq_base", 10000.0);
  read_rope_scaling(rope);
  rope.freq_factors = file_.find("rope_freqs.weight") != nullptr;

  int64_t window = 0;
  if (file_.find_i64(key("%s.attention.sliding_window")).value_or(0) != 0) {
    window = count("%s.attention.sliding_window", kMaxContext);
  } else if (facts.family == Family::gemma3) {
    file_.get_i64(key("%s.attention.sliding_window"));  // throws: without it the result is wrong
    file_.fail(ErrorCode::corrupt, "gemma3.attention.sliding_window is 0, required: at least 1");
  }
  RopeConfig local = rope;
  if (facts.family == Family::gemma3) {
    local.freq_base = kGemma3LocalBase;
    local.linear_factor = 1.0;
    local.yarn.reset();
    local.freq_factors = false;
  }
  local.freq_base = positive("%s.rope.freq_base_swa", local.freq_base);

  const std::vector<bool> sliding = sliding_layers();
  for (size_t i = 0; i < config_.layers.size(); ++i) {
    if (heads[i] % kv_heads[i] != 0) {
      file_.fail(ErrorCode::corrupt,
                 fmt::format("layer {}: head_count {} is not a multiple of head_count_kv {}", i,
                             heads[i], kv_heads[i]));
    }
    const bool is_sliding = window > 0 && sliding[i];
    config_.layers[i] = {.q_heads = heads[i],
                         .kv_heads = kv_heads[i],
                         .head_dim_k = dim_k,
                         .head_dim_v = dim_v,
                         .ff = ff[i],
                         .window = is_sliding ? window : 0,
                         .rope = is_sliding ? local : rope};
  }
  const bool by_width = facts.family == Family::gemma3 && config_.layer_count() == kGemma3Layers27B;
  const double scaled_dim = by_width ? static_cast<double>(config_.width) / heads[0] : dim_k;
  config_.attention_scale =
      static_cast<float>(positive("%s.attention.scale", 1.0 / std::sqrt(scaled_dim)));
}

void Reader::read_vocabulary() {
  const GgufTensor& embedding = file_.require("token_embd.weight");
  config_.vocab = embedding.rows();
  if (embedding.ne[0] != config_.width) {
    file_.fail(ErrorCode::corrupt, fmt::format("token_embd.weight is {}, required: {} x vocabulary",
                                               embedding.shape(), config_.width));
  }
  config_.tied_embeddings = file_.find("output.weight") == nullptr;
}

ModelConfig Reader::read() {
  const FamilyFacts& facts = family();
  config_.family = facts.family;
  config_.architecture = facts.architecture;
  config_.name = printable(file_.find_string("general.name").value_or(facts.architecture));
  config_.activation = facts.activation;
  config_.qk_norm = facts.qk_norm;
  config_.post_norms = facts.post_norms;
  refuse_what_is_not_built();

  config_.width = count("%s.embedding_length", kMaxWidth);
  config_.context = count("%s.context_length", kMaxContext);
  config_.rms_eps = static_cast<float>(positive("%s.attention.layer_norm_rms_epsilon", {}));
  read_layers(facts);
  read_vocabulary();

  const auto softcap = [&](std::string_view pattern) {
    return file_.find_f64(key(pattern)).value_or(0.0) == 0.0 ? 0.0 : positive(pattern, {});
  };
  config_.attention_softcap = static_cast<float>(softcap("%s.attn_logit_softcapping"));
  config_.final_softcap = static_cast<float>(softcap("%s.final_logit_softcapping"));
  if (facts.family == Family::gemma3) {
    config_.embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(config_.width)));
  }
  config_.qkv_bias = facts.family == Family::qwen2 || file_.find("blk.0.attn_q.bias") != nullptr;
  return std::move(config_);
}

}  // namespace

ModelConfig read_model_config(const GgufFile& file) { return Reader(file).read(); }

void apply_rope_override(const RopeOverride& wanted, ModelConfig& config) {
  const auto fail = [](const std::string& message) {
    throw Error(ErrorCode::invalid_argument, message);
  };
  if (!(wanted.factor >= 1.0) || wanted.factor > 1e6) {
    fail(fmt::format("a RoPE scale of {} is not possible, required: 1 to 1000000", wanted.factor));
  }
  const std::optional<YarnConfig>& own = config.layers[0].rope.yarn;
  int64_t original = config.context;
  if (own) original = own->original_context;
  if (wanted.original_context != 0) original = wanted.original_context;
  if (original < 1 || static_cast<double>(original) * wanted.factor > kMaxContext) {
    fail(
        fmt::format("an original context of {} tokens times a RoPE scale of {} is not possible, "
                    "required: 1 to {} tokens",
                    original, wanted.factor, kMaxContext));
  }
  for (LayerConfig& layer : config.layers) {
    if (config.family == Family::gemma3 && layer.window > 0) continue;
    RopeConfig& rope = layer.rope;
    rope.linear_factor = wanted.scaling == RopeScaling::none ? 1.0 : wanted.factor;
    rope.yarn.reset();
    if (wanted.scaling == RopeScaling::yarn) rope.yarn = YarnConfig{.original_context = original};
  }
  if (wanted.scaling != RopeScaling::none) {
    config.context = static_cast<int64_t>(static_cast<double>(original) * wanted.factor);
  }
}

std::string explain_rope_scaling(const ModelConfig& config) {
  for (const LayerConfig& layer : config.layers) {
    const RopeConfig& rope = layer.rope;
    if (rope.yarn) {
      return fmt::format("YaRN, {} times {} tokens", rope.linear_factor,
                         rope.yarn->original_context);
    }
    if (rope.linear_factor != 1.0) return fmt::format("linear, {} times", rope.linear_factor);
  }
  return {};
}

std::vector<LayerShape> layer_shapes(const ModelConfig& config) {
  std::vector<LayerShape> shapes;
  for (const LayerConfig& layer : config.layers) {
    shapes.push_back({.kv_heads = layer.kv_heads,
                      .q_heads = layer.q_heads,
                      .head_dim_k = layer.head_dim_k,
                      .head_dim_v = layer.head_dim_v,
                      .window = layer.window});
  }
  return shapes;
}

PolicyContext policy_context(const ModelConfig& config, int64_t context_tokens) {
  PolicyContext context{.layers = config.layer_count(),
                        .context_tokens = context_tokens > 0 ? context_tokens : config.context};
  for (const LayerConfig& layer : config.layers) {
    context.sliding_window.push_back(layer.window > 0);
    context.kv_heads.push_back(layer.kv_heads);
  }
  return context;
}

}  // namespace thriftattn
