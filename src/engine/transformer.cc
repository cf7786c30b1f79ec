// The forward pass of a decoder-only transformer over a KvCache, in FP32:
//
//   x = embed(tokens)
//   for each layer:  q, k, v = norm(x) Wqkv;  rotate q and k by their positions
//                    cache <- k, v;           x += attend(q, cache) Wout
//                    gate, up = norm(x) Wgu;  x += (activation(gate) * up) Wdown
//   hidden = norm(x)
#include "engine/transformer.h"

#include <fmt/format.h>
#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <chrono>
#include <exception>

#include "engine/rope.h"
#include "engine/vector_ops.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using Clock = std::chrono::steady_clock;

// Adds the seconds of its scope to a sum.
class Timer {
 public:
  explicit Timer(double& sum) : sum_(sum), start_(Clock::now()) {}
  ~Timer() { sum_ += std::chrono::duration<double>(Clock::now() - start_).count(); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  double& sum_;
  Clock::time_point start_;
};

// FP32 memory that is written before it is read, so it need not be zeroed.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(std::make_unique_for_overwrite<float[]>(static_cast<size_t>(count))) {}
  float* get() const { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
};

template <typename Row>
void for_rows(int64_t rows, const Row& row) {
  if (rows == 1) return row(0);
  tbb::parallel_for(tbb::blocked_range<int64_t>(0, rows, 4), [&](const auto& part) {
    for (int64_t i = part.begin(); i < part.end(); ++i) row(i);
  });
}

// One step of one sequence: the activations of all its tokens, layer after layer.
class Step {
 public:
  Step(const Model& model, KvCache& cache, SequenceId sequence, int64_t tokens,
       const ForwardOptions& options);

  void embed(std::span<const int32_t> tokens);
  void attention(int64_t layer);
  void feed_forward(int64_t layer);
  void require_finite() const;
  void final_norm(float* out);
  const ForwardTimes& times() const { return times_; }

 private:
  void multiply(const DenseMatrix& w, float* x, const std::vector<float>& bias, float* y);
  void normalize(const std::vector<float>& weight, float* out);
  // x += y, with the family's norm in between.
  void add_to_stream(const std::vector<float>& post_norm, float* y);
  void norm_and_rotate(const LayerConfig& layer, const LayerWeights& w, const RopeTable& rope,
                       float* qkv);

  const Model& model_;
  const ModelConfig& config_;
  KvCache& cache_;
  SequenceId sequence_;
  const ForwardOptions& options_;
  int64_t tokens_;
  int64_t width_;
  std::vector<RopeTable> ropes_;  // as many as Model::rope_tables()
  Buffer x_;                      // [tokens][width]: the residual stream
  Buffer normed_;                 // [tokens][width]: also the output of a block
  Buffer wide_;                   // [tokens][...]: q, k and v; then gate and up
  Buffer inner_;                  // [tokens][...]: what attention read; then gate * up
  ForwardTimes times_;
};

// Floats that a token needs in wide_ and in inner_.
struct RowSizes {
  int64_t wide = 0;
  int64_t inner = 0;
};

RowSizes row_sizes(const ModelConfig& config) {
  RowSizes sizes;
  for (const LayerConfig& l : config.layers) {
    const int64_t qkv = (l.q_heads + l.kv_heads) * l.head_dim_k + l.kv_heads * l.head_dim_v;
    sizes.wide = std::max({sizes.wide, qkv, 2 * l.ff});
    sizes.inner = std::max({sizes.inner, l.ff, l.q_heads * l.head_dim_v});
  }
  return sizes;
}

Step::Step(const Model& model, KvCache& cache, SequenceId sequence, int64_t tokens,
           const ForwardOptions& options)
    : model_(model),
      config_(model.config()),
      cache_(cache),
      sequence_(sequence),
      options_(options),
      tokens_(tokens),
      width_(config_.width),
      ropes_(model.rope_tables()),
      x_(tokens * config_.width),
      normed_(tokens * config_.width),
      wide_(tokens * row_sizes(config_).wide),
      inner_(tokens * row_sizes(config_).inner) {
  const int64_t first = cache.length(sequence);
  for (int64_t i = 0; i < config_.layer_count(); ++i) {
    RopeTable& table = ropes_[model.rope_table(i)];
    if (table.pairs != 0) continue;
    table = RopeTable(model.rope_frequencies(i), first, tokens,
                      rope_magnitude(config_.layers[static_cast<size_t>(i)].rope));
  }
}

void Step::embed(std::span<const int32_t> tokens) {
  for_rows(tokens_,
           [&](int64_t t) { model_.embed(tokens[static_cast<size_t>(t)], x_.get() + t * width_); });
}

void Step::multiply(const DenseMatrix& w, float* x, const std::vector<float>& bias, float* y) {
  const Timer timer(times_.dense);
  w.multiply(x, tokens_, y, bias.empty() ? nullptr : bias.data());
}

void Step::normalize(const std::vector<float>& weight, float* out) {
  for_rows(tokens_, [&](int64_t t) {
    rms_norm(x_.get() + t * width_, weight.data(), width_, config_.rms_eps, out + t * width_);
  });
}

void Step::add_to_stream(const std::vector<float>& post_norm, float* y) {
  for_rows(tokens_, [&](int64_t t) {
    float* row = y + t * width_;
    if (!post_norm.empty()) rms_norm(row, post_norm.data(), width_, config_.rms_eps, row);
    add(x_.get() + t * width_, row, width_);
  });
}

void Step::norm_and_rotate(const LayerConfig& layer, const LayerWeights& w, const RopeTable& rope,
                           float* qkv) {
  const int64_t dim = layer.head_dim_k;
  const int64_t row = w.qkv.rows();
  for_rows(tokens_, [&](int64_t t) {
    for (int64_t h = 0; h < layer.q_heads + layer.kv_heads; ++h) {
      float* head = qkv + t * row + h * dim;
      if (config_.qk_norm) {
        const std::vector<float>& weight = h < layer.q_heads ? w.q_norm : w.k_norm;
        rms_norm(head, weight.data(), dim, config_.rms_eps, head);
      }
      apply_rope(rope, t, layer.rope.layout, head);
    }
  });
}

void Step::attention(int64_t index) {
  const LayerConfig& layer = config_.layers[static_cast<size_t>(index)];
  const LayerWeights& w = model_.layer(index);
  float* qkv = wide_.get();
  normalize(w.attn_norm, normed_.get());
  multiply(w.qkv, normed_.get(), w.qkv_bias, qkv);
  norm_and_rotate(layer, w, ropes_[model_.rope_table(index)], qkv);

  const int64_t row = w.qkv.rows();
  const auto view = [&](int64_t offset, int64_t heads, int64_t dim) {
    return TensorView<const float>{qkv + offset, tokens_, heads, dim, row, dim};
  };
  const int64_t k_at = layer.q_heads * layer.head_dim_k;
  const auto q = view(0, layer.q_heads, layer.head_dim_k);
  const auto k = view(k_at, layer.kv_heads, layer.head_dim_k);
  const auto v = view(k_at + layer.kv_heads * layer.head_dim_k, layer.kv_heads, layer.head_dim_v);
  if (options_.on_qk) options_.on_qk(index, q, k);
  {
    const Timer timer(times_.attention);
    AttendStats stats;
    cache_.append(sequence_, index, k, v);
    attend(cache_,
           {.sequence = sequence_,
            .layer = index,
            .config = {.mode = options_.mode,
                       // FP32 weights are asked for where quality is judged.
                       .math = model_.compute() == ComputeType::f32 ? AttendMath::f32
                                                                    : AttendMath::fast,
                       .softmax_scale = config_.attention_scale,
                       .softcap = config_.attention_softcap},
            .q = q,
            .out = TensorView<float>::dense(inner_.get(), tokens_, layer.q_heads, layer.head_dim_v),
            .lse = {},
            .stats = &stats});
    if (options_.stats != nullptr) options_.stats->merge(stats);
    if (options_.layer_stats != nullptr) {
      options_.layer_stats->resize(config_.layers.size());
      (*options_.layer_stats)[static_cast<size_t>(index)].merge(stats);
    }
  }
  multiply(w.out, inner_.get(), w.out_bias, normed_.get());
  add_to_stream(w.post_attn_norm, normed_.get());
}

void Step::feed_forward(int64_t index) {
  const LayerConfig& layer = config_.layers[static_cast<size_t>(index)];
  const LayerWeights& w = model_.layer(index);
  normalize(w.ffn_norm, normed_.get());
  multiply(w.gate_up, normed_.get(), {}, wide_.get());
  for_rows(tokens_, [&](int64_t t) {
    const float* gate = wide_.get() + t * 2 * layer.ff;
    gated_activation(config_.activation, gate, gate + layer.ff, layer.ff,
                     inner_.get() + t * layer.ff);
  });
  multiply(w.down, inner_.get(), {}, normed_.get());
  add_to_stream(w.post_ffn_norm, normed_.get());
}

void Step::require_finite() const {
  for (int64_t t = 0; t < tokens_; ++t) {
    if (all_finite(x_.get() + t * width_, width_)) continue;
    throw Error(ErrorCode::non_finite,
                fmt::format("token {} of the sequence has an activation that is NaN or Inf after "
                            "the last layer; the weights overflow FP32 or are damaged: fetch the "
                            "model again",
                            cache_.length(sequence_) + t));
  }
}

void Step::final_norm(float* out) { normalize(model_.final_norm(), out); }

void require_same_shape(const Model& model, const KvCache& cache) {
  const std::vector<LayerShape> wanted = layer_shapes(model.config());
  const std::vector<LayerShape>& have = cache.config().layers;
  bool same = wanted.size() == have.size();
  for (size_t i = 0; same && i < wanted.size(); ++i) {
    same = wanted[i].kv_heads == have[i].kv_heads && wanted[i].q_heads == have[i].q_heads &&
           wanted[i].head_dim_k == have[i].head_dim_k &&
           wanted[i].head_dim_v == have[i].head_dim_v && wanted[i].window == have[i].window;
  }
  if (!same) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("the cache ({} layers) was made for another model than {} ({} layers); "
                            "make it from layer_shapes()",
                            have.size(), model.config().name, wanted.size()));
  }
}

}  // namespace

void ForwardTimes::merge(const ForwardTimes& other) {
  attention += other.attention;
  dense += other.dense;
  total += other.total;
}

void forward(const Model& model, KvCache& cache, SequenceId sequence,
             std::span<const int32_t> tokens, const ForwardOptions& options, float* hidden_out) {
  require_same_shape(model, cache);
  const auto count = static_cast<int64_t>(tokens.size());
  if (count == 0) return;
  ForwardTimes times;
  {
    const Timer timer(times.total);
    Step step(model, cache, sequence, count, options);
    step.embed(tokens);
    cache.begin_step(sequence, count);
    try {
      for (int64_t i = 0; i < model.config().layer_count(); ++i) {
        if (options.cancelled && options.cancelled()) {
          throw Error(ErrorCode::cancelled, "the step was cancelled; nothing of it is stored");
        }
        step.attention(i);
        step.feed_forward(i);
      }
      step.require_finite();
      cache.commit(sequence);
    } catch (...) {
      cache.rollback(sequence);
      throw;
    }
    if (hidden_out != nullptr) step.final_norm(hidden_out);
    times.attention = step.times().attention;
    times.dense = step.times().dense;
  }
  if (options.times != nullptr) options.times->merge(times);
}

void logits(const Model& model, const float* hidden, int64_t rows, float* out,
            ForwardTimes* times) {
  ForwardTimes mine;
  {
    const Timer timer(mine.total);
    {
      const Timer dense(mine.dense);
      model.lm_head().multiply(hidden, rows, out);
    }
    const int64_t vocab = model.config().vocab;
    if (model.config().final_softcap > 0.0f) {
      for_rows(rows,
               [&](int64_t r) { soft_cap(out + r * vocab, vocab, model.config().final_softcap); });
    }
  }
  if (times != nullptr) times->merge(mine);
}

}  // namespace thriftattn
