// What kernels know of a layer: the numbers of PageLayout and LayerPolicy that they read, as plain
// data that is passed by value. Made in one place (geometry.cc) from the CPU's own layout.
#pragma once

#include <cstdint>

#include "cache/page_layout.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {

// How the rows of one side are stored.
enum class SideKind : int32_t { bf16, fp8, nvfp4, mxfp4, int3 };

struct SideGeometry {
  SideKind kind = SideKind::bf16;
  int32_t dim = 0;
  int32_t head_bytes = 0;                    // stride between KV heads in a page slot
  int64_t start = 0;                         // of head 0 in a page slot
  int32_t codes = 0, scales = 0, mean = 0;   // layered: offsets from the start of the head's side
  int32_t res_codes = 0, res_scales = 0;     // layered: offsets in a residual slot; NVFP4 always
  int32_t rows = 0, row_bytes = 0;           // bf16, fp8
  int32_t always_full = 0;                   // nvfp4x2: the residual is always read
  int32_t rotated = 0;                       // V is stored as H.x
  float range_max = 0;                       // |x| beyond it is refused

  constexpr bool layered() const { return kind >= SideKind::nvfp4; }
  // Base planes that only the kernels for groups of 32 read.
  constexpr bool grouped() const { return kind > SideKind::nvfp4; }
  constexpr int32_t plane_bytes() const { return mean - codes; }  // of the base: codes and scales
};

struct Geometry {
  int32_t kv_heads = 0, group = 0;
  int64_t window = 0;
  SideGeometry k, v;
  int32_t meta_stride = 0;                   // PageMeta of a head is at meta_start + head * this
  int64_t meta_start = 0;
  int64_t slot_bytes = 0, residual_bytes = 0, open_bytes = 0;
  int32_t open_v = 0, open_reference = 0;    // offsets in an open slot; K rows come first
  int32_t center = 1, rotate = 1;
  // The mass rule and where a residual is in reach (precision/mass_rule.h).
  float promote = 1, skip = 0;
  int32_t sealed = 0;                        // Residency::dropped
  int64_t sinks = 0, recent = 0;
  // The budget rule (precision/budget_rule.h) by block mean, in place of the mass rule; 0 also where
  // it has nothing to choose.
  int32_t budget = 0;
  int64_t budget_pages = 0;  // 0 = by fraction
  double budget_fraction = 0;

  constexpr bool any_layered() const { return k.layered() || v.layered(); }
  constexpr bool any_grouped() const { return k.grouped() || v.grouped(); }
  // Both sides are NVFP4: attend_planes.
  constexpr bool nvfp4_planes() const {
    return k.kind == SideKind::nvfp4 && v.kind == SideKind::nvfp4;
  }
};

// Throws Error(unsupported), naming required / supported / missing, for what no kernel serves.
Geometry make_geometry(const LayerShape& shape, const LayerPolicy& policy);

}  // namespace thriftattn::cuda
