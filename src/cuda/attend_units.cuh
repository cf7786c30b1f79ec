// How attend_planes shares the pages of a batch among its blocks. A unit of work is a split of one
// sequence, KV head and tile of rows; units are about as large as each other and as many as blocks
// take at a time, or a small multiple of that. One block of attend_prepare decides it, from the
// lengths on the device, and says when it has: attend_planes begins while attend_prepare still
// runs.
#pragma once

#include "cuda/attend_args.cuh"

namespace thriftattn::cuda {

// Items that a walk reads with their residual, the newest ones, take about the time of two: of a
// sealed policy those of `recent`.
__device__ inline int heavy_items(const AttendArgs& a) {
  if (a.slots == 0 || !a.g.sealed || a.prefill || a.g.k.always_full || a.g.v.always_full) return 0;
  return static_cast<int>(min((a.g.recent + kPage - 1) / kPage + 1, int64_t{1} << 20));
}

// Walks that share the open page of a step of one position, a place of each
// (attend_planes_open.cuh).
inline constexpr int kOpenWalks = kWarps;
__device__ inline bool shares_open_page(const AttendArgs& a, const TileView& v) {
  return a.open_by_block != 0 && v.i_first == v.i_last && v.items - v.sealed_items == 1;
}

// A walk notes items in 32 words of 32 bits.
inline constexpr int kMostPlaces = kWarps * 1000;
// What beginning and ending a unit costs, in places.
inline constexpr int kUnitCost = 12;

// What the units of a launch are as large as. By whole warps; `places` has those of each sequence.
class UnitSizes {
 public:
  static constexpr int kRounds = 4, kTries = 24;

  __device__ UnitSizes(const AttendArgs& a, const int32_t* places)
      : a_(a), places_(places), batch_(static_cast<int>(a.limits.batch)) {}

  __device__ static int places_of(const AttendArgs& a, int seq) {
    const TileView v = tile_view(a, seq, 0);
    if (v.rows == 0 || a.batch_invariant) return v.rows == 0 ? 0 : max(1, v.items);
    const int open = shares_open_page(a, v) ? kOpenWalks : a.split_rule.open_items;
    return v.items - 1 + open + min(v.items, heavy_items(a));
  }

  struct Choice {
    int cost, size;
  };
  // Where blocks take `rounds` units one after another: a unit's places, and how long that takes.
  // Each lane looks at one size, each a sixteenth above the one before; the first that makes few
  // enough units is it.
  __device__ Choice best_of(int rounds) const {
    const int lane = threadIdx.x % 32, slots = a_.slots * rounds;
    float total = 0;  // rounded: sizes are tried anyway
    for (int b = lane; b < batch_; b += 32) total += static_cast<float>(places_[b]);
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    total *= static_cast<float>(a_.g.kv_heads * a_.row_tiles);
    int size = max(kLeastPlaces, static_cast<int>(fminf(total / slots, kMostPlaces)));
#pragma unroll 1
    for (int i = min(lane, kTries - 1); i > 0; --i) size += max(size / 16, 1);
    int units = 0, most = 0;
#pragma unroll 1
    for (int b = 0; b < batch_; ++b) {
      const int n = places_[b], s = splits(n, size);
      units += s;
      if (s > 0) most = max(most, (n + s - 1) / s);
    }
    units *= a_.g.kv_heads * a_.row_tiles;
    const int cost = (units + a_.slots - 1) / a_.slots * (most + kUnitCost);
    const bool enough = units <= slots || size >= kMostPlaces || lane >= kTries - 1;
    const int first = __ffs(static_cast<int>(__ballot_sync(~0u, enough))) - 1;
    return {__shfl_sync(~0u, cost, first), __shfl_sync(~0u, size, first)};
  }
  // Of `places` in units of `size`; 0 where splits go by a sequence's own length.
  __device__ int splits(int places, int size) const {
    if (places == 0) return 0;
    if (size == 0) return static_cast<int>(splits_of(places, a_.split_rule));
    const int least = (places + kMostPlaces - 1) / kMostPlaces;
    return min(a_.splits, max(least, (places + size - 1) / size));
  }

 private:
  const AttendArgs& a_;
  const int32_t* places_;
  int batch_;
};

struct alignas(16) Unit {
  int32_t seq;
  uint16_t head, tile, split, splits;
};

// Written by attend_prepare for attend_planes: the first unit of each sequence, and all of them.
// Units are there when `ready` is.
struct UnitTable {
  int32_t *taken, *ready;  // units beyond the first of each block
  int32_t* starts;
  Unit* units;
  __device__ explicit UnitTable(const AttendArgs& a)
      : taken(workspace_at<int32_t>(a, a.ws.next_unit)),
        ready(taken + 1),
        starts(workspace_at<int32_t>(a, a.ws.unit_starts)),
        units(workspace_at<Unit>(a, units_offset(a.ws, a.limits.batch))) {}
};

// Decides what the units are, by a whole block. Before the first kernel that waits for them may
// start, forget_units().
__device__ inline void forget_units(const UnitTable& t) {
  if (threadIdx.x == 0) {
    *t.ready = 0;
    *t.taken = 0;
    __threadfence();
  }
  __syncthreads();
}
__device__ inline void share_units(const AttendArgs& a, const UnitTable& t) {
  __shared__ UnitSizes::Choice choice[UnitSizes::kRounds];
  const int batch = static_cast<int>(a.limits.batch), threads = static_cast<int>(blockDim.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int b = threadIdx.x; b < batch; b += threads) t.starts[b + 1] = UnitSizes::places_of(a, b);
  __syncthreads();
  const UnitSizes sizes(a, t.starts + 1);
  if (!a.batch_invariant) {
    if (warp < UnitSizes::kRounds) {
      const UnitSizes::Choice c = sizes.best_of(warp + 1);
      if (lane == 0) choice[warp] = c;
    }
    __syncthreads();
  }
  const int across = a.g.kv_heads * a.row_tiles;
  if (warp == 0) {
    UnitSizes::Choice best = {INT32_MAX, 0};
    for (int r = 0; r < UnitSizes::kRounds && !a.batch_invariant; ++r) {
      if (choice[r].cost < best.cost) best = choice[r];
    }
    int start = 0;
    for (int first = 0; first < batch; first += 32) {
      const int b = first + lane;
      const int own = b < batch ? sizes.splits(t.starts[b + 1], best.size) * across : 0;
      const int end = start + warp_sum_up(own);
      if (b < batch) t.starts[b + 1] = end;
      start = __shfl_sync(~0u, end, 31);
    }
    if (lane == 0) t.starts[0] = 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < batch * across; i += threads) {
    const int seq = i / across, at = i % across, start = t.starts[seq];
    const int splits = (t.starts[seq + 1] - start) / across;
    Unit u = {seq, static_cast<uint16_t>(at / a.row_tiles), static_cast<uint16_t>(at % a.row_tiles),
              0, static_cast<uint16_t>(splits)};
    for (; u.split < splits; ++u.split) t.units[start + u.split * across + at] = u;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *const_cast<volatile int32_t*>(t.ready) = 1;
  }
}
// Until share_units() is done: attend_prepare may still run, but its blocks have begun.
__device__ inline void wait_for_units(const UnitTable& t) {
  while (read_acquire(t.ready) == 0) {
  }
}

// Splits of a sequence with `items` items where blocks take one each (attend_decode): in pieces of which
// the whole batch has as many as blocks are resident, or a small multiple where that ends sooner. By
// a whole warp, from the lengths on the device; windows are not looked at.
__device__ inline int splits_by_batch(const AttendArgs& a, int items) {
  if (a.batch_invariant || items == 0) return static_cast<int>(splits_of(items, a.split_rule));
  constexpr int kRounds = 8;
  const int lane = threadIdx.x % 32, batch = static_cast<int>(a.limits.batch);
  const int across = a.g.kv_heads * a.row_tiles;
  float pages = 0;  // rounded: of the batch
  for (int b = lane; b < batch; b += 32)
    pages += static_cast<float>((a.call.tables.lengths[b] + kPage - 1) / kPage);
  for (int step = 16; step > 0; step /= 2) pages += __shfl_xor_sync(~0u, pages, step);
  // Each lane looks at so many rounds: each (sequence, KV head) has a piece that is not full.
  const int rounds = lane + 1, pieces = rounds * a.resident - batch * across;
  int cost = INT32_MAX, size = 0;
  if (lane < kRounds && pieces > 0) {
    const float even = pages * static_cast<float>(across) / static_cast<float>(pieces);
    size = max(kLeastPlaces, static_cast<int>(fminf(even, kMostPlaces)) + 1);
    cost = rounds * (size + kUnitCost);
  }
  const int least = __reduce_min_sync(~0u, cost);
  if (least == INT32_MAX) return static_cast<int>(splits_of(items, a.split_rule));
  const int best = __ffs(static_cast<int>(__ballot_sync(~0u, cost == least))) - 1;
  size = __shfl_sync(~0u, size, best);
  return min(a.splits, (items + size - 1) / size);
}

// Splits of a sequence with `items` items, of whichever kernel walked them; by a whole warp.
__device__ inline int splits_of_sequence(const AttendArgs& a, int seq, int items) {
  if (a.slots == 0) return splits_by_batch(a, items);
  const int32_t* starts = workspace_at<const int32_t>(a, a.ws.unit_starts);
  return (starts[seq + 1] - starts[seq]) / (a.g.kv_heads * a.row_tiles);
}

}  // namespace thriftattn::cuda
