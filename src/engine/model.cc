// Loading of a Model: every tensor of the file is found, checked against the metadata and
// dequantised; one that is missing, has another shape, is not finite or has no use is an Error.
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "engine/gguf.h"
#include "engine/memory_limit.h"
#include "engine/rope.h"
#include "engine/transformer.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

class Loader {
 public:
  Loader(const GgufFile& file, const ModelConfig& config, ComputeType compute)
      : file_(file), config_(config), compute_(compute) {}

  void require_memory() const;
  LayerWeights layer(int64_t index);
  std::vector<float> vector(const std::string& name, int64_t count);
  DenseMatrix matrix(const std::vector<std::string>& names, const std::vector<int64_t>& rows,
                     int64_t columns);
  void use(const std::string& name) { used_.insert(name); }
  void refuse_unused() const;

 private:
  const GgufFile& file_;
  const ModelConfig& config_;
  ComputeType compute_;
  std::set<std::string, std::less<>> used_;
};

void Loader::require_memory() const {
  const int64_t bytes_of_element = compute_ == ComputeType::f32 ? 4 : 2;
  int64_t needed = 0;
  for (const GgufTensor& tensor : file_.tensors()) {
    const bool only_rows = tensor.name == "token_embd.weight" && !config_.tied_embeddings;
    if (only_rows) continue;
    needed += compute_ == ComputeType::stored ? tensor.rows() * tensor.row_bytes()
                                              : tensor.elements() * bytes_of_element;
  }
  const int64_t available = available_memory();
  if (needed > available) {
    file_.fail(ErrorCode::out_of_memory,
               fmt::format("the weights need {} MiB as {}, {} MiB are available; use {}a smaller "
                           "model",
                           needed >> 20, to_string(compute_), available >> 20,
                           compute_ == ComputeType::stored ? "" : "compute type auto or "));
  }
}

std::vector<float> Loader::vector(const std::string& name, int64_t count) {
  const GgufTensor& tensor = file_.require(name);
  if (tensor.ne[0] != count || tensor.rows() != 1) {
    file_.fail(ErrorCode::corrupt, fmt::format("tensor {} is {}, required: {}; the file does not "
                                               "fit its own metadata",
                                               name, tensor.shape(), count));
  }
  check_finite(tensor);
  std::vector<float> values(static_cast<size_t>(count));
  dequantize_rows(tensor, 0, 1, values.data());
  use(name);
  return values;
}

DenseMatrix Loader::matrix(const std::vector<std::string>& names, const std::vector<int64_t>& rows,
                           int64_t columns) {
  for (const std::string& name : names) use(name);
  return DenseMatrix::load(file_, names, rows, columns, compute_);
}

LayerWeights Loader::layer(int64_t index) {
  const LayerConfig& layer = config_.layers[static_cast<size_t>(index)];
  const auto name = [&](const char* what) { return fmt::format("blk.{}.{}", index, what); };
  const int64_t width = config_.width;
  const int64_t q = layer.q_heads * layer.head_dim_k;
  const int64_t k = layer.kv_heads * layer.head_dim_k;
  const int64_t v = layer.kv_heads * layer.head_dim_v;

  LayerWeights w;
  w.attn_norm = vector(name("attn_norm.weight"), width);
  w.ffn_norm = vector(name("ffn_norm.weight"), width);
  if (config_.post_norms) {
    w.post_attn_norm = vector(name("post_attention_norm.weight"), width);
    w.post_ffn_norm = vector(name("post_ffw_norm.weight"), width);
  }
  if (config_.qk_norm) {
    w.q_norm = vector(name("attn_q_norm.weight"), layer.head_dim_k);
    w.k_norm = vector(name("attn_k_norm.weight"), layer.head_dim_k);
  }
  if (config_.qkv_bias) {
    for (const auto& [bias, count] :
         {std::pair{"attn_q.bias", q}, {"attn_k.bias", k}, {"attn_v.bias", v}}) {
      const std::vector<float> part = vector(name(bias), count);
      w.qkv_bias.insert(w.qkv_bias.end(), part.begin(), part.end());
    }
  }
  if (file_.find(name("attn_output.bias")) != nullptr) {
    w.out_bias = vector(name("attn_output.bias"), width);
  }
  w.qkv = matrix({name("attn_q.weight"), name("attn_k.weight"), name("attn_v.weight")}, {q, k, v},
                 width);
  w.out = matrix({name("attn_output.weight")}, {width}, layer.q_heads * layer.head_dim_v);
  w.gate_up = matrix({name("ffn_gate.weight"), name("ffn_up.weight")}, {layer.ff, layer.ff}, width);
  w.down = matrix({name("ffn_down.weight")}, {width}, layer.ff);
  return w;
}

// A tensor that the forward pass does not read would change the result in silence.
void Loader::refuse_unused() const {
  for (const GgufTensor& tensor : file_.tensors()) {
    if (used_.contains(tensor.name)) continue;
    file_.fail(ErrorCode::unsupported,
               fmt::format("tensor {} ({}) is not used by the {} models that are supported; this "
                           "variant of the family needs a newer version",
                           printable(tensor.name), tensor.shape(), config_.architecture));
  }
}

}  // namespace

std::shared_ptr<const Model> Model::load(const std::string& path, const ModelOptions& options) {
  return load(std::make_shared<const GgufFile>(GgufFile::open(path)), options);
}

std::shared_ptr<const Model> Model::load(std::shared_ptr<const GgufFile> file,
                                         const ModelOptions& options) {
  std::shared_ptr<Model> model(new Model());
  model->options_ = options;
  model->config_ = read_model_config(*file);
  if (options.rope) apply_rope_override(*options.rope, model->config_);
  const ModelConfig& config = model->config_;
  Loader loader(*file, config, options.compute);
  loader.require_memory();

  loader.use("token_embd.weight");
  const std::string head = config.tied_embeddings ? "token_embd.weight" : "output.weight";
  model->lm_head_ = loader.matrix({head}, {config.vocab}, config.width);
  if (!config.tied_embeddings) check_finite(file->require("token_embd.weight"));
  model->embedding_ = &file->require("token_embd.weight");
  model->final_norm_ = loader.vector("output_norm.weight", config.width);

  std::vector<float> factors;
  if (file->find("rope_freqs.weight") != nullptr) {
    factors = loader.vector("rope_freqs.weight", config.layers[0].rope.dims / 2);
    if (!std::all_of(factors.begin(), factors.end(), [](float f) { return f > 0.0f; })) {
      file->fail(ErrorCode::corrupt, "rope_freqs.weight has a value that is not positive");
    }
  }
  std::vector<RopeConfig> distinct;
  for (int64_t i = 0; i < config.layer_count(); ++i) {
    model->layers_.push_back(loader.layer(i));
    const RopeConfig& rope = config.layers[static_cast<size_t>(i)].rope;
    const auto found = std::find(distinct.begin(), distinct.end(), rope);
    model->rope_of_layer_.push_back(found - distinct.begin());
    if (found != distinct.end()) continue;
    distinct.push_back(rope);
    model->rope_.push_back(thriftattn::rope_frequencies(rope, factors));
  }
  loader.refuse_unused();
  model->file_ = std::move(file);
  return model;
}

const std::string& Model::hash() const {
  std::call_once(hashed_, [&] { hash_ = file_->content_hash(); });
  return hash_;
}

int64_t Model::weight_bytes() const {
  int64_t bytes = lm_head_.bytes();
  for (const LayerWeights& w : layers_) {
    bytes += w.qkv.bytes() + w.out.bytes() + w.gate_up.bytes() + w.down.bytes();
  }
  return bytes;
}

std::string Model::explain() const {
  const LayerConfig& first = config_.layers[0];
  int64_t sliding = 0;
  for (const LayerConfig& layer : config_.layers) sliding += layer.window > 0;
  std::string text = fmt::format(
      "model: {} ({}), {} layers, width {}, {} query and {} KV heads of {}, vocabulary {}, "
      "context {}",
      config_.name, config_.architecture, config_.layer_count(), config_.width, first.q_heads,
      first.kv_heads, first.head_dim_k, config_.vocab, config_.context);
  if (sliding > 0) text += fmt::format(", {} layers with a sliding window", sliding);
  return text + fmt::format("\n{}; {} MiB of weights\n", explain_compute(options_.compute),
                            weight_bytes() >> 20);
}

void Model::embed(int32_t token, float* out) const {
  if (token < 0 || token >= config_.vocab) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("token {} is outside the vocabulary of {}; the tokens are not this "
                            "model's",
                            token, config_.vocab));
  }
  dequantize_rows(*embedding_, token, 1, out);
  if (config_.embedding_scale == 1.0f) return;
  for (int64_t i = 0; i < config_.width; ++i) out[i] *= config_.embedding_scale;
}

}  // namespace thriftattn
