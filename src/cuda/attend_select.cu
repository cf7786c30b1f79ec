// attend_select: PromoteRule::budget (precision/budget_rule.h). Of the pages that a position sees,
// those with the highest mean over the group's query heads of q'.mean, which attend_prepare has left
// in the records; ties go to the lower index; sinks and recent are always in and not counted. The
// walk behind it reads what was chosen as a residual table of which it reads everything.
//
// A block takes one position of one (sequence, KV head): radix select over the scores as ordered
// integers, 11 bits at a time from the top, until what is left of the budget is all of a bin. The
// choice depends on the scores alone, not on the order in which threads count. With several
// positions attend_select_pages makes one table of theirs.
#include <algorithm>
#include <cstdint>

#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/dependent_launch.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kRounds = 3, kBins = 2048;
constexpr int kAhead = 2;  // pages of a thread whose reads are under way at a time

// Keys of pages: what is no candidate comes below all scores.
constexpr uint32_t kOut = 0, kAlways = 1, kLowest = 2;

struct SelectShared {
  uint32_t key[kHeldKeys];
  uint32_t count[kRounds][kBins];
  uint32_t warp_sum[kThreads / 32];
  uint32_t bin, left, members;  // found by find_bin()
};
static_assert(sizeof(SelectShared) <= 48 << 10);

// Higher scores have higher keys; -0 is 0.
__device__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return max(kLowest, bits >> 31 ? ~bits : bits | 0x80000000u);
}

// The sum of x over the threads before this one, and over all.
__device__ uint32_t sum_before(uint32_t x, uint32_t (&warp_sum)[kThreads / 32], uint32_t& all) {
  static_assert(kThreads / 32 == 32, "a lane reads a warp's sum");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t sum = warp_sum_up(x);
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

// A position and its pages: n-th of those that any position of the pass reads sealed.
class Selection {
 public:
  __device__ Selection(const AttendArgs& a, const TileView& v, int seq, int head, int i,
                       SelectShared& shared)
      : a_(a), v_(v), s_(shared), seq_(seq), head_(head), i_(i) {
    seq_head_ = int64_t{seq} * a.g.kv_heads + head;
    pages_ = v.open_from(v.i_last) - v.page_begin;
    more_keys_ = workspace_at<uint32_t>(a, a.ws.keys) +
                 (seq_head_ * a.positions + i) *
                     max(int64_t{0}, a.limits.max_pages - kHeldKeys) -
                 kHeldKeys;
  }

  __device__ void note_pages();   // what is known without scores
  __device__ void weigh_pages();  // scores in place of what was noted of candidates
  __device__ void choose();

 private:
  // What each thread does with its pages, kAhead at a time: read(n, k) of all, then use(n, k).
  template <class Read, class Use>
  __device__ void each_page(const Read& read, const Use& use) const {
    for (int base = threadIdx.x; base < pages_; base += kAhead * kThreads) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (base + k * kThreads < pages_) read(base + k * kThreads, k);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (base + k * kThreads < pages_) use(base + k * kThreads, k);
      }
    }
  }
  __device__ int page(int n) const { return v_.page_begin + n; }
  __device__ int32_t residual(int n) const {
    return v_.t.residuals == nullptr ? -1
                                     : v_.t.residuals[int64_t{page(n)} * a_.g.kv_heads + head_];
  }
  __device__ uint32_t& key(int n) const { return n < kHeldKeys ? s_.key[n] : more_keys_[n]; }
  // Where the record of a page has row `row`.
  __device__ const float* record(int row, int n) const {
    const int tile = row / a_.tile_rows;
    return page_record(a_, seq_head_, tile, page(n)) + 4 + row - tile * a_.tile_rows;
  }
  __device__ uint32_t find_bin(int round, uint32_t wanted);
  __device__ void write(int n, bool chosen, int32_t residual) const;

  const AttendArgs& a_;
  const TileView& v_;
  SelectShared& s_;
  int64_t seq_head_;
  uint32_t* more_keys_;
  int seq_, head_, i_, pages_;
};

__device__ void Selection::note_pages() {
  const int from = v_.begin(i_) / kPage, to = v_.open_from(i_);
  int32_t held[kAhead];
  each_page([&](int n, int k) { held[k] = residual(n); },
            [&](int n, int k) {
              const int p = page(n);
              const bool sinks = int64_t{p} * kPage < a_.g.sinks;
              const bool recent =
                  a_.g.recent > 0 && int64_t{p + 1} * kPage > v_.end(i_) - a_.g.recent;
              key(n) = held[k] < 0 || p < from || p >= to ? kOut
                       : sinks || recent                  ? kAlways
                                                          : kLowest;
            });
  for (int n = threadIdx.x; n < kRounds * kBins; n += kThreads) (&s_.count[0][0])[n] = 0;
}

__device__ void Selection::weigh_pages() {
  __syncthreads();  // bins are empty
  const int first = i_ * a_.g.group, end = first + a_.g.group;
  const int next = kThreads * (4 + a_.tile_rows);  // from a thread's page to its next one
  for (int base = threadIdx.x; base < pages_; base += kAhead * kThreads) {
    float sum[kAhead] = {};
    // Rows of a quad are in one tile.
    if (a_.g.group % 4 == 0) {
      for (int row = first; row < end; row += 4) {
        const float* from = record(row, base);
        float4 x[kAhead] = {};
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (base + k * kThreads < pages_) x[k] = *reinterpret_cast<const float4*>(from + k * next);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) sum[k] = sum[k] + x[k].x + x[k].y + x[k].z + x[k].w;
      }
    } else {
      for (int row = first; row < end; ++row) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (base + k * kThreads < pages_) sum[k] += record(row, base)[k * next];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int n = base + k * kThreads;
      if (n >= pages_ || key(n) != kLowest) continue;
      key(n) = ordered(sum[k]);
      atomicAdd(&s_.count[0][key(n) >> 21], 1u);
    }
  }
}

// The bin with the wanted-th key from the top, to shared memory; what was wanted.
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
      uint32_t x[kAhead];
      each_page([&](int n, int k) { x[k] = key(n); },
                [&](int, int k) {
                  if (x[k] >= low && x[k] <= high) {
                    atomicAdd(&s_.count[round][x[k] >> shift & (kBins - 1)], 1u);
                  }
                });
    }
    if (find_bin(round, left) == 0) {  // a budget of nothing
      low = high;
      left = members = 0;
      break;
    }
    left = s_.left;
    members = s_.members;
    low = max(kLowest, low | s_.bin << shift);
    high = low | ((1u << shift) - 1);
    if (left == members) break;
  }
  uint32_t earlier = 0;  // members of lower pages
  for (int base = 0; base < pages_; base += kAhead * kThreads) {
    bool chosen[kAhead];
    int32_t held[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int n = base + k * kThreads + static_cast<int>(threadIdx.x);
      const uint32_t x = n < pages_ ? key(n) : kOut;
      const bool member = x >= low && x <= high;
      chosen[k] = x == kAlways || x > high || (member && left != 0);
      if (left != members) {  // ties
        uint32_t all = 0;
        const uint32_t rank = earlier + sum_before(member, s_.warp_sum, all);
        earlier += all;
        if (member) chosen[k] = rank < left;
        __syncthreads();  // warp_sum is read
      }
      held[k] = chosen[k] ? residual(n) : -1;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int n = base + k * kThreads + static_cast<int>(threadIdx.x);
      if (n < pages_) write(n, chosen[k], held[k]);
    }
  }
}

__device__ int32_t* chosen_residual(const AttendArgs& a, int seq, int page, int head) {
  return workspace_at<int32_t>(a, a.ws.chosen_residuals) +
         (int64_t{seq} * a.limits.max_pages + page) * a.g.kv_heads + head;
}

__device__ void Selection::write(int n, bool chosen, int32_t residual) const {
  if (a_.ws.choices == 0) {
    *chosen_residual(a_, seq_, page(n), head_) = residual;
  } else {
    page_choices(a_, seq_head_, page(n))[i_] = chosen;
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

// A thread a page and KV head.
constexpr int kPageThreads = 256;

__global__ void __launch_bounds__(kPageThreads)
    attend_select_pages(const __grid_constant__ AttendArgs a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int seq = blockIdx.y;
  const TileView v = tile_view(a, seq, 0, static_cast<int>(a.ws.rows));
  if (v.rows == 0) return;
  const int64_t at = int64_t{blockIdx.x} * kPageThreads + threadIdx.x;
  const int page = v.page_begin + static_cast<int>(at / a.g.kv_heads);
  const int head = static_cast<int>(at % a.g.kv_heads);
  if (page >= v.open_from(v.i_last)) return;
  const uint4 flags = *reinterpret_cast<const uint4*>(
      page_choices(a, int64_t{seq} * a.g.kv_heads + head, page));
  const uint32_t words[4] = {flags.x, flags.y, flags.z, flags.w};
  int count = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int there = min(4, v.i_last + 1 - 4 * w);  // positions
    if (there > 0) count += __popc(words[w] & ~0u >> (32 - 8 * there));
  }
  int32_t residual = -1;
  if (count != 0) residual = v.t.residuals[int64_t{page} * a.g.kv_heads + head];
  if (count != 0 && count <= v.i_last) residual += kSomePositions;
  *chosen_residual(a, seq, page, head) = residual;
}

}  // namespace

void launch_select(const AttendArgs& a, cudaStream_t stream) {
  const auto batch = static_cast<unsigned>(a.limits.batch);
  const dim3 grid(static_cast<unsigned>(a.positions * a.g.kv_heads), batch);
  launch_after_previous(attend_select, {grid, dim3(kThreads), 0}, a, stream, "attend_select");
  if (a.ws.choices == 0) return;
  const int64_t pages = a.limits.max_pages * a.g.kv_heads;
  const dim3 of_pages(static_cast<unsigned>((pages + kPageThreads - 1) / kPageThreads), batch);
  launch_after_previous(attend_select_pages, {of_pages, dim3(kPageThreads), 0}, a, stream,
                        "attend_select_pages");
}

}  // namespace thriftattn::cuda
