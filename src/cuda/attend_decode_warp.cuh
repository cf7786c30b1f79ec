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
// Whole pages go through short loops of their own (attend_decode_walk.cuh), with one running softmax
// reference; the rest - the first, the newest and the open page, other formats, rows that differ -
// through walk_rest(), where each page has a reference of its own. O is FP32 and takes a page with one
// factor a row, into which the page scale goes. A row that skips a page has factor 0 but still adds
// mass * mean(V). V is fetched after the decision, one page behind K.
//
// A page that rows promote is left out for these rows and noted; after the walk the warp reads the
// noted pages again with base and residual, for these rows alone.
#pragma once

#include <cuda_bf16.h>

#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/mma.cuh"

namespace thriftattn::cuda {

inline constexpr int kStages = 2;  // of K, and of V
inline constexpr int kNotes = 4;   // items whose addresses are remembered: one behind, two ahead

template <int D>
struct StageSizes {
  static constexpr int kRowStride = 2 * D + 16;  // of BF16 rows: 16 bytes against bank conflicts
  static constexpr int kK = 36 * D;              // a plane; 16 BF16 rows; 32 FP8 rows
  static constexpr int kV = 38 * D;              // and V's mean
  static_assert(16 * kRowStride <= kK && 32 * (D + 4) <= kK);
};

// How an item is read.
enum ItemKind : int32_t {
  kItemSealed = 0,  // base planes (or plain rows), by the mass rule
  kItemFull = 1,    // base and residual for all rows
  kItemOpen = 2,    // the open form
  kItemAgain = 3,   // base and residual for the rows that promoted it
};
// With the kind in the low bits and the number of tokens that exist from bit 8 on:
enum ItemFlags : int32_t {
  kItemKind = 3,
  kItemWhole = 4,        // every row sees every token
  kItemPromotable = 8,   // by mass
  kItemSkippable = 16,   // by mass
  kItemMixed = 32,       // rows differ in what they may do
};

struct ItemNote {
  int32_t slot = -1;      // page slot, or open slot
  int32_t residual = -1;  // residual slot; of an open item, its page slot
  int32_t item = 0;       // within the tile's list
  int32_t flags = 0;

  __device__ int kind() const { return flags & kItemKind; }
  __device__ int held() const { return flags >> 8; }
};

template <int D, int NT>
struct WarpShared {
  alignas(64) uint8_t k[kStages][StageSizes<D>::kK];
  uint8_t v[kStages][StageSizes<D>::kV];
  float record[kStages][4 + 8 * NT];
  alignas(16) ItemNote notes[kNotes];
  uint64_t k_bar[kStages], v_bar[kStages];
};

// What the tile's rows are: kept here, because registers are what bounds the kernel.
template <int D, int NT>
struct BlockShared {
  WarpShared<D, NT> warps[kWarps];
  float row_factor[8 * NT];
  float floor[8 * NT];       // log2 of a floor of the row's sum
  int32_t position[8 * NT];  // of the pass; -1: no such row
  TileView view;
};
// Three blocks an SM: (228 KB - 3 * 1 KB) / 3.
static_assert(sizeof(BlockShared<128, 1>) <= 76800);

// Rows c * 8 + 2j, + 1 of the tile are a lane's columns 2c, 2c + 1.
template <int D, int NT>
class DecodeWarp {
 public:
  __device__ DecodeWarp(const AttendArgs& a, BlockShared<D, NT>& block, int warp, int head,
                        int tile, int seq, int split)
      : a_(a),
        v_(block.view),
        b_(block),
        s_(block.warps[warp]),
        tile_(tile),
        head_(head),
        seq_(seq) {
    lane_ = threadIdx.x % 32;
    g_ = lane_ / 4;
    j_ = lane_ % 4;
    perm_ = g_ ^ (g_ >> 1 & 1);
    // Splits take turns, so that the last pages, which take longer, fall to different blocks.
    const int splits = static_cast<int>(splits_of(v_.items));
    first_item_ = split + warp * splits;
    stride_ = splits * kWarps;
    items_ = first_item_ < v_.items ? (v_.items - first_item_ + stride_ - 1) / stride_ : 0;
    if (lane_ == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&s_.k_bar[i]);
        barrier_init(&s_.v_bar[i]);
      }
      fence_barrier_init();
    }
    __syncwarp();
    rules_ = !v_.prefill && a.g.any_layered() && (a.g.promote < 1.0f || a.g.skip > 0.0f);
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      m_[c] = kEmpty;
      l_[c] = 0;
    }
    clear(o_);
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int i = 0; i < D / 16; ++i) q_[i] = query_nvfp4()[i * 32];
    }
  }

  __device__ void run();
  __device__ void leave(float* to) const;

 private:
  // The reference of an empty sum: finite, so that differences are.
  static constexpr float kEmpty = -1e30f;
  static constexpr bool kQueryInRegisters = NT == 1 && D <= 128;

  struct Pending {
    uint32_t p[4][NT][2];  // half2 of rows 2j, 2j + 1 (and + 8) of 16 tokens for column g
    float m[2 * NT], l[2 * NT];
    uint32_t out = 0;      // bit c: the column takes nothing from this item
    uint32_t skip = 0;     // bit c: only mass * mean(V)
    float v_scale = 1, v_res_scale = 1;
    int note = 0;
    int units = 0, issued = 0;  // of V
    bool mean_only = false;
  };

  __device__ const uint2* query_nvfp4() const {
    const int64_t n_tile =
        ((int64_t{seq_} * a_.g.kv_heads + head_) * a_.ws.rows + v_.first_row) / 8;
    return workspace_at<const uint2>(a_, a_.ws.q_nvfp4) + n_tile * (D / 16) * 32 + lane_;
  }
  __device__ int column_row(int c) const { return c / 2 * 8 + 2 * j_ + (c & 1); }
  __device__ bool item_sealed(int item) const { return item < v_.sealed_items; }
  __device__ int item_page(int item) const {
    return item_sealed(item) ? v_.page_begin + item : v_.open_first + item - v_.sealed_items;
  }
  __device__ bool residual_in_reach(int page, int i) const {
    if (!a_.g.sealed) return true;
    return int64_t{page} * kPage < a_.g.sinks ||
           int64_t{page + 1} * kPage > v_.end(i) - a_.g.recent;
  }
  // Whether a held residual is read whatever the mass, where it is in reach.
  __device__ bool always_full() const {
    return v_.prefill || a_.g.k.always_full || a_.g.v.always_full || a_.g.sealed;
  }
  __device__ bool forced_full(int page, int i) const {
    return v_.prefill || (always_full() && residual_in_reach(page, i));
  }
  __device__ bool skippable(int page, int i) const {
    return a_.g.v.layered() && a_.g.center &&
           (v_.window == 0 || page * kPage >= v_.end(i) - v_.window);
  }
  __device__ static int units_of(const SideGeometry& side, int kind, int held) {
    if (side.layered() && kind != kItemOpen) return kind == kItemSealed ? 1 : 2;
    return side.kind == SideKind::fp8 ? (held + 31) / 32 : (held + 15) / 16;
  }
  __device__ const uint8_t* side_at(const SideGeometry& side, int slot) const {
    return a_.call.memory.pages + int64_t{slot} * a_.g.slot_bytes + side.start +
           int64_t{head_} * side.head_bytes;
  }
  __device__ const uint8_t* residual_at(int slot) const {
    return a_.call.memory.residuals + int64_t{slot} * a_.g.residual_bytes;
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
  __device__ void walk_planes();
  __device__ void walk_rows();
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
  __device__ ItemNote describe(int n) const;
  __device__ bool next_item();
  __device__ void issue_k();
  __device__ void issue_rows(StageCopy copy, uint8_t* to, const SideGeometry& side,
                             const uint8_t* rows, int unit, int held);
  __device__ void issue_v(Pending& first, Pending& second);
  __device__ void scores_nvfp4(const uint8_t* codes, float (&s)[4][NT][4]) const;
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
  __device__ void values_nvfp4(const uint8_t* codes, const uint32_t (&p)[4][NT][2], const float (&f)[2 * NT],
                               float scale);
  __device__ void values_bf16(const uint8_t* rows, const uint32_t (&p)[4][NT][2], int slice,
                              const float (&f)[2 * NT]);
  __device__ void values_fp8(const uint8_t* rows, const Pending& p, int slice,
                             const float (&f)[2 * NT]);
  __device__ void add_mean(const uint8_t* mean, const float (&lf)[2 * NT]);

  const AttendArgs& a_;
  const TileView& v_;
  BlockShared<D, NT>& b_;
  WarpShared<D, NT>& s_;
  int tile_, head_, seq_;
  int lane_, g_, j_, perm_;
  int first_item_ = 0, stride_ = 1;  // item n of the walk is first_item_ + n * stride_ of the tile
  int items_ = 0;        // of the walk
  int others_ = 0;       // of these, not simple: each is looked at by itself
  int again_ = 0;        // read again after them
  bool rules_ = false;
  bool fresh_ = true;    // no walk has weighed a page
  // Lane i holds bits for the items 32 i ... of the walk.
  uint32_t simple_ = 0;  // whole and alike for all rows: the walks below
  uint32_t other_ = 0;   // the rest
  uint32_t noted_ = 0;   // those that some row promoted: read again at the end

  // The copy cursors.
  int k_item_ = 0, k_unit_ = 0, k_units_ = 0, k_end_ = 0, k_issued_ = 0, k_used_ = 0;
  int v_issued_ = 0, v_used_ = 0;

  uint2 q_[kQueryInRegisters ? D / 16 : 1];
  float m_[2 * NT], l_[2 * NT];
  float o_[D / 16][NT][4];
};

// What item n of the walk is; each lane may ask for another.
template <int D, int NT>
__device__ ItemNote DecodeWarp<D, NT>::describe(int n) const {
  ItemNote note;
  note.item = first_item_ + n * stride_;
  const int page = item_page(note.item);
  const int held = min(kPage, v_.length - page * kPage);
  note.flags = held << 8;
  if (!item_sealed(note.item)) {
    note.slot = v_.t.open[page % static_cast<int>(v_.t.open_pages)];
    if (!a_.g.k.layered() || !a_.g.v.layered()) note.residual = v_.t.blocks[page];
    note.flags |= kItemOpen | kItemMixed;
    return note;
  }
  note.slot = v_.t.blocks[page];
  const bool layered = a_.g.any_layered();
  if (v_.t.residuals != nullptr && layered) {
    note.residual = v_.t.residuals[int64_t{page} * a_.g.kv_heads + head_];
  }
  const bool seen_by_all = !layered || page < v_.open_from(v_.i_first);
  const bool held_residual = note.residual >= 0;
  // What later positions may read in full, earlier ones may too; skipping likewise.
  const bool forced_first = held_residual && forced_full(page, v_.i_first);
  const bool forced_last = held_residual && forced_full(page, v_.i_last);
  const bool skip_first = skippable(page, v_.i_first), skip_last = skippable(page, v_.i_last);
  if (forced_last && seen_by_all) note.flags |= kItemFull;
  if (rules_ && held_residual && residual_in_reach(page, v_.i_first)) note.flags |= kItemPromotable;
  if (rules_ && a_.g.skip > 0 && skip_last) note.flags |= kItemSkippable;
  if (!seen_by_all || forced_first != forced_last || skip_first != skip_last) {
    note.flags |= kItemMixed;
  }
  if (held == kPage && seen_by_all && page * kPage >= v_.begin(v_.i_last) &&
      (layered || (page + 1) * kPage <= v_.end(v_.i_first))) {
    note.flags |= kItemWhole;
  }
  return note;
}

// Tells simple items from others.
template <int D, int NT>
__device__ void DecodeWarp<D, NT>::sort_items() {
  const bool planes = a_.g.k.layered() && a_.g.v.layered();
  const bool rows = a_.g.k.kind == SideKind::bf16 && a_.g.v.kind == SideKind::bf16;
  const bool walks = (planes || rows) && a_.softcap == 0;
  // The rule of several positions at once is decide()'s.
  const int decided = v_.i_first == v_.i_last ? 0 : kItemPromotable | kItemSkippable;
  for (int base = 0; base < items_; base += 32) {
    const int n = base + lane_;
    bool simple = false;
    if (n < items_ && walks) {
      const int flags = describe(n).flags;
      simple = (flags & (kItemKind | kItemMixed | kItemWhole | decided)) ==
               (kItemSealed | kItemWhole);
    }
    const uint32_t chosen = __ballot_sync(0xffffffffu, simple);
    const uint32_t exist = __ballot_sync(0xffffffffu, n < items_);
    if (lane_ == base / 32) {
      simple_ = chosen;
      other_ = exist & ~chosen;
    }
    others_ += __popc(exist & ~chosen);
  }
  __syncwarp();
}

// Notes the next item that is not simple, or of those to be read again; false at the end.
template <int D, int NT>
__device__ bool DecodeWarp<D, NT>::next_item() {
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

template <int D, int NT>
__device__ void DecodeWarp<D, NT>::issue_rows(StageCopy copy, uint8_t* to,
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
template <int D, int NT>
__device__ void DecodeWarp<D, NT>::issue_k() {
  while (k_issued_ - k_used_ < kStages) {
    if (k_unit_ == 0 && !next_item()) return;
    const ItemNote note = s_.notes[k_item_ % kNotes];
    __syncwarp();
    const int stage = k_issued_ % kStages;
    const StageCopy copy{&s_.k_bar[stage], lane_};
    const bool first = k_unit_ == 0;
    constexpr int kRecord = 16 + 32 * NT;
    if (first) {
      k_units_ = units_of(a_.g.k, note.kind(), note.held());
      copy.expect(kRecord);
    }
    if (a_.g.k.layered() && note.kind() != kItemOpen) {
      copy.begin(36 * D);
      copy.copy(s_.k[stage], 0,
                first ? side_at(a_.g.k, note.slot) + a_.g.k.codes
                      : residual_at(note.residual) + a_.g.k.res_codes,
                0, 36 * D, 1);
    } else {
      issue_rows(copy, s_.k[stage], a_.g.k, rows_at(a_.g.k, note, 0), k_unit_, note.held());
    }
    if (first) {
      const int page = item_page(note.item);
      const int index = note.kind() == kItemOpen
                            ? static_cast<int>(a_.limits.max_pages) + page - v_.open_from(0)
                            : page;
      copy.copy(reinterpret_cast<uint8_t*>(s_.record[k_item_ % 2]), 0,
                reinterpret_cast<const uint8_t*>(page_record(
                    a_, int64_t{seq_} * a_.g.kv_heads + head_, tile_, index)),
                0,
                kRecord, 1);
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
template <int D, int NT>
__device__ void DecodeWarp<D, NT>::issue_v(Pending& first, Pending& second) {
  while (v_issued_ - v_used_ < kStages) {
    const bool of_first = first.issued < first.units;
    if (!of_first && second.issued >= second.units) return;
    const int unit = of_first ? first.issued++ : second.issued++;
    const bool mean_only = of_first ? first.mean_only : second.mean_only;
    const ItemNote note = s_.notes[of_first ? first.note : second.note];
    __syncwarp();
    const int stage = v_issued_ % kStages;
    const StageCopy copy{&s_.v_bar[stage], lane_};
    uint8_t* to = s_.v[stage];
    if (a_.g.v.layered() && note.kind() != kItemOpen) {
      // Codes, scales and mean lie side by side.
      const int skipped = mean_only ? 36 * D : 0;
      const int bytes = unit == 0 ? 38 * D - skipped : 36 * D;
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
