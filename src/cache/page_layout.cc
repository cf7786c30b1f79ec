// Where the planes of a page lie (page_layout.h).
#include "cache/page_layout.h"

#include <fmt/format.h>

#include <algorithm>

#include "formats/format_info.h"
#include "formats/nvfp4.h"
#include "formats/plane_codec.h"
#include "formats/row_codec.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

// Planes start on 64-byte lines: an aligned vector load never straddles two.
constexpr int64_t kPlaneAlignment = 64;

int64_t aligned(int64_t n) { return (n + kPlaneAlignment - 1) / kPlaneAlignment * kPlaneAlignment; }

// Above any model; sums of slot sizes cannot overflow.
constexpr int64_t kMaxHeads = int64_t{1} << 16;
constexpr int64_t kMaxWindow = int64_t{1} << 40;

void check_dim(const char* name, int64_t dim) {
  if (dim < 32 || dim > kMaxHeadDim || dim % 16 != 0) {
    throw Error(ErrorCode::unsupported,
                fmt::format("{} = {}; required: {}; supported: multiples of 16 from 32 to {}; "
                            "missing: pages of other widths",
                            name, dim, dim, kMaxHeadDim));
  }
}

// Of the formats, those with wider groups than the 16 elements that check_dim() asks for.
void check_group(const char* side, Format format, int64_t dim) {
  const int64_t multiple = format_info(format).dim_multiple;
  if (dim % multiple == 0) return;
  std::string supported;
  for (const FormatInfo& other : kFormats) {
    if (dim % other.dim_multiple != 0) continue;
    supported += fmt::format("{}{}", supported.empty() ? "" : ", ", other.name);
  }
  throw Error(ErrorCode::unsupported,
              fmt::format("{} in {} with head_dim_{} = {}; required: a multiple of {}, its group; "
                          "supported at {}: {}; missing: groups that are cut short",
                          side, to_string(format), side[0] == 'K' ? 'k' : 'v', dim, multiple, dim,
                          supported));
}

}  // namespace

std::vector<std::vector<int64_t>> heads_by_policy(const LayerPolicy& policy, int64_t kv_heads) {
  std::vector<std::vector<int64_t>> groups;
  for (int64_t h = 0; h < kv_heads; ++h) {
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const auto& group) {
      return policy.of_head(group.front()) == policy.of_head(h);
    });
    if (same == groups.end()) {
      groups.push_back({h});
    } else {
      same->push_back(h);
    }
  }
  return groups;
}

LayerShape shape_of_heads(const LayerShape& shape, int64_t heads) {
  LayerShape part = shape;
  part.kv_heads = heads;
  part.q_heads = shape.q_heads / shape.kv_heads * heads;
  return part;
}

void check_layer_shape(const LayerShape& shape) {
  if (shape.kv_heads < 1 || shape.q_heads < 1 || shape.q_heads % shape.kv_heads != 0) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("q_heads = {} must be a positive multiple of kv_heads = {}",
                            shape.q_heads, shape.kv_heads));
  }
  if (shape.q_heads > kMaxHeads) {
    throw Error(ErrorCode::unsupported,
                fmt::format("q_heads = {}: supported are at most {}", shape.q_heads, kMaxHeads));
  }
  if (shape.window < 0 || shape.window > kMaxWindow) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("window = {}: it is 1 to {} tokens, or 0 for none", shape.window,
                            kMaxWindow));
  }
  check_dim("head_dim_k", shape.head_dim_k);
  check_dim("head_dim_v", shape.head_dim_v);
}

PageLayout make_page_layout(const LayerShape& shape, const LayerPolicy& policy) {
  check_layer_shape(shape);
  check_group("K", policy.k_format, shape.head_dim_k);
  check_group("V", policy.v_format, shape.head_dim_v);

  PageLayout layout;
  layout.kv_heads = shape.kv_heads;
  int64_t res_at = 0;
  const auto place = [&](SideLayout& side, Format format, int64_t dim) {
    int64_t at = 0;
    side.format = format;
    side.layered = is_layered(format);
    side.dim = dim;
    if (side.layered) {
      const int64_t codes_bytes = plane_codes_bytes(format, dim);
      const int64_t scales_bytes = plane_scales_bytes(format, dim);
      side.codes = at;
      at = aligned(at + codes_bytes);
      side.scales = at;
      at = aligned(at + scales_bytes);
      side.mean = at;
      at = aligned(at + 2 * dim);
      side.res_codes = res_at;
      res_at = aligned(res_at + nvfp4_codes_bytes(dim));
      side.res_scales = res_at;
      res_at = aligned(res_at + nvfp4_scales_bytes(dim));
      side.base_bytes = codes_bytes + scales_bytes;
      side.residual_bytes = nvfp4_codes_bytes(dim) + nvfp4_scales_bytes(dim);
      layout.base_bytes += side.base_bytes;
    } else {
      side.row_bytes = row_bytes(format, dim);
      side.rows = at;
      at = aligned(at + kPageTokens * side.row_bytes);
      layout.plain_bytes += aligned(kPageTokens * side.row_bytes);
    }
    side.head_bytes = at;
  };
  place(layout.k, policy.k_format, shape.head_dim_k);
  place(layout.v, policy.v_format, shape.head_dim_v);
  layout.k.rotated = layout.k.layered && policy.rotate;
  layout.v.rotated = format_info(policy.v_format).rotate_v && policy.rotate;
  if (layout.any_layered()) {
    SideLayout& side = layout.k.layered ? layout.k : layout.v;
    layout.meta = side.head_bytes;
    side.head_bytes = aligned(layout.meta + static_cast<int64_t>(sizeof(PageMeta)));
  }
  layout.head_bytes = layout.k.head_bytes + layout.v.head_bytes;
  layout.slot_bytes = layout.head_bytes * shape.kv_heads;
  layout.residual_bytes = res_at;
  // Alignment is counted where it is spent: with the summary.
  layout.summary_bytes = layout.head_bytes - layout.base_bytes - layout.plain_bytes;
  return layout;
}

}  // namespace thriftattn
