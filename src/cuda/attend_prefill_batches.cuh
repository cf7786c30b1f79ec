// What the filling warpgroups of attend_prefill do for kPageBatch pages at a time: facts and K's
// means of pages come by asynchronous copies, two batches and one ahead, and q'.mean(K) is
// computed.
#pragma once

#include "base/float_convert.h"
#include "cuda/attend_args.cuh"
#include "cuda/attend_prefill_convert.cuh"
#include "cuda/attend_prefill_tile.cuh"

namespace thriftattn::cuda {

// Where things lie in shared memory, as what reads them wants it.
struct PrefillTiles {
  uint32_t q = 0, q_low = 0, k = 0, v = 0;
  uint8_t* k_means = nullptr;
  uint8_t* v_means = nullptr;
};

// kKeys: of a warpgroup that fills K, which does what K needs.
template <int D, bool kKeys>
class PrefillBatches {
 public:
  __device__ PrefillBatches(const AttendArgs& a, const TileView& v, int seq_head,
                            PrefillShared& shared, const PrefillTiles& tiles)
      : a_(a),
        shared_(shared),
        tiles_(tiles),
        head_(seq_head % a.g.kv_heads),
        seq_(seq_head / a.g.kv_heads),
        length_(v.length),
        page_begin_(v.page_begin),
        items_(v.items) {
    facts_ =
        workspace_at<const PageFacts>(a, a.ws.facts) + seq_head * a.limits.max_pages + v.page_begin;
  }

 protected:
  static constexpr uint32_t kTile = prefill_tile_bytes(D);

  __device__ const PageFacts& facts(int item) const {
    return shared_.facts[kKeys ? 0 : 1][item / kPageBatch % 4][item % kPageBatch];
  }

  // The first facts, and the first means on their way.
  __device__ void begin() const;
  __device__ void begin_batch(int batch) const;
  __device__ void write_decisions(const TileView& v, const PageFacts& f, int page) const;

  const AttendArgs& a_;
  PrefillShared& shared_;
  const PrefillTiles tiles_;
  int head_, seq_, length_, page_begin_, items_;
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
  };

 private:
  // Of open pages the reference that they were centred by.
  __device__ const uint8_t* k_mean(const PageFacts& f) const {
    if (f.open >= 0) {
      return a_.call.memory.open + int64_t{f.open} * a_.g.open_bytes + a_.g.open_reference +
             int64_t{head_} * (2 * D);
    }
    return a_.call.memory.pages + int64_t{f.slot} * a_.g.slot_bytes + a_.g.k.start +
           int64_t{head_} * a_.g.k.head_bytes + a_.g.k.mean;
  }
  __device__ void fetch_facts(int batch) const;
  __device__ void fetch_means(int batch) const;
  __device__ void offsets(int batch) const;
};

template <int D, bool kKeys>
__device__ void PrefillBatches<D, kKeys>::fetch_facts(int batch) const {
  const int item = batch * kPageBatch + thread_ / 2, half = thread_ % 2 * 16;
  if (thread_ >= 2 * kPageBatch || item >= items_) return;
  copy_async<16>(shared_address(&facts(item)) + half,
                 reinterpret_cast<const uint8_t*>(facts_ + item) + half);
}

template <int D, bool kKeys>
__device__ void PrefillBatches<D, kKeys>::fetch_means(int batch) const {
  constexpr int kChunks = D / 8;
  const uint32_t to = shared_address(tiles_.k_means) + batch % 2 * (kPageBatch * 2 * D);
  for (int i = thread_; i < kPageBatch * kChunks; i += 128) {
    const int item = batch * kPageBatch + i / kChunks;
    if (item >= items_) return;
    const uint8_t* mean = k_mean(facts(item));
    copy_async<16>(to + i * 16, mean + i % kChunks * 16);
  }
}

// q'.mean of the pages of a batch, for the 32 rows of each warp: FP16 tensor products of q' in two
// terms with the means, exact in FP16.
template <int D, bool kKeys>
__device__ void PrefillBatches<D, kKeys>::offsets(int batch) const {
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

template <int D, bool kKeys>
__device__ void PrefillBatches<D, kKeys>::write_decisions(const TileView& v, const PageFacts& f,
                                                          int page) const {
  const int row = v.first_row + thread_;
  if (row >= v.end_row || row % a_.g.group != 0) return;
  Decision d = Decision::plain;
  if (a_.g.any_layered()) {
    d = f.open >= 0 ? Decision::open : f.residual >= 0 ? Decision::full : Decision::base;
  }
  const int64_t at =
      (int64_t{seq_} * a_.limits.step_tokens + row / a_.g.group) * a_.limits.max_pages + page;
  a_.call.decisions[at * a_.g.kv_heads + head_] = static_cast<uint8_t>(d);
}

template <int D, bool kKeys>
__device__ void PrefillBatches<D, kKeys>::begin() const {
  fetch_facts(0);
  fetch_facts(1);
  copies_commit();
  copies_wait(1);
  warpgroup_barrier_sync(kKeys ? 1 : 2);
  if (kKeys && a_.g.k.layered()) fetch_means(0);
}

// Every thread's copies of the batches before have landed: facts of this batch and the next one,
// and K's means of this one, are there for all.
template <int D, bool kKeys>
__device__ void PrefillBatches<D, kKeys>::begin_batch(int batch) const {
  warpgroup_barrier_sync(kKeys ? 1 : 2);
  fetch_facts(batch + 2);
  if (!kKeys || !a_.g.k.layered()) return;
  fetch_means(batch + 1);
  offsets(batch);
  barrier_arrive(&shared_.offsets_full[batch % 2]);
}

}  // namespace thriftattn::cuda
