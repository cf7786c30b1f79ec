// attend_reference(): the definition of attention over a mixed-precision cache in plain FP64
// loops, one query head at a time, from the values as stored. Slow and obvious: what the
// tests compare the tile kernels with. It shares the storage codecs and the rule
// (precision/mass_rule.h) with them, and nothing else.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attend/request.h"
#include "base/float_convert.h"
#include "cache/page_codec.h"
#include "formats/row_codec.h"
#include "precision/budget_rule.h"
#include "precision/mass_cap.h"
#include "precision/mass_rule.h"

namespace thriftattn {
namespace {

using Row = std::vector<double>;

// H x in FP64, from the definition of the Hadamard matrix; it is its own inverse.
Row hadamard(const Row& in) {
  const int64_t dim = static_cast<int64_t>(in.size());
  Row out(in.size(), 0.0);
  const int64_t block = dim & -dim;
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t base = i / block * block;
    for (int64_t j = 0; j < block; ++j) {
      const bool minus = __builtin_popcountll(static_cast<uint64_t>((i - base) & j)) % 2 == 1;
      out[static_cast<size_t>(i)] += (minus ? -1.0 : 1.0) * in[static_cast<size_t>(base + j)];
    }
    out[static_cast<size_t>(i)] /= std::sqrt(static_cast<double>(block));
  }
  return out;
}

// What K' is dotted with: H (q / s), each step where the layer has it.
Row transformed_query(const float* q, const LayerStore& store, int64_t kv_head) {
  const SideLayout& side = store.layout.k;
  Row out(q, q + side.dim);
  if (side.layered && !store.equalizer.empty()) {
    for (int64_t d = 0; d < side.dim; ++d) {
      out[static_cast<size_t>(d)] /= store.equalizer[static_cast<size_t>(kv_head * side.dim + d)];
    }
  }
  return side.rotated ? hadamard(out) : out;
}

// One page's values of one side for one KV head, in FP64.
struct PageValues {
  std::vector<float> base, residual;  // [64][dim]; residual empty if not held
  Row mean;                           // page mean or open reference (K); page mean (V)
};

// The scores of PromoteRule::budget from their definitions; `q` has softmax_scale in it.
double block_score(BlockScore score, const Row& q, const PageValues& k, int64_t tokens,
                   int64_t page) {
  if (score == BlockScore::local) return static_cast<double>(page);
  double total = 0;
  for (size_t d = 0; d < q.size(); ++d) {
    total += q[d] * k.mean[d];
    if (score == BlockScore::mean) continue;
    double low = INFINITY, high = -INFINITY, sum = 0, squares = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const double x = k.base[static_cast<size_t>(t) * q.size() + d];
      low = std::min(low, x);
      high = std::max(high, x);
      sum += x;
    }
    const double mean = sum / static_cast<double>(tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      const double x = k.base[static_cast<size_t>(t) * q.size() + d] - mean;
      squares += x * x;
    }
    const double variance = squares / static_cast<double>(tokens);
    total += score == BlockScore::quest ? std::max(q[d] * low, q[d] * high)
                                        : q[d] * mean + 0.5 * q[d] * q[d] * variance;
  }
  return total;
}

class Reference {
 public:
  Reference(const LayerView& view, const AttendRequest& request, int64_t head)
      : view_(view), request_(request), store_(view.store()), head_(head) {}

  void query(int64_t index);

 private:
  PageValues load(const SideLayout& side, int64_t page, bool open) const;

  const LayerView& view_;
  const AttendRequest& request_;
  const LayerStore& store_;
  int64_t head_;

  // The layer's query head of a group's head.
  int64_t q_head(int64_t g) const {
    return store_.model_head(head_) * (store_.shape.q_heads / store_.shape.kv_heads) + g;
  }
};

PageValues Reference::load(const SideLayout& side, int64_t page, bool open) const {
  PageValues v;
  const int64_t dim = side.dim;
  v.base.assign(static_cast<size_t>(kPageTokens * dim), 0.0f);
  v.mean.assign(static_cast<size_t>(dim), 0.0);
  const bool is_k = &side == &store_.layout.k;
  const PageHead head = view_.head(page, head_);
  const uint8_t* start = store_.layout.start(side, head);
  const int64_t held = std::min(kPageTokens, view_.length() - page * kPageTokens);
  if (!side.layered) {
    decode_rows_scalar(side.format, start + side.rows, side.row_bytes, held, dim, v.base.data(), dim);
  } else if (open) {
    const OpenPage& o = *view_.open(page);
    const uint16_t* rows = (is_k ? o.k : o.v).data() + head_ * kPageTokens * dim;
    for (int64_t i = 0; i < held * dim; ++i) v.base[static_cast<size_t>(i)] = bf16_to_f32(rows[i]);
    if (is_k) {
      for (int64_t d = 0; d < dim; ++d) {
        v.mean[static_cast<size_t>(d)] = bf16_to_f32(o.k_reference[static_cast<size_t>(head_ * dim + d)]);
      }
    }
  } else {
    decode_base(store_.layout, side, head, v.base.data());
    const auto* mean = reinterpret_cast<const uint16_t*>(start + side.mean);
    for (int64_t d = 0; d < dim; ++d) v.mean[static_cast<size_t>(d)] = bf16_to_f32(mean[d]);
    if (const uint8_t* residual = view_.residual(page, head_)) {
      v.residual.resize(v.base.size());
      decode_residual(store_.layout, side, head, residual, v.residual.data());
    }
  }
  return v;
}

double log_sum_exp(const std::vector<Row>& scores, const float* sink) {
  double top = sink ? *sink : -INFINITY;
  for (const Row& page : scores) {
    for (double s : page) top = std::max(top, s);
  }
  if (top == -INFINITY) return top;
  double sum = sink ? std::exp(*sink - top) : 0.0;
  for (const Row& page : scores) {
    for (double s : page) sum += std::exp(s - top);
  }
  return top + std::log(sum);
}

double page_mass(const Row& scores, double lse) {
  double mass = 0;
  for (double s : scores) mass += std::exp(s - lse);
  return mass;
}

void Reference::query(int64_t index) {
  const LayerShape& shape = store_.shape;
  const PageLayout& layout = store_.layout;
  const AttendConfig& config = request_.config;
  const int64_t group = shape.q_heads / shape.kv_heads;
  const int64_t position = view_.length() - request_.q.tokens + index;
  const int64_t first = shape.window > 0 ? std::max<int64_t>(0, position + 1 - shape.window) : 0;
  const int64_t visible = config.causal ? position + 1 : view_.length();
  const int64_t first_page = first / kPageTokens, end_page = (visible - 1) / kPageTokens + 1;
  const int64_t open_from =
      config.mode == AttendMode::prefill ? view_.committed() / kPageTokens : end_page - 1;
  const size_t pages = static_cast<size_t>(end_page - first_page);

  std::vector<PageValues> k(pages), v(pages);
  for (size_t p = 0; p < pages; ++p) {
    const int64_t page = first_page + static_cast<int64_t>(p);
    k[p] = load(layout.k, page, page >= open_from);
    v[p] = load(layout.v, page, page >= open_from);
  }
  const auto cap = [&](double s) {
    return config.softcap > 0 ? config.softcap * std::tanh(s / config.softcap) : s;
  };
  // Scores per query head of the group: over base planes, and with the residual.
  std::vector<std::vector<Row>> base(static_cast<size_t>(group), std::vector<Row>(pages));
  std::vector<std::vector<Row>> full = base;
  std::vector<std::vector<double>> known(static_cast<size_t>(group), Row(pages, 0.0));
  std::vector<double> lse(static_cast<size_t>(group)), lse_full(lse);
  for (int64_t g = 0; g < group; ++g) {
    const Row q = transformed_query(request_.q.row(index, q_head(g)), store_, head_);
    for (size_t p = 0; p < pages; ++p) {
      double offset = 0;
      for (size_t d = 0; d < q.size(); ++d) offset += q[d] * k[p].mean[d];
      if (store_.policy.score != BlockScore::oracle) {
        Row scaled = q;
        for (double& x : scaled) x *= config.softmax_scale;
        const int64_t page = first_page + static_cast<int64_t>(p);
        known[static_cast<size_t>(g)][p] =
            block_score(store_.policy.score, scaled, k[p],
                        std::min(kPageTokens, view_.length() - page * kPageTokens), page);
      }
      for (int64_t t = 0; t < kPageTokens; ++t) {
        const int64_t token = (first_page + static_cast<int64_t>(p)) * kPageTokens + t;
        double s = -INFINITY, s_full = -INFINITY;
        if (token >= first && token < visible) {
          double dot = offset, dot_residual = 0;
          for (size_t d = 0; d < q.size(); ++d) {
            const size_t at = static_cast<size_t>(t) * q.size() + d;
            dot += q[d] * k[p].base[at];
            if (!k[p].residual.empty()) dot_residual += q[d] * k[p].residual[at];
          }
          s = cap(dot * config.softmax_scale);
          s_full = cap((dot + dot_residual) * config.softmax_scale);
        }
        base[static_cast<size_t>(g)][p].push_back(s);
        full[static_cast<size_t>(g)][p].push_back(s_full);
      }
    }
    const float* sink = request_.sink_logits ? request_.sink_logits + q_head(g) : nullptr;
    lse[static_cast<size_t>(g)] = log_sum_exp(base[static_cast<size_t>(g)], sink);
    lse_full[static_cast<size_t>(g)] = log_sum_exp(full[static_cast<size_t>(g)], nullptr);
  }

  // How each sealed layered page is read.
  std::vector<PageRead> how(pages, PageRead::base);
  const LayerPolicy& policy = store_.policy;
  std::vector<PageFacts> facts(pages);
  std::vector<float> score(pages, 0.0f);
  std::vector<uint8_t> candidate(pages, 0), always(pages, 0);
  for (size_t p = 0; p < pages; ++p) {
    const int64_t page = first_page + static_cast<int64_t>(p);
    if (page >= open_from || !layout.any_layered()) continue;
    const bool held = view_.residual(page, head_) != nullptr;
    facts[p] = page_facts(layout, policy, page, visible, shape.window, held);
    const bool sinks = page * kPageTokens < policy.sinks;
    const bool recent = policy.recent > 0 && (page + 1) * kPageTokens > visible - policy.recent;
    candidate[p] = held && !sinks && !recent;
    always[p] = held && (sinks || recent);
    for (int64_t g = 0; g < group; ++g) {
      const size_t gi = static_cast<size_t>(g);
      if (policy.score != BlockScore::oracle) {
        score[p] += static_cast<float>(known[gi][p] / static_cast<double>(group));
      } else {
        score[p] = std::max(score[p], static_cast<float>(page_mass(full[gi][p], lse_full[gi])));
      }
    }
  }
  const std::vector<uint8_t> chosen =
      select_by_budget(score, candidate, {policy.budget, policy.budget_pages});
  std::vector<float> masses(pages, 0.0f), promotable;  // promotable: what the cap counts
  for (size_t p = 0; p < pages; ++p) {
    double mass = 0;
    for (int64_t g = 0; g < group; ++g) {
      const size_t gi = static_cast<size_t>(g);
      mass = std::max(mass, page_mass(base[gi][p], lse[gi]));
    }
    masses[p] = static_cast<float>(mass);
    if (facts[p].has_residual && !facts[p].forced_full) promotable.push_back(masses[p]);
  }
  const float promote =
      capped_promote(promotable, static_cast<float>(policy.promote),
                     promotion_cap(policy.max_promoted,
                                   std::max<int64_t>(0, std::min(open_from, end_page) - first_page)));
  for (size_t p = 0; p < pages; ++p) {
    const int64_t page = first_page + static_cast<int64_t>(p);
    if (page >= open_from || !layout.any_layered()) continue;
    if (config.mode == AttendMode::prefill) {
      how[p] = view_.residual(page, head_) ? PageRead::full : PageRead::base;
      continue;
    }
    MassRule rule{promote, static_cast<float>(policy.skip)};
    if (policy.rule == PromoteRule::budget) {
      rule.promote = 1.0f;
      facts[p].forced_full |= facts[p].has_residual && (chosen[p] || always[p]);
    }
    how[p] = read_by_mass(rule, facts[p], masses[p]);
  }

  for (int64_t g = 0; g < group; ++g) {
    const size_t gi = static_cast<size_t>(g);
    std::vector<Row> s(pages);
    for (size_t p = 0; p < pages; ++p) {
      s[p] = how[p] == PageRead::full && layout.k.layered ? full[gi][p] : base[gi][p];
    }
    const float* sink = request_.sink_logits ? request_.sink_logits + q_head(g) : nullptr;
    const double total = log_sum_exp(s, sink);
    Row out(static_cast<size_t>(layout.v.dim), 0.0);
    for (size_t p = 0; p < pages; ++p) {
      for (size_t t = 0; t < s[p].size(); ++t) {
        const double weight = total == -INFINITY ? 0.0 : std::exp(s[p][t] - total);
        if (weight == 0) continue;
        for (size_t d = 0; d < out.size(); ++d) {
          const size_t at = t * out.size() + d;
          double value = v[p].mean[d];
          if (how[p] != PageRead::skip) value += v[p].base[at];
          if (how[p] == PageRead::full && !v[p].residual.empty()) value += v[p].residual[at];
          out[d] += weight * value;
        }
      }
    }
    if (layout.v.rotated) out = hadamard(out);  // what is stored is H v
    float* row = request_.out.row(index, q_head(g));
    for (size_t d = 0; d < out.size(); ++d) row[d] = static_cast<float>(out[d]);
    if (request_.lse.data) *request_.lse.row(index, q_head(g)) = static_cast<float>(total);
  }
}

}  // namespace

void attend_reference(const KvCache& cache, const AttendRequest& request) {
  const auto views = checked_views(cache, std::span(&request, 1));
  for (const LayerView& view : views.front()) {
    for (int64_t head = 0; head < view.store().shape.kv_heads; ++head) {
      Reference reference(view, request, head);
      for (int64_t i = 0; i < request.q.tokens; ++i) reference.query(i);
    }
  }
}

}  // namespace thriftattn
