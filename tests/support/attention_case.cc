// A random attention problem over a KvCache (attention_case.h).
#include "support/attention_case.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/float_convert.h"

namespace thriftattn::testing {
namespace {

KvCacheConfig config_of(const CaseOptions& o, std::mt19937& rng) {
  KvCacheConfig config{.layers = {o.shape}, .policy = {o.policy}, .poison_free = true};
  if (o.equalizer) {
    std::normal_distribution<float> normal;
    std::vector<float> s(static_cast<size_t>(o.shape.kv_heads * o.shape.head_dim_k));
    for (float& x : s) x = std::exp(0.5f * normal(rng));
    config.equalizer.layers = {s};
  }
  return config;
}

}  // namespace

AttentionCase::AttentionCase(const CaseOptions& o)
    : options_(o), cache_([&] {
        std::mt19937 rng(o.seed + 1000);
        return KvCache(config_of(o, rng));
      }()) {
  std::mt19937 rng(o.seed);
  std::normal_distribution<float> normal;
  const int64_t total = o.length + o.queries;
  const auto fill = [&](std::vector<float>& x, int64_t n, float gain, float offset) {
    x.resize(static_cast<size_t>(n));
    for (float& value : x) value = gain * normal(rng) + offset;
  };
  fill(k_, total * o.shape.kv_heads * o.shape.head_dim_k, 1.0f, o.k_offset);
  if (o.k_period > 0) {
    const int64_t width = o.shape.kv_heads * o.shape.head_dim_k;
    for (int64_t i = o.k_period * width; i < total * width; ++i) {
      k_[static_cast<size_t>(i)] = k_[static_cast<size_t>(i - o.k_period * width)];
    }
  }
  fill(v_, total * o.shape.kv_heads * o.shape.head_dim_v, 1.0f, 0.3f);
  if (o.v_spread != 0) {
    const int64_t width = o.shape.kv_heads * o.shape.head_dim_v;
    for (int64_t i = 0; i < total * width; ++i) {
      v_[static_cast<size_t>(i)] *=
          std::exp2(o.v_spread * static_cast<float>(i / width / kPageTokens % 4 - 1));
    }
  }
  fill(q_, o.queries * o.shape.q_heads * o.shape.head_dim_k, o.q_gain, 0.0f);
  if (o.bf16_queries) {
    for (float& x : q_) x = bf16_to_f32(f32_to_bf16(x));
  }
  if (o.sink_logits) fill(sinks_, o.shape.q_heads, 2.0f, 1.0f);

  SequenceId other = 0;
  if (o.scramble) {
    other = cache_.create();
    feed(other, 0, std::min<int64_t>(o.length, 200), true);
  }
  sequence_ = cache_.create();
  // Odd steps: page boundaries fall anywhere in them.
  for (int64_t at = 0; at < o.length;) {
    const int64_t n = std::min<int64_t>(o.length - at, 1 + static_cast<int64_t>(rng() % 150));
    feed(sequence_, at, n, true);
    at += n;
    if (o.scramble && other != 0 && at > o.length / 2) {
      cache_.free(other);  // its pages go to this sequence, in another order
      other = 0;
    }
  }
  if (o.queries > 0) feed(sequence_, o.length, o.queries, false);
}

float AttentionCase::softmax_scale() const {
  const float scale = 1.0f / std::sqrt(static_cast<float>(options_.shape.head_dim_k));
  return options_.bf16_queries ? std::exp2(std::round(std::log2(scale))) : scale;
}

void AttentionCase::feed(SequenceId seq, int64_t first, int64_t n, bool commit) {
  cache_.begin_step(seq, n);
  cache_.append(seq, 0, k_view(first, n), v_view(first, n));
  if (commit) cache_.commit(seq);
}

TensorView<const float> AttentionCase::k_view(int64_t first, int64_t n) const {
  const auto& s = options_.shape;
  return TensorView<const float>::dense(k_.data() + first * s.kv_heads * s.head_dim_k, n,
                                        s.kv_heads, s.head_dim_k);
}

TensorView<const float> AttentionCase::v_view(int64_t first, int64_t n) const {
  const auto& s = options_.shape;
  return TensorView<const float>::dense(v_.data() + first * s.kv_heads * s.head_dim_v, n,
                                        s.kv_heads, s.head_dim_v);
}

TensorView<const float> AttentionCase::q_view() const {
  const auto& s = options_.shape;
  return TensorView<const float>::dense(q_.data(), options_.queries, s.q_heads, s.head_dim_k);
}

AttendRequest AttentionCase::request(std::vector<float>& out) const {
  const auto& s = options_.shape;
  out.assign(static_cast<size_t>(options_.queries * s.q_heads * s.head_dim_v),
             std::numeric_limits<float>::quiet_NaN());
  AttendRequest r;
  r.sequence = sequence_;
  r.config = {.mode = options_.mode,
              .math = options_.math,
              .softmax_scale = softmax_scale(),
              .softcap = options_.softcap,
              .causal = options_.causal};
  r.q = q_view();
  r.out = TensorView<float>::dense(out.data(), options_.queries, s.q_heads, s.head_dim_v);
  r.sink_logits = sinks_.empty() ? nullptr : sinks_.data();
  return r;
}

std::vector<float> AttentionCase::attend(AttendStats* stats, std::vector<float>* lse) {
  std::vector<float> out;
  AttendRequest r = request(out);
  r.stats = stats;
  if (lse) {
    lse->assign(static_cast<size_t>(options_.queries * options_.shape.q_heads), NAN);
    r.lse = TensorView<float>::dense(lse->data(), options_.queries, options_.shape.q_heads, 1);
  }
  thriftattn::attend(cache_, r);
  return out;
}

std::vector<float> AttentionCase::attend_reference(std::vector<float>* lse) {
  std::vector<float> out;
  AttendRequest r = request(out);
  if (lse) {
    lse->assign(static_cast<size_t>(options_.queries * options_.shape.q_heads), NAN);
    r.lse = TensorView<float>::dense(lse->data(), options_.queries, options_.shape.q_heads, 1);
  }
  thriftattn::attend_reference(cache_, r);
  return out;
}

AttendRequest rows_of(const AttendRequest& r, int64_t first, int64_t n) {
  const auto cut = [&](auto view) {
    if (view.data != nullptr) view.data += first * view.token_stride;
    view.tokens = n;
    return view;
  };
  AttendRequest part = r;
  part.q = cut(r.q);
  part.out = cut(r.out);
  part.lse = cut(r.lse);
  return part;
}

std::vector<float> AttentionCase::exact() const {
  const auto& s = options_.shape;
  const int64_t group = s.q_heads / s.kv_heads;
  const double scale = softmax_scale();
  std::vector<float> out;
  for (int64_t i = 0; i < options_.queries; ++i) {
    const int64_t position = options_.length + i;
    const int64_t first = s.window > 0 ? std::max<int64_t>(0, position + 1 - s.window) : 0;
    const int64_t end = options_.causal ? position + 1 : total();
    for (int64_t h = 0; h < s.q_heads; ++h) {
      const float* q = &q_[static_cast<size_t>((i * s.q_heads + h) * s.head_dim_k)];
      std::vector<double> score, o(static_cast<size_t>(s.head_dim_v), 0.0);
      double top = sinks_.empty() ? -1e300 : sinks_[static_cast<size_t>(h)];
      for (int64_t t = first; t < end; ++t) {
        const float* k = &k_[static_cast<size_t>((t * s.kv_heads + h / group) * s.head_dim_k)];
        double dot = 0;
        for (int64_t d = 0; d < s.head_dim_k; ++d) dot += static_cast<double>(q[d]) * k[d];
        dot *= scale;
        if (options_.softcap > 0) dot = options_.softcap * std::tanh(dot / options_.softcap);
        score.push_back(dot);
        top = std::max(top, dot);
      }
      double l = sinks_.empty() ? 0.0 : std::exp(sinks_[static_cast<size_t>(h)] - top);
      for (double x : score) l += std::exp(x - top);
      for (int64_t t = first; t < end; ++t) {
        const float* v = &v_[static_cast<size_t>((t * s.kv_heads + h / group) * s.head_dim_v)];
        const double p = std::exp(score[static_cast<size_t>(t - first)] - top) / l;
        for (int64_t d = 0; d < s.head_dim_v; ++d) o[static_cast<size_t>(d)] += p * v[d];
      }
      for (double x : o) out.push_back(static_cast<float>(x));
    }
  }
  return out;
}

double row_error(const std::vector<float>& a, const std::vector<float>& b, int64_t row) {
  if (a.size() != b.size() || a.empty()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (size_t at = 0; at < a.size(); at += static_cast<size_t>(row)) {
    double diff = 0, norm = 0;
    for (size_t i = at; i < at + static_cast<size_t>(row); ++i) {
      if (!std::isfinite(a[i]) || !std::isfinite(b[i])) return std::numeric_limits<double>::infinity();
      diff += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
      norm += static_cast<double>(b[i]) * b[i];
    }
    worst = std::max(worst, std::sqrt(diff / norm));
  }
  return worst;
}

LayerPolicy plain_policy(Format format) { return {.k_format = format, .v_format = format}; }

LayerPolicy layered_policy(double promote, double skip) {
  return {.k_format = Format::nvfp4, .v_format = Format::nvfp4, .promote = promote, .skip = skip};
}

LayerPolicy sealed_policy(int64_t sinks, int64_t recent) {
  LayerPolicy p = layered_policy(0.02, 0.0003);
  p.residency = Residency::dropped;
  p.sinks = sinks;
  p.recent = recent;
  return p;
}

}  // namespace thriftattn::testing
