// What one sequence holds in one layer: block tables into the pools, and the open pages.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cache/page_layout.h"
#include "cache/slot_pool.h"

namespace thriftattn {

// The 16-bit form of one page's tokens on the layered sides: V, rotated for int3, and T.K minus a
// reference that is fixed when the page opens (the previous page's stored mean; 0 for the first
// page). [kv_heads][64][dim]; the reference is [kv_heads][head_dim_k].
struct OpenPage {
  std::vector<uint16_t> k, v, k_reference;  // empty where the cache is on a device
  int32_t slot = -1;                        // there: in LayerStore::open, the same three in a row

  int64_t bytes() const {
    return static_cast<int64_t>((k.size() + v.size() + k_reference.size()) * sizeof(uint16_t));
  }
};

// What OpenPage::bytes() is for a layer.
inline int64_t open_page_bytes(const PageLayout& layout) {
  int64_t elements = 0;
  if (layout.k.layered) elements += layout.kv_heads * (kPageTokens + 1) * layout.k.dim;
  if (layout.v.layered) elements += layout.kv_heads * kPageTokens * layout.v.dim;
  return elements * static_cast<int64_t>(sizeof(uint16_t));
}

inline constexpr int32_t kNoPage = -1;

struct LayerSequence {
  // pages[j] is the slot of page j, or kNoPage: not sealed yet, or behind the sliding window.
  std::vector<int32_t> pages;
  // residuals[j * kv_heads + head], or kNoPage: dropped.
  std::vector<int32_t> residuals;
  // Open forms of pages first_open .. first_open + open.size() - 1. Outside a step at most one.
  std::vector<OpenPage> open;
  int64_t first_open = 0;
  int64_t staged = 0;          // tokens appended by the open step
  int64_t reopened_page = -1;  // a page decoded into the open form by truncate()
  // Pages below these have been looked at by release_behind() already.
  int64_t residual_floor = 0, window_floor = 0;
};

// The KV heads of one layer that share a policy: all of them, unless the policy has rules by
// head. Heads are counted within the store; model_head() says which of the layer's they are.
struct LayerStore {
  int64_t layer = 0;
  LayerShape shape;  // kv_heads and q_heads of this store
  LayerPolicy policy;
  PageLayout layout;
  std::vector<float> equalizer;  // [kv_heads][head_dim_k], empty = 1
  std::vector<int64_t> heads;    // the layer's KV heads, empty = all
  SlotPool pages;
  SlotPool residuals;
  std::optional<SlotPool> open;  // of a cache on a device that has layered sides

  int64_t model_head(int64_t kv_head) const {
    return heads.empty() ? kv_head : heads[static_cast<size_t>(kv_head)];
  }
};

struct Sequence {
  std::vector<LayerSequence> layers;
  int64_t length = 0;       // committed tokens
  int64_t step_tokens = 0;  // > 0: a step is open
};

}  // namespace thriftattn
