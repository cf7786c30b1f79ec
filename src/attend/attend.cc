// attend() and attend_batch(): check the requests, cut them into tiles and run those on the
// threads.
#include <fmt/format.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "attend/attend_tile.h"
#include "attend/decode_heads.h"
#include "attend/prefill_head.h"
#include "attend/request.h"
#include "thriftattn/attention.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

// Query rows a tile aims at: decoding a page is shared by them, and their scores over the whole
// context stay in the last-level cache.
constexpr int64_t kTileRows = 128;
// The decode kernels expand codes again for each block of rows, so a tile of them is smaller.
constexpr int64_t kDecodeRows = 64;
// Up to this many queries the splits run in parallel too: there are too few tiles to share out.
constexpr int64_t kFewQueries = 16;

using Task = std::function<void(AttendStats*)>;

// The positions of each tile, for KV head 0. Tiles never straddle a page, so that every page is
// either sealed or open for a whole tile.
std::vector<TileSpec> make_tiles(const LayerView& view, const AttendRequest& request,
                                 int64_t rows) {
  const LayerShape& shape = view.store().shape;
  const int64_t group = shape.q_heads / shape.kv_heads;
  int64_t step = 1;
  while (step < kPageTokens && step * 2 * group <= rows) step *= 2;
  std::vector<TileSpec> tiles;
  const int64_t first = view.length() - request.q.tokens;
  for (int64_t token = first; token < view.length();) {
    const int64_t end = std::min(view.length(), (token / step + 1) * step);
    tiles.push_back({0, token - first, end - token, token});
    token = end;
  }
  return tiles;
}

// Tiles of few queries share out their splits as well. Isolated: a thread that waits for the last
// split must not begin another tile, whose scores would be held beside this one's.
void run_tile(AttendTile& tile, bool few, AttendStats* stats) {
  const auto over_splits = [&](auto&& f) {
    if (few) {
      tbb::this_task_arena::isolate([&] { tbb::parallel_for(int64_t{0}, tile.splits(), f); });
    } else {
      for (int64_t s = 0; s < tile.splits(); ++s) f(s);
    }
  };
  over_splits([&](int64_t s) { tile.score(s); });
  tile.combine();
  over_splits([&](int64_t s) { tile.accumulate(s); });
  tile.finish(stats);
}

// The work of one request on one store, by the fastest kernels that its formats and this machine
// have. What is chosen depends on the request alone, not on what comes with it.
void add_tasks(const LayerView& view, const AttendRequest& request, ScratchPool& scratch,
               std::vector<Task>& tasks) {
  if (request.q.tokens == 0) return;
  const bool few = request.q.tokens <= kFewQueries;
  const bool fast = request.config.math == AttendMath::fast;
  if (request.config.mode == AttendMode::prefill && !few && fast) {
    const PrefillKernels* kernels = prefill_kernels_bf16();
    if (kernels != nullptr && PrefillHead::supports(view.store())) {
      for (int64_t head = 0; head < view.store().shape.kv_heads; ++head) {
        tasks.push_back([&view, &request, kernels, head](AttendStats* stats) {
          // Its inner loops must not take another head's task in the middle of a tile.
          tbb::this_task_arena::isolate(
              [&] { PrefillHead(view, request, head, *kernels).run(stats); });
        });
      }
      return;
    }
  }
  if (fast && request.config.mode == AttendMode::decode && DecodeTile::supports(view.store())) {
    const DecodeKernels& kernels = DecodeTile::kernels_for(view.store());
    for (const TileSpec& spec : make_tiles(view, request, kDecodeRows)) {
      tasks.push_back([&view, &request, &scratch, &kernels, spec, few](AttendStats* stats) {
        DecodeHeads(view, request, spec, kernels, scratch).run(few, stats);
      });
    }
    return;
  }
  const std::vector<TileSpec> tiles = make_tiles(view, request, kTileRows);
  for (int64_t head = 0; head < view.store().shape.kv_heads; ++head) {
    for (TileSpec spec : tiles) {
      spec.kv_head = head;
      tasks.push_back([&view, &request, spec, few](AttendStats* stats) {
        AttendTile tile(view, request, spec);
        run_tile(tile, few, stats);
      });
    }
  }
}

}  // namespace

void AttendStats::merge(const AttendStats& o) {
  rows += o.rows;
  bits_read += o.bits_read;
  elements_visible += o.elements_visible;
  bits_per_element_sum += o.bits_per_element_sum;
  pages_visible += o.pages_visible;
  pages_promoted += o.pages_promoted;
  pages_skipped += o.pages_skipped;
  max_mass_4bit = std::max(max_mass_4bit, o.max_mass_4bit);
  max_mass_skipped = std::max(max_mass_skipped, o.max_mass_skipped);
  sum_mass_4bit += o.sum_mass_4bit;
  sum_mass_skipped += o.sum_mass_skipped;
  final_mass_4bit += o.final_mass_4bit;
  final_mass_skipped += o.final_mass_skipped;
  wanted_mass += o.wanted_mass;
  rows_capped += o.rows_capped;
  query_heads += o.query_heads;
  masses_known = masses_known && o.masses_known;
}

double AttendStats::bits_read_per_element() const {
  return rows > 0 ? bits_per_element_sum / static_cast<double>(rows) : 0.0;
}
double AttendStats::promoted_fraction() const {
  return pages_visible > 0
             ? static_cast<double>(pages_promoted) / static_cast<double>(pages_visible)
             : 0.0;
}
double AttendStats::skipped_fraction() const {
  return pages_visible > 0 ? static_cast<double>(pages_skipped) / static_cast<double>(pages_visible)
                           : 0.0;
}

double AttendStats::capped_fraction() const {
  return rows > 0 ? static_cast<double>(rows_capped) / static_cast<double>(rows) : 0.0;
}

void attend(const KvCache& cache, const AttendRequest& request) {
  attend_batch(cache, std::span(&request, 1));
}

void attend_batch(const KvCache& cache, std::span<const AttendRequest> requests) {
  const auto views = checked_views(cache, requests);
  std::vector<Task> tasks;
  std::vector<const AttendRequest*> owner;  // of each task
  for (size_t i = 0; i < requests.size(); ++i) {
    for (const LayerView& view : views[i]) {
      add_tasks(view, requests[i], cache.impl().scratch, tasks);
    }
    owner.resize(tasks.size(), &requests[i]);
  }
  std::vector<AttendStats> stats(tasks.size());
  tbb::parallel_for(size_t{0}, tasks.size(),
                    [&](size_t i) { tasks[i](owner[i]->stats != nullptr ? &stats[i] : nullptr); });
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (owner[i]->stats != nullptr) owner[i]->stats->merge(stats[i]);
  }
}

void attend_batch(const KvCache& cache, const PackedQueries& batch) {
  attend_batch(cache, requests_of(cache, batch));
}

}  // namespace thriftattn
