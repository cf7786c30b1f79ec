// What a block of attend_prefill holds in shared memory: one plan for host and device.
//
//   Q' [128 rows], FP16                   as panels of 64 dims
//   what FP16 left of Q'                  where K is layered or queries are FP32
//   K tiles [stages], then V tiles        64 tokens each, FP16
//   PrefillShared
//   means of K [2 batches of pages], means of V [stages][4 warps]
//
// A panel holds 128 bytes (64 dims) of every row; 16-byte chunk c of row r lies at
// r * 128 + (c ^ (r & 7)) * 16: rows on different banks, and what tensor cores read as the 128-byte
// swizzle. Inside a chunk the dims are in the order 0 4 2 6 1 5 3 7, in which codes come apart.
#pragma once

#include <cstdint>

#include "cuda/plan.h"

namespace thriftattn::cuda {

inline constexpr int kPrefillRows = 128;  // query rows of a block
inline constexpr int kPrefillMaxStages = 4;
inline constexpr int kPageBatch = 8;  // pages whose facts are fetched at a time

// Threads of a block: `fillers` warpgroups fill tiles, two of 64 rows attend.
constexpr int prefill_threads(int fillers) { return (fillers + 2) * 128; }

// What the attending warps need to know of a page beside its tiles.
struct StageNote {
  float k_factor = 1;  // of the scores, beside the row's
  int32_t v_exponent = 0;
};

struct PrefillShared {
  uint64_t k_full[kPrefillMaxStages], k_empty[kPrefillMaxStages];
  uint64_t v_full[kPrefillMaxStages], v_empty[kPrefillMaxStages];
  uint64_t offsets_full[2];
  StageNote notes[kPrefillMaxStages];
  PageFacts facts[2][4][kPageBatch];  // a filler's: this batch of pages and the two after it
  float row_factor[kPrefillRows];
  float offsets[2][kPageBatch][kPrefillRows];  // q'.mean of the pages of two batches
};
static_assert(sizeof(PrefillShared) % 16 == 0);

constexpr int prefill_query_bytes(int dim) { return kPrefillRows * dim * 2; }
constexpr int prefill_tile_bytes(int dim) { return 64 * dim * 2; }
constexpr int prefill_k_mean_bytes(int dim) { return 2 * kPageBatch * dim * 2; }
constexpr int prefill_shared_bytes(int dim, bool q_low, int stages) {
  return 1024 + prefill_query_bytes(dim) * (q_low ? 2 : 1) + 2 * stages * prefill_tile_bytes(dim) +
         static_cast<int>(sizeof(PrefillShared)) + prefill_k_mean_bytes(dim) + stages * 4 * dim * 2;
}

// Stages of K and of V that fit a block of a device of this compute capability; 0: it is not
// served. Before sm_90 the products of 192 and more dims need more registers than there are.
constexpr int prefill_stages(int dim, bool q_low, int major, int minor) {
  if (major != 9 && dim > 128) return 0;
  int limit = 99 << 10;
  if (major == 9) limit = 227 << 10;
  if (major == 8 && (minor == 0 || minor == 7)) limit = 163 << 10;
  limit -= 1024;  // the block's view of its rows
  int stages = kPrefillMaxStages;
  while (stages > 0 && prefill_shared_bytes(dim, q_low, stages) > limit) --stages;
  return stages;
}
// Whether tiles are made before attend_prefill: (sequence, KV head)s of a pass, whose tiles fit
// into most_bytes, or 0 where pages are better expanded by each block that needs them. Costs are
// clocks a page (head_dim 128): of a block, and of making its tiles by all multiprocessors.
struct PrefillWork {
  int64_t heads = 1, row_tiles = 1;  // blocks
  int64_t head_bytes = 0, most_bytes = 0;
  int64_t multiprocessors = 1;
};
constexpr int32_t prefill_pass_heads(const PrefillWork& w) {
  constexpr int64_t kExpanding = 3100, kMade = 1900, kMaking = 6500;
  const int64_t fit = w.most_bytes / w.head_bytes < w.heads ? w.most_bytes / w.head_bytes : w.heads;
  if (fit == 0) return 0;
  const auto waves = [&](int64_t heads) {
    return (heads * w.row_tiles + w.multiprocessors - 1) / w.multiprocessors;
  };
  const int64_t passes = (w.heads + fit - 1) / fit, each = (w.heads + passes - 1) / passes;
  const int64_t made = passes * waves(each) * kMade + w.heads * kMaking / w.multiprocessors;
  return made < waves(w.heads) * kExpanding ? static_cast<int32_t>(each) : 0;
}

static_assert(prefill_stages(128, true, 9, 0) >= 3 && prefill_stages(256, true, 9, 0) >= 1);

}  // namespace thriftattn::cuda
