// The warpgroups of attend_prefill that expand pages where they are used (attend_prefill_fill.cuh),
// page after page: one of K and one of V, or one of both. Copies run several sides (K or V of a
// page) ahead of what is expanded.
#pragma once

#include "cuda/attend_prefill_batches.cuh"
#include "cuda/attend_prefill_groups.cuh"

namespace thriftattn::cuda {

// What a filling warpgroup fills.
inline constexpr int kFillKeys = 1, kFillValues = 2;

template <int D, int kSides>
class PrefillPages : private PrefillBatches<D, (kSides & kFillKeys) != 0> {
 public:
  static constexpr bool kKeys = (kSides & kFillKeys) != 0, kValues = (kSides & kFillValues) != 0;
  using Batches = PrefillBatches<D, kKeys>;

  __device__ PrefillPages(const AttendArgs& a, const TileView& v, int seq_head,
                          PrefillShared& shared, const PrefillTiles& tiles)
      : Batches(a, v, seq_head, shared, tiles), filler_(a, seq_head % a.g.kv_heads) {}

  // Fills the tiles of every item.
  __device__ void run(const TileView& v);

 private:
  using Batches::a_, Batches::facts, Batches::items_, Batches::kTile, Batches::length_,
      Batches::page_begin_, Batches::shared_, Batches::thread_, Batches::tiles_, Batches::warp_;
  using typename Batches::Ring;

  __device__ int held(int item) const { return min(kPage, length_ - (page_begin_ + item) * kPage); }
  __device__ uint32_t v_mean(int stage) const {
    return shared_address(tiles_.v_means + (stage * 4 + warp_) * (2 * D));
  }
  __device__ void fetch_next();

  const TileFiller<D> filler_;
  Ring next_k_, next_v_;
  // The next side to fetch: K's tiles of item 0, V of item 0, K's of item 1 ...
  int next_item_ = 0, next_side_ = 0;
};

// One group of copies, of nothing behind the last item.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_next() {
  if (next_item_ < items_) {
    if (kKeys && (!kValues || next_side_ < filler_.k_tiles())) {
      barrier_wait(&shared_.k_empty[next_k_.stage], next_k_.parity);
      filler_.fetch_k(facts(next_item_), held(next_item_), next_side_,
                      tiles_.k + next_k_.stage * kTile);
      next_k_.next(a_.stages);
    } else {
      barrier_wait(&shared_.v_empty[next_v_.stage], next_v_.parity);
      filler_.fetch_v(facts(next_item_), held(next_item_), tiles_.v + next_v_.stage * kTile,
                      v_mean(next_v_.stage));
      next_v_.next(a_.stages);
    }
    if (++next_side_ == (kKeys ? filler_.k_tiles() : 0) + (kValues ? 1 : 0)) {
      next_side_ = 0;
      ++next_item_;
    }
  }
  copies_commit();
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::run(const TileView& v) {
  // Sides on their way; the more, the fewer tiles are ready ahead of the attending warps. K and V
  // in turn: a side is fetched when the one 2 * stages before it was given back, for which the
  // attending warps may need the keys of the page behind it: less than 2 * stages - 1. By
  // themselves: `stages` before it; at most `stages`.
  int ahead = a_.stages > 2 ? 2 : 1;
  if (kKeys && kValues) ahead = a_.stages > 2 ? a_.stages - 1 : a_.stages;
  this->begin();
  for (int i = 0; i < ahead; ++i) fetch_next();
  Ring keys, values;
  for (int n = 0; n < items_; ++n) {
    copies_wait(ahead);
    if (n % kPageBatch == 0) this->begin_batch(n / kPageBatch);
    const PageFacts f = facts(n);
    if constexpr (kKeys) {
      if (a_.call.decisions != nullptr) this->write_decisions(v, f, page_begin_ + n);
      for (int part = 0; part < filler_.k_tiles(); ++part) {
        if (part > 0) copies_wait(ahead);
        filler_.expand_k(tiles_.k + keys.stage * kTile, f, part);
        if (thread_ == 0) shared_.notes[keys.stage] = {f.k_factor, f.v_exponent};
        fence_stores_before_products();
        barrier_arrive(&shared_.k_full[keys.stage]);
        keys.next(a_.stages);
        fetch_next();
      }
    }
    if constexpr (kValues) {
      if (kKeys) copies_wait(ahead);
      filler_.expand_v(tiles_.v + values.stage * kTile, f, v_mean(values.stage));
      fence_stores_before_products();
      barrier_arrive(&shared_.v_full[values.stage]);
      __syncwarp();  // and is read by all before it is copied again
      values.next(a_.stages);
      fetch_next();
    }
  }
}

}  // namespace thriftattn::cuda
