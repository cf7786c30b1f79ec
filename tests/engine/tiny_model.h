// Small random models of each family, as GGUF files in memory, and what they compute: plain FP64
// loops that share no code with the engine (own attention, no cache, own reading of the spec).
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/float_convert.h"
#include "engine/gguf.h"
#include "engine/gguf_writer.h"
#include "engine/transformer.h"

namespace thriftattn::test {

struct TinySpec {
  std::string arch = "llama";
  int64_t layers = 2;
  int64_t width = 64;
  int64_t heads = 4;
  int64_t kv_heads = 2;
  int64_t dim_k = 32;
  int64_t dim_v = 32;
  int64_t ff = 96;
  int64_t vocab = 61;
  int64_t context = 4096;
  int64_t window = 0;
  int64_t rope_dims = 32;
  double freq_base = 10000.0;
  double linear = 1.0;        // rope.scaling.factor
  int64_t yarn_context = 0;   // > 0: YaRN by that factor from this context
  bool rope_factors = false;  // rope_freqs.weight
  bool tied = false;
  double attention_softcap = 0.0;
  double final_softcap = 0.0;
  float k_bias = 0.0f;  // qwen2: added to the K bias
  uint32_t seed = 7;
};

struct TinyModel {
  TinySpec spec;
  GgufWriter writer;
  std::map<std::string, std::vector<float>> tensors;
  std::string bytes;

  bool is(const char* arch) const { return spec.arch == arch; }
  bool halves() const { return !is("llama"); }
  bool qk_norm() const { return is("qwen3") || is("gemma3"); }
  const std::vector<float>& at(int64_t layer, const std::string& name) const {
    return tensors.at("blk." + std::to_string(layer) + "." + name);
  }

  // Valid as long as this object.
  std::shared_ptr<const GgufFile> file() const {
    return std::make_shared<const GgufFile>(GgufFile::from_memory(as_bytes(bytes), "tiny.gguf"));
  }
  std::shared_ptr<const Model> load(ComputeType compute = ComputeType::f32) const {
    return Model::load(file(), {.compute = compute});
  }
};

// `edit` may change metadata and tensors before the file is built.
struct TinyEdit {
  std::function<void(GgufWriter&)> keys = {};
  std::function<void(std::map<std::string, std::vector<float>>&)> tensors = {};
};

inline TinyModel make_tiny(const TinySpec& spec, const TinyEdit& edit = {}) {
  TinyModel model{.spec = spec, .writer = {}, .tensors = {}, .bytes = {}};
  std::mt19937 random(spec.seed);
  std::map<std::string, std::vector<uint64_t>> shapes;
  const auto add = [&](const std::string& name, std::vector<uint64_t> ne, double scale,
                       double offset) {
    uint64_t count = 1;
    for (const uint64_t n : ne) count *= n;
    std::vector<float> values(count);
    for (float& value : values) {
      // A sum of uniforms, not std::normal_distribution: the same on every platform.
      double sum = -6.0;
      for (int i = 0; i < 12; ++i) sum += random() * (1.0 / 4294967296.0);
      value = static_cast<float>(offset + scale * sum);
    }
    model.tensors[name] = std::move(values);
    shapes[name] = std::move(ne);
  };
  const auto u = [](int64_t v) { return static_cast<uint64_t>(v); };
  const double by_width = 1.0 / std::sqrt(static_cast<double>(spec.width));
  add("token_embd.weight", {u(spec.width), u(spec.vocab)}, model.is("gemma3") ? 0.1 : 0.8, 0.0);
  add("output_norm.weight", {u(spec.width)}, 0.2, 1.0);
  if (!spec.tied) add("output.weight", {u(spec.width), u(spec.vocab)}, by_width, 0.0);
  if (spec.rope_factors) add("rope_freqs.weight", {u(spec.rope_dims / 2)}, 0.3, 4.0);
  for (int64_t l = 0; l < spec.layers; ++l) {
    const std::string blk = "blk." + std::to_string(l) + ".";
    add(blk + "attn_norm.weight", {u(spec.width)}, 0.2, 1.0);
    add(blk + "ffn_norm.weight", {u(spec.width)}, 0.2, 1.0);
    const int64_t q = spec.heads * spec.dim_k;
    const int64_t k = spec.kv_heads * spec.dim_k;
    const int64_t v = spec.kv_heads * spec.dim_v;
    add(blk + "attn_q.weight", {u(spec.width), u(q)}, 2.0 * by_width, 0.0);
    add(blk + "attn_k.weight", {u(spec.width), u(k)}, 2.0 * by_width, 0.0);
    add(blk + "attn_v.weight", {u(spec.width), u(v)}, by_width, 0.0);
    if (model.is("qwen2")) {
      add(blk + "attn_q.bias", {u(q)}, 0.5, 0.0);
      add(blk + "attn_k.bias", {u(k)}, 0.5, spec.k_bias);
      add(blk + "attn_v.bias", {u(v)}, 0.5, 0.0);
    }
    if (model.qk_norm()) {
      add(blk + "attn_q_norm.weight", {u(spec.dim_k)}, 0.3, 1.5);
      add(blk + "attn_k_norm.weight", {u(spec.dim_k)}, 0.3, 1.5);
    }
    if (model.is("gemma3")) {
      add(blk + "post_attention_norm.weight", {u(spec.width)}, 0.2, 1.0);
      add(blk + "post_ffw_norm.weight", {u(spec.width)}, 0.2, 1.0);
    }
    const int64_t mixed = spec.heads * spec.dim_v;
    add(blk + "attn_output.weight", {u(mixed), u(spec.width)}, 1.0 / std::sqrt(mixed), 0.0);
    add(blk + "ffn_gate.weight", {u(spec.width), u(spec.ff)}, by_width, 0.0);
    add(blk + "ffn_up.weight", {u(spec.width), u(spec.ff)}, by_width, 0.0);
    add(blk + "ffn_down.weight", {u(spec.ff), u(spec.width)}, 1.0 / std::sqrt(spec.ff), 0.0);
  }

  const auto u32 = [&](const char* name, int64_t value) {
    model.writer.u32(spec.arch + "." + name, static_cast<uint32_t>(value));
  };
  const auto f32 = [&](const char* name, double value) {
    model.writer.f32(spec.arch + "." + name, static_cast<float>(value));
  };
  model.writer.string("general.architecture", spec.arch);
  model.writer.string("general.name", "tiny " + spec.arch);
  u32("block_count", spec.layers);
  u32("context_length", spec.context);
  u32("embedding_length", spec.width);
  u32("feed_forward_length", spec.ff);
  u32("attention.head_count", spec.heads);
  u32("attention.head_count_kv", spec.kv_heads);
  u32("attention.key_length", spec.dim_k);
  u32("attention.value_length", spec.dim_v);
  u32("rope.dimension_count", spec.rope_dims);
  f32("attention.layer_norm_rms_epsilon", 1e-6);
  f32("rope.freq_base", spec.freq_base);
  if (spec.linear != 1.0) {
    const bool yarn = spec.yarn_context > 0;
    model.writer.string(spec.arch + ".rope.scaling.type", yarn ? "yarn" : "linear");
    f32("rope.scaling.factor", spec.linear);
    if (yarn) u32("rope.scaling.original_context_length", spec.yarn_context);
  }
  if (spec.window > 0) u32("attention.sliding_window", spec.window);
  if (spec.attention_softcap > 0) f32("attn_logit_softcapping", spec.attention_softcap);
  if (spec.final_softcap > 0) f32("final_logit_softcapping", spec.final_softcap);
  if (edit.keys) edit.keys(model.writer);
  if (edit.tensors) edit.tensors(model.tensors);
  for (const auto& [name, values] : model.tensors) {
    // An edited tensor that no longer fits its shape is written as a vector.
    std::vector<uint64_t> shape{values.size()};
    if (const auto known = shapes.find(name); known != shapes.end()) {
      uint64_t count = 1;
      for (const uint64_t n : known->second) count *= n;
      if (count == values.size()) shape = known->second;
    }
    model.writer.f32_tensor(name, shape, values);
  }
  model.bytes = model.writer.build();
  return model;
}

// What the reference saw inside, for the tests of the equaliser: [layer][token][head * dim].
struct TinyTrace {
  std::vector<std::vector<std::vector<double>>> q, k;
};

using Row = std::vector<double>;

inline Row reference_norm(const Row& x, const std::vector<float>& weight) {
  double sum = 0.0;
  for (const double v : x) sum += v * v;
  Row y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    y[i] = x[i] / std::sqrt(sum / static_cast<double>(x.size()) + 1e-6) * weight[i];
  }
  return y;
}

inline Row reference_product(const std::vector<float>& w, const Row& x) {
  Row y(w.size() / x.size());
  for (size_t n = 0; n < y.size(); ++n) {
    for (size_t k = 0; k < x.size(); ++k) y[n] += static_cast<double>(w[n * x.size() + k]) * x[k];
  }
  return y;
}

struct TinyRope {
  double base;
  double linear;
  int64_t yarn_context;
  const std::vector<float>* factors;
};

// YaRN by the number of turns within the original context: above 32 nothing is stretched, below 1
// all, between them in proportion to the pair's place among the whole pairs around both ends.
inline double reference_yarn_share(const TinyModel& m, const TinyRope& rope, int64_t pair) {
  const auto turns = [&](double i) {
    return rope.yarn_context / (2 * M_PI) / std::pow(rope.base, 2 * i / m.spec.rope_dims);
  };
  int64_t first = 0, last = 0;
  while (turns(static_cast<double>(first + 1)) >= 32) ++first;
  while (turns(static_cast<double>(last)) > 1) ++last;
  if (pair <= first) return 0;
  return pair >= last ? 1 : static_cast<double>(pair - first) / static_cast<double>(last - first);
}

inline void reference_rope(const TinyModel& m, const TinyRope& rope, int64_t position, double* x) {
  const int64_t pairs = m.spec.rope_dims / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const double share = rope.yarn_context > 0 ? reference_yarn_share(m, rope, i) : 1.0;
    const double turn = 1.0 - share + share / rope.linear;
    double angle = position * turn / std::pow(rope.base, 2.0 * i / m.spec.rope_dims);
    if (rope.factors != nullptr) angle /= (*rope.factors)[static_cast<size_t>(i)];
    double& a = m.halves() ? x[i] : x[2 * i];
    double& b = m.halves() ? x[i + pairs] : x[2 * i + 1];
    const double a0 = a;
    const double grow = rope.yarn_context > 0 ? 1.0 + std::log(rope.linear) / 10.0 : 1.0;
    const double turned = a0 * std::cos(angle) - b * std::sin(angle);
    b = grow * (a0 * std::sin(angle) + b * std::cos(angle));
    a = grow * turned;
  }
}

// Logits of every position: [token][vocab]. With `bf16_inputs` the activations are rounded to BF16
// before each matrix product, as native BF16 arithmetic does.
inline std::vector<Row> reference_logits(const TinyModel& m, const std::vector<int32_t>& tokens,
                                         TinyTrace* trace = nullptr, bool bf16_inputs = false) {
  const TinySpec& s = m.spec;
  const auto product = [&](const std::vector<float>& w, Row row) {
    if (bf16_inputs) {
      for (double& v : row) v = bf16_to_f32(f32_to_bf16(static_cast<float>(v)));
    }
    return reference_product(w, row);
  };
  const bool gemma = m.is("gemma3");
  const size_t n = tokens.size();
  std::vector<Row> x(n);
  const std::vector<float>& embedding = m.tensors.at("token_embd.weight");
  for (size_t t = 0; t < n; ++t) {
    for (int64_t i = 0; i < s.width; ++i) {
      const double scale = gemma ? std::sqrt(static_cast<double>(s.width)) : 1.0;
      x[t].push_back(scale * embedding[static_cast<size_t>(tokens[t] * s.width + i)]);
    }
  }
  for (int64_t l = 0; l < s.layers; ++l) {
    const bool sliding = gemma ? (l + 1) % 6 != 0 : s.window > 0;
    const bool local = gemma && sliding;
    const TinyRope rope{
        .base = local ? 10000.0 : s.freq_base,
        .linear = local ? 1.0 : s.linear,
        .yarn_context = local ? 0 : s.yarn_context,
        .factors = s.rope_factors && !local ? &m.tensors.at("rope_freqs.weight") : nullptr};
    std::vector<Row> q(n), k(n), v(n);
    for (size_t t = 0; t < n; ++t) {
      const Row h = reference_norm(x[t], m.at(l, "attn_norm.weight"));
      q[t] = product(m.at(l, "attn_q.weight"), h);
      k[t] = product(m.at(l, "attn_k.weight"), h);
      v[t] = product(m.at(l, "attn_v.weight"), h);
      if (m.is("qwen2")) {
        for (size_t i = 0; i < q[t].size(); ++i) q[t][i] += m.at(l, "attn_q.bias")[i];
        for (size_t i = 0; i < k[t].size(); ++i) k[t][i] += m.at(l, "attn_k.bias")[i];
        for (size_t i = 0; i < v[t].size(); ++i) v[t][i] += m.at(l, "attn_v.bias")[i];
      }
      for (auto* part : {&q[t], &k[t]}) {
        const std::vector<float>* norm =
            !m.qk_norm() ? nullptr
                         : &m.at(l, part == &q[t] ? "attn_q_norm.weight" : "attn_k_norm.weight");
        for (size_t at = 0; at < part->size(); at += static_cast<size_t>(s.dim_k)) {
          double* head = part->data() + at;
          if (norm != nullptr) {
            const Row normed = reference_norm(Row(head, head + s.dim_k), *norm);
            std::copy(normed.begin(), normed.end(), head);
          }
          reference_rope(m, rope, static_cast<int64_t>(t), head);
        }
      }
    }
    if (trace != nullptr) {
      trace->q.push_back(q);
      trace->k.push_back(k);
    }
    for (size_t t = 0; t < n; ++t) {
      Row mixed;
      for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t kv = h / (s.heads / s.kv_heads);
        const size_t first = sliding && t + 1 > static_cast<size_t>(s.window)
                                 ? t + 1 - static_cast<size_t>(s.window)
                                 : 0;
        Row p;
        double sum = 0.0;
        for (size_t j = first; j <= t; ++j) {
          double score = 0.0;
          for (int64_t d = 0; d < s.dim_k; ++d) {
            score += q[t][static_cast<size_t>(h * s.dim_k + d)] *
                     k[j][static_cast<size_t>(kv * s.dim_k + d)];
          }
          score /= std::sqrt(static_cast<double>(s.dim_k));
          if (s.attention_softcap > 0) {
            score = s.attention_softcap * std::tanh(score / s.attention_softcap);
          }
          p.push_back(std::exp(score));
          sum += p.back();
        }
        for (int64_t d = 0; d < s.dim_v; ++d) {
          double value = 0.0;
          for (size_t j = first; j <= t; ++j) {
            value += p[j - first] / sum * v[j][static_cast<size_t>(kv * s.dim_v + d)];
          }
          mixed.push_back(value);
        }
      }
      Row out = product(m.at(l, "attn_output.weight"), mixed);
      if (gemma) out = reference_norm(out, m.at(l, "post_attention_norm.weight"));
      for (size_t i = 0; i < out.size(); ++i) x[t][i] += out[i];

      const Row h = reference_norm(x[t], m.at(l, "ffn_norm.weight"));
      Row gate = product(m.at(l, "ffn_gate.weight"), h);
      const Row up = product(m.at(l, "ffn_up.weight"), h);
      for (size_t i = 0; i < gate.size(); ++i) {
        const double g = gate[i];
        const double activated =
            gemma ? 0.5 * g * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g)))
                  : g / (1.0 + std::exp(-g));
        gate[i] = activated * up[i];
      }
      Row down = product(m.at(l, "ffn_down.weight"), gate);
      if (gemma) down = reference_norm(down, m.at(l, "post_ffw_norm.weight"));
      for (size_t i = 0; i < down.size(); ++i) x[t][i] += down[i];
    }
  }
  const std::vector<float>& head = m.tensors.at(s.tied ? "token_embd.weight" : "output.weight");
  std::vector<Row> logits;
  for (const Row& row : x) {
    Row out = product(head, reference_norm(row, m.tensors.at("output_norm.weight")));
    for (double& value : out) {
      if (s.final_softcap > 0) value = s.final_softcap * std::tanh(value / s.final_softcap);
    }
    logits.push_back(std::move(out));
  }
  return logits;
}

inline std::vector<int32_t> random_tokens(int64_t count, int64_t vocab, uint32_t seed = 3) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)));
  }
  return tokens;
}

// One of each family, with every feature that changes the arithmetic somewhere.
inline TinySpec tiny_spec(const std::string& family) {
  TinySpec s;
  s.arch = family;
  if (family == "llama") {
    s.rope_factors = true;
    s.dim_v = 64;
    s.rope_dims = 24;
    s.freq_base = 500000.0;
  } else if (family == "qwen2") {
    s.tied = true;
    s.k_bias = 3.0f;
    s.freq_base = 1e6;
  } else if (family == "qwen3") {
    s.dim_k = 64;
    s.dim_v = 64;
    s.rope_dims = 64;
    s.linear = 2.0;
    s.attention_softcap = 5.0;
  } else if (family == "gemma3") {
    s.layers = 6;
    s.tied = true;
    s.kv_heads = 1;
    s.window = 70;
    s.linear = 8.0;
    s.freq_base = 1e6;
    s.final_softcap = 3.0;
  }
  return s;
}

}  // namespace thriftattn::test
