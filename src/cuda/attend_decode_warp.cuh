// attend_decode: attention of a few query rows over a long context, one pass over the pages.
//
// A block takes a split of the pages of one (sequence, KV head) for a tile of 8 * NT query rows
// (positions x heads of the group). Its warps share nothing but the query: each walks
// pages with a ring of asynchronous copies of its own, so there are no barriers between warps, and
// what a page holds of the attention is known inside one warp.
//
// Scores are S^T = K.Q^T (A = 16 tokens x 16 dims of K, B = 8 query rows), values O^T = V^T.P^T
// (A = 16 dims x 16 tokens of V). The order of dims inside a product is free, so a lane's words
// are taken as they lie: lane (g, j) = (lane / 4, lane % 4) holds, of K's token row g, dims
// j * D/4 ... as whole words, and of V, dims g * D/8 ... of tokens 2j, 2j+1, 2j+8, 2j+9. Row r of
// 16 tokens is token r ^ (r >> 1 & 1): so V's four rows fall on different banks.
//
// Whole pages of BF16 or FP8 rows, and the last page of a step of one position, go through a short
// loop of their own (attend_decode_walk.cuh), with one running softmax reference, and so do those of
// planes of which one has groups of 32 (attend_groups_walk.cuh); the rest - the open page, pages that
// a window cuts, sides that differ, rows that differ - through walk_rest(), where each page has a
// reference of its own. Where both
// sides are NVFP4 planes, attend_planes takes the whole pages and calls this for the rest. O is
// FP32 and takes a page with one factor a row, into which the page scale goes. A row that skips a
// page has factor 0 but still adds mass * mean(V). V is fetched after the decision, one page behind
// K.
//
// A page that rows promote is left out for these rows and noted; after the walk the warp reads the
// noted pages again with base and residual, for these rows alone.
#pragma once

#include <cuda_bf16.h>

#include "cuda/attend_items.cuh"
#include "cuda/attend_launch.h"
#include "cuda/attend_nvfp4.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/mma.cuh"

namespace thriftattn::cuda {

inline constexpr int kNotes = 4;  // items whose addresses are remembered: one behind, two ahead

template <int D>
struct StageSizes {
  static constexpr int kRowStride = 2 * D + 16;  // of BF16 rows: 16 bytes against bank conflicts
  static constexpr int kK = 36 * D;              // a plane; 16 BF16 rows; 32 FP8 rows
  static constexpr int kV = 38 * D;              // and V's mean
  static_assert(16 * kRowStride <= kK && 32 * (D + 4) <= kK);
};

// Rows of a stage, as a plain side stores them.
template <int D>
struct BrainRows16 {
  static constexpr SideKind kKind = SideKind::bf16;
  static constexpr int kRows = 16, kStride = StageSizes<D>::kRowStride;
};
template <int D>
struct Fp8Rows {
  static constexpr SideKind kKind = SideKind::fp8;
  static constexpr int kRows = 32, kStride = D + 4;
};

template <int D, int NT, bool kWithGroups>
struct WarpShared {
  static constexpr bool kGroups = kWithGroups;
  static constexpr int kRing = 2;  // stages of K, and of V
  alignas(64) uint8_t k[kRing][StageSizes<D>::kK];
  uint8_t v[kRing][StageSizes<D>::kV];
  float record[2][4 + 8 * NT];
  alignas(16) ItemNote notes[kNotes];
  uint64_t k_bar[kRing], v_bar[kRing];
};

template <int D, int NT, bool kGroups>
struct BlockShared {
  WarpShared<D, NT, kGroups> warps[kWarps];
  TileRows<NT> rows;
};
// Three blocks an SM: (228 KB - 3 * 1 KB) / 3.
static_assert(sizeof(BlockShared<128, 1, true>) <= 76800);

// Shared has the rings of copies: kRing, k, v, record, notes, k_bar, v_bar, as WarpShared; and
// kGroups where the code that reads MXFP4 and INT3 planes is wanted.
template <int D, int NT, class Shared>
class DecodeWarp : ItemWalk<D, NT> {
 public:
  __device__ DecodeWarp(const ItemWalk<D, NT>& walk, Shared& shared)
      : ItemWalk<D, NT>(walk), s_(shared), perm_(token_of_row(g_)) {
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      m_[c] = kEmpty;
      l_[c] = 0;
    }
    clear(o_);
  }
  // Once, before the first walk with these rings.
  __device__ static void init(Shared& shared, int lane) {
    if (lane == 0) {
      for (int i = 0; i < kRing; ++i) {
        barrier_init(&shared.k_bar[i]);
        barrier_init(&shared.v_bar[i]);
      }
      fence_barrier_init();
    }
    __syncwarp();
  }

  // Copies ahead of walk_rows(): of the items base ... base + 31.
  struct RowCopies {
    int base = -1;
    ItemNote note;                        // of item base + lane
    uint32_t k_ahead = 0, v_ahead = 0;    // items that are not copied yet, one a bit
    int k_unit = 0, v_unit = 0;           // stages of the first of them
  };
  // What needs nothing of attend_prepare: sorts the items, and where they are rows starts the first
  // copies. Then run().
  __device__ void begin(RowCopies& copies);
  __device__ void run(RowCopies& copies);
  __device__ void leave(float* to) const;

  // For a warp that has walked all but `other`: lane i holds bits for the items 32 i ... . used_k,
  // used_v: how many stages of the rings were used by such walks before.
  __device__ void walk_others(uint32_t other, int& used_k, int& used_v) {
    k_issued_ = k_used_ = used_k;
    v_issued_ = v_used_ = used_v;
    other_ = other;
    others_ = static_cast<int>(__reduce_add_sync(0xffffffffu, __popc(other)));
    walk_rest();
    used_k = k_used_;
    used_v = v_used_;
  }
  // The sums (store_state), and l and m of each row.
  __device__ void leave_state(uint8_t* state, float* l, float* m) const {
    store_state<D, NT>(state, lane_, o_);
    if (g_ != 0) return;
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      l[column_row(c)] = l_[c];
      m[column_row(c)] = m_[c];
    }
  }

 private:
  using Base = ItemWalk<D, NT>;
  using Base::a_, Base::v_, Base::b_, Base::tile_, Base::head_, Base::seq_, Base::lane_, Base::g_,
      Base::j_, Base::items_, Base::rules_;
  using Base::describe, Base::exists, Base::item_of, Base::column_row, Base::item_page,
      Base::residual_in_reach, Base::always_full, Base::skippable, Base::side_at, Base::residual_at,
      Base::query_nvfp4, Base::decision_at;
  static constexpr int kRing = Shared::kRing;
  static constexpr bool kGroups = Shared::kGroups;
  // The reference of an empty sum: finite, so that differences are.
  static constexpr float kEmpty = -1e30f;

  struct Pending {
    uint32_t p[4][NT][2];  // half2 of rows 2j, 2j + 1 (and + 8) of 16 tokens for column g
    float m[2 * NT], l[2 * NT];
    uint32_t out = 0;   // bit c: the column takes nothing from this item
    uint32_t skip = 0;  // bit c: only mass * mean(V)
    float v_scale = 1, v_res_scale = 1;
    int note = 0;
    int units = 0, issued = 0;  // of V
    bool mean_only = false;
  };

  // Of a base plane.
  __device__ static int plane_bytes(const SideGeometry& side) {
    return kGroups ? side.plane_bytes() : 36 * D;
  }
  __device__ static int units_of(const SideGeometry& side, int kind, int held) {
    if (side.layered() && kind != kItemOpen) return kind == kItemSealed ? 1 : 2;
    return side.kind == SideKind::fp8 ? (held + 31) / 32 : (held + 15) / 16;
  }
  // Where the rows of a plain or open side begin.
  __device__ const uint8_t* rows_at(const SideGeometry& side, const ItemNote& note,
                                    int open_offset) const {
    if (note.kind() == kItemOpen && side.layered()) {
      return a_.call.memory.open + int64_t{note.slot} * a_.g.open_bytes + open_offset +
             head_ * (kPage * 2 * D);
    }
    return side_at(side, note.kind() == kItemOpen ? note.residual : note.slot) + side.rows;
  }

  __device__ static void rest_of(DecodeWarp& warp);
  __device__ void walk_rest();
  __device__ void take_sums(const DecodeWarp& from) {
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      m_[c] = from.m_[c];
      l_[c] = from.l_[c];
    }
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[i][n][e] = from.o_[i][n][e];
      }
    }
  }
  template <class Rows>
  __device__ void begin_rows(int base, RowCopies& copies);
  template <class Rows>
  __device__ void fetch_rows(const SideGeometry& side, bool keys, RowCopies& copies);
  template <class Rows>
  __device__ void walk_rows(RowCopies& copies);
  template <class Rows>
  __device__ void clear_rows(uint8_t* stage, int from) const;
  __device__ void walk_groups();
  // The first page is weighed relative to 0, and sets the reference.
  __device__ void begin_walk() {
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      if (fresh_) m_[c] = 0;
    }
  }
  __device__ void weigh(float (&s)[4][NT][4], uint32_t (&p)[4][NT][2], float (&sum)[2 * NT],
                        float (&waiting)[2 * NT]);
  __device__ void write_tile_decisions(int page, Decision decision) const;
  __device__ void sort_items();
  __device__ bool next_item();
  __device__ void issue_k();
  __device__ void issue_rows(StageCopy copy, uint8_t* to, const SideGeometry& side,
                             const uint8_t* rows, int unit, int held);
  __device__ void issue_v(Pending& first, Pending& second);
  __device__ void scores_bf16(const uint8_t* rows, float (&s)[NT][4]) const;
  __device__ void scores_fp8(const uint8_t* rows, int slice, float (&s)[NT][4]) const;
  __device__ void softmax(float (&s)[4][NT][4], Pending& p) const;
  __device__ uint32_t* noted_rows(int item) const;
  __device__ void note_columns(int item, uint32_t columns) const;
  __device__ uint32_t noted_columns(int item) const;
  __device__ void decide(const ItemNote& note, int page, Pending& cur);
  __device__ void decide_by_position(const ItemNote& note, int page, const float (&mass)[2 * NT],
                                     Pending& cur) const;
  __device__ void write_decisions(int page, Decision decision, uint32_t columns, uint32_t skipping,
                                  bool open) const;
  __device__ void scores(int n, Pending& cur);
  __device__ void take_factors(const Pending& p, float (&f)[2 * NT], float (&lf)[2 * NT]);
  __device__ void values(Pending& p, Pending& next);
  __device__ void values_bf16(const uint8_t* rows, const uint32_t (&p)[4][NT][2], int slice,
                              const float (&f)[2 * NT]);
  __device__ void values_fp8(const uint8_t* rows, const uint32_t (&p)[4][NT][2], int unit,
                             const float (&f)[2 * NT]);

  Shared& s_;
  int perm_;
  int others_ = 0;     // of these, not simple: each is looked at by itself
  int again_ = 0;      // read again after them
  bool fresh_ = true;  // no walk has weighed a page
  int tail_ = kPage;   // tokens of the walk's first item, where that is a page in part
  // Lane i holds bits for the items 32 i ... of the walk.
  uint32_t simple_ = 0;  // whole and alike for all rows: the walks below
  uint32_t other_ = 0;   // the rest
  uint32_t noted_ = 0;   // those that some row promoted: read again at the end

  // The copy cursors.
  int k_item_ = 0, k_unit_ = 0, k_units_ = 0, k_end_ = 0, k_issued_ = 0, k_used_ = 0;
  int v_issued_ = 0, v_used_ = 0;

  float m_[2 * NT], l_[2 * NT];
  float o_[D / 16][NT][4];
};

// Tells simple items from others.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::sort_items() {
  const bool rows = !kGroups && a_.g.k.kind == a_.g.v.kind && !a_.g.k.layered();
  const bool walks = (kGroups ? a_.g.k.layered() && a_.g.v.layered() : rows) && a_.softcap == 0;
  // What several positions may promote, or some of them do by budget, is decide()'s; a page that is
  // only skipped is so for the tile.
  const int decided = (v_.i_first == v_.i_last ? 0 : kItemPromotable) | kItemChosen;
  for (int base = 0; base < items_; base += 32) {
    const int n = base + lane_;
    bool simple = false;
    if (walks && exists(n)) {
      const int flags = describe(n).flags;
      simple =
          (flags & (kItemKind | kItemMixed | kItemWhole | decided)) == (kItemSealed | kItemWhole);
      if (!simple && rows && n == 0 && Base::first_ == 0 && v_.i_first == v_.i_last) {
        // The last page, of which the one position sees the first tokens.
        const int page = item_page(item_of(0));
        simple = page * kPage >= v_.begin(v_.i_first);
        if (simple) tail_ = min(kPage, v_.end(v_.i_first) - page * kPage);
      }
    }
    const uint32_t chosen = __ballot_sync(0xffffffffu, simple);
    const uint32_t exist = __ballot_sync(0xffffffffu, exists(n));
    if (lane_ == base / 32) {
      simple_ = chosen;
      other_ = exist & ~chosen;
    }
    others_ += __popc(exist & ~chosen);
  }
  tail_ = __shfl_sync(0xffffffffu, tail_, 0);
}

// Notes the next item that is not simple, or of those to be read again; false at the end.
template <int D, int NT, class Shared>
__device__ bool DecodeWarp<D, NT, Shared>::next_item() {
  if (k_item_ >= k_end_) return false;
  const bool again = k_item_ >= others_;
  const uint32_t mask = again ? noted_ : other_;
  const uint32_t words = __ballot_sync(0xffffffffu, mask != 0);
  const int word = __ffs(static_cast<int>(words)) - 1;
  const uint32_t bits = __shfl_sync(0xffffffffu, mask, word);
  if (lane_ == word && again) noted_ &= noted_ - 1;
  if (lane_ == word && !again) other_ &= other_ - 1;
  ItemNote note = describe(word * 32 + __ffs(static_cast<int>(bits)) - 1);
  if (again) note.flags = (note.flags & ~kItemKind) | kItemAgain;
  if (lane_ == 0) s_.notes[k_item_ % kNotes] = note;
  __syncwarp();
  return true;
}

template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::issue_rows(StageCopy copy, uint8_t* to,
                                                      const SideGeometry& side, const uint8_t* rows,
                                                      int unit, int held) {
  if (side.kind == SideKind::fp8) {
    // Whole 16 bytes; the slot goes on behind the last row.
    const int bytes = (min(32, held - 32 * unit) * (D + 4) + 15) / 16 * 16;
    copy.begin(bytes);
    copy.copy(to, 0, rows + unit * 32 * (D + 4), 0, bytes, 1);
  } else {
    const int count = min(16, held - 16 * unit);
    copy.begin(count * 2 * D);
    copy.copy(to, StageSizes<D>::kRowStride, rows + unit * 16 * 2 * D, 2 * D, 2 * D, count);
  }
}

// Starts the copies of K's units while stages are free; an item's record comes with its first.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::issue_k() {
  while (k_issued_ - k_used_ < kRing) {
    if (k_unit_ == 0 && !next_item()) return;
    const ItemNote note = s_.notes[k_item_ % kNotes];
    __syncwarp();
    const int stage = k_issued_ % kRing;
    const StageCopy copy{&s_.k_bar[stage], lane_};
    const bool first = k_unit_ == 0;
    constexpr int kRecord = 16 + 32 * NT;
    if (first) {
      k_units_ = units_of(a_.g.k, note.kind(), note.held());
      copy.expect(kRecord);
    }
    if (a_.g.k.layered() && note.kind() != kItemOpen) {
      const int bytes = first ? plane_bytes(a_.g.k) : 36 * D;
      copy.begin(bytes);
      copy.copy(s_.k[stage], 0,
                first ? side_at(a_.g.k, note.slot) + a_.g.k.codes
                      : residual_at(note.residual) + a_.g.k.res_codes,
                0, bytes, 1);
    } else {
      issue_rows(copy, s_.k[stage], a_.g.k, rows_at(a_.g.k, note, 0), k_unit_, note.held());
    }
    if (first) {
      const int page = item_page(note.item);
      const int index = note.kind() == kItemOpen
                            ? static_cast<int>(a_.limits.max_pages) + page - v_.open_from(0)
                            : page;
      copy.copy(reinterpret_cast<uint8_t*>(s_.record[k_item_ % 2]), 0,
                reinterpret_cast<const uint8_t*>(
                    page_record(a_, int64_t{seq_} * a_.g.kv_heads + head_, tile_, index)),
                0, kRecord, 1);
    }
    copy.end();
    ++k_issued_;
    if (++k_unit_ == k_units_) {
      k_unit_ = 0;
      ++k_item_;
    }
  }
}

// Starts copies of V while stages are free: of `first`, then of `second`.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::issue_v(Pending& first, Pending& second) {
  while (v_issued_ - v_used_ < kRing) {
    const bool of_first = first.issued < first.units;
    if (!of_first && second.issued >= second.units) return;
    const int unit = of_first ? first.issued++ : second.issued++;
    const bool mean_only = of_first ? first.mean_only : second.mean_only;
    const ItemNote note = s_.notes[of_first ? first.note : second.note];
    __syncwarp();
    const int stage = v_issued_ % kRing;
    const StageCopy copy{&s_.v_bar[stage], lane_};
    uint8_t* to = s_.v[stage];
    if (a_.g.v.layered() && note.kind() != kItemOpen) {
      // Codes, scales and mean lie side by side.
      const int skipped = mean_only ? plane_bytes(a_.g.v) : 0;
      const int bytes = unit == 0 ? plane_bytes(a_.g.v) + 2 * D - skipped : 36 * D;
      copy.begin(bytes);
      copy.copy(to + skipped, 0,
                unit == 0 ? side_at(a_.g.v, note.slot) + a_.g.v.codes + skipped
                          : residual_at(note.residual) + a_.g.v.res_codes,
                0, bytes, 1);
    } else {
      issue_rows(copy, to, a_.g.v, rows_at(a_.g.v, note, a_.g.open_v), unit, note.held());
    }
    copy.end();
    ++v_issued_;
  }
}

}  // namespace thriftattn::cuda
