// attend(): checks the request, cuts it into tiles and runs them on the threads.
#include <fmt/format.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attend/attend_tile.h"
#include "attend/decode_tile.h"
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

// Tiles never straddle a page, so that every page is either sealed or open for a whole tile.
std::vector<TileSpec> make_tiles(const LayerView& view, const AttendRequest& request,
                                 int64_t rows) {
  const LayerShape& shape = view.store().shape;
  const int64_t group = shape.q_heads / shape.kv_heads;
  int64_t step = 1;
  while (step < kPageTokens && step * 2 * group <= rows) step *= 2;
  std::vector<TileSpec> tiles;
  const int64_t first = view.length() - request.q.tokens;
  for (int64_t head = 0; head < shape.kv_heads; ++head) {
    for (int64_t token = first; token < view.length();) {
      const int64_t end = std::min(view.length(), (token / step + 1) * step);
      tiles.push_back({head, token - first, end - token, token});
      token = end;
    }
  }
  return tiles;
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
  query_heads += o.query_heads;
}

double AttendStats::bits_read_per_element() const {
  return rows > 0 ? bits_per_element_sum / static_cast<double>(rows) : 0.0;
}
double AttendStats::promoted_fraction() const {
  return pages_visible > 0 ? static_cast<double>(pages_promoted) / static_cast<double>(pages_visible)
                           : 0.0;
}
double AttendStats::skipped_fraction() const {
  return pages_visible > 0 ? static_cast<double>(pages_skipped) / static_cast<double>(pages_visible)
                           : 0.0;
}

LayerView checked_view(const KvCache& cache, const AttendRequest& request) {
  const auto fail = [](const std::string& message) {
    throw Error(ErrorCode::invalid_argument, "attend: " + message);
  };
  const KvCache::Impl& impl = cache.impl();
  const Sequence& seq = impl.sequence(request.sequence);
  if (request.layer < 0 || request.layer >= static_cast<int64_t>(impl.layers.size())) {
    fail(fmt::format("layer {} is not in 0..{}", request.layer, impl.layers.size() - 1));
  }
  const LayerStore& store = impl.layers[static_cast<size_t>(request.layer)];
  const LayerView view(store, seq.layers[static_cast<size_t>(request.layer)], seq.length);
  const LayerShape& shape = store.shape;
  const auto& q = request.q;
  if (q.data == nullptr || q.heads != shape.q_heads || q.head_dim != shape.head_dim_k) {
    fail(fmt::format("q is [{}][{}][{}]{}, layer {} needs [n][{}][{}]", q.tokens, q.heads,
                     q.head_dim, q.data == nullptr ? " at a null pointer" : "", request.layer,
                     shape.q_heads, shape.head_dim_k));
  }
  const auto& out = request.out;
  if (out.data == nullptr || out.tokens != q.tokens || out.heads != shape.q_heads ||
      out.head_dim != shape.head_dim_v) {
    fail(fmt::format("out is [{}][{}][{}]{}, it must be [{}][{}][{}]", out.tokens, out.heads,
                     out.head_dim, out.data == nullptr ? " at a null pointer" : "", q.tokens,
                     shape.q_heads, shape.head_dim_v));
  }
  if (request.lse.data && (request.lse.tokens != q.tokens || request.lse.heads != shape.q_heads)) {
    fail(fmt::format("lse is [{}][{}], it must be [{}][{}]", request.lse.tokens, request.lse.heads,
                     q.tokens, shape.q_heads));
  }
  const float scale = request.config.softmax_scale;
  if (!(std::isfinite(scale) && scale > 0)) {
    fail(fmt::format("softmax_scale = {}; it is usually 1/sqrt(head_dim)", scale));
  }
  if (!(std::isfinite(request.config.softcap) && request.config.softcap >= 0)) {
    fail(fmt::format("softcap = {}; it is a positive number, or 0 for none", request.config.softcap));
  }
  if (q.tokens < 0 || q.tokens > view.length()) {
    fail(fmt::format("{} queries, but the sequence holds {} tokens", q.tokens, view.length()));
  }
  const int64_t first = view.length() - q.tokens;
  if (request.config.mode == AttendMode::prefill && first < view.committed()) {
    fail(fmt::format("prefill of {} queries, but the open step has {} tokens", q.tokens,
                     view.length() - view.committed()));
  }
  if (store.layout.any_layered() && q.tokens > 0) {
    const int64_t open_from = request.config.mode == AttendMode::prefill
                                  ? view.committed() / kPageTokens
                                  : first / kPageTokens;
    for (int64_t page = open_from; page * kPageTokens < view.length(); ++page) {
      if (view.open(page) == nullptr) {
        fail(fmt::format("the page of token {} is sealed; attend before commit, within the step that "
                         "appended the queries' tokens",
                         page * kPageTokens));
      }
    }
  }
  for (int64_t t = 0; t < q.tokens; ++t) {
    for (int64_t h = 0; h < q.heads; ++h) {
      const float* row = q.row(t, h);
      bool finite = true;
      for (int64_t d = 0; d < q.head_dim; ++d) finite &= std::isfinite(row[d]);
      if (!finite) {
        throw Error(ErrorCode::non_finite,
                    fmt::format("q of layer {}, head {}, token {} holds NaN or Inf: check the model's "
                                "weights",
                                request.layer, h, first + t));
      }
    }
  }
  return view;
}

namespace {

// Many queries: a tile a task. Few: too few tiles to share out, so their splits run in parallel.
template <typename Tile, typename MakeTile>
void run_tiles(const std::vector<TileSpec>& specs, bool few, const MakeTile& make,
               std::vector<AttendStats>& stats) {
  const auto stats_of = [&](size_t i) { return stats.empty() ? nullptr : &stats[i]; };
  if (!few) {
    tbb::parallel_for(size_t{0}, specs.size(), [&](size_t i) {
      const std::unique_ptr<Tile> tile = make(specs[i]);
      for (int64_t s = 0; s < tile->splits(); ++s) tile->score(s);
      tile->combine();
      for (int64_t s = 0; s < tile->splits(); ++s) tile->accumulate(s);
      tile->finish(stats_of(i));
    });
    return;
  }
  struct Work {
    size_t tile;
    int64_t split;
  };
  std::vector<std::unique_ptr<Tile>> tiles(specs.size());
  tbb::parallel_for(size_t{0}, specs.size(), [&](size_t i) { tiles[i] = make(specs[i]); });
  std::vector<Work> work;
  for (size_t i = 0; i < specs.size(); ++i) {
    for (int64_t s = 0; s < tiles[i]->splits(); ++s) work.push_back({i, s});
  }
  const auto over_splits = [&](auto&& f) {
    tbb::parallel_for(size_t{0}, work.size(),
                      [&](size_t w) { f(*tiles[work[w].tile], work[w].split); });
  };
  over_splits([](Tile& tile, int64_t split) { tile.score(split); });
  tbb::parallel_for(size_t{0}, tiles.size(), [&](size_t i) { tiles[i]->combine(); });
  over_splits([](Tile& tile, int64_t split) { tile.accumulate(split); });
  tbb::parallel_for(size_t{0}, tiles.size(), [&](size_t i) { tiles[i]->finish(stats_of(i)); });
}

void run_heads(const LayerView& view, const AttendRequest& request, const PrefillKernels& kernels) {
  const int64_t heads = view.store().shape.kv_heads;
  std::vector<AttendStats> stats(static_cast<size_t>(heads));
  tbb::parallel_for(int64_t{0}, heads, [&](int64_t head) {
    // Its inner loops must not take another head's task in the middle of a tile.
    tbb::this_task_arena::isolate([&] {
      PrefillHead(view, request, head, kernels).run(request.stats ? &stats[head] : nullptr);
    });
  });
  if (request.stats) {
    for (const AttendStats& s : stats) request.stats->merge(s);
  }
}

}  // namespace

void attend(const KvCache& cache, const AttendRequest& request) {
  const LayerView view = checked_view(cache, request);
  const bool few = request.q.tokens <= kFewQueries;
  const DecodeKernels* kernels = nullptr;
  if (request.config.math == AttendMath::fast) {
    kernels = decode_kernels_bf16();
    if (kernels == nullptr) kernels = decode_kernels_f32();
  }
  const bool fast_decode = kernels != nullptr && request.config.mode == AttendMode::decode &&
                           DecodeTile::supports(view.store());
  const PrefillKernels* prefill =
      request.config.math == AttendMath::fast ? prefill_kernels_bf16() : nullptr;
  if (prefill != nullptr && request.config.mode == AttendMode::prefill && !few &&
      PrefillHead::supports(view.store())) {
    run_heads(view, request, *prefill);
    return;
  }
  const std::vector<TileSpec> specs =
      make_tiles(view, request, fast_decode ? kDecodeRows : kTileRows);
  std::vector<AttendStats> stats(request.stats ? specs.size() : 0);
  if (fast_decode) {
    run_tiles<DecodeTile>(
        specs, few,
        [&](const TileSpec& spec) {
          return std::make_unique<DecodeTile>(view, request, spec, *kernels,
                                              cache.impl().scratch);
        },
        stats);
  } else {
    run_tiles<AttendTile>(
        specs, few,
        [&](const TileSpec& spec) { return std::make_unique<AttendTile>(view, request, spec); },
        stats);
  }
  for (const AttendStats& s : stats) request.stats->merge(s);
}

}  // namespace thriftattn
