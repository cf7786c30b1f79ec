// prefill_tiles: the FP16 tiles of every page that a pass of attend_prefill reads, made once for
// all of its query rows and kept in the workspace as shared memory will have them. A block for each
// (page, KV head): one warpgroup fills K's tiles, one V's.
#pragma once

#include "cuda/attend_prefill_copies.cuh"
#include "cuda/attend_prefill_groups.cuh"
#include "cuda/dependent_launch.cuh"

namespace thriftattn::cuda {

template <int D>
constexpr int prefill_tiles_shared_bytes() {
  return 2 * prefill_tile_bytes(D) + 4 * 2 * D;
}

template <int D>
__global__ void __launch_bounds__(256) prefill_tiles(const __grid_constant__ AttendArgs a) {
#ifdef THRIFTATTN_WGMMA
  THRIFTATTN_DYNAMIC_SHARED(uint8_t, shared_bytes, 1024);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int page = static_cast<int>(blockIdx.x);
  const int seq_head = a.first_head + static_cast<int>(blockIdx.y);
  const TileView v = tile_view(a, seq_head / a.g.kv_heads, 0, a.row_tiles * a.tile_rows);
  if (v.items == 0 || page < v.page_begin || page >= v.page_end) return;
  const PageFacts f =
      workspace_at<const PageFacts>(a, a.ws.facts)[int64_t{seq_head} * a.limits.max_pages + page];
  const int held = min(kPage, v.length - page * kPage), warp = threadIdx.x / 32 % 4;
  const TileFiller<D> filler(a, seq_head % a.g.kv_heads);
  const uint32_t at = shared_address(shared_bytes);
  const auto store = [&](int tile, uint32_t from, int barrier) {
    fence_stores_before_products();
    warpgroup_barrier_sync(barrier);
    if (threadIdx.x % 128 != 0) return;
    bulk_store(made_tile<D>(a, seq_head, page, tile), from, prefill_tile_bytes(D));
    bulk_stores_read();
  };
  if (threadIdx.x < 128) {
    for (int part = 0; part < filler.k_tiles(); ++part) {
      if (part > 0) warpgroup_barrier_sync(1);
      filler.fetch_k(f, held, part, at);
      copies_commit();
      copies_wait(1);
      filler.expand_k(at, f, part);
      store(part, at, 1);
    }
  } else {
    const uint32_t tile = at + prefill_tile_bytes(D);
    const uint32_t mean = tile + prefill_tile_bytes(D) + warp * (2 * D);
    filler.fetch_v(f, held, tile, mean);
    copies_commit();
    copies_wait(1);
    filler.expand_v(tile, f, mean);
    store(filler.k_tiles(), tile, 2);
  }
#endif
}

template <int D>
void launch_prefill_tiles(const AttendArgs& a, cudaStream_t stream) {
  constexpr int kBytes = prefill_tiles_shared_bytes<D>();
  allow_shared(prefill_tiles<D>, kBytes, "prefill_tiles");
  const dim3 grid(static_cast<unsigned>(a.limits.max_pages), static_cast<unsigned>(a.pass_heads));
  launch_after_previous(prefill_tiles<D>, {grid, dim3(256), size_t{kBytes}}, a, stream,
                        "prefill_tiles");
}

}  // namespace thriftattn::cuda
