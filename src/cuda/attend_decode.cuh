// attend_decode: the kernel around DecodeWarp (attend_decode_warp.cuh says how it works), and with
// the code for planes in groups of 32 attend_groups. A block is a split of the pages of one
// (sequence, KV head) for one tile of query rows; it leaves a partial.
#pragma once

#include "cuda/attend_decode_scores.cuh"
#include "cuda/attend_decode_values.cuh"
#include "cuda/attend_decode_walk.cuh"
#include "cuda/attend_groups_walk.cuh"

namespace thriftattn::cuda {

template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::begin(RowCopies& copies) {
  sort_items();
  const uint32_t words = __ballot_sync(0xffffffffu, simple_ != 0);
  if (kGroups || words == 0) return;
  const int base = 32 * (__ffs(static_cast<int>(words)) - 1);
  if (a_.g.k.kind == SideKind::fp8) return begin_rows<Fp8Rows<D>>(base, copies);
  begin_rows<BrainRows16<D>>(base, copies);
}

template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::run(RowCopies& copies) {
  if constexpr (kGroups) {
    walk_groups();
  } else if (a_.g.k.kind == SideKind::fp8) {
    walk_rows<Fp8Rows<D>>(copies);
  } else {
    walk_rows<BrainRows16<D>>(copies);
  }
  if (others_ == 0 && !__any_sync(0xffffffffu, noted_ != 0)) return;
  // A function of its own, on a copy of its own, so that registers are shared out among the walks
  // without it: kept inline it made them spill.
  DecodeWarp copy(*this);
  rest_of(copy);
  take_sums(copy);
}

template <int D, int NT, class Shared>
__device__ __noinline__ void DecodeWarp<D, NT, Shared>::rest_of(DecodeWarp& warp) {
  DecodeWarp own(warp);
  own.walk_rest();
  warp.take_sums(own);
}

// Items that are not simple, then what was promoted.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::walk_rest() {
  k_end_ = others_;
  issue_k();
  Pending cur, last;
  last.units = last.issued = 0;
  bool has = false;
  for (int n = 0;; ++n) {
    if (n == others_) {  // what was noted is next
      again_ = static_cast<int>(__reduce_add_sync(0xffffffffu, __popc(noted_)));
      k_end_ = others_ + again_;
      if (again_ != 0) issue_k();
    }
    const bool have = n < others_ + again_;
    cur.units = cur.issued = 0;
    if (have) scores(n, cur);
    if (has) values(last, cur);
    if (!have) return;
    has = true;
    last = cur;
  }
}

// The warp's state to shared memory: O [8 NT][D], then m and l of each row.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::leave(float* to) const {
  constexpr int kWords = D / 64;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          to[(8 * n + 2 * j_ + (e & 1)) * D + 8 * (g_ * kWords + w) + 2 * i + (e >> 1)] =
              o_[4 * w + i][n][e];
        }
      }
    }
  }
  if (g_ != 0) return;
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) {
    to[8 * NT * D + 2 * column_row(c)] = m_[c];
    to[8 * NT * D + 2 * column_row(c) + 1] = l_[c];
  }
}

template <int D, int NT, bool kGroups>
__global__ void __launch_bounds__(32 * kWarps, decode_blocks(D, NT))
    attend_decode(const __grid_constant__ AttendArgs a) {
  THRIFTATTN_DYNAMIC_SHARED(uint8_t, shared_bytes, 128);
  using Shared = BlockShared<D, NT, kGroups>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int split = blockIdx.y, seq = blockIdx.z;
  const int head = blockIdx.x / a.row_tiles, tile = blockIdx.x % a.row_tiles;
  const int64_t seq_head = int64_t{seq} * a.g.kv_heads + head;
  const int warp = threadIdx.x / 32;
  // Pages and tables of rows are there before attend_prepare has begun; the residuals that a budget
  // chose are not.
  const bool early = !a.g.any_layered();
  if (!early) wait_for_previous_kernel();
  int splits;
  {
    const TileView v = tile_view(a, seq, tile);
    splits = splits_by_batch(a, v.items);
    if (split >= splits) {
      // One block a sequence and head waits, so that kernels end in their order.
      if (split == 0) wait_for_previous_kernel();
      return;
    }
    if (threadIdx.x == 0) shared.rows.view = v;
  }
  __syncthreads();
  using OfWarp = WarpShared<D, NT, kGroups>;
  using Warp = DecodeWarp<D, NT, OfWarp>;
  Warp::init(shared.warps[warp], threadIdx.x % 32);
  Warp decode(ItemWalk<D, NT>(a, shared.rows, head, tile, seq, {split, splits, warp, kWarps}),
              shared.warps[warp]);
  typename Warp::RowCopies copies;
  decode.begin(copies);
  if (early) wait_for_previous_kernel();
  let_next_kernel_start();
  {
    const TileView& v = shared.rows.view;
    for (int r = threadIdx.x; r < 8 * NT; r += 32 * kWarps) {
      const int row = v.first_row + r;
      const bool real = row < v.end_row;
      shared.rows.position[r] = real ? row / a.g.group : -1;
      shared.rows.row_factor[r] =
          real ? workspace_at<const float>(a, a.ws.row_factor)[seq_head * a.ws.rows + row] : 0.0f;
      if (!real) shared.rows.floor[r] = INFINITY;
    }
    // Only pages that may be promoted or skipped are held against floors.
    for (int row = v.first_row + warp; !early && row < v.end_row; row += kWarps) {
      const float floor = row_floor<32>(a, seq_head, row, head * a.g.group + row % a.g.group);
      if (threadIdx.x % 32 == 0) shared.rows.floor[row - v.first_row] = floor;
    }
  }
  __syncthreads();
  decode.run(copies);

  // In place of the warp's own K: barriers must not be written over. Where they were, a kernel that
  // lost the device to another process in the meantime found them again in its sums.
  constexpr int kRows = 8 * NT;
  static_assert(kRows * (D + 2) * 4 <= sizeof(OfWarp::k));
  const auto state = [&](int w) { return reinterpret_cast<float*>(shared.warps[w].k); };
  decode.leave(state(warp));
  __syncthreads();
  const int64_t first = partial_row(a, seq_head, split) + shared.rows.view.first_row;
  float* out = workspace_at<float>(a, a.ws.partial_o) + first * D;
  float2* ml = workspace_at<float2>(a, a.ws.partial_ml) + first;
  for (int i = threadIdx.x; i < kRows * D; i += 32 * kWarps) {
    const int row = i / D;
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, state(w)[kRows * D + 2 * row]);
    float o = 0, l = 0;
    if (top > -INFINITY) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* s = state(w);
        const float factor = exp2f(s[kRows * D + 2 * row] - top);
        l += s[kRows * D + 2 * row + 1] * factor;
        if (factor > 0) o += s[i] * factor;
      }
    }
    out[i] = o;
    if (i % D == 0) ml[row] = make_float2(top, l);
  }
}

template <int D, int NT, bool kGroups>
void launch_decode_tile(const AttendArgs& a, cudaStream_t stream) {
  const char* name = kGroups ? "attend_groups" : "attend_decode";
  const int bytes = static_cast<int>(sizeof(BlockShared<D, NT, kGroups>));
  allow_shared(attend_decode<D, NT, kGroups>, bytes, name);
  const dim3 grid(a.g.kv_heads * a.row_tiles, a.splits, static_cast<unsigned>(a.limits.batch));
  launch_after_previous(attend_decode<D, NT, kGroups>,
                        {grid, dim3(32 * kWarps), static_cast<size_t>(bytes)}, a, stream, name);
}

template <int D, bool kGroups>
void launch_decode(const AttendArgs& a, int n_tiles, cudaStream_t stream) {
  if (n_tiles == 1) return launch_decode_tile<D, 1, kGroups>(a, stream);
  launch_decode_tile<D, 2, kGroups>(a, stream);
}

}  // namespace thriftattn::cuda
