// The warpgroup of attend_prefill that fetches tiles which prefill_tiles() has made: a bulk copy
// each.
#pragma once

#include <type_traits>

#include "cuda/attend_prefill_batches.cuh"

namespace thriftattn::cuda {

// Tiles of a page: prefill_k_tiles() of K, one of V.
template <int D>
__device__ inline uint8_t* made_tile(const AttendArgs& a, int seq_head, int page, int tile) {
  const int64_t tiles = prefill_k_tiles(a) + 1;
  const int64_t at = (int64_t{seq_head - a.first_head} * a.limits.max_pages + page) * tiles + tile;
  return workspace_at<uint8_t>(a, a.ws.tiles) + at * prefill_tile_bytes(D);
}

template <int D>
class PrefillCopies : private PrefillBatches<D, true> {
 public:
  using Batches = PrefillBatches<D, true>;

  __device__ PrefillCopies(const AttendArgs& a, const TileView& v, int seq_head,
                           PrefillShared& shared, const PrefillTiles& tiles)
      : Batches(a, v, seq_head, shared, tiles),
        from_(made_tile<D>(a, seq_head, v.page_begin, 0)),
        k_tiles_(prefill_k_tiles(a)) {}

  // Copies into empty stages, by one warp.
  __device__ void start() {
    while (started_ < items_ && (started_ + 1) * k_tiles_ <= a_.stages) {
      for (int part = 0; part < k_tiles_; ++part)
        copy(shared_.k_full, shared_.k_empty, tiles_.k, keys_);
      copy(shared_.v_full, shared_.v_empty, tiles_.v, values_);
      ++started_;
    }
  }
  // The rest, and what attending warps need beside tiles; by the warpgroup.
  __device__ void run(const TileView& v);

 private:
  using Batches::a_, Batches::facts, Batches::items_, Batches::kTile, Batches::page_begin_,
      Batches::shared_, Batches::thread_, Batches::tiles_, Batches::warp_;
  using typename Batches::Ring;

  // The next tile, into a stage that was given back.
  __device__ void copy(uint64_t* full, uint64_t* empty, uint32_t stages, Ring& ring) {
    barrier_wait(&empty[ring.stage], ring.parity);
    if (thread_ == 0) {
      StageCopy{&full[ring.stage], 0}.begin(kTile);
      bulk_load(stages + ring.stage * kTile, from_, kTile, &full[ring.stage]);
    }
    from_ += kTile;
    ring.next(a_.stages);
  }

  const uint8_t* from_;
  int k_tiles_, started_ = 0;
  Ring keys_, values_, notes_;
};

// Where tiles are expanded where they are used there is nothing to copy.
struct NoCopies {
  __device__ NoCopies(const AttendArgs&, const TileView&, int, PrefillShared&,
                      const PrefillTiles&) {}
  __device__ void start() {}
};
template <int D, bool kMade>
using MadeTiles = std::conditional_t<kMade, PrefillCopies<D>, NoCopies>;

template <int D>
__device__ void PrefillCopies<D>::run(const TileView& v) {
  this->begin();
  copies_commit();
  for (int n = 0; n < items_; ++n) {
    if (n % kPageBatch == 0) {
      copies_wait(1);
      this->begin_batch(n / kPageBatch);
      copies_commit();
    }
    if (a_.call.decisions != nullptr) this->write_decisions(v, facts(n), page_begin_ + n);
    if (warp_ != 0) continue;
    // A stage of K goes on with its note, so that one is enough for two tiles of a page.
    for (int part = 0; part < k_tiles_; ++part) {
      if (n >= started_) copy(shared_.k_full, shared_.k_empty, tiles_.k, keys_);
      if (thread_ == 0) {
        shared_.notes[notes_.stage] = {facts(n).k_factor, facts(n).v_exponent};
        barrier_arrive(&shared_.k_full[notes_.stage]);
      }
      notes_.next(a_.stages);
    }
    if (n >= started_) copy(shared_.v_full, shared_.v_empty, tiles_.v, values_);
  }
}

}  // namespace thriftattn::cuda
