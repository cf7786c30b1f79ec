// What a cache will hold (memory_plan.h). The formulas mirror settle() and release_behind() of
// kv_cache.cc and append() of append.cc, which decide what is held when.
#include "cache/memory_plan.h"

#include <algorithm>
#include <utility>

#include "cache/page_layout.h"
#include "cache/sequence_state.h"

namespace thriftattn {
namespace {

int64_t pages_begun(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

// What one sequence holds in one layer.
struct Held {
  int64_t pages = 0;
  int64_t residuals = 0;  // (page, KV head) pairs
  int64_t open = 0;       // open pages
  int64_t entries = 0;    // pages in the block table
};

class LayerPlan {
 public:
  LayerPlan(const LayerShape& shape, const LayerPolicy& policy)
      : shape_(shape), policy_(policy), layout_(make_page_layout(shape, policy)) {}

  // After the commit of token `length` - 1; pages and residuals from page `first` on.
  Held settled(int64_t length, int64_t first) const {
    const int64_t full = length / kPageTokens;
    const bool partial = length % kPageTokens != 0;
    Held held;
    held.entries = table_pages(length);
    held.open = partial && layout_.any_layered() ? 1 : 0;
    int64_t begin = first;
    if (shape_.window > 0) {
      const int64_t behind = std::max<int64_t>(0, length + 1 - shape_.window) / kPageTokens - 1;
      begin = std::max(begin, std::min(behind, full - 1));
    }
    held.pages = std::max<int64_t>(0, held.entries - begin);
    if (layout_.any_layered()) {
      int64_t kept = std::max<int64_t>(0, full - begin);
      if (policy_.residency == Residency::dropped) {
        const int64_t from = std::max(begin, pages_begun(policy_.sinks));
        const int64_t to =
            std::min(full, std::max<int64_t>(0, length + 1 - policy_.recent) / kPageTokens);
        kept -= std::max<int64_t>(0, to - from);
      }
      held.residuals = kept * layout_.kv_heads;
    }
    return held;
  }

  // Before the commit of the step that feeds tokens begin .. end - 1: nothing is dropped yet.
  Held in_step(int64_t begin, int64_t end, int64_t first) const {
    Held held = settled(begin, first);
    held.entries = table_pages(end);
    held.pages += held.entries - table_pages(begin);
    if (layout_.any_layered()) {
      held.residuals += (end / kPageTokens - begin / kPageTokens) * layout_.kv_heads;
      held.open = pages_begun(end) - begin / kPageTokens;
    }
    return held;
  }

  void add(const Held& held, int64_t layers, CacheUsage& usage) const {
    const int64_t heads = layers * held.pages * layout_.kv_heads;
    usage.base_bytes += heads * layout_.base_bytes;
    usage.summary_bytes += heads * layout_.summary_bytes;
    usage.plain_bytes += heads * layout_.plain_bytes;
    usage.residual_bytes += layers * held.residuals * layout_.residual_bytes;
    usage.open_bytes += layers * held.open * open_page_bytes(layout_);
    usage.table_bytes +=
        layers * held.entries * (1 + layout_.kv_heads) * static_cast<int64_t>(sizeof(int32_t));
    usage.pages += layers * held.pages;
    usage.residual_pages += layers * held.residuals;
  }

 private:
  int64_t table_pages(int64_t length) const {
    return layout_.any_plain() ? pages_begun(length) : length / kPageTokens;
  }

  LayerShape shape_;
  LayerPolicy policy_;
  PageLayout layout_;
};

class Planner {
 public:
  Planner(const std::vector<LayerShape>& layers, const std::vector<LayerPolicy>& policy) {
    std::vector<std::pair<LayerShape, LayerPolicy>> distinct;  // of each kind
    for (size_t l = 0; l < layers.size(); ++l) {
      for (const auto& heads : heads_by_policy(policy[l], layers[l].kv_heads)) {
        const std::pair<LayerShape, LayerPolicy> part(
            shape_of_heads(layers[l], static_cast<int64_t>(heads.size())),
            policy[l].of_head(heads.front()));
        const auto same = std::find(distinct.begin(), distinct.end(), part);
        if (same != distinct.end()) {
          ++kinds_[static_cast<size_t>(same - distinct.begin())].second;
        } else {
          distinct.push_back(part);
          kinds_.emplace_back(LayerPlan(part.first, part.second), 1);
        }
      }
    }
  }

  MemoryPlan plan(const MemoryRequest& request) const {
    MemoryPlan plan;
    CacheUsage base;  // the document's sequence, beside its fork
    int64_t first = 0, at = 0;
    const auto total = [&](const auto& held_of) {
      CacheUsage usage = base;
      for (const auto& [kind, layers] : kinds_) kind.add(held_of(kind), layers, usage);
      return usage;
    };
    const auto step = [&](int64_t tokens) {
      const CacheUsage u =
          total([&](const LayerPlan& kind) { return kind.in_step(at, at + tokens, first); });
      plan.peak_bytes = std::max(plan.peak_bytes, u.total());
      at += tokens;
    };
    const auto settled = [&] {
      return total([&](const LayerPlan& kind) { return kind.settled(at, first); });
    };
    const auto prefill = [&](int64_t tokens) {
      const int64_t end = at + tokens;
      while (at < end) step(std::min(request.chunk - at % request.chunk, end - at));
    };
    prefill(request.document);
    if (request.forked) {
      base = settled();
      // Earlier pages are shared, and so is a partial one until it is written.
      first = request.question + request.answer > 0 ? at / kPageTokens : pages_begun(at);
    }
    prefill(request.question);
    for (int64_t i = 0; i < request.answer; ++i) step(1);
    plan.usage = settled();
    plan.peak_bytes = std::max(plan.peak_bytes, plan.usage.total());
    return plan;
  }

 private:
  std::vector<std::pair<LayerPlan, int64_t>> kinds_;  // with the number of such layers
};

}  // namespace

MemoryPlan plan_memory(const std::vector<LayerShape>& layers,
                       const std::vector<LayerPolicy>& policy, const MemoryRequest& request) {
  return Planner(layers, policy).plan(request);
}

int64_t tokens_that_fit(const std::vector<LayerShape>& layers,
                        const std::vector<LayerPolicy>& policy, const MemoryRequest& request,
                        int64_t max_bytes) {
  const Planner planner(layers, policy);
  const auto fits = [&](int64_t tokens) {
    MemoryRequest cut = request;
    cut.answer = std::min(request.answer, tokens);
    cut.question = std::min(request.question, tokens - cut.answer);
    cut.document = tokens - cut.answer - cut.question;
    return planner.plan(cut).peak_bytes <= max_bytes;
  };
  int64_t most = 0, beyond = request.tokens() + 1;
  while (beyond - most > 1) {
    const int64_t middle = most + (beyond - most) / 2;
    (fits(middle) ? most : beyond) = middle;
  }
  return most;
}

}  // namespace thriftattn
