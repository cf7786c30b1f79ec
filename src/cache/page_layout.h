// Where the planes of a page lie (docs/formats.md). One slot of the page pool holds the base
// planes, summaries and plain rows of all KV heads of a layer: K of every head, then V of every
// head, since scores and values are read at different times. One slot of the residual pool holds
// the residual planes of one (page, KV head).
#pragma once

#include <cstdint>
#include <vector>

#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

namespace thriftattn {

// Widest head that a page can hold.
inline constexpr int64_t kMaxHeadDim = 256;

// Facts recorded by the encoder, FP32. "both" is base + residual.
struct PageMeta {
  float k_scale = 1, v_scale = 1;          // page scales of the base planes
  float k_res_scale = 1, v_res_scale = 1;  // page scales of the residual planes
  float k_error = 0, v_error = 0;          // RMS of x - decode(base)
  float k_error_both = 0, v_error_both = 0;
  float k_mean_norm = 0;  // L2 norm of the mean of the decoded base K'
};
static_assert(sizeof(PageMeta) == 36, "metadata is at most 48 bytes a page (DESIGN section 11)");

// One side (K or V) of one KV head in a page slot; offsets are from the start of the head's side.
struct SideLayout {
  Format format = Format::bf16;
  bool layered = false;
  bool rotated = false;  // values are stored as H.x; H is its own inverse
  int64_t dim = 0;
  int64_t codes = 0, scales = 0, mean = 0;          // layered: base plane and summary
  int64_t res_codes = 0, res_scales = 0;            // layered: offsets in a residual slot
  int64_t rows = 0, row_bytes = 0;                  // plain: [64] rows
  int64_t base_bytes = 0, residual_bytes = 0;       // codes and scales
  int64_t head_bytes = 0;                           // stride between KV heads in a slot
};

// One KV head in a page slot: where its K and its V start. Empty for a page without a slot.
template <typename Byte>
struct PageHeadOf {
  Byte* k = nullptr;
  Byte* v = nullptr;

  explicit operator bool() const { return k != nullptr; }
  operator PageHeadOf<const Byte>() const { return {k, v}; }
};
using PageHead = PageHeadOf<const uint8_t>;
using MutablePageHead = PageHeadOf<uint8_t>;

struct PageLayout {
  int64_t kv_heads = 0;
  SideLayout k, v;
  int64_t meta = 0;            // offset of PageMeta in K's side, in V's if K is plain; only with a
                               // layered side
  int64_t head_bytes = 0;      // of both sides
  int64_t slot_bytes = 0;      // kv_heads * head_bytes
  int64_t residual_bytes = 0;  // slot size of the residual pool; 0 = no residual plane
  // Per KV head, of a slot: what usage() reports.
  int64_t base_bytes = 0, summary_bytes = 0, plain_bytes = 0;

  template <typename Byte>
  PageHeadOf<Byte> head(Byte* slot, int64_t kv_head) const {
    return {slot + kv_head * k.head_bytes, slot + kv_heads * k.head_bytes + kv_head * v.head_bytes};
  }
  // Where a side of this layout starts: `side` is k or v.
  template <typename Byte>
  Byte* start(const SideLayout& side, PageHeadOf<Byte> head) const {
    return &side == &k ? head.k : head.v;
  }

  bool any_layered() const { return k.layered || v.layered; }
  bool any_plain() const { return !k.layered || !v.layered; }
};

// KV heads of equal policies, which share a store, by first appearance; one group if the policy
// has no rules by head.
std::vector<std::vector<int64_t>> heads_by_policy(const LayerPolicy& policy, int64_t kv_heads);
// The part of a layer that such a group of heads is.
LayerShape shape_of_heads(const LayerShape& shape, int64_t heads);

// Throws Error(unsupported / invalid_argument) for shapes that no page can hold, whatever the
// policy; make_page_layout() also for what the policy's formats cannot.
void check_layer_shape(const LayerShape& shape);
PageLayout make_page_layout(const LayerShape& shape, const LayerPolicy& policy);

}  // namespace thriftattn
