// attend_prepare: before the pages' codes are read. One launch that
// - transforms the queries and lays them out as the mma fragments of attend_decode.cuh,
// - computes q'.mean of every page and row (so that the kernels behind it read no K mean),
// - gives a floor of each row's LSE (DESIGN section 6): Jensen over the pages' summaries, exact for
//   the first and the own page. With a softcap, which is not convex, only what is exact counts, and
// - decides how attend_planes shares the pages (attend_units.cuh).
// A block has up to 64 rows of one (sequence, KV head). blockIdx.z = 0 takes the exact pages and
// writes the fragments, 1 shares the pages; the others take turns at chunks of pages, each warp 16
// pages at a time.
// What a chunk is depends on the sequence alone, and so does the order of its sums.
#include <algorithm>
#include <cstddef>

#include "cuda/attend_launch.h"
#include "cuda/attend_prepare_exact.cuh"
#include "cuda/attend_units.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/launch.h"

namespace thriftattn::cuda {
namespace {

// The pages that any row reads, as one list: sealed ones, then open ones.
struct PageList {
  int first = 0, sealed = 0, pages = 0;  // sealed ones are first + index
  int open_first = 0;
  int chunk = 0, chunks = 0;  // pages in a chunk

  __device__ PageList(const AttendArgs& a, const TileView& v, int unit) {
    const int sealed_end = a.g.any_layered() ? v.open_from(v.i_last) : v.page_end;
    first = min(v.page_begin, sealed_end);
    sealed = sealed_end - first;
    open_first = max(v.open_from(0), v.page_begin);
    pages = sealed + (a.g.any_layered() ? v.page_end - open_first : 0);
    const int most = unit * kPageChunks;
    chunk = unit * ((pages + most - 1) / most);
    chunks = (pages + chunk - 1) / chunk;
  }
};

// 16 pages of a warp: rows g and g + 8 of a lane. Ids are read for both before either is used.
struct PagePlaces {
  int page[2] = {-1, -1};  // -1: none
  int id[2] = {};          // of its slot
  bool open[2] = {};
};

__device__ inline PagePlaces find_pages(const AttendArgs& a, const TileView& v,
                                        const PageList& list, int index, int end, int lane) {
  PagePlaces p;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int at = index + lane / 4 + 8 * h;
    if (at >= end) continue;
    p.open[h] = at >= list.sealed;
    p.page[h] = p.open[h] ? list.open_first + at - list.sealed : list.first + at;
    if (!a.g.any_layered()) continue;
    p.id[h] = read_now(p.open[h] ? v.t.open + p.page[h] % static_cast<int>(v.t.open_pages)
                                 : v.t.blocks + p.page[h]);
  }
  return p;
}

template <int Regs>
struct PageRows {
  BrainRows<Regs> mean;
  float scale[2];       // page scale j
  float norm_bound[2];  // of the mean of the decoded base
  int sealed_page[2];   // -1: none, or an open one, whose mean says nothing
  int record[2];        // -1: no page
};

template <int Regs>
__device__ PageRows<Regs> load_pages(const AttendArgs& a, const TileView& v, const PagePlaces& at,
                                     int head, int lane) {
  const int j = lane % 4;
  PageRows<Regs> p;
  const uint16_t* mean[2] = {};
  const SideGeometry& k = a.g.k;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool open = at.open[h];
    p.scale[h] = 1;
    p.norm_bound[h] = 0;
    p.sealed_page[h] = open ? -1 : at.page[h];
    p.record[h] = at.page[h];
    if (open) p.record[h] += static_cast<int>(a.limits.max_pages) - v.open_from(0);
    if (at.page[h] < 0 || !a.g.any_layered()) continue;
    const LayerMemory& memory = a.call.memory;
    uint8_t* slot =
        (open ? memory.open : memory.pages) + at.id[h] * (open ? a.g.open_bytes : a.g.slot_bytes);
    if (k.layered()) {
      const int64_t offset = open ? a.g.open_reference + head * (2 * k.dim)
                                  : k.start + int64_t{head} * k.head_bytes + k.mean;
      mean[h] = reinterpret_cast<const uint16_t*>(slot + offset);
    }
    if (open) continue;
    const PageMeta* meta = meta_of(slot, a.g, head);
    p.norm_bound[h] = read_once(&meta->k_mean_norm);
    static_assert(offsetof(PageMeta, k_scale) == 0 &&
                  offsetof(PageMeta, v_res_scale) == 3 * sizeof(float));
    p.scale[h] = read_once(reinterpret_cast<const float*>(meta) + j);
  }
  const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int c = 0; c < Regs; ++c) {
    const int d = 32 * c + 8 * j;
    p.mean.low[c] = mean[0] ? read_once(reinterpret_cast<const uint4*>(mean[0] + d)) : none;
    p.mean.high[c] = mean[1] ? read_once(reinterpret_cast<const uint4*>(mean[1] + d)) : none;
  }
  return p;
}

// Records of 16 pages for the block's rows, and what they add to the floors.
template <int Regs, int Warps>
__device__ void take_pages(const AttendArgs& a, int64_t seq_head, int first_row, int tiles,
                           const PageRows<Regs>& p, bool jensen, PrepareShared<Regs, Warps>& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, j = lane % 4;
  // Records of a (sequence, KV head) are fewer than 2^31 numbers.
  const int next_tile =
      static_cast<int>(a.limits.max_pages + a.ws.open_records) * (4 + a.tile_rows);
  float* records = page_record(a, seq_head, first_row / a.tile_rows, 0);
  const int record[2] = {p.record[0] * (4 + a.tile_rows), p.record[1] * (4 + a.tile_rows)};
  int at = 0;  // within the tile of the walking kernel
  ColumnSums sums;
  for (int n = 0; n < tiles; ++n) {
    float t[4];
    multiply_rows<Regs>(p.mean, s.query[n], lane, t);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (record[h] < 0) continue;
      float* to = records + record[h];
      if (at == 0) to[j] = p.scale[h];
      *reinterpret_cast<float2*>(to + 4 + at + 2 * j) = make_float2(t[2 * h], t[2 * h + 1]);
    }
    at += 8;
    if (at == a.tile_rows) {
      at = 0;
      records += next_tile;
    }
    if (!jensen) continue;
      // Sum over the page's tokens of 2^s >= 64 * 2^(mean of s), and the mean of s is
      // q'.mean + q'.(mean of decoded K') >= q'.mean - |q'| * norm_bound.
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const RowFacts f = s.facts[8 * n + 2 * j + e];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = 6.0f + t[2 * h + e] - f.norm * p.norm_bound[h];
        const bool counts = p.sealed_page[h] > f.first_page && p.sealed_page[h] < f.open_page;
        t[2 * h + e] = counts && fabsf(x) < INFINITY ? x : -INFINITY;
      }
    }
    sums.add(t, n, lane);
  }
  if (jensen) sums.take(s.sums[warp], tiles, lane);
}

// A chunk's floors from the warps' sums, in their order.
template <int Regs, int Warps>
__device__ void write_floors(const AttendArgs& a, int rows, float* floors,
                             PrepareShared<Regs, Warps>& s) {
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += 32 * Warps) {
    ColumnSum sum = s.sums[0][r];
#pragma unroll
    for (int w = 1; w < Warps; ++w) sum = ColumnSums::together(sum, s.sums[w][r]);
    floors[r] = sum.top == -INFINITY ? sum.top : sum.top + log2f(sum.sum);
  }
  __syncthreads();
}

template <int Regs, int Warps>
__global__ void __launch_bounds__(32 * Warps, Regs > 4     ? 1
                                              : Warps == 8 ? 3
                                                           : 2)
    attend_prepare(const __grid_constant__ AttendArgs a) {
  THRIFTATTN_DYNAMIC_SHARED(uint8_t, shared_bytes, 16);
  using Shared = PrepareShared<Regs, Warps>;
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  wait_for_previous_kernel();
  const bool shares = a.slots > 0 && blockIdx.z == 1 && blockIdx.x == 0 && blockIdx.y == 0;
  if (shares) forget_units(UnitTable(a));
  let_next_kernel_start();
  if (shares) share_units(a, UnitTable(a));
  if (blockIdx.z == 1) return;
  const int groups = (static_cast<int>(a.ws.rows) + kRowGroup<Regs> - 1) / kRowGroup<Regs>;
  const int head = groups == 1 ? blockIdx.x : blockIdx.x / groups,
            first_row = (blockIdx.x - head * groups) * kRowGroup<Regs>, seq = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t seq_head = int64_t{seq} * a.g.kv_heads + head;
  const TileView v = tile_view(a, seq, 0, static_cast<int>(a.ws.rows));
  const bool exact = blockIdx.z == 0;
  // Rows that only fill a tile up get zeros.
  const int last_tile = (v.rows + a.tile_rows - 1) & -a.tile_rows;  // a power of two
  const int rows_end = exact ? static_cast<int>(a.ws.rows) : last_tile;
  const int rows = min(rows_end - first_row, kRowGroup<Regs>);
  if (v.rows == 0 || rows <= 0) return;
  const int real_rows = min(v.rows - first_row, rows);  // may be negative

  constexpr int kUnit = 16 * Warps;
  // attend_planes starts from floors; else without a rule nobody asks for one but the caller.
  const bool asked = !v.prefill && (a.g.nvfp4_planes() || a.call.lse_floor != nullptr ||
                                    a.g.promote < 1.0f || a.g.skip > 0.0f);
  const PageList list(a, v, kUnit);
  int chunk = static_cast<int>(blockIdx.z) - 2;
  if (!exact && chunk >= list.chunks) return;
  const auto find = [&](int at) {
    return find_pages(a, v, list, at, min((chunk + 1) * list.chunk, list.pages), lane);
  };
  // What is read of a row lies between, so that it is under way beside the pages.
  PagePlaces places;
  ExactPage exact_of_warp;
  if (exact) {
    if (asked) exact_of_warp = exact_page(a, v, head, warp / 4);
  } else {
    places = find(chunk * list.chunk + 16 * warp);
  }
  QueryRow<Regs> read;
  if (warp < real_rows) read = read_row<Regs>(a, v, head, first_row + warp, lane);
  PageRows<Regs> pages;
  if (exact) {
    prefetch_exact_page(a.g.k, exact_of_warp, warp % 4, lane);
  } else {
    pages = load_pages<Regs>(a, v, places, head, lane);
  }
  for (int r = warp; r < rows; r += Warps) {
    const int row = first_row + r;
    float x[Regs] = {};
    RowFacts facts;
    if (row < v.rows) {
      if (r != warp) read = read_row<Regs>(a, v, head, row, lane);
      transform_row(a, read, lane, x);
#pragma unroll
      for (int k = 0; k < Regs; ++k) x[k] *= a.softmax_scale * kLog2e;
      facts.position = position_of(a, row);
      facts.first_page = v.begin(facts.position) / kPage;
      facts.open_page = v.open_from(facts.position);
    }
    float norm = 0;
#pragma unroll
    for (int k = 0; k < Regs; ++k) norm = fmaf(x[k], x[k], norm);
    for (int step = 16; step > 0; step /= 2) norm += __shfl_xor_sync(~0u, norm, step);
    facts.norm = sqrtf(norm);
    if (lane == 0) s.facts[r] = facts;
    share_row(x, lane, r, s.query[r / 8]);
    if (exact) write_fragments(a, seq_head, row, lane, x);
  }
  const auto clear_sums = [&] {
#pragma unroll 1
    for (int r = lane; r < rows; r += 32) s.sums[warp][r] = {-INFINITY, 0.0f};
    __syncwarp();
  };
  float* floors =
      workspace_at<float>(a, a.ws.floors) + seq_head * a.ws.chunks * a.ws.rows + first_row;
  clear_sums();
  __syncthreads();
  if (exact) {
    const int page_chunks = static_cast<int>(a.ws.page_chunks);
#pragma unroll 1
    for (int c = list.chunks + warp; c < page_chunks; c += Warps) {
#pragma unroll 1
      for (int r = lane; r < rows; r += 32) floors[c * static_cast<int>(a.ws.rows) + r] = -INFINITY;
    }
    if (asked && real_rows > 0) {
      add_exact_pages(a, seq, head, (real_rows + 7) / 8, exact_of_warp, s);
    }
    write_floors<Regs, Warps>(a, rows, floors + a.ws.page_chunks * a.ws.rows, s);
    return;
  }
  const bool jensen = asked && a.g.k.layered() && a.softcap == 0;
  for (bool loaded = true; chunk < list.chunks; chunk += static_cast<int>(gridDim.z) - 2) {
    const int end = min((chunk + 1) * list.chunk, list.pages);
    for (int at = chunk * list.chunk + 16 * warp; at < end; at += kUnit) {
      if (!loaded) pages = load_pages<Regs>(a, v, find(at), head, lane);
      loaded = false;
      take_pages(a, seq_head, first_row, rows / 8, pages, jensen, s);
    }
    loaded = false;
    write_floors<Regs, Warps>(a, rows, floors + chunk * a.ws.rows, s);
    clear_sums();
  }
}

template <int Regs, int Warps>
void launch(const AttendArgs& a, cudaStream_t stream) {
  const int64_t groups = (a.ws.rows + kRowGroup<Regs> - 1) / kRowGroup<Regs>;
  const int64_t across = a.g.kv_heads * groups * a.limits.batch;
  // Every block transforms its rows, so there are no more of them than keep memory busy.
  const int64_t most =
      std::max<int64_t>(1, int64_t{a.multiprocessors} * (Warps == 8 ? 2 : 1) / across);
  const int64_t turns = std::min(most, a.ws.page_chunks);
  const dim3 grid(static_cast<unsigned>(a.g.kv_heads * groups),
                  static_cast<unsigned>(a.limits.batch), static_cast<unsigned>(2 + turns));
  const size_t bytes =
      PrepareShared<Regs, Warps>::bytes(std::min<int64_t>(a.ws.rows, kRowGroup<Regs>) / 8);
  allow_shared(attend_prepare<Regs, Warps>, static_cast<int>(sizeof(PrepareShared<Regs, Warps>)), "attend_prepare");
  launch_after_previous(attend_prepare<Regs, Warps>, {grid, dim3(32 * Warps), bytes}, a, stream,
                        "attend_prepare");
}

template <int Regs>
void launch(const AttendArgs& a, cudaStream_t stream) {
  if (prepare_warps(a.ws.rows) == 8) return launch<Regs, 8>(a, stream);
  launch<Regs, 16>(a, stream);
}

}  // namespace

void launch_prepare(const AttendArgs& a, cudaStream_t stream) {
  for_head_dim(a.g.k.dim, [&](auto dim) { launch<dim.value / 32>(a, stream); });
}

}  // namespace thriftattn::cuda
