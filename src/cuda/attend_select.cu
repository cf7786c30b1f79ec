// attend_select: PromoteRule::budget (precision/budget_rule.h). Of the pages that a position sees,
// those with the highest mean over the group's query heads of q'.mean, which attend_prepare has left
// in the records; ties go to the lower index; sinks and recent are always in and not counted.
//
// A block takes one position of one (sequence, KV head): radix select over the scores as ordered
// integers, 11 bits at a time from the top, until what is left of the budget is all of a bin. The
// choice depends on the scores alone, not on the order in which threads count.
#include <cstdint>

#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/dependent_launch.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kRounds = 3, kBins = 2048;
// Keys that stay in shared memory; those of later pages are made again from the records, which L2
// holds, in every round.
constexpr int kHeldKeys = 4096;

// Keys of pages: what is no candidate comes below all scores.
constexpr uint32_t kOut = 0, kAlways = 1, kLowest = 2;

struct SelectShared {
  uint32_t key[kHeldKeys];
  uint32_t count[kRounds][kBins];
  uint32_t warp_sum[kThreads / 32];
  uint32_t bin, left, members;  // found by find_bin()
};

// Higher scores have higher keys; -0 is 0.
__device__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return max(kLowest, bits >> 31 ? ~bits : bits | 0x80000000u);
}

// The sum of x over the threads before this one, and over all.
__device__ uint32_t sum_before(uint32_t x, uint32_t (&warp_sum)[kThreads / 32], uint32_t& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sum[warp] = sum;
  __syncthreads();
  const uint32_t of_warp = warp_sum[lane];
  all = __reduce_add_sync(~0u, of_warp);
  return sum - x + __reduce_add_sync(~0u, lane < warp ? of_warp : 0u);
}

// How many of the candidates: the arithmetic of select_by_budget().
__device__ uint32_t budget_of(const Geometry& g, uint32_t candidates) {
  const double wanted = g.budget_pages > 0 ? static_cast<double>(g.budget_pages)
                                           : ceil(g.budget_fraction * candidates - 1e-9);
  return static_cast<uint32_t>(fmax(0.0, fmin(wanted, static_cast<double>(candidates))));
}

// A position and its pages [first, first + pages).
class Selection {
 public:
  __device__ Selection(const AttendArgs& a, const TileView& v, int seq, int head, int i,
                       SelectShared& shared)
      : a_(a), v_(v), s_(shared), seq_head_(int64_t{seq} * a.g.kv_heads + head), head_(head), i_(i) {
    pages_ = v.open_from(v.i_last) - v.page_begin;
    from_ = v.begin(i) / kPage;
    to_ = v.open_from(i);
  }

  // What is known without scores.
  __device__ void note_pages() {
    for (int n = threadIdx.x; n < min(pages_, kHeldKeys); n += kThreads) s_.key[n] = state(n);
    for (int n = threadIdx.x; n < kRounds * kBins; n += kThreads) (&s_.count[0][0])[n] = 0;
  }
  // Scores in place of what was noted of candidates.
  __device__ void weigh_pages() {
    __syncthreads();  // bins are empty
    for (int n = threadIdx.x; n < pages_; n += kThreads) {
      uint32_t key = n < kHeldKeys ? s_.key[n] : state(n);
      if (key != kLowest) continue;
      key = ordered(score(n));
      if (n < kHeldKeys) s_.key[n] = key;
      atomicAdd(&s_.count[0][key >> 21], 1u);
    }
  }
  __device__ void choose();

 private:
  __device__ int page(int n) const { return v_.page_begin + n; }
  // kOut, kAlways or, of a candidate, kLowest.
  __device__ uint32_t state(int n) const {
    const int p = page(n);
    if (p < from_ || p >= to_ || v_.t.residuals == nullptr) return kOut;
    if (v_.t.residuals[int64_t{p} * a_.g.kv_heads + head_] < 0) return kOut;
    const bool sinks = int64_t{p} * kPage < a_.g.sinks;
    const bool recent = a_.g.recent > 0 && int64_t{p + 1} * kPage > v_.end(i_) - a_.g.recent;
    return sinks || recent ? kAlways : kLowest;
  }
  __device__ float score(int n) const {
    float sum = 0;
    for (int row = i_ * a_.g.group, end = row + a_.g.group; row < end;) {
      const int tile = row / a_.tile_rows, first = tile * a_.tile_rows;
      const float* record = page_record(a_, seq_head_, tile, page(n)) + 4;
      for (; row < min(end, first + a_.tile_rows); ++row) sum += record[row - first];
    }
    return sum;
  }
  __device__ uint32_t key(int n) const {
    if (n < kHeldKeys) return s_.key[n];
    const uint32_t known = state(n);
    return known == kLowest ? ordered(score(n)) : known;
  }
  __device__ uint32_t find_bin(int round, uint32_t wanted);
  __device__ void write(int n, bool chosen) const {
    workspace_at<uint8_t>(a_, a_.ws.chosen)[(seq_head_ * a_.limits.max_pages + page(n)) *
                                                a_.ws.chosen_stride +
                                            i_] = chosen;
  }

  const AttendArgs& a_;
  const TileView& v_;
  SelectShared& s_;
  int64_t seq_head_;
  int head_, i_, pages_, from_, to_;
};

// The bin with the wanted-th key from the top, to shared memory; all keys of the round.
__device__ uint32_t Selection::find_bin(int round, uint32_t wanted) {
  static_assert(kBins == 2 * kThreads);
  __syncthreads();  // all are counted
  const int top = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
  const uint32_t count[2] = {s_.count[round][top], s_.count[round][top - 1]};
  uint32_t all = 0;
  uint32_t before = sum_before(count[0] + count[1], s_.warp_sum, all);
  if (round == 0) wanted = budget_of(a_.g, all);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (before < wanted && wanted <= before + count[k]) {
      s_.bin = static_cast<uint32_t>(top - k);
      s_.left = wanted - before;
      s_.members = count[k];
    }
    before += count[k];
  }
  __syncthreads();
  return wanted;
}

__device__ void Selection::choose() {
  // Keys from `low` to `high` share the digits found so far; of them `left` are in.
  uint32_t low = 0, high = ~0u, left = 0, members = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int shift = round == 0 ? 21 : round == 1 ? 10 : 0;
    if (round > 0) {
      for (int n = threadIdx.x; n < pages_; n += kThreads) {
        const uint32_t k = key(n);
        if (k >= kLowest && k >= low && k <= high) {
          atomicAdd(&s_.count[round][k >> shift & (kBins - 1)], 1u);
        }
      }
    }
    if (find_bin(round, left) == 0) {  // a budget of nothing
      low = high;
      left = members = 0;
      break;
    }
    left = s_.left;
    members = s_.members;
    low |= s_.bin << shift;
    high = low | ((1u << shift) - 1);
    if (left == members) break;
  }
  const bool ties = left != members;
  uint32_t earlier = 0;  // of them, of lower pages
  for (int base = 0; base < pages_; base += kThreads) {
    const int n = base + static_cast<int>(threadIdx.x);
    const uint32_t k = n < pages_ ? key(n) : kOut;
    const bool scored = k >= kLowest, member = scored && k >= low && k <= high;
    bool chosen = k == kAlways || (scored && k > high) || (member && left != 0);
    if (ties) {
      uint32_t all = 0;
      const uint32_t rank = earlier + sum_before(member, s_.warp_sum, all);
      earlier += all;
      if (member) chosen = rank < left;
      __syncthreads();  // warp_sum is read
    }
    if (n < pages_) write(n, chosen);
  }
}

__global__ void __launch_bounds__(kThreads) attend_select(const __grid_constant__ AttendArgs a) {
  __shared__ SelectShared shared;
  const int i = blockIdx.x % a.positions, head = blockIdx.x / a.positions, seq = blockIdx.y;
  const TileView v = tile_view(a, seq, 0, static_cast<int>(a.ws.rows));
  const bool real = v.rows != 0 && i <= v.i_last;
  Selection selection(a, v, seq, head, i, shared);
  if (real) selection.note_pages();  // tables, which attend_prepare does not write
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (!real) return;
  selection.weigh_pages();
  selection.choose();
}

}  // namespace

void launch_select(const AttendArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.positions * a.g.kv_heads),
                  static_cast<unsigned>(a.limits.batch));
  launch_after_previous(attend_select, {grid, dim3(kThreads), 0}, a, stream, "attend_select");
}

}  // namespace thriftattn::cuda
