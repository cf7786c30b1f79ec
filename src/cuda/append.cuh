// append(): staging a step's tokens and encoding full pages on the device, byte-equal to
// src/cache/append.cc and src/cache/page_codec.cc. The order of operations is the page format, so
// what includes this is compiled without FMA contraction (--fmad=false), divides by IEEE division or by what
// equals it, and takes conversions from the header that the CPU takes them from.
//
// append_pages: a block one or a few pages of a (sequence, KV head) of V, and of plain sides; a block a
// run of pages of K, because a page's reference is the stored mean of the page before it, rounding included. A
// run begins kWarmup pages early with no reference at all: what the reference was is forgotten by
// a factor of three or more from page to page, since it only moves the rounding of 64 rows whose
// mean is then rounded to BF16. append_repair compares the ends: where a run began with another
// reference than the page before it has stored, pages are done again until they agree. So the bytes
// are those of one walk through the pages, whatever the data.
#pragma once

#include <cmath>

#include "cuda/append_page.cuh"
#include "cuda/checks.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/launch.h"

namespace thriftattn::cuda {
namespace {  // of each append_<dim>.cu, so that the compiler knows all calls

// Pages. Of normal data without a mean every second column differs after one page, a third as many
// after each that follows: one of 10^5 here. With a mean, its rounding to BF16 forgets sooner.
inline constexpr int kWarmup = 10;
inline constexpr int kMaxRun = 16;
// Pages of V that a block does, where that leaves blocks enough.
inline constexpr int kMaxVPages = 4;

template <int kDim>
constexpr int kBlocksPerSm = kDim == 64 ? 4 : kDim == 128 ? 2 : 1;

// Pages of one run of a step of `pages` pages.
__device__ inline int run_pages(int pages, int runs) { return min((pages + runs - 1) / runs, kMaxRun); }

__device__ inline float load_element(const void* p, Element type, int64_t i) {
  if (type == Element::f32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return type == Element::bf16 ? bf16_to_f32(bits) : fp16_to_f32(bits);
}

// One token of a plain side: a row of the slot.
template <int Regs>
__device__ void store_plain(const SideGeometry& side, const float (&x)[Regs], int lane,
                            uint8_t* row) {
  if (side.kind == SideKind::bf16) {
#pragma unroll
    for (int r = 0; r < Regs; ++r) {
      reinterpret_cast<uint16_t*>(row)[r * 32 + lane] = f32_to_bf16(x[r]);
    }
    return;
  }
  float amax = 0;
#pragma unroll
  for (int r = 0; r < Regs; ++r) amax = fmaxf(amax, fabsf(x[r]));
  for (int step = 16; step > 0; step /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
  }
  const float scale = usable_scale(amax / kE4m3Max);
  if (lane == 0) *reinterpret_cast<float*>(row) = scale;
#pragma unroll
  for (int r = 0; r < Regs; ++r) row[4 + r * 32 + lane] = f32_to_e4m3(x[r] / scale);
}

// Rows of BF16 as they are, 16 bytes a thread and turn. `refused` gets the first token that is.
template <int kDim>
__device__ void copy_rows(const uint8_t* from, int64_t stride, int64_t begin, int64_t end, float limit,
                          uint8_t* rows, int* refused) {
  constexpr int kChunks = kDim / 8, kThreads = PageShape<kDim>::kThreads;
  constexpr int kTurns = kPageTokens * kChunks / kThreads;
  const int chunks = static_cast<int>(end - begin) * kChunks;
  uint4 x[kTurns];
#pragma unroll
  for (int n = 0; n < kTurns; ++n) {
    const int i = threadIdx.x + n * kThreads;
    if (i < chunks) x[n] = *reinterpret_cast<const uint4*>(from + i / kChunks * stride + i % kChunks * 16);
  }
#pragma unroll
  for (int n = 0; n < kTurns; ++n) {
    const int i = threadIdx.x + n * kThreads;
    if (i >= chunks) continue;
    const uint32_t words[4] = {x[n].x, x[n].y, x[n].z, x[n].w};
    if (!(largest_bf16(words) <= limit)) atomicMin(refused, static_cast<int>(begin) + i / kChunks);
    const auto row = static_cast<int>((begin + i / kChunks) % kPageTokens);
    *reinterpret_cast<uint4*>(rows + row * (2 * kDim) + i % kChunks * 16) = x[n];
  }
}

// The step's tokens of one page of a plain side, a warp a token.
template <int kDim>
__device__ void plain_page(const AppendArgs& a, int side_index, int head, int seq, int64_t index) {
  constexpr int kWarps = PageShape<kDim>::kWarps, kRegs = kDim / 32;
  __shared__ int refused;
  const SequenceTables t = sequence_tables(a.call.tables, a.limits, a.g, seq);
  const int64_t first_token = t.length - t.step;
  const int64_t page = first_token / kPageTokens + index;
  if (t.step <= 0 || page * kPageTokens >= t.length) return;
  if (threadIdx.x == 0) refused = INT32_MAX;
  __syncthreads();
  const SideGeometry& side = side_index == 0 ? a.g.k : a.g.v;
  const void* from = side_index == 0 ? a.call.k : a.call.v;
  int64_t stride = side_index == 0 ? a.call.k_token_stride : a.call.v_token_stride;
  if (stride == 0) stride = int64_t{a.g.kv_heads} * kDim;
  uint8_t* rows = side_of(page_slot(a.call.memory, t, a.g, page), side, head) + side.rows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = max(first_token, page * kPageTokens);
  const int64_t end = min(t.length, (page + 1) * kPageTokens);
  const auto* bytes = static_cast<const uint8_t*>(from) +
                      ((t.first_row + begin - first_token) * stride + head * kDim) * 2;
  const bool copies = side.kind == SideKind::bf16 && a.call.element == Element::bf16 &&
                      ((reinterpret_cast<uint64_t>(bytes) | static_cast<uint64_t>(2 * stride)) & 15) == 0;
  if (copies) copy_rows<kDim>(bytes, 2 * stride, begin, end, side.range_max, rows, &refused);
  for (int64_t token = copies ? end : begin + warp; token < end; token += kWarps) {
    const int64_t at = (t.first_row + token - first_token) * stride + head * kDim;
    float x[kRegs];
    bool over = false;
#pragma unroll
    for (int r = 0; r < kRegs; ++r) {
      x[r] = load_element(from, a.call.element, at + r * 32 + lane);
      over |= !(fabsf(x[r]) <= side.range_max);
    }
    if (over) atomicMin(&refused, static_cast<int>(token));
    store_plain(side, x, lane, rows + token % kPageTokens * side.row_bytes);
  }
  __syncthreads();
  if (threadIdx.x == 0 && refused != INT32_MAX) report(a.call.status, side_index, seq, head, refused);
}

// Pages of one block: a run of K, or some of V.
template <int kDim, bool kGroups, bool kIsK>
__device__ void layered_pages(const AppendArgs& a, PageShared<kDim>& shared, int head, int seq, int index) {
  PageEncoder<kDim, kIsK> encoder(a, shared, head, seq);
  if (encoder.tables().step <= 0) return;
  const int pages = encoder.pages(), first = encoder.first_page();
  const int length = kIsK ? run_pages(pages, a.runs) : a.v_pages;
  const int begin = index * length, end = min(begin + length, pages);
  if (begin >= pages) return;
  // Without centring every reference behind the first is zero.
  int page = kIsK && a.g.center ? max(begin - kWarmup, 0) : begin;
  encoder.prefetch(first + page);
  encoder.begin(first + end - 1);
  if constexpr (kIsK) {
    if (page == 0) {
      encoder.load_reference(first);
    } else {
      encoder.zero_reference();
    }
    for (; page < begin; ++page) encoder.reference_page(first + page);
  }
  for (; page < end; ++page) {
    // Pages of V know nothing of each other.
    if (!encoder.template page<kGroups>(first + page, true) && kIsK) break;
  }
  encoder.end();
}

// kGroups: for layers with a side in groups of 32 (append_groups.cuh).
template <int kDim, bool kGroups>
__global__ void __launch_bounds__(PageShape<kDim>::kThreads, kBlocksPerSm<kDim>)
    append_pages(const __grid_constant__ AppendArgs a) {
  __shared__ PageShared<kDim> shared;
  if (a.repairs) let_next_kernel_start();
  const int head = blockIdx.x % a.g.kv_heads, seq = blockIdx.y;
  const int unit = blockIdx.x / a.g.kv_heads;
  const int side = unit < a.k_units ? 0 : 1;
  const int index = side == 0 ? unit : unit - a.k_units;
  if (!(side == 0 ? a.g.k : a.g.v).layered()) return plain_page<kDim>(a, side, head, seq, index);
  if (side == 0) return layered_pages<kDim, kGroups, true>(a, shared, head, seq, index);
  layered_pages<kDim, kGroups, false>(a, shared, head, seq, index);
}

// Runs of K that began with a reference which the page before them does not have.
template <int kDim, bool kGroups>
__global__ void __launch_bounds__(PageShape<kDim>::kThreads, 1)
    append_repair(const __grid_constant__ AppendArgs a) {
  constexpr int kVectors = kDim / 8;  // of a reference, 16 bytes each
  __shared__ PageShared<kDim> shared;
  wait_for_previous_kernel();
  PageEncoder<kDim, true> encoder(a, shared, blockIdx.x, blockIdx.y);
  if (encoder.tables().step <= 0) return;
  const int pages = encoder.pages(), first = encoder.first_page();
  const int length = run_pages(pages, a.runs);
  // Runs before this one walked from the step's first page.
  const int first_run = kWarmup / length + 1;
  const int runs = (pages + length - 1) / length;
  bool begun = false;
  for (int from = first_run * length;;) {
    if (threadIdx.x == 0) shared.least = INT32_MAX;
    __syncthreads();
    const int run = (from + length - 1) / length;
    for (int i = run * kVectors + threadIdx.x; i < runs * kVectors; i += PageShape<kDim>::kThreads) {
      const int page = i / kVectors * length;
      if (!encoder.reference_holds(first + page, i % kVectors)) {
        atomicMin(&shared.least, page);
      }
    }
    __syncthreads();
    int page = shared.least;
    if (page == INT32_MAX) {
      if (begun) encoder.end();
      return;
    }
    if (!begun) encoder.begin(-1);
    begun = true;
    for (int differs = 1; differs;) {
      encoder.load_reference(first + page);
      if (!encoder.template page<kGroups>(first + page, false)) return encoder.end();
      ++page;
      differs = page < pages && threadIdx.x < kVectors &&
                !encoder.reference_holds(first + page, threadIdx.x);
      differs = __syncthreads_or(differs);
    }
    from = page;
  }
}

template <int kDim, bool kGroups>
void launch_append_as(const AppendArgs& args, const dim3& grid, Stream stream) {
  const dim3 block(PageShape<kDim>::kThreads);
  launch_kernel(append_pages<kDim, kGroups>, {grid, block, 0}, stream, "append_pages", args);
  if (!args.repairs) return;
  const LaunchShape walks{dim3(args.g.kv_heads, grid.y), block, 0};
  launch_after_previous(append_repair<kDim, kGroups>, walks, args, stream, "append_repair");
}

}  // namespace

// Both kernels of one head_dim, instantiated in append_<dim>.cu.
template <int kDim>
void launch_append_pages(const AppendArgs& args, const dim3& grid, Stream stream) {
  if (args.g.any_grouped()) return launch_append_as<kDim, true>(args, grid, stream);
  launch_append_as<kDim, false>(args, grid, stream);
}

}  // namespace thriftattn::cuda
