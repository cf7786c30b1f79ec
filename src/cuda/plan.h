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
// Splits depend on the sequence's own items only (DESIGN section 11): never fewer than
// kMinSplitItems pages in one, never more than kMaxSplits of them.
inline constexpr int kMinSplitItems = 32;
inline constexpr int kMaxSplits = 48;
inline constexpr int kPrepareThreads = 128;  // pages a block of the prepare kernel looks at

THRIFTATTN_HOST_DEVICE inline int64_t items_per_split(int64_t items) {
  const int64_t even = (items + kMaxSplits - 1) / kMaxSplits;
  return even > kMinSplitItems ? even : kMinSplitItems;
}
THRIFTATTN_HOST_DEVICE inline int64_t splits_of(int64_t items) {
  const int64_t per = items_per_split(items);
  return (items + per - 1) / per;
}

// Offsets in bytes into the workspace. "rows" are of one (sequence, KV head), padded to tiles.
struct Workspace {
  int64_t rows = 0;          // tiles * tile_rows
  int64_t open_records = 0;   // records of open pages, behind those of max_pages sealed ones
  int64_t page_chunks = 0;    // prepare blocks over the pages of a sequence
  int64_t chunks = 0;         // page_chunks, and one for what is exact
  int64_t q_nvfp4 = 0, q_fp8 = 0, q_bf16 = 0;  // query fragments
  int64_t row_factor = 0;    // [batch][kv_heads][rows]: FP32 factor of the FP16 query
  int64_t floors = 0;        // [batch][kv_heads][chunks][rows]: log2 of partial sums
  int64_t records = 0;       // [batch][kv_heads][row_tiles][max_pages + open_records][4 + tile rows]:
                             // 4 page scales and an offset a row
  int64_t noted = 0;         // [batch][kv_heads][row_tiles][max_pages + open_records] row bits
  int64_t partial_o = 0;     // [batch][kv_heads][splits][rows][dim]
  int64_t partial_ml = 0;    // [batch][kv_heads][splits][rows][2]
  int64_t bytes = 0;
};

struct AttendPlan::State {
  LayerShape shape;
  LayerPolicy policy;
  AttendLimits limits;
  Geometry geometry;
  int device = 0;
  int major = 0, minor = 0;
  int n_tiles = 1;      // mma tiles of 8 query rows in a block: 1 or 2
  int row_tiles = 1;    // blocks over the rows of a (sequence, KV head)
  int64_t positions = 1;  // query positions of one pass: min(step_tokens, 16)
  int64_t splits = 1;
  Workspace workspace;
};

// Items a warp walks are noted in 32 words of 32 bits.
inline constexpr int kWarps = 4;
inline constexpr int64_t kMaxPages = int64_t{kMaxSplits} * kWarps * 1024 - 2;

// Pages that the step of a sequence may touch.
inline int64_t pages_touched(const AttendLimits& limits) {
  return (limits.step_tokens + kPageTokens - 2) / kPageTokens + 1;
}

}  // namespace thriftattn::cuda
