// Prefill of one KV head in BF16 arithmetic: all query rows of its group, in tiles of 64, over every
// page they see. Pages are decoded to BF16 once for all tiles, 64 at a time; a tile takes them four
// at a time with a running maximum. Tiles are independent, pages come in their order: the result
// does not depend on the threads.
//
// Layered pages are read with base + residual where the residual is held, others as stored; tokens
// of the step's first page and later ones in open form. K' and V' are rounded to BF16 after the
// planes are added; q'.mean(K) and mean(V) stay FP32.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "attend/prefill_kernels.h"
#include "attend/request.h"
#include "cache/kv_cache_impl.h"
#include "thriftattn/attention.h"

namespace thriftattn {

class PrefillHead {
 public:
  // FP32 and FP16 caches keep FP32 arithmetic: BF16 would lose what they were chosen for.
  static bool supports(const LayerStore& store);

  PrefillHead(const LayerView& view, const AttendRequest& request, int64_t kv_head,
              const PrefillKernels& kernels);

  void run(AttendStats* stats);

 private:
  // Query rows [first_row, first_row + rows) of the group's, row = query * group + head.
  struct Tile {
    int64_t first_row, rows;
    int64_t first_token, last_token;  // positions of its first and last row
    int64_t page_begin, page_end;
    AlignedFloats q;                  // [dim_k][64] FP32, transformed and scaled
    AlignedWords q_pairs;             // [dim_k / 2][64]
    AlignedFloats o;                  // [dim_v][64]
    AlignedFloats m, l;               // [64]
  };

  // Of one thread.
  struct Scratch {
    AlignedFloats scores;  // [pages of a step][64][64]
    AlignedWords p;        // [pages of a step][32 token pairs][64]
    Scratch();
  };

  // The layer's query head of a row: the index into q, out, lse and sink_logits.
  int64_t q_head(int64_t row) const { return store_.model_head(kv_head_) * group_ + row % group_; }
  void make_tile(int64_t index);
  void decode_page(int64_t page, int64_t slot);
  void read_side(const SideLayout& side, int64_t page, float* out) const;
  void read_mean(const SideLayout& side, int64_t page, float* out) const;
  void attend_pages(Tile& tile, Scratch& scratch, int64_t slot, int64_t page, int64_t pages) const;
  void mask(const Tile& tile, int64_t page, float* s) const;
  void write(const Tile& tile);
  void add_stats(AttendStats& stats) const;

  const LayerView& view_;
  const AttendRequest& request_;
  const LayerStore& store_;
  const PrefillKernels& kernels_;
  Visibility visible_;
  int64_t kv_head_, group_, first_token_, open_from_;
  std::vector<Tile> tiles_;
  AlignedWords k_;        // [pages of a block][64][dim_k / 2]
  AlignedWords v_;        // [pages of a block][32 token pairs][dim_v]
  AlignedFloats k_mean_;  // [pages of a block][dim_k]
  AlignedFloats v_mean_;  // [pages of a block][dim_v]
};

}  // namespace thriftattn
