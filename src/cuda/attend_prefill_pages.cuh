// The warpgroups of attend_prefill that fill tiles (attend_prefill_fill.cuh) page after page: one
// of K and one of V, or one of both. Copies run several sides (K or V of a page) ahead of what is
// expanded; facts and means of pages come kPageBatch pages at a time.
#pragma once

#include "cuda/attend_prefill_fill.cuh"

namespace thriftattn::cuda {

// What a filling warpgroup fills.
inline constexpr int kFillKeys = 1, kFillValues = 2;

template <int D, int kSides>
class PrefillPages {
 public:
  static constexpr bool kKeys = (kSides & kFillKeys) != 0, kValues = (kSides & kFillValues) != 0;
  struct Tiles {
    uint32_t q = 0, q_low = 0, k = 0, v = 0;  // shared addresses
    uint8_t* k_means = nullptr;
    uint8_t* v_means = nullptr;
  };

  __device__ PrefillPages(const AttendArgs& a, const TileView& v, int head, int64_t seq_head,
                          PrefillShared& shared, const Tiles& tiles)
      : a_(a),
        filler_(a, head),
        shared_(shared),
        tiles_(tiles),
        head_(head),
        length_(v.length),
        page_begin_(v.page_begin),
        items_(v.items) {
    facts_ =
        workspace_at<const PageFacts>(a, a.ws.facts) + seq_head * a.limits.max_pages + v.page_begin;
  }

  // Fills the tiles of every item.
  __device__ void run(const TileView& v);

 private:
  static constexpr uint32_t kTile = prefill_tile_bytes(D);

  __device__ const PageFacts& facts(int item) const {
    return shared_.facts[kKeys ? 0 : 1][item / kPageBatch % 4][item % kPageBatch];
  }
  __device__ int held(int item) const { return min(kPage, length_ - (page_begin_ + item) * kPage); }
  __device__ uint32_t v_mean(int stage) const {
    return shared_address(tiles_.v_means + (stage * 4 + warp_) * (2 * D));
  }

  __device__ void fetch_facts(int batch) const;
  __device__ void fetch_means(int batch) const;
  __device__ void fetch_next();

  __device__ void begin_batch(int batch) const;
  __device__ void offsets(int batch) const;
  __device__ void write_decisions(const TileView& v, const PageFacts& f, int page) const;

  const AttendArgs& a_;
  const TileFiller<D> filler_;
  PrefillShared& shared_;
  const Tiles tiles_;
  int head_, length_, page_begin_, items_;
  const PageFacts* facts_;
  const int thread_ = threadIdx.x % 128, warp_ = thread_ / 32;  // of the warpgroup
  struct Ring {
    int stage = 0;
    uint32_t parity = 1;  // a stage that was never filled is empty
    __device__ void next(int stages) {
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  } next_k_, next_v_;
  // The next side to fetch: K's tiles of item 0, V of item 0, K's of item 1 ...
  int next_item_ = 0, next_side_ = 0;
};

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_facts(int batch) const {
  const int item = batch * kPageBatch + thread_ / 2, half = thread_ % 2 * 16;
  if (thread_ >= 2 * kPageBatch || item >= items_) return;
  copy_async<16>(shared_address(&facts(item)) + half,
                 reinterpret_cast<const uint8_t*>(facts_ + item) + half);
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_means(int batch) const {
  constexpr int kChunks = D / 8;
  const uint32_t to = shared_address(tiles_.k_means) + batch % 2 * (kPageBatch * 2 * D);
  for (int i = thread_; i < kPageBatch * kChunks; i += 128) {
    const int item = batch * kPageBatch + i / kChunks;
    if (item >= items_) return;
    const uint8_t* mean = filler_.k_mean(facts(item));
    copy_async<16>(to + i * 16, mean + i % kChunks * 16);
  }
}

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

// q'.mean of the pages of a batch, for the 32 rows of each warp: FP16 tensor products of q' in two
// terms with the means, exact in FP16.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::offsets(int batch) const {
  const int lane = thread_ % 32, g = lane / 4, j = lane % 4;
  const int row = warp_ * 32, item = batch * kPageBatch + g;
  const bool exists = item < items_;
  const float factor = exists ? power_of_two(facts(item).mean_exponent) : 0.0f;
  const float up = exists ? power_of_two(-facts(item).mean_exponent) : 0.0f;
  const auto* mean =
      reinterpret_cast<const uint16_t*>(tiles_.k_means) + (batch % 2 * kPageBatch + g) * D;
  float sum[2][4] = {};
  const int d = (j & 1) << 1 | j >> 1;  // the dims at places 2j, 2j + 1 are d, d + 4
#pragma unroll 2
  for (int i = 0; i < D / 16; ++i) {
    uint32_t b[2] = {0, 0};
    if (exists) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint16_t* at = mean + 16 * i + 8 * h + d;
        b[h] = half_pair(bf16_to_f32(at[0]) * up, bf16_to_f32(at[4]) * up);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t x[4];
      load_left(x, tiles_.q, kPrefillRows, row + 16 * m, i, lane);
      mma_f16(sum[m], x, b[0], b[1]);
      load_left(x, tiles_.q_low, kPrefillRows, row + 16 * m, i, lane);
      mma_f16(sum[m], x, b[0], b[1]);
    }
  }
  // Columns 2j, 2j + 1 are pages, whose factors are lanes' of these g.
  const float f0 = __shfl_sync(0xffffffffu, factor, 8 * j);
  const float f1 = __shfl_sync(0xffffffffu, factor, 8 * j + 4);
  float(*to)[kPrefillRows] = shared_.offsets[batch % 2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * m + 8 * h + g;
      const float up_row = shared_.row_factor[r];
      to[2 * j][r] = sum[m][2 * h] * up_row * f0;
      to[2 * j + 1][r] = sum[m][2 * h + 1] * up_row * f1;
    }
  }
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::write_decisions(const TileView& v, const PageFacts& f,
                                                         int page) const {
  const int row = v.first_row + thread_;
  if (row >= v.end_row || row % a_.g.group != 0) return;
  const int seq = blockIdx.x % (a_.g.kv_heads * static_cast<int>(a_.limits.batch)) / a_.g.kv_heads;
  Decision d = Decision::plain;
  if (a_.g.any_layered()) {
    d = f.open >= 0 ? Decision::open : f.residual >= 0 ? Decision::full : Decision::base;
  }
  const int64_t at =
      (int64_t{seq} * a_.limits.step_tokens + row / a_.g.group) * a_.limits.max_pages + page;
  a_.call.decisions[at * a_.g.kv_heads + head_] = static_cast<uint8_t>(d);
}

// Every thread's copies of the batches before have landed: facts of this batch and the next one,
// and K's means of this one, are there for all.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::begin_batch(int batch) const {
  filler_barrier(kKeys ? 1 : 2);
  fetch_facts(batch + 2);
  if (!kKeys || !a_.g.k.layered()) return;
  fetch_means(batch + 1);
  offsets(batch);
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::run(const TileView& v) {
  // Sides on their way; the more, the fewer tiles are ready ahead of the attending warps. K and V
  // in turn: a side is fetched when the one 2 * stages before it was given back, for which the
  // attending warps may need the keys of the page behind it: less than 2 * stages - 1. By
  // themselves: `stages` before it; at most `stages`.
  int ahead = a_.stages > 2 ? 2 : 1;
  if (kKeys && kValues) ahead = a_.stages > 2 ? a_.stages - 1 : a_.stages;
  fetch_facts(0);
  fetch_facts(1);
  copies_commit();
  copies_wait(1);
  filler_barrier(kKeys ? 1 : 2);
  if (kKeys && a_.g.k.layered()) fetch_means(0);
  for (int i = 0; i < ahead; ++i) fetch_next();
  Ring keys, values;
  for (int n = 0; n < items_; ++n) {
    copies_wait(ahead);
    if (n % kPageBatch == 0) begin_batch(n / kPageBatch);
    const PageFacts f = facts(n);
    if constexpr (kKeys) {
      if (a_.call.decisions != nullptr) write_decisions(v, f, page_begin_ + n);
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
