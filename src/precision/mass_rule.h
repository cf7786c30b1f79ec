// Precision by attention mass (DESIGN section 6): how a complete layered page is read for one
// query, from the share of attention it holds. One function, used by every kernel and by the
// reference, so that the rule has one home.
#pragma once

#include <cstdint>

#include "cache/page_layout.h"
#include "thriftattn/policy.h"

namespace thriftattn {

enum class PageRead : uint8_t {
  full,  // K and V with base + residual
  base,  // K and V in 4 bits
  skip,  // K in 4 bits; V only as mass * mean(V)
};

// What is known about a page before its mass: the same for all heads of a query.
struct PageFacts {
  bool has_residual = false;    // held, and within the query's own sinks or recent if sealed
  bool forced_full = false;     // read with the residual whatever its mass
  bool wholly_visible = false;  // no token is hidden from the query
};

struct MassRule {
  float promote = 1.0f;
  float skip = 0.0f;
};

// M_j: the largest mass over the query heads of the group, FP32, over base scores. Strict >.
inline PageRead read_by_mass(const MassRule& rule, const PageFacts& facts, float mass) {
  if (facts.forced_full) return PageRead::full;
  if (facts.has_residual && mass > rule.promote) return PageRead::full;
  if (mass > rule.skip || !facts.wholly_visible || rule.skip <= 0) return PageRead::base;
  return PageRead::skip;
}

// Whether a query that sees `visible` tokens (its own included) may use the residual of page
// `page` under this policy. It depends on the query's own position alone, so that another
// sequence's lifetime never changes results.
inline bool residual_in_reach(const LayerPolicy& policy, int64_t page, int64_t visible) {
  if (policy.residency == Residency::device) return true;
  return page * kPageTokens < policy.sinks || (page + 1) * kPageTokens > visible - policy.recent;
}

// What a page of this layer is for a decode query, before its mass is known.
inline PageFacts page_facts(const PageLayout& layout, const LayerPolicy& policy, int64_t page,
                            int64_t visible, int64_t window, bool residual_held) {
  PageFacts facts;
  facts.has_residual = residual_held && residual_in_reach(policy, page, visible);
  const bool always =
      layout.k.format == Format::nvfp4x2 || layout.v.format == Format::nvfp4x2 ||
      policy.residency == Residency::dropped;
  facts.forced_full = facts.has_residual && always;
  facts.wholly_visible = window == 0 || page * kPageTokens >= visible - window;
  // Without a stored V mean a skipped page would lose its V.
  if (!layout.v.layered || !policy.center) facts.wholly_visible = false;
  return facts;
}

// Bits a decode kernel reads of one page for one KV head: codes, scales, means, metadata and
// its share of the block tables (one id a page, one a residual plane).
inline double page_read_bits(const PageLayout& layout, PageRead read, int64_t visible_tokens) {
  double bytes = 4.0 / static_cast<double>(layout.kv_heads);
  if (layout.any_layered()) bytes += static_cast<double>(sizeof(PageMeta)) + 4.0;
  const auto side_bytes = [&](const SideLayout& side, bool codes) {
    if (!side.layered) return static_cast<double>(side.row_bytes * visible_tokens);
    double b = 2.0 * static_cast<double>(side.dim);
    if (codes) b += static_cast<double>(side.base_bytes);
    if (read == PageRead::full) b += static_cast<double>(side.residual_bytes);
    return b;
  };
  return 8.0 * (bytes + side_bytes(layout.k, true) + side_bytes(layout.v, read != PageRead::skip));
}

// The same for open tokens: 16 bits an element and K's reference; plain sides as stored.
inline double open_read_bits(const PageLayout& layout, int64_t visible_tokens) {
  const auto side_bytes = [&](const SideLayout& side) {
    return static_cast<double>(visible_tokens * (side.layered ? 2 * side.dim : side.row_bytes));
  };
  const double reference = layout.k.layered ? 2.0 * static_cast<double>(layout.k.dim) : 0.0;
  return 8.0 * (side_bytes(layout.k) + side_bytes(layout.v) + reference);
}

}  // namespace thriftattn
