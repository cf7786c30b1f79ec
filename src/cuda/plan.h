// What a plan fixes: the query tile, the splits and where everything lies in the workspace. Pure
// host arithmetic; the kernels get it by value, so host and device cannot disagree.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/geometry.h"

#ifdef __CUDACC__
#define THRIFTATTN_HOST_DEVICE __host__ __device__
#else
#define THRIFTATTN_HOST_DEVICE
#endif

namespace thriftattn::cuda {

// Query rows (positions x heads of the group) that one pass of the kernels serves.
inline constexpr int64_t kMaxPositions = 16;
// Splits that depend on the sequence's own items only (DESIGN section 11): min_items pages or more in
// one, at most max_splits of them; but few_splits where there are kLeastPlaces pages for each.
// Where batch_invariant is not asked for, kernels go by the whole batch instead (attend_units.cuh), and
// the plans of those but attend_planes have as many few_splits as make kDecodeBlocks blocks a
// multiprocessor. The newest page, in open form, takes as long as open_items others.
struct SplitRule {
  int32_t min_items = 32, max_splits = 48, few_splits = 1, open_items = 1;
};
inline constexpr SplitRule kDecodeSplits{32, 48, 1, 1}, kPlanesSplits{43, 48, 12, 16};
inline constexpr int64_t kDecodeBlocks = 3;
// Blocks of attend_decode on an SM, as registers allow.
THRIFTATTN_HOST_DEVICE constexpr int decode_blocks(int dim, int n_tiles) {
  return dim > 128 ? 1 : n_tiles == 1 ? 3 : 2;
}
inline constexpr int kLeastPlaces = 8;
// attend_prepare takes the pages of a sequence in at most kPageChunks chunks, each of which leaves a floor
// a row; a chunk is 16 pages a warp, or a multiple of that. More rows have wider blocks.
inline constexpr int kPageChunks = 32;
THRIFTATTN_HOST_DEVICE inline int prepare_warps(int64_t rows) { return rows <= 16 ? 8 : 16; }

inline constexpr int kMaxSplits = 48;

// Blocks of attend_planes on an SM: three have 168 registers a thread at head_dim 128; four, with
// 128, spill.
THRIFTATTN_HOST_DEVICE constexpr int planes_blocks(int dim, int n_tiles) {
  if (n_tiles == 1) return dim <= 128 ? 3 : 2;
  return dim <= 128 && n_tiles == 2 ? 2 : 1;
}

THRIFTATTN_HOST_DEVICE inline int64_t splits_of(int64_t items, SplitRule rule) {
  const int64_t even = (items + rule.max_splits - 1) / rule.max_splits;
  const int64_t per = even > rule.min_items ? even : rule.min_items;
  const int64_t splits = (items + per - 1) / per;
  const int64_t short_splits = (items + kLeastPlaces - 1) / kLeastPlaces;
  const int64_t few = short_splits < rule.few_splits ? short_splits : rule.few_splits;
  return splits > few ? splits : few;
}

// Of any number of items up to this: splits_of() is now and then larger for fewer.
inline int64_t most_splits(int64_t items, SplitRule rule) {
  const int64_t full = (items + rule.min_items - 1) / rule.min_items;
  const int64_t few = (items + kLeastPlaces - 1) / kLeastPlaces;
  const int64_t least = few < rule.few_splits ? few : rule.few_splits;
  const int64_t most = full < rule.max_splits ? full : rule.max_splits;
  return most > least ? most : least;
}

// Without batch_invariant a unit of attend_planes has at least kLeastPlaces items.
inline int64_t most_unit_splits(int64_t items) {
  const int64_t most = (2 * items + kLeastPlaces - 1) / kLeastPlaces;
  return most < kMaxSplits ? most : kMaxSplits;
}

// Offsets in bytes into the workspace. "rows" are of one (sequence, KV head), padded to tiles.
struct Workspace {
  int64_t rows = 0;          // tiles * tile_rows
  int64_t open_records = 0;   // records of open pages, behind those of max_pages sealed ones
  int64_t page_chunks = 0;    // of the pages of a sequence, at most kPageChunks
  int64_t chunks = 0;         // page_chunks, and one for what is exact
  int64_t q_nvfp4 = 0, q_fp8 = 0, q_bf16 = 0;  // query fragments
  int64_t row_factor = 0;    // [batch][kv_heads][rows]: FP32 factor of the FP16 query
  int64_t floors = 0;        // [batch][kv_heads][chunks][rows]: log2 of partial sums
  int64_t records = 0;       // [batch][kv_heads][row_tiles][max_pages + open_records][4 + tile rows]:
                             // 4 page scales and an offset a row
  int64_t noted = 0;         // [batch][kv_heads][row_tiles][max_pages + open_records] row bits
  // Of attend_planes: int32, which unit is taken next, and whether the units are there; [batch + 1]
  // int32, the first unit of each sequence, and from units_offset() on the units, 16 bytes each.
  int64_t next_unit = 0, unit_starts = 0;
  int64_t partial_o = 0;     // [batch][kv_heads][splits][rows][dim]
  int64_t partial_ml = 0;    // [batch][kv_heads][splits][rows][2]
  int64_t facts = 0;         // [batch][kv_heads][max_pages] PageFacts of attend_prefill
  // Of attend_select: the residual table of what a budget promotes; for several positions also a byte for
  // each of 16, [batch][kv_heads][max_pages][16]; and keys of pages that shared memory does not hold,
  // [batch][kv_heads][positions][max_pages - kHeldKeys].
  int64_t chosen_residuals = 0, choices = 0, keys = 0;
  int64_t tiles = 0;         // of a pass: [heads][max_pages][tiles of K and V] FP16 [64][dim]
  int64_t bytes = 0;
};

THRIFTATTN_HOST_DEVICE inline int64_t units_offset(const Workspace& w, int64_t batch) {
  return w.unit_starts + ((batch + 1) * 4 + 15) / 16 * 16;
}

struct AttendPlan::State {
  LayerShape shape;
  LayerPolicy policy;
  AttendLimits limits;
  Geometry geometry;
  int device = 0;
  int major = 0, minor = 0;
  int multiprocessors = 1;
  int slots = 0;        // blocks of attend_planes that the device holds at a time
  int resident = 0;     // of attend_decode
  bool planes = false;  // attend_planes, for two NVFP4 sides; else attend_decode or attend_groups
  SplitRule split_rule;
  int n_tiles = 1;      // mma tiles of 8 query rows in a block: 1, 2 or 4
  int row_tiles = 1;    // blocks over the rows of a (sequence, KV head)
  int64_t positions = 1;  // query positions of one pass: min(step_tokens, 16)
  int64_t rule_positions = 1;  // of decode mode: fewer, in one tile, where tiles would cut positions
  int64_t splits = 1;
  int prefill_stages = 0;  // of attend_prefill; 0: it is not used
  // (Sequence, KV head)s of a pass of attend_prefill whose tiles are made before it, with one tile of K
  // a page and with two; 0: pages are expanded where they are used.
  int32_t prefill_pass_heads[2] = {0, 0};
  Workspace workspace;
};

// What attend_prefill reads of a page before its codes: made by prefill_facts().
struct alignas(16) PageFacts {
  int32_t slot = -1, residual = -1, open = -1;  // open: the page is read in open form
  int32_t mean_exponent = 0;  // K's mean is FP16 numbers times 2^this
  float k_factor = 1;         // scores are q'.tile times this; a power of two of MXFP4 codes
  float k_tile = 1;           // plain and open rows of K are multiplied with this; of codes, the page
                              // scale of the residual over that of the base
  int32_t v_exponent = 0;     // V's tile holds values times 2^-v_exponent
  uint32_t v_factors = 0;     // FP16: of a base block's scale in the format's units, and of the residual's
};

// Items a warp walks are noted in 32 words of 32 bits.
inline constexpr int kWarps = 4;
inline constexpr int64_t kMaxPages = int64_t{kDecodeSplits.max_splits} * kWarps * 1024 - 2 - kPlanesSplits.open_items;

// Pages whose keys attend_select has in shared memory.
inline constexpr int64_t kHeldKeys = 4096;

// Pages that the step of a sequence may touch.
inline int64_t pages_touched(const AttendLimits& limits) {
  return (limits.step_tokens + kPageTokens - 2) / kPageTokens + 1;
}

}  // namespace thriftattn::cuda
