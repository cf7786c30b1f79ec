// How attend_planes shares the pages of a batch among its blocks. A unit of work is a split of one
// sequence, KV head and tile of rows; units are about as large as each other and as many as blocks
// take at a time, or a small multiple of that. One warp of attend_prepare decides it, from the
// lengths on the device.
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

// Decides it, by a whole warp. `places` is called as places(b), by lane b % 32 alone.
class UnitSizes {
 public:
  __device__ explicit UnitSizes(const AttendArgs& a)
      : a_(a), lane_(threadIdx.x % 32), batch_(static_cast<int>(a.limits.batch)) {}

  __device__ int places(int seq) const {
    const TileView v = tile_view(a_, seq, 0);
    if (v.rows == 0 || a_.batch_invariant) return v.rows == 0 ? 0 : max(1, v.items);
    const int open = shares_open_page(a_, v) ? kOpenWalks : a_.split_rule.open_items;
    return v.items - 1 + open + min(v.items, heavy_items(a_));
  }
  // Most places of a unit: that for which the launch takes the least time, if blocks take unit
  // after unit; 0 where splits go by a sequence's own length.
  template <class Places>
  __device__ int best(const Places& places) const {
    if (a_.batch_invariant) return 0;
    float total = 0;  // rounded: sizes are tried anyway
    for (int b = lane_; b < batch_; b += 32) total += static_cast<float>(places(b));
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    total *= static_cast<float>(a_.g.kv_heads * a_.row_tiles);
    int best = 1, least = INT32_MAX;
#pragma unroll 1
    for (int rounds = 1; rounds <= 4; ++rounds) {
      const int slots = a_.slots * rounds;
      int size = max(kLeastPlaces, static_cast<int>(fminf(total / slots, kMostPlaces)));
      int units = 0, most = 0;
#pragma unroll 1
      for (int i = 0; i < 24; ++i) {
        count(size, places, units, most);
        if (units <= slots || size >= kMostPlaces) break;
        size += max(size / 16, 1);
      }
      const int cost = (units + a_.slots - 1) / a_.slots * (most + kUnitCost);
      if (cost < least) least = cost, best = size;
    }
    return best;
  }
  __device__ int units(int places, int size) const {
    return splits(places, size) * a_.g.kv_heads * a_.row_tiles;
  }

 private:
  __device__ int splits(int places, int size) const {
    if (places == 0) return 0;
    if (size == 0) return static_cast<int>(splits_of(places, a_.split_rule));
    const int least = (places + kMostPlaces - 1) / kMostPlaces;
    return min(a_.splits, max(least, (places + size - 1) / size));
  }
  template <class Places>
  __device__ void count(int size, const Places& places, int& units, int& most) const {
    int sum = 0;
    most = 0;
    for (int b = lane_; b < batch_; b += 32) {
      const int n = places(b), s = splits(n, size);
      sum += s;
      if (s > 0) most = max(most, (n + s - 1) / s);
    }
    units = __reduce_add_sync(~0u, sum) * a_.g.kv_heads * a_.row_tiles;
    most = __reduce_max_sync(~0u, most);
  }

  const AttendArgs& a_;
  int lane_, batch_;
};

// The first unit of each sequence, for kernels that do not decide it themselves. By a whole warp.
__device__ inline void write_unit_starts(const AttendArgs& a) {
  int32_t* starts = workspace_at<int32_t>(a, a.ws.unit_starts);
  const UnitSizes sizes(a);
  const int lane = threadIdx.x % 32, batch = static_cast<int>(a.limits.batch);
  for (int b = lane; b < batch; b += 32) starts[b + 1] = sizes.places(b);
  const auto places = [&](int b) { return starts[b + 1]; };  // of the same lane
  const int size = sizes.best(places);
  int start = 0;
  for (int first = 0; first < batch; first += 32) {
    const int b = first + lane;
    const int end = start + warp_sum_up(b < batch ? sizes.units(places(b), size) : 0);
    if (b < batch) starts[b + 1] = end;
    start = __shfl_sync(~0u, end, 31);
  }
  if (lane == 0) starts[0] = 0;
}

struct Unit {
  int seq, head, tile, split, splits;
};
// The units of a launch, of sequence after sequence. Asked by whole warps.
class Units {
 public:
  __device__ explicit Units(const AttendArgs& a) : a_(a), count_(starts()[a.limits.batch]) {}
  __device__ int count() const { return count_; }
  __device__ Unit at(int unit) const {
    const int batch = static_cast<int>(a_.limits.batch);
    int seq = 0, start = 0, end = 0;
    for (int first = 0;; first += 32) {
      const int b = first + static_cast<int>(threadIdx.x % 32);
      const int own = b < batch ? starts()[b + 1] : INT32_MAX;
      const int before = __popc(__ballot_sync(~0u, own <= unit));
      seq += before;
      if (before > 0) start = __shfl_sync(~0u, own, before - 1);
      end = __shfl_sync(~0u, own, before % 32);
      if (before < 32) break;
    }
    const int across = a_.g.kv_heads * a_.row_tiles;
    return {seq, (unit - start) % across / a_.row_tiles, (unit - start) % a_.row_tiles,
            (unit - start) / across, (end - start) / across};
  }

 private:
  __device__ const int32_t* starts() const {
    return workspace_at<const int32_t>(a_, a_.ws.unit_starts);
  }

  const AttendArgs& a_;
  int count_;
};

// Splits of a sequence with `items` items, of whichever kernel walked them.
__device__ inline int splits_of_sequence(const AttendArgs& a, int seq, int items) {
  if (a.slots == 0) return static_cast<int>(splits_of(items, a.split_rule));
  const int32_t* starts = workspace_at<const int32_t>(a, a.ws.unit_starts);
  return (starts[seq + 1] - starts[seq]) / (a.g.kv_heads * a.row_tiles);
}

}  // namespace thriftattn::cuda
