// The numbers that kernels read, from the CPU's page layout (geometry.h).
#include "cuda/geometry.h"

#include <fmt/format.h>

#include "formats/format_info.h"
#include "formats/plane_codec.h"
#include "thriftattn/error.h"

namespace thriftattn::cuda {
namespace {

[[noreturn]] void unsupported(const char* what, const std::string& required,
                              const char* supported, const char* missing) {
  throw Error(ErrorCode::unsupported,
              fmt::format("CUDA: {}; required: {}; supported: {}; missing: {}", what, required,
                          supported, missing));
}

SideGeometry side_geometry(const char* name, const SideLayout& side) {
  SideGeometry g;
  switch (base_format(side.format)) {
    case Format::bf16:
      g.kind = SideKind::bf16;
      break;
    case Format::fp8_e4m3:
      g.kind = SideKind::fp8;
      break;
    case Format::nvfp4:
      g.kind = SideKind::nvfp4;
      break;
    case Format::mxfp4:
      g.kind = SideKind::mxfp4;
      break;
    case Format::int3:
      g.kind = SideKind::int3;
      break;
    default:
      unsupported("storage format", fmt::format("{} in {}", name, to_string(side.format)),
                  "nvfp4, nvfp4x2, mxfp4, int3, fp8_e4m3, bf16",
                  "kernels of the other formats");
  }
  if (side.dim != 64 && side.dim != 128 && side.dim != 192 && side.dim != 256) {
    unsupported("head_dim", fmt::format("{} of {}", side.dim, name), "64, 128, 192, 256",
                "kernels of other widths");
  }
  g.dim = static_cast<int32_t>(side.dim);
  g.head_bytes = static_cast<int32_t>(side.head_bytes);
  g.codes = static_cast<int32_t>(side.codes);
  g.scales = static_cast<int32_t>(side.scales);
  g.mean = static_cast<int32_t>(side.mean);
  g.res_codes = static_cast<int32_t>(side.res_codes);
  g.res_scales = static_cast<int32_t>(side.res_scales);
  g.rows = static_cast<int32_t>(side.rows);
  g.row_bytes = static_cast<int32_t>(side.row_bytes);
  if (g.layered() &&
      (side.scales != side.codes + plane_codes_bytes(side.format, side.dim) ||
       side.mean != side.scales + plane_scales_bytes(side.format, side.dim) ||
       side.res_scales != side.res_codes + 32 * side.dim)) {
    unsupported("page layout", "codes, scales and mean of a plane side by side", "page format 2",
                "kernels of other layouts");
  }
  g.always_full = side.format == Format::nvfp4x2;
  g.rotated = side.rotated;
  g.range_max = format_info(side.format).range_max;
  return g;
}

}  // namespace

Geometry make_geometry(const LayerShape& shape, const LayerPolicy& policy) {
  const PageLayout layout = make_page_layout(shape, policy);
  if (shape.head_dim_k != shape.head_dim_v) {
    unsupported("head_dim", fmt::format("{} for K and {} for V", shape.head_dim_k, shape.head_dim_v),
                "the same for K and V", "kernels of two widths");
  }
  if (shape.q_heads / shape.kv_heads > 64) {
    unsupported("query heads", fmt::format("{} a KV head", shape.q_heads / shape.kv_heads),
                "at most 64 a KV head", "wider groups");
  }
  if (!policy.heads.empty()) {
    unsupported("policy by KV head", "one policy for the heads of a call", "uniform layers",
                "several policies in one call: use one plan for each group of heads");
  }
  if (policy.rule == PromoteRule::budget && policy.score != BlockScore::mean) {
    unsupported("score", "promotion by budget with quest, variance, local or oracle",
                "the block mean (score=mean)", "kernels of the other scores");
  }
  if (policy.max_promoted < 1) {
    unsupported("rule", "a cap on the promoted pages (max)",
                "promotion by attention mass without a cap, or by budget", "the cap");
  }
  Geometry g;
  g.kv_heads = static_cast<int32_t>(shape.kv_heads);
  g.group = static_cast<int32_t>(shape.q_heads / shape.kv_heads);
  g.window = shape.window;
  g.k = side_geometry("K", layout.k);
  g.v = side_geometry("V", layout.v);
  // A slot has K of all heads, then V of all heads.
  g.v.start = layout.kv_heads * layout.k.head_bytes;
  const SideGeometry& with_meta = layout.k.layered ? g.k : g.v;
  g.meta_start = with_meta.start + layout.meta;
  g.meta_stride = with_meta.head_bytes;
  g.slot_bytes = layout.slot_bytes;
  g.residual_bytes = layout.residual_bytes;
  int64_t open = 0;
  if (layout.k.layered) open += 2 * shape.kv_heads * kPageTokens * layout.k.dim;
  g.open_v = static_cast<int32_t>(open);
  if (layout.v.layered) open += 2 * shape.kv_heads * kPageTokens * layout.v.dim;
  g.open_reference = static_cast<int32_t>(open);
  if (layout.k.layered) open += 2 * shape.kv_heads * layout.k.dim;
  g.open_bytes = (open + 63) / 64 * 64;
  g.center = policy.center;
  g.rotate = policy.rotate;
  g.promote = static_cast<float>(policy.promote);
  g.skip = static_cast<float>(policy.skip);
  g.sealed = policy.residency == Residency::dropped;
  g.sinks = policy.sinks;
  g.recent = policy.recent;
  if (policy.rule == PromoteRule::budget) {
    g.promote = 1;  // never by mass
    g.budget = g.any_layered() && !g.k.always_full && !g.v.always_full && !g.sealed;
    g.budget_pages = policy.budget_pages;
    g.budget_fraction = policy.budget;
  }
  return g;
}

SlotSizes slot_sizes(const LayerShape& shape, const LayerPolicy& policy) {
  const Geometry g = make_geometry(shape, policy);
  return {.page = g.slot_bytes, .residual = g.residual_bytes, .open = g.open_bytes};
}

}  // namespace thriftattn::cuda
