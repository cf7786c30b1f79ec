// attend_planes: attention of a few query rows over pages whose K and V are both NVFP4 planes: the
// kernels around what their warps do (attend_planes_solo.cuh, attend_planes_team.cuh). Fragments
// are as in attend_decode_warp.cuh.
#pragma once

#include "cuda/attend_planes_scores.cuh"
#include "cuda/attend_planes_solo.cuh"
#include "cuda/attend_planes_values.cuh"

namespace thriftattn::cuda {

// What the rows of a tile are, by one warp.
template <int D, int NT>
__device__ void fill_rows(const AttendArgs& a, const TileView& v, int seq, int head,
                          TileRows<NT>& rows) {
  const int lane = threadIdx.x % 32;
  const int64_t seq_head = int64_t{seq} * a.g.kv_heads + head;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    // Four lanes a row.
    const int r = 8 * n + lane / 4, row = v.first_row + r;
    const bool real = row < v.end_row;
    const int position = position_of(a, row);
    const int q_head = head * a.g.group + row - position * a.g.group;
    const float floor = row_floor<4>(a, seq_head, row, q_head, real);
    if (lane % 4 != 0) continue;
    rows.floor[r] = real ? floor : INFINITY;
    rows.position[r] = real ? position : -1;
    rows.row_factor[r] =
        real ? workspace_at<const float>(a, a.ws.row_factor)[seq_head * a.ws.rows + row] : 0.0f;
  }
  __syncwarp();
}

// The first row of a unit's partial.
__device__ inline int64_t unit_row(const AttendArgs& a, const Unit& u) {
  return partial_row(a, int64_t{u.seq} * a.g.kv_heads + u.head, u.split) + u.tile * a.tile_rows;
}

template <int D>
__global__ void __launch_bounds__(32 * kSoloWarps, kSoloBlocks<D>)
    attend_planes_solo(const __grid_constant__ AttendArgs a) {
  THRIFTATTN_DYNAMIC_SHARED(uint8_t, shared_bytes, 128);
  SolosShared<D>& shared = *reinterpret_cast<SolosShared<D>*>(shared_bytes);
  const int way = threadIdx.x / 32, lane = threadIdx.x % 32;
  SoloShared<D>& s = shared.warp[way];
  DecodeWarp<D, 1, SoloShared<D>>::init(s, lane);
  // The codes of pages are there before attend_prepare is done; what a budget chooses is not.
  if (a.g.budget != 0) wait_for_previous_kernel();
  const UnitTable table(a);
  wait_for_units(table);
  let_next_kernel_start();  // attend_merge reads the units' numbers before it waits
  const int units = table.starts[a.limits.batch];
  SoloCursor cursor;
  bool finished = false;  // sums of a unit lie in shared memory
  const auto add_finished = [&] {
    WarpSums from[kSoloWarps];
#pragma unroll
    for (int w = 0; w < kSoloWarps; ++w)
      from[w] = {shared.warp[w].v[0], shared.warp[w].l, shared.warp[w].m};
    add_up<D, 1, kSoloWarps>(a, from, way, lane, s.partial);
  };
  // Units are taken as blocks become free: which block adds a unit up makes no difference to it.
  for (int unit = blockIdx.x; unit < units; unit = shared.next) {
    int next = 0;
    if (threadIdx.x == 0) next = static_cast<int>(gridDim.x) + atomicAdd(table.taken, 1);
    const Unit u = table.units[unit];
    const TileView v = tile_view(a, u.seq, u.tile);
    __syncwarp();  // the unit before is not read any more
    if (lane == 0) s.page.rows.view = v;
    __syncwarp();
    const ItemWalk<D, 1> walk(a, s.page.rows, u.head, u.tile, u.seq,
                              {u.split, u.splits, way, kSoloWarps, shares_open_page(a, v)});
    SoloWarp<D>(walk, s, cursor)
        .run(
            &shared.query[0][lane],
            [&] {
              wait_for_previous_kernel();
              fill_rows<D, 1>(a, v, u.seq, u.head, s.page.rows);
            },
            [&] {
              uint2 q[D / 16 / kSoloWarps];
#pragma unroll
              for (int i = 0; i < D / 16 / kSoloWarps; ++i)
                q[i] = walk.query_nvfp4()[(way + i * kSoloWarps) * 32];
              __syncthreads();  // all warps have left their sums
#pragma unroll
              for (int i = 0; i < D / 16 / kSoloWarps; ++i)
                shared.query[way + i * kSoloWarps][lane] = q[i];
              if (finished) add_finished();
              __syncwarp();
              if (lane == 0) s.partial = unit_row(a, u);
              if (threadIdx.x == 0) shared.next = next;
              __syncthreads();
            });
    finished = true;
  }
  // Blocks without a unit wait too, because attend_merge waits for this kernel alone.
  wait_for_previous_kernel();
  __syncthreads();
  if (finished) add_finished();
}

template <int D, int NT>
__global__ void __launch_bounds__(64 * kTeams, TeamShape<D, NT>::kBlocks)
    attend_planes_team(const __grid_constant__ AttendArgs a) {
  THRIFTATTN_DYNAMIC_SHARED(uint8_t, shared_bytes, 128);
  TeamsShared<D, NT>& shared = *reinterpret_cast<TeamsShared<D, NT>*>(shared_bytes);
  const int warp = threadIdx.x / 32, team = warp % kTeams, lane = threadIdx.x % 32;
  TeamShared<D, NT>& s = shared.team[team];
  if (warp < kTeams) init_team(s, lane);
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (warp >= kTeams) {
    ValueWarp<D, NT>(a, shared, team).run();
    return;
  }
  const UnitTable table(a);
  const int units = table.starts[a.limits.batch];
  TeamCursor cursor;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const Unit u = table.units[unit];
    const TileView v = tile_view(a, u.seq, u.tile);
    __syncwarp();  // the unit before is not read any more
    if (lane == 0) s.page.rows.view = v;
    fill_rows<D, NT>(a, v, u.seq, u.head, s.page.rows);
    const ItemWalk<D, NT> walk(a, s.page.rows, u.head, u.tile, u.seq,
                               {u.split, u.splits, team, kTeams});
    ScoreWarp<D, NT>(walk, s, cursor).run(unit_row(a, u));
  }
  ScoreWarp<D, NT>::stop(s, cursor, lane);
}

struct PlanesShape {
  int threads, bytes;  // of a block
};
inline void launch_planes_kernel(void (*kernel)(AttendArgs), const PlanesShape& shape,
                                 const AttendArgs& a, cudaStream_t stream) {
  allow_shared(kernel, shape.bytes, "attend_planes");
  const int64_t units = int64_t{a.splits} * a.limits.batch * a.g.kv_heads * a.row_tiles;
  const int64_t blocks = std::min<int64_t>(units, a.slots);
  launch_after_previous(
      kernel,
      {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(shape.threads)),
       static_cast<size_t>(shape.bytes)},
      a, stream, "attend_planes");
}
template <int D, int NT>
void launch_planes_team(const AttendArgs& a, cudaStream_t stream) {
  launch_planes_kernel(attend_planes_team<D, NT>,
                       {64 * kTeams, static_cast<int>(sizeof(TeamsShared<D, NT>))}, a, stream);
}

template <int D>
void launch_planes(const AttendArgs& a, int n_tiles, cudaStream_t stream) {
  if (n_tiles == 1) {
    return launch_planes_kernel(
        attend_planes_solo<D>, {32 * kSoloWarps, static_cast<int>(sizeof(SolosShared<D>))}, a,
        stream);
  }
  if constexpr (D <= 128) {
    if (n_tiles == 4) return launch_planes_team<D, 4>(a, stream);
  }
  launch_planes_team<D, 2>(a, stream);
}

}  // namespace thriftattn::cuda
