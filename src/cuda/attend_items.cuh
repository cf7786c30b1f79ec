// What the query rows of a tile see of a sequence's pages, item by item: an item is a page in its
// tier, or an open page. Both attend kernels walk items of (sequence, KV head, tile of rows,
// split).
#pragma once

#include "cuda/attend_units.cuh"

namespace thriftattn::cuda {

// How an item is read.
enum ItemKind : int32_t {
  kItemSealed = 0,  // base planes (or plain rows), by the mass rule
  kItemFull = 1,    // base and residual for all rows
  kItemOpen = 2,    // the open form
  kItemAgain = 3,   // base and residual for the rows that promoted it
};
// With the kind in the low bits, the number of tokens that exist from bit 8 on, and the walk's
// index from bit 16 on:
enum ItemFlags : int32_t {
  kItemKind = 3,
  kItemWhole = 4,       // every row sees every token
  kItemPromotable = 8,  // by mass
  kItemSkippable = 16,  // by mass
  kItemMixed = 32,      // rows differ in what they may do
  kItemChosen = 64,     // a budget promotes it for some positions of the pass
};

struct ItemNote {
  int32_t slot = -1;      // page slot, or open slot
  int32_t residual = -1;  // residual slot; of an open item, its page slot
  int32_t item = 0;       // within the tile's list
  int32_t flags = 0;

  __device__ int kind() const { return flags & kItemKind; }
  __device__ int held() const { return flags >> 8 & 0xff; }
  __device__ int index() const { return flags >> 16; }  // of the walk
};

// What the tile's rows are: in shared memory, because registers are what bounds the kernels.
template <int NT>
struct TileRows {
  float row_factor[8 * NT];
  float floor[8 * NT];       // log2 of a floor of the row's sum
  int32_t position[8 * NT];  // of the pass; -1: no such row
  TileView view;
};

// Which walk of a tile: `part` of `parts` that share a split; whether those of the first split
// share the open page, which is no item of a walk then.
struct WalkPart {
  int split, splits, part, parts;
  bool share_open = false;
};

// Which items a walk has: every stride_'th, beginning with the newest. So the last pages, which
// take longer, fall to different walks. The newest one takes the place of open_items: its walk has
// none of the next open_items - 1; or the first place of each walk that shares it. Those after it
// that are read with their residual take two.
template <int D, int NT>
class ItemWalk {
 public:
  __device__ ItemWalk(const AttendArgs& a, const TileRows<NT>& rows, int head, int tile, int seq,
                      const WalkPart& p)
      : a_(a), v_(rows.view), b_(rows), tile_(tile), head_(head), seq_(seq) {
    lane_ = lane_in_register();
    g_ = lane_ / 4;
    j_ = lane_ % 4;
    const int splits = max(1, p.splits);  // no items: one split of none
    first_ = p.share_open ? p.split * p.parts + p.part : p.split + p.part * splits;
    stride_ = splits * p.parts;
    lead_ = p.share_open ? p.parts : 1;
    lead_places_ = p.share_open ? 1 : a.split_rule.open_items;
    heavy_ = min(heavy_items(a), stride_ - lead_);
    const int extra = lead_ * lead_places_ - 1 + heavy_;
    const int left = v_.items + extra - first_;
    items_ =
        left <= 0 ? 0 : static_cast<int>((left + stride_ - 1u) / static_cast<unsigned>(stride_));
    rules_ = !v_.prefill && a.g.any_layered() && (a.g.promote < 1.0f || a.g.skip > 0.0f);
  }

  // This lane's fragments of the tile's queries.
  __device__ const uint2* query_nvfp4() const {
    return workspace_at<const uint2>(a_, a_.ws.q_nvfp4) + first_fragment();
  }
  __device__ const uint4* query_bf16() const {
    return workspace_at<const uint4>(a_, a_.ws.q_bf16) + first_fragment();
  }

 private:
  __device__ int64_t first_fragment() const {
    const int64_t n_tile =
        ((int64_t{seq_} * a_.g.kv_heads + head_) * a_.ws.rows + v_.first_row) / 8;
    return n_tile * (D / 16) * 32 + lane_;
  }

 protected:
  // A budget of several positions has wider tiles (plan.cc), so that one row tile knows nothing of it.
  static constexpr bool kByPosition = NT > 1;

  // Row of the tile of a lane's column c: rows 8t + 2j, + 1 are columns 2t, 2t + 1.
  __device__ int column_row(int c) const { return c / 2 * 8 + 2 * j_ + (c & 1); }
  // Whether the walk's n-th place holds an item, and which.
  __device__ bool exists(int n) const {
    if (n >= items_ || item_of(n) < 0) return false;
    if (first_ < lead_) return n >= lead_places_ || (n == 0 && lead_ == 1);
    return n != 1 || first_ >= lead_ + heavy_;
  }
  __device__ int item_of(int n) const {
    const bool later = n > 1 || (n == 1 && first_ >= lead_);  // than the heavy ones
    return v_.items - 1 - (first_ + 1 + n * stride_ - lead_ * min(n + 1, lead_places_) -
                           (later ? heavy_ : 0));
  }
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
  __device__ const uint8_t* side_at(const SideGeometry& side, int slot) const {
    return a_.call.memory.pages + int64_t{slot} * a_.g.slot_bytes + side.start +
           int64_t{head_} * side.head_bytes;
  }
  __device__ const uint8_t* residual_at(int slot) const {
    return a_.call.memory.residuals + int64_t{slot} * a_.g.residual_bytes;
  }
  __device__ uint8_t* decision_at(int i, int page) const {
    return a_.call.decisions +
           ((seq_ * a_.limits.step_tokens + a_.first_q + i) * a_.limits.max_pages + page) *
               a_.g.kv_heads +
           head_;
  }
  // Of a kItemChosen page: a byte for each position of the pass.
  __device__ const uint8_t* choices_at(int page) const {
    return page_choices(a_, int64_t{seq_} * a_.g.kv_heads + head_, page);
  }
  __device__ ItemNote describe(int n) const;

  const AttendArgs& a_;
  const TileView& v_;
  const TileRows<NT>& b_;
  int tile_, head_, seq_;
  int lane_, g_, j_;
  int first_ = 0, stride_ = 1;
  int lead_ = 1, lead_places_ = 1;  // walks that have the open page, and how many places of each
  int heavy_ = 0;  // walks after these whose first item takes two places
  int items_ = 0;  // places of the walk
  bool rules_ = false;
};

// What item n of the walk is; each lane may ask for another.
template <int D, int NT>
__device__ ItemNote ItemWalk<D, NT>::describe(int n) const {
  ItemNote note;
  note.item = item_of(n);
  const int page = item_page(note.item);
  const int held = min(kPage, v_.length - page * kPage);
  note.flags = held << 8 | n << 16;
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
  const bool some = kByPosition && note.residual >= kSomePositions;
  if (some) {
    note.residual -= kSomePositions;
    note.flags |= kItemChosen;
  }
  const bool seen_by_all = !layered || page < v_.open_from(v_.i_first);
  const bool held_residual = note.residual >= 0;
  // What later positions may read in full, earlier ones may too; skipping likewise.
  const bool forced_first = held_residual && forced_full(page, v_.i_first);
  const bool forced_last = held_residual && forced_full(page, v_.i_last);
  const bool skip_first = skippable(page, v_.i_first), skip_last = skippable(page, v_.i_last);
  if (forced_last && seen_by_all && !some) note.flags |= kItemFull;
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

}  // namespace thriftattn::cuda
