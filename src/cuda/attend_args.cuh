// What the attend kernels get by value, and what a block of query rows sees. Scores are base-2
// logarithms inside the kernels: softmax_scale * log2(e) is folded into q'.
#pragma once

#include "cuda/device_tables.cuh"
#include "cuda/mma.cuh"

namespace thriftattn::cuda {

inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;
inline constexpr int kPage = static_cast<int>(kPageTokens);

struct AttendArgs {
  Geometry g;
  AttendLimits limits;
  AttendCall call;
  Workspace ws;
  int64_t first_q = 0;    // first position of this pass within the step
  int32_t positions = 1;  // of this pass, at most
  int32_t tile_rows = 8, row_tiles = 1, splits = 1;
  SplitRule split_rule;
  int32_t multiprocessors = 1;
  int32_t slots = 0;            // of attend_planes: its blocks at a time; 0: attend_decode
  int32_t resident = 0;         // of attend_decode: its blocks at a time
  int32_t batch_invariant = 0;
  int32_t prefill = 0, causal = 1;
  // Of attend_prefill: stages of its ring, and whether FP16 may not hold all digits of q'.
  int32_t stages = 0, two_terms = 0;
  // Of attend_prefill and prefill_tiles: the (sequence, KV head)s of this pass.
  int32_t first_head = 0, pass_heads = 0;
  float softmax_scale = 1, softcap = 0;  // softcap in base-2 units; 0 = none
  float hadamard_factor = 1;
  float log2_promote = 0, log2_skip = 0;  // of the thresholds
  // Of attend_planes with tiles of 8 rows: warps of a block may share an open page.
  int32_t open_by_block = 0;
};

// The position of a row of the pass; the usual step has one.
__device__ inline int position_of(const AttendArgs& a, int row) {
  return row < a.g.group ? 0 : row / a.g.group;
}

// The first row of partial `index` of a (sequence, KV head).
__device__ inline int64_t partial_row(const AttendArgs& a, int64_t seq_head, int index) {
  return (seq_head * a.splits + index) * a.ws.rows;
}

// Tiles of K a page has in attend_prefill. Base and residual of layered K are one tile, rounded to
// FP16's 11 bits, and so are codes times scales of FP8 rows; beside FP32 queries they are two.
__host__ __device__ inline int prefill_k_tiles(const AttendArgs& a) {
  return a.two_terms != 0 && (a.g.k.layered() || a.g.k.kind == SideKind::fp8) ? 2 : 1;
}

// Sums of this lane and those before it. By a whole warp.
template <class T>
__device__ inline T warp_sum_up(T x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(~0u, x, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) x += other;
  }
  return x;
}

template <class T>
__device__ T* workspace_at(const AttendArgs& a, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<uint8_t*>(a.call.workspace) + offset);
}

// What the query rows of one block see: positions i of the pass, pages as a list of items.
struct TileView {
  SequenceTables t;
  int first_position = 0;  // of i = 0
  int length = 0, committed = 0;
  int rows = 0;                    // of the pass: positions * group; row = i * group + head
  int first_row = 0, end_row = 0;  // of the tile
  int i_first = 0, i_last = 0;
  int page_begin = 0, page_end = 0;
  int sealed_items = 0;  // items [0, sealed) are pages page_begin + item in their tier
  int open_first = 0;    // then open pages open_first + ...
  int items = 0;         // 0: nothing to do
  int window = 0;        // 0: none
  bool causal = true, prefill = false;

  __device__ int end(int i) const { return causal ? first_position + i + 1 : length; }
  __device__ int begin(int i) const {
    return window == 0 ? 0 : max(0, first_position + i + 1 - window);
  }
  // Layered pages from this one on are read in open form by position i.
  __device__ int open_from(int i) const {
    return static_cast<int>(static_cast<unsigned>(prefill ? committed : end(i) - 1) / kPage);
  }
};

// Of tile `tile`, of `tile_rows` rows each.
__device__ inline TileView tile_view(const AttendArgs& a, int seq, int tile, int tile_rows) {
  TileView v;
  v.t = sequence_tables(a.call.tables, a.limits, a.g, seq);
  v.length = static_cast<int>(v.t.length);
  v.window = static_cast<int>(min(a.g.window, int64_t{1} << 30));
  v.causal = a.causal != 0;
  v.prefill = a.prefill != 0;
  v.committed = static_cast<int>(v.t.length - v.t.step);
  v.first_position = v.committed + static_cast<int>(a.first_q);
  const int positions = min(a.positions, static_cast<int>(v.t.step - a.first_q));
  if (positions <= 0) return v;
  v.rows = positions * a.g.group;
  v.first_row = tile * tile_rows;
  v.end_row = min(v.rows, v.first_row + tile_rows);
  if (v.first_row >= v.end_row) return v;
  v.i_first = position_of(a, v.first_row);
  v.i_last = position_of(a, v.end_row - 1);
  v.page_begin = v.begin(v.i_first) / kPage;
  v.page_end = (v.end(v.i_last) - 1) / kPage + 1;
  if (a.g.any_layered()) {
    v.sealed_items = max(0, v.open_from(v.i_last) - v.page_begin);
    v.open_first = max(v.open_from(v.i_first), v.page_begin);
    v.items = v.sealed_items + v.page_end - v.open_first;
  } else {
    v.sealed_items = v.items = v.page_end - v.page_begin;
  }
  return v;
}

__device__ inline TileView tile_view(const AttendArgs& a, int seq, int tile) {
  return tile_view(a, seq, tile, a.tile_rows);
}

// The record of a page for a tile of rows: 4 page scales (K, V, residual K, residual V), then
// q'.mean a row. Open pages have theirs behind those of the sealed ones.
__device__ inline float* page_record(const AttendArgs& a, int64_t seq_head, int tile, int index) {
  const int64_t pages = a.limits.max_pages + a.ws.open_records;
  return workspace_at<float>(a, a.ws.records) +
         ((seq_head * a.row_tiles + tile) * pages + index) * (4 + a.tile_rows);
}

// Under a budget the walk reads a residual table that attend_select has made: ids of what is promoted,
// this much higher where only some positions of the pass promote the page. So ids are below it.
inline constexpr int32_t kSomePositions = int32_t{1} << 30;
// Which of them do, a byte each.
__device__ inline uint8_t* page_choices(const AttendArgs& a, int64_t seq_head, int page) {
  return workspace_at<uint8_t>(a, a.ws.choices) +
         (seq_head * a.limits.max_pages + page) * kMaxPositions;
}

// log2 of a floor of the sum of exp over everything visible to a row, by `Lanes` lanes next to each
// other, which all get it; lanes that ask for no row get -inf. By a whole warp.
template <int Lanes>
__device__ inline float row_floor(const AttendArgs& a, int64_t seq_head, int row, int q_head,
                                  bool asks = true) {
  constexpr int kEach = (kPageChunks + Lanes) / Lanes;  // of kPageChunks + 1
  const int chunks = asks ? static_cast<int>(a.ws.chunks) : 0, rows = static_cast<int>(a.ws.rows);
  int c = threadIdx.x % Lanes;
  const float* floors =
      workspace_at<const float>(a, a.ws.floors) + (seq_head * a.ws.chunks + c) * rows + row;
  float x[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i, c += Lanes, floors += Lanes * rows)
    x[i] = c < chunks ? *floors : -INFINITY;
  const float sink =
      asks && a.call.sink_logits != nullptr ? a.call.sink_logits[q_head] * kLog2e : -INFINITY;
  float top = sink;
#pragma unroll
  for (int i = 0; i < kEach; ++i) top = fmaxf(top, x[i]);
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  const float base = top == -INFINITY ? 0.0f : top;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += exp2_approx(x[i] - base);
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  sum += exp2_approx(sink - base);
  return base + __log2f(sum);
}

}  // namespace thriftattn::cuda
