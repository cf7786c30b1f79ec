// Decode of all KV heads of a store (decode_heads.h).
#include "attend/decode_heads.h"

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>

namespace thriftattn {
namespace {

// Parts that the work is cut into for each thread: enough to even out their speeds.
constexpr int64_t kPartsPerThread = 4;

}  // namespace

DecodeHeads::DecodeHeads(const LayerView& view, const AttendRequest& request, const TileSpec& spec,
                         const DecodeKernels& kernels, ScratchPool& scratch) {
  const int64_t kv_heads = view.store().shape.kv_heads;
  heads_.reserve(static_cast<size_t>(kv_heads));
  for (int64_t h = 0; h < kv_heads; ++h) {
    TileSpec of_head = spec;
    of_head.kv_head = h;
    heads_.emplace_back(view, request, of_head, kernels);
  }
  const DecodeTile& any = heads_.front();
  const int64_t bytes = any.weights_bytes(), stride = kv_heads * bytes;
  const int64_t weights = any.pages() * stride / static_cast<int64_t>(sizeof(float));
  memory_ = scratch.take(weights + kv_heads * any.floats());
  for (int64_t h = 0; h < kv_heads; ++h) {
    heads_[static_cast<size_t>(h)].set_memory(
        {.weights = reinterpret_cast<std::byte*>(memory_.get()) + h * bytes,
         .weights_stride = stride,
         .floats = memory_.get() + weights + h * any.floats()});
  }
}

void DecodeHeads::score(int64_t split, int64_t head_begin, int64_t head_end) {
  const DecodeTile& any = heads_.front();
  for (int64_t page = any.page_first(split); page < any.page_last(split); ++page) {
    for (int64_t h = head_begin; h < head_end; ++h) {
      const NextRows next = h + 1 < head_end
                                ? heads_[static_cast<size_t>(h + 1)].keys_to_come(page)
                                : heads_[static_cast<size_t>(head_begin)].keys_to_come(page + 1);
      heads_[static_cast<size_t>(h)].score_page(page, next);
    }
  }
}

void DecodeHeads::accumulate(int64_t split, int64_t head_begin, int64_t head_end) {
  for (int64_t h = head_begin; h < head_end; ++h) heads_[static_cast<size_t>(h)].begin_split(split);
  const DecodeTile& any = heads_.front();
  for (int64_t page = any.page_first(split); page < any.page_last(split); ++page) {
    for (int64_t h = head_begin; h < head_end; ++h) {
      const NextRows next = h + 1 < head_end
                                ? heads_[static_cast<size_t>(h + 1)].values_to_come(page)
                                : heads_[static_cast<size_t>(head_begin)].values_to_come(page + 1);
      heads_[static_cast<size_t>(h)].weigh_page(split, page, next);
    }
  }
}

// f(split, head_begin, head_end) over all splits and heads: whole pages where there are splits
// enough for the threads, else some heads of them. How it is cut changes no result: each head's
// sums over a split are its own.
template <typename F>
void DecodeHeads::over_parts(bool parallel, const F& f) {
  const int64_t splits = heads_.front().splits();
  const auto heads = static_cast<int64_t>(heads_.size());
  if (!parallel) {
    for (int64_t s = 0; s < splits; ++s) f(s, int64_t{0}, heads);
    return;
  }
  const int64_t wanted = kPartsPerThread * tbb::this_task_arena::max_concurrency();
  const int64_t cuts = std::clamp<int64_t>((wanted + splits - 1) / splits, 1, heads);
  // Isolated: a thread that waits for the last part must not begin another tile, whose scores
  // would be held beside this one's.
  tbb::this_task_arena::isolate([&] {
    tbb::parallel_for(int64_t{0}, splits * cuts, [&](int64_t i) {
      const int64_t cut = i % cuts;
      f(i / cuts, heads * cut / cuts, heads * (cut + 1) / cuts);
    });
  });
}

// f(head) over all heads.
template <typename F>
void DecodeHeads::over_heads(bool parallel, const F& f) {
  if (!parallel) {
    for (DecodeTile& head : heads_) f(head);
    return;
  }
  tbb::this_task_arena::isolate(
      [&] { tbb::parallel_for(size_t{0}, heads_.size(), [&](size_t h) { f(heads_[h]); }); });
}

void DecodeHeads::run(bool parallel, AttendStats* stats) {
  over_parts(parallel, [&](int64_t s, int64_t begin, int64_t end) { score(s, begin, end); });
  over_heads(parallel, [](DecodeTile& head) { head.combine(); });
  over_parts(parallel, [&](int64_t s, int64_t begin, int64_t end) { accumulate(s, begin, end); });
  over_heads(parallel, [](DecodeTile& head) { head.write_output(); });
  if (stats == nullptr) return;
  for (const DecodeTile& head : heads_) head.add_stats(*stats);
}

}  // namespace thriftattn
