// What a GGUF file says about a transformer: the facts that the forward pass, the cache and
// the reports need, read once and checked, so that later code needs no defaults of its own.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

namespace thriftattn {

class GgufFile;

enum class Family : uint8_t { llama, qwen2, qwen3, gemma3 };

// Which elements of a head RoPE turns together: (2i, 2i+1), or (i, i + dims/2).
enum class RopeLayout : uint8_t { interleaved, halves };

enum class Activation : uint8_t { silu, gelu_tanh };

// YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times within the original context
// keep their frequency, those below beta_slow are divided by the factor, between them a ramp over
// the pairs' indices; q and k grow by rope_magnitude().
struct YarnConfig {
  int64_t original_context = 0;  // tokens the model was trained for before it was stretched
  double attn_factor = 1.0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;

  bool operator==(const YarnConfig&) const = default;
};

struct RopeConfig {
  RopeLayout layout = RopeLayout::interleaved;
  int64_t dims = 0;  // elements of a head that turn, even; the rest stay as they are
  double freq_base = 10000.0;
  double linear_factor = 1.0;  // positions are divided by it; under YaRN those of slow pairs
  std::optional<YarnConfig> yarn;
  bool freq_factors = false;  // divide the frequencies by rope_freqs.weight (Llama 3)

  bool operator==(const RopeConfig&) const = default;
};

struct LayerConfig {
  int64_t q_heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim_k = 0;
  int64_t head_dim_v = 0;
  int64_t ff = 0;      // width of the feed-forward part
  int64_t window = 0;  // sliding window, the query's own token included; 0 = none
  RopeConfig rope;
};

struct ModelConfig {
  Family family = Family::llama;
  std::string architecture;  // general.architecture
  std::string name;          // general.name, or the architecture
  int64_t width = 0;         // embedding_length
  int64_t vocab = 0;         // rows of token_embd.weight
  int64_t context = 0;       // context_length the model was trained for
  std::vector<LayerConfig> layers;

  float rms_eps = 1e-5f;
  float attention_scale = 0.0f;
  float attention_softcap = 0.0f;  // 0 = none
  float final_softcap = 0.0f;      // 0 = none
  float embedding_scale = 1.0f;
  Activation activation = Activation::silu;
  bool qkv_bias = false;
  bool qk_norm = false;
  bool post_norms = false;       // norms after attention and after the feed-forward part
  bool tied_embeddings = false;  // no output.weight: the embedding is the LM head

  int64_t layer_count() const { return static_cast<int64_t>(layers.size()); }
};

// What the user asks for in place of the file's own scaling, so that more tokens fit than the model
// was made for.
enum class RopeScaling : uint8_t { none, linear, yarn };
struct RopeOverride {
  RopeScaling scaling = RopeScaling::none;
  double factor = 1.0;           // at least 1
  int64_t original_context = 0;  // yarn: 0 = what the file says, or the model's context

  bool operator==(const RopeOverride&) const = default;
};

// Changes RoPE and context of a model. The sliding-window layers of Gemma 3 keep their own RoPE.
void apply_rope_override(const RopeOverride& wanted, ModelConfig& config);
// "YaRN, 4 times 32768 tokens", "linear, 2 times"; empty if positions are not scaled.
std::string explain_rope_scaling(const ModelConfig& config);

// Reads and checks the metadata. Throws Error (unsupported, corrupt or not_found) that names
// the key, what is required or supported, and what the file has. Tensor shapes are checked
// where the tensors are loaded.
ModelConfig read_model_config(const GgufFile& file);

// The same facts in the forms that the cache and the policy ask for.
std::vector<LayerShape> layer_shapes(const ModelConfig& config);
// `context_tokens`: what per cent in a policy is of; 0 = the model's own context.
PolicyContext policy_context(const ModelConfig& config, int64_t context_tokens = 0);

}  // namespace thriftattn
