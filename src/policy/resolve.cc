// Folds the rules of a policy into one LayerPolicy per layer, and refuses what the cache cannot
// do: a setting is either obeyed or an error.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "formats/format_info.h"
#include "policy/fields.h"
#include "thriftattn/error.h"
#include "thriftattn/policy.h"

namespace thriftattn {
namespace {

constexpr int64_t kMaxLayers = int64_t{1} << 20;
constexpr int64_t kMaxHeads = int64_t{1} << 12;

using Kind = LayerSelector::Kind;

// A layer (or one KV head of it, when the policy has rules by head) while rules are folded: what
// it has, and what only an explicit setting may decide.
struct Fold {
  LayerPolicy policy;
  bool has_budget = false;
};

// Every layer's folds: one, or one a KV head.
using Folds = std::vector<std::vector<Fold>>;

// The formats with a residual that the policy decides on.
constexpr std::string_view kPromotableNames = "nvfp4, mxfp4 and int3";

bool any_promotable(const LayerPolicy& p) {
  return is_promotable(p.k_format) || is_promotable(p.v_format);
}

bool rotates(const LayerPolicy& p) {
  return is_layered(p.k_format) || format_info(p.v_format).rotate_v;
}

bool uses_nvfp4x2(const LayerPolicy& p) {
  return p.k_format == Format::nvfp4x2 || p.v_format == Format::nvfp4x2;
}

bool any_layered(const LayerPolicy& p) { return is_layered(p.k_format) || is_layered(p.v_format); }

std::string formats(const LayerPolicy& p) {
  return p.k_format == p.v_format
             ? fmt::format("K and V in {}", to_string(p.k_format))
             : fmt::format("K in {} and V in {}", to_string(p.k_format), to_string(p.v_format));
}

[[noreturn]] void fail(ErrorCode code, std::string_view policy, const std::string& message) {
  throw Error(code, fmt::format("policy '{}': {}", policy, message));
}

bool has_head_rules(const Policy& policy) {
  return std::any_of(policy.rules.begin(), policy.rules.end(),
                     [](const PolicyRule& rule) { return !rule.heads.all(); });
}

std::vector<int64_t> selected_layers(const Policy& policy, const LayerSelector& selector,
                                     const PolicyContext& context) {
  const int64_t n = context.layers;
  int64_t begin = 0, end = n;
  switch (selector.kind) {
    case Kind::all:
    case Kind::sliding_window:
      break;
    case Kind::range:
      begin = selector.begin;
      end = selector.end;
      break;
    case Kind::first:
      end = selector.end;
      break;
    case Kind::last:
      begin = n - selector.end;
      break;
  }
  if (begin < 0 || end > n || begin >= end) {
    fail(ErrorCode::invalid_argument, policy.name,
         fmt::format("layers '{}' do not exist: the model has {} layers, 0 to {}",
                     to_string(selector), n, n - 1));
  }
  std::vector<int64_t> layers;
  for (int64_t l = begin; l < end; ++l) {
    const bool sliding =
        !context.sliding_window.empty() && context.sliding_window[static_cast<size_t>(l)];
    if (selector.kind != Kind::sliding_window || sliding) layers.push_back(l);
  }
  return layers;
}

// The folds that a rule applies to.
std::vector<Fold*> selected_folds(const Policy& policy, const PolicyRule& rule,
                                  const PolicyContext& context, Folds& folds) {
  std::vector<Fold*> selected;
  for (const int64_t l : selected_layers(policy, rule.layers, context)) {
    std::vector<Fold>& layer = folds[static_cast<size_t>(l)];
    const auto n = static_cast<int64_t>(layer.size());
    int64_t begin = 0, end = n;
    if (!rule.heads.all()) {
      begin = rule.heads.begin;
      end = rule.heads.end;
      if (begin < 0 || end > n || begin >= end) {
        fail(ErrorCode::invalid_argument, policy.name,
             fmt::format("KV heads '{}' do not exist in layer {}: it has {}, 0 to {}",
                         selection_of(rule), l, n, n - 1));
      }
    }
    for (int64_t h = begin; h < end; ++h) selected.push_back(&layer[static_cast<size_t>(h)]);
  }
  return selected;
}

// A share of the context, rounded up to a token.
int64_t tokens_of(const TokenCount& count, const char* name, const Policy& policy,
                  const PolicyContext& context) {
  if (!(count.percent > 0)) return count.tokens;
  if (context.context_tokens < 1) {
    fail(ErrorCode::unsupported, policy.name,
         fmt::format("{0} = {1}%; required: the tokens of the context; supported without it: whole "
                     "numbers such as {0}=512; missing: PolicyContext::context_tokens (a model, -m)",
                     name, count.percent));
  }
  return static_cast<int64_t>(
      std::ceil(count.percent / 100 * static_cast<double>(context.context_tokens) - 1e-9));
}

void apply(const Policy& policy, const PolicyRule& rule, const PolicyContext& context, Fold& fold) {
  LayerPolicy& p = fold.policy;
  const auto set = [](auto& field, const auto& value) {
    if (value) field = *value;
  };
  set(p.k_format, rule.k_format);
  set(p.v_format, rule.v_format);
  set(p.rule, rule.rule);
  set(p.promote, rule.promote);
  set(p.skip, rule.skip);
  set(p.max_promoted, rule.max_promoted);
  if (rule.budget || rule.budget_pages) {  // the later of the two counts
    p.budget = rule.budget.value_or(0);
    p.budget_pages = rule.budget_pages.value_or(0);
    fold.has_budget = true;
  }
  set(p.score, rule.score);
  set(p.residency, rule.residency);
  if (rule.sinks) p.sinks = tokens_of(*rule.sinks, "sinks", policy, context);
  if (rule.recent) p.recent = tokens_of(*rule.recent, "recent", policy, context);
  set(p.rotate, rule.rotate);
  set(p.center, rule.center);
  set(p.equalize, rule.equalize);
}

// Why a setting would be ignored for such a layer; empty if it is not.
std::string why_ignored(std::string_view field, const LayerPolicy& p) {
  if (field == "k" || field == "v") return "";
  if (field == "rotate") {
    return rotates(p) ? "" : "it acts on K in a layered format and on V in int3";
  }
  if (field == "equalize") return is_layered(p.k_format) ? "" : "it acts on K in a layered format";
  if (field == "center") return any_layered(p) ? "" : "it acts on layered formats";
  if (field == "skip" && !is_promotable(p.v_format)) {
    return fmt::format("only V in {} can be skipped", kPromotableNames);
  }
  if (field == "skip") return "";
  if (!any_promotable(p)) {
    return fmt::format("{}it acts on {}",
                       uses_nvfp4x2(p) ? "nvfp4x2 always keeps and reads its residual; " : "",
                       kPromotableNames);
  }
  const bool by_budget = p.rule == PromoteRule::budget;
  if ((field == "promote" || field == "max") && by_budget) {
    return "it acts with rule=mass, and this is rule=budget";
  }
  if (field == "max" && p.residency == Residency::dropped) {
    return "a sealed layer promotes no page; it acts with residency=device";
  }
  if ((field == "budget" || field == "pages" || field == "score") && !by_budget) {
    return "it acts with rule=budget, and this is rule=mass";
  }
  return "";
}

// Sliding-window layers: their cache is small and most of a window is read with weight, so what
// would be promotable is nvfp4x2, unless a `sliding_window` rule itself asks for such a format.
void apply_sliding_window_default(const PolicyRule& explicit_rule, LayerPolicy& p) {
  for (const auto& format : {explicit_rule.k_format, explicit_rule.v_format}) {
    if (format && is_promotable(*format)) return;
  }
  for (Format* format : {&p.k_format, &p.v_format}) {
    if (is_promotable(*format)) *format = Format::nvfp4x2;
  }
}

// All fields that the sliding-window rules set for a KV head, the last one of each.
PolicyRule merged_sliding_window_rules(const Policy& policy, int64_t head) {
  PolicyRule merged;
  for (const PolicyRule& rule : policy.rules) {
    if (rule.layers.kind != Kind::sliding_window) continue;
    if (!rule.heads.all() && (head < rule.heads.begin || head >= rule.heads.end)) continue;
    for (const PolicyField& field : policy_fields()) {
      if (!field.is_set(rule)) continue;
      std::visit([&](auto member) { merged.*member = rule.*member; }, field.member);
    }
  }
  return merged;
}

void check_layer(const Policy& policy, const Fold& fold, const std::string& where) {
  const LayerPolicy& p = fold.policy;
  const auto refuse = [&](ErrorCode code, const std::string& what) {
    fail(code, policy.name, fmt::format("{}: {}", where, what));
  };
  if (any_promotable(p) && uses_nvfp4x2(p)) {
    const Format other = p.k_format == Format::nvfp4x2 ? p.v_format : p.k_format;
    refuse(ErrorCode::unsupported,
           fmt::format("{}: one residual serves both, so {} and nvfp4x2 cannot be mixed in a "
                       "layer; give both {} or both nvfp4x2, or one of them a plain format such "
                       "as bf16",
                       formats(p), to_string(other), to_string(other)));
  }
  if (!any_promotable(p)) return;
  const bool v_skips = is_promotable(p.v_format);
  if (p.rule == PromoteRule::mass && !(p.skip < p.promote) && v_skips) {
    refuse(ErrorCode::invalid_argument,
           fmt::format("skip = {} must be less than promote = {} (to read every page with its "
                       "residual use nvfp4x2)",
                       p.skip, p.promote));
  }
  if (p.rule == PromoteRule::mass && !(p.promote > 0)) {
    refuse(ErrorCode::invalid_argument,
           "promote = 0 must be greater than 0: to read every page with its residual use nvfp4x2");
  }
  if (v_skips && p.skip > 0 && !p.center) {
    refuse(ErrorCode::unsupported,
           fmt::format("skip = {} needs center=true, because a skipped page stands for its V mean; "
                       "set skip=0",
                       p.skip));
  }
  if (p.rule == PromoteRule::mass) return;
  if (!fold.has_budget) {
    refuse(ErrorCode::invalid_argument, "rule=budget needs a budget, such as budget=0.05 or pages=16");
  }
  if (p.residency == Residency::dropped) {
    refuse(ErrorCode::unsupported,
           "rule=budget needs residency=device: a dropped residual cannot be promoted");
  }
  if (p.score == BlockScore::mean && (!is_layered(p.k_format) || !p.center)) {
    refuse(ErrorCode::unsupported,
           fmt::format("score=mean needs the page means of K, so K in {} and center=true; this "
                       "is {} with center={}",
                       kPromotableNames, formats(p), p.center));
  }
}

// Fields that do nothing for this layer take the value that says so.
LayerPolicy normalized(LayerPolicy p) {
  const LayerPolicy off;
  if (!any_promotable(p)) {
    p.rule = off.rule;
    p.promote = off.promote;
    p.residency = off.residency;
    p.sinks = p.recent = 0;
  }
  if (!any_promotable(p) || p.rule == PromoteRule::budget || p.residency == Residency::dropped) {
    p.max_promoted = off.max_promoted;
  }
  if (!is_promotable(p.v_format)) p.skip = 0;
  if (p.rule == PromoteRule::budget) {
    p.promote = off.promote;
  } else {
    p.budget = 0;
    p.budget_pages = 0;
    p.score = off.score;
  }
  if (!rotates(p)) p.rotate = false;
  if (!is_layered(p.k_format)) p.equalize = false;
  if (!any_layered(p)) p.center = false;
  return p;
}

void check_context(const Policy& policy, const PolicyContext& context) {
  if (context.layers < 1 || context.layers > kMaxLayers) {
    fail(ErrorCode::invalid_argument, policy.name,
         fmt::format("the model has {} layers: accepted are 1 to {}", context.layers, kMaxLayers));
  }
  const auto flags = static_cast<int64_t>(context.sliding_window.size());
  if (flags != 0 && flags != context.layers) {
    fail(ErrorCode::invalid_argument, policy.name,
         fmt::format("sliding_window has {} entries for {} layers: give one a layer, or none",
                     flags, context.layers));
  }
  const auto heads = static_cast<int64_t>(context.kv_heads.size());
  if (heads != 0 && heads != context.layers) {
    fail(ErrorCode::invalid_argument, policy.name,
         fmt::format("kv_heads has {} entries for {} layers: give one a layer, or none", heads,
                     context.layers));
  }
  for (size_t l = 0; l < context.kv_heads.size(); ++l) {
    if (context.kv_heads[l] >= 1 && context.kv_heads[l] <= kMaxHeads) continue;
    fail(ErrorCode::invalid_argument, policy.name,
         fmt::format("layer {} has {} KV heads: accepted are 1 to {}", l, context.kv_heads[l],
                     kMaxHeads));
  }
  if (context.context_tokens < 0) {
    fail(ErrorCode::invalid_argument, policy.name,
         fmt::format("context_tokens = {}: a number of tokens, or 0 if unknown",
                     context.context_tokens));
  }
  if (has_head_rules(policy) && context.kv_heads.empty()) {
    fail(ErrorCode::unsupported, policy.name,
         "rules by KV head; required: the number of KV heads of each layer; supported without it: "
         "rules by layer; missing: PolicyContext::kv_heads (a model, -m)");
  }
}

// One policy for the layer: that of its only fold, or of most heads with each head's beside it.
LayerPolicy joined(const std::vector<LayerPolicy>& heads) {
  if (std::all_of(heads.begin(), heads.end(), [&](const auto& p) { return p == heads.front(); })) {
    return heads.front();
  }
  LayerPolicy layer;
  ptrdiff_t most = 0;
  for (const LayerPolicy& p : heads) {
    const ptrdiff_t n = std::count(heads.begin(), heads.end(), p);
    if (n <= most) continue;
    most = n;
    layer = p;
  }
  layer.heads = heads;
  return layer;
}

// Whether the rule lays a ground that later rules may use: the formats of all layers. Its other
// settings may then wait for formats that come later, or for layers that this model lacks.
bool is_ground(const PolicyRule& rule) {
  return rule.layers.kind == Kind::all && rule.heads.all() && rule.k_format && rule.v_format;
}

}  // namespace

std::vector<LayerPolicy> resolve(const Policy& policy, const PolicyContext& context) {
  check_context(policy, context);
  const bool by_head = has_head_rules(policy);
  Folds folds(static_cast<size_t>(context.layers));
  for (size_t l = 0; l < folds.size(); ++l) {
    folds[l].resize(by_head ? static_cast<size_t>(context.kv_heads[l]) : 1);
  }
  const size_t rule_count = policy.rules.size();
  std::vector<std::vector<Fold*>> selected(rule_count);
  // Per rule and field: whether any layer obeys it, when it is applied or in the end.
  std::vector<std::vector<bool>> obeyed(rule_count);
  const auto note_obeyed = [&](size_t r) {
    const PolicyRule& rule = policy.rules[r];
    size_t f = 0;
    for (const PolicyField& field : policy_fields()) {
      for (const Fold* fold : selected[r]) {
        if (obeyed[r][f]) break;
        obeyed[r][f] = !field.is_set(rule) || why_ignored(field.name, fold->policy).empty();
      }
      ++f;
    }
  };
  const auto apply_rule = [&](size_t r) {
    for (Fold* fold : selected[r]) apply(policy, policy.rules[r], context, *fold);
    note_obeyed(r);
  };

  for (size_t r = 0; r < rule_count; ++r) {
    try {
      check_ranges(policy.rules[r]);
    } catch (const Error& error) {
      fail(error.code(), policy.name, error.what());
    }
    selected[r] = selected_folds(policy, policy.rules[r], context, folds);
    obeyed[r].assign(policy_fields().size(), false);
    if (policy.rules[r].layers.kind != Kind::sliding_window) apply_rule(r);
  }
  for (const int64_t l : selected_layers(policy, {.kind = Kind::sliding_window}, context)) {
    std::vector<Fold>& layer = folds[static_cast<size_t>(l)];
    for (size_t h = 0; h < layer.size(); ++h) {
      apply_sliding_window_default(merged_sliding_window_rules(policy, static_cast<int64_t>(h)),
                                   layer[h].policy);
    }
  }
  for (size_t r = 0; r < rule_count; ++r) {
    if (policy.rules[r].layers.kind == Kind::sliding_window) apply_rule(r);
  }

  for (size_t r = 0; r < rule_count; ++r) {
    note_obeyed(r);
    if (selected[r].empty() || (r == 0 && is_ground(policy.rules[r]))) continue;
    size_t f = 0;
    for (const PolicyField& field : policy_fields()) {
      if (obeyed[r][f++]) continue;
      const LayerPolicy& p = selected[r].front()->policy;
      fail(ErrorCode::invalid_argument, policy.name,
           fmt::format("{} for layers '{}' would have no effect on {}: {}; remove it or change "
                       "the format",
                       field.name, selection_of(policy.rules[r]), formats(p),
                       why_ignored(field.name, p)));
    }
  }

  std::vector<LayerPolicy> resolved;
  resolved.reserve(folds.size());
  for (size_t l = 0; l < folds.size(); ++l) {
    std::vector<LayerPolicy> heads;
    for (size_t h = 0; h < folds[l].size(); ++h) {
      check_layer(policy, folds[l][h],
                  by_head ? fmt::format("layer {}, KV head {}", l, h) : fmt::format("layer {}", l));
      heads.push_back(normalized(folds[l][h].policy));
    }
    resolved.push_back(joined(heads));
  }
  return resolved;
}

}  // namespace thriftattn
