// The model and its forward pass. A Model is immutable and may be shared by sessions and
// threads; everything that changes while tokens are fed lives in the KvCache.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/dense.h"
#include "engine/model_config.h"
#include "thriftattn/attention.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn {

class GgufFile;
struct GgufTensor;

struct ModelOptions {
  ComputeType compute = ComputeType::f32;
  std::optional<RopeOverride> rope = std::nullopt;  // instead of the file's own scaling
};

// Weights of one layer. Vectors are empty where the family has none.
struct LayerWeights {
  std::vector<float> attn_norm, ffn_norm;
  std::vector<float> post_attn_norm, post_ffn_norm;
  std::vector<float> q_norm, k_norm;
  std::vector<float> qkv_bias, out_bias;
  DenseMatrix qkv;  // rows: q, then k, then v
  DenseMatrix out;
  DenseMatrix gate_up;  // rows: gate, then up
  DenseMatrix down;
};

class Model {
 public:
  static std::shared_ptr<const Model> load(const std::string& path,
                                           const ModelOptions& options = {});
  static std::shared_ptr<const Model> load(std::shared_ptr<const GgufFile> file,
                                           const ModelOptions& options = {});

  const ModelConfig& config() const { return config_; }
  const GgufFile& file() const { return *file_; }  // for the tokenizer
  const std::string& hash() const;                 // of the file's content
  ComputeType compute() const { return options_.compute; }
  int64_t weight_bytes() const;  // of the dense layers, in memory or in the file's mapping
  // What runs, one line each: family and sizes; how the dense layers compute.
  std::string explain() const;

  const LayerWeights& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  const std::vector<float>& final_norm() const { return final_norm_; }
  const DenseMatrix& lm_head() const { return lm_head_; }
  // Radians per position of each pair, for layer i.
  const std::vector<double>& rope_frequencies(int64_t i) const { return rope_[rope_table(i)]; }
  // Layers with equal numbers share the frequencies.
  size_t rope_table(int64_t i) const { return rope_of_layer_[static_cast<size_t>(i)]; }
  size_t rope_tables() const { return rope_.size(); }
  // The embedding of a token, scaled as the family asks. Throws for an id outside the vocabulary.
  void embed(int32_t token, float* out) const;

 private:
  Model() = default;

  std::shared_ptr<const GgufFile> file_;
  ModelOptions options_;
  ModelConfig config_;
  mutable std::once_flag hashed_;
  mutable std::string hash_;
  const GgufTensor* embedding_ = nullptr;  // in file_
  std::vector<LayerWeights> layers_;
  std::vector<float> final_norm_;
  DenseMatrix lm_head_;
  std::vector<std::vector<double>> rope_;  // distinct tables
  std::vector<size_t> rope_of_layer_;
};

// Where the seconds of forward() and logits() went.
struct ForwardTimes {
  double attention = 0;  // append and attend
  double dense = 0;      // matrix products
  double total = 0;

  void merge(const ForwardTimes& other);
};

struct ForwardOptions {
  AttendMode mode = AttendMode::prefill;
  AttendStats* stats = nullptr;                     // summed over the layers
  std::vector<AttendStats>* layer_stats = nullptr;  // one a layer, merged into; resized if empty
  ForwardTimes* times = nullptr;                    // merged into
  // Asked before each layer; true ends the step with Error(cancelled), which rolls it back.
  std::function<bool()> cancelled;
  // Sees Q and K of each layer after RoPE and QK norm (the equaliser's measurement).
  std::function<void(int64_t layer, TensorView<const float> q, TensorView<const float> k)> on_qk;
};

// Feeds `tokens` to the sequence as one step. `hidden_out` [tokens][width] receives the
// activations after the final norm, or is null. On an Error the step is rolled back: the
// sequence is as it was.
void forward(const Model& model, KvCache& cache, SequenceId sequence,
             std::span<const int32_t> tokens, const ForwardOptions& options, float* hidden_out);

// out[rows][vocab] = LM head of hidden[rows][width], soft-capped where the model asks.
void logits(const Model& model, const float* hidden, int64_t rows, float* out,
            ForwardTimes* times = nullptr);

}  // namespace thriftattn
