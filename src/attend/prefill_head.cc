// Prefill of one KV head in BF16 arithmetic (prefill_head.h).
#include "attend/prefill_head.h"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>

#include "attend/read_stats.h"
#include "attend/softmax_state.h"
#include "attend/tile_kernels.h"
#include "base/float_convert.h"
#include "cache/page_codec.h"
#include "formats/k_transform.h"
#include "formats/row_codec.h"

namespace thriftattn {
namespace {

constexpr int64_t kCols = kPrefillColumns;
constexpr int64_t kBlockPages = 64;  // decoded at a time: 2 MiB of K and V at head_dim 128
constexpr int64_t kStepPages = 4;    // of one pass through a tile's output

bool in_reach(const SideLayout& side) {
  return side.format != Format::f32 && side.format != Format::fp16;
}

void widen_bf16(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_f32(in[i]);
}

}  // namespace

PrefillHead::Scratch::Scratch()
    : scores(aligned_buffer<float>(kStepPages * kPageTokens * kCols)),
      p(aligned_buffer<uint32_t>(kStepPages * kPageTokens / 2 * kCols)) {}

bool PrefillHead::supports(const LayerStore& store) {
  return in_reach(store.layout.k) && in_reach(store.layout.v);
}

PrefillHead::PrefillHead(const LayerView& view, const AttendRequest& request, int64_t kv_head,
                         const PrefillKernels& kernels)
    : view_(view),
      request_(request),
      store_(view.store()),
      kernels_(kernels),
      visible_(view, request),
      kv_head_(kv_head),
      group_(store_.shape.q_heads / store_.shape.kv_heads),
      first_token_(view.length() - request.q.tokens),
      open_from_(view.committed() / kPageTokens) {
  const int64_t rows = request.q.tokens * group_;
  tiles_.resize(static_cast<size_t>((rows + kCols - 1) / kCols));
  const int64_t dk = store_.layout.k.dim, dv = store_.layout.v.dim;
  k_ = aligned_buffer<uint32_t>(kBlockPages * kPageTokens * dk / 2);
  v_ = aligned_buffer<uint32_t>(kBlockPages * kPageTokens / 2 * dv);
  k_mean_ = aligned_buffer<float>(kBlockPages * dk);
  v_mean_ = aligned_buffer<float>(kBlockPages * dv);
}

void PrefillHead::make_tile(int64_t index) {
  Tile& tile = tiles_[static_cast<size_t>(index)];
  const int64_t dk = store_.layout.k.dim, dv = store_.layout.v.dim;
  tile.first_row = index * kCols;
  tile.rows = std::min(kCols, request_.q.tokens * group_ - tile.first_row);
  tile.first_token = first_token_ + tile.first_row / group_;
  tile.last_token = first_token_ + (tile.first_row + tile.rows - 1) / group_;
  tile.page_begin = visible_.begin(tile.first_token) / kPageTokens;
  tile.page_end = (visible_.end(tile.last_token) - 1) / kPageTokens + 1;
  tile.q = aligned_buffer<float>(dk * kCols);
  tile.q_pairs = aligned_buffer<uint32_t>(dk / 2 * kCols);
  tile.o = aligned_buffer<float>(dv * kCols);
  tile.m = aligned_buffer<float>(kCols);
  tile.l = aligned_buffer<float>(kCols);
  std::fill_n(tile.q.get(), dk * kCols, 0.0f);
  std::fill_n(tile.o.get(), dv * kCols, 0.0f);
  std::fill_n(tile.m.get(), kCols, kNegInf);
  std::fill_n(tile.l.get(), kCols, 0.0f);
  const float* eq = store_.equalizer.empty() ? nullptr : &store_.equalizer[kv_head_ * dk];
  std::vector<float> row(static_cast<size_t>(dk));
  for (int64_t c = 0; c < tile.rows; ++c) {
    const int64_t r = tile.first_row + c;
    const float* q = request_.q.row(r / group_, q_head(r));
    if (store_.layout.k.layered) {
      equalize_rotate_rows(q, dk, 1, dk, eq, true, store_.policy.rotate, row.data(), dk);
    } else {
      std::copy_n(q, dk, row.data());
    }
    for (int64_t d = 0; d < dk; ++d) {
      tile.q[d * kCols + c] = row[static_cast<size_t>(d)] * request_.config.softmax_scale;
    }
  }
  for (int64_t d = 0; d < dk; d += 2) {
    kernels_.narrow_pairs(&tile.q[d * kCols], &tile.q[(d + 1) * kCols], kCols,
                          &tile.q_pairs[d / 2 * kCols]);
  }
}

// One side of a page as FP32 [64][dim]; rows behind the last token are zeros.
void PrefillHead::read_side(const SideLayout& side, int64_t page, float* out) const {
  const int64_t tokens = std::min(kPageTokens, view_.length() - page * kPageTokens);
  std::fill_n(out + tokens * side.dim, (kPageTokens - tokens) * side.dim, 0.0f);
  if (!side.layered) {
    const uint8_t* start = view_.start(side, page, kv_head_);
    decode_rows(side.format, start + side.rows, side.row_bytes, tokens, side.dim, out, side.dim);
  } else if (page >= open_from_) {
    const OpenPage& open = *view_.open(page);
    const std::vector<uint16_t>& rows = &side == &store_.layout.k ? open.k : open.v;
    widen_bf16(&rows[static_cast<size_t>(kv_head_ * side.dim * kPageTokens)], tokens * side.dim,
               out);
  } else {
    const PageHead head = view_.head(page, kv_head_);
    decode_base(store_.layout, side, head, out);
    const uint8_t* residual = view_.residual(page, kv_head_);
    if (residual == nullptr) return;
    std::vector<float> r(static_cast<size_t>(kPageTokens * side.dim));
    decode_residual(store_.layout, side, head, residual, r.data());
    for (size_t i = 0; i < r.size(); ++i) out[i] += r[i];
  }
}

// The FP32 part of a side: K's mean or the open page's reference, V's mean; zeros otherwise.
void PrefillHead::read_mean(const SideLayout& side, int64_t page, float* out) const {
  const bool open = page >= open_from_;
  if (!side.layered || (open && &side == &store_.layout.v)) {
    std::fill_n(out, side.dim, 0.0f);
  } else if (open) {
    widen_bf16(&view_.open(page)->k_reference[static_cast<size_t>(kv_head_ * side.dim)], side.dim,
               out);
  } else {
    widen_bf16(reinterpret_cast<const uint16_t*>(view_.start(side, page, kv_head_) + side.mean), side.dim,
               out);
  }
}

void PrefillHead::decode_page(int64_t page, int64_t slot) {
  const SideLayout &k = store_.layout.k, &v = store_.layout.v;
  std::vector<float> x(static_cast<size_t>(kPageTokens * std::max(k.dim, v.dim)));
  read_side(k, page, x.data());
  kernels_.narrow(x.data(), kPageTokens * k.dim,
                  reinterpret_cast<uint16_t*>(k_.get() + slot * kPageTokens * k.dim / 2));
  read_side(v, page, x.data());
  for (int64_t t = 0; t < kPageTokens; t += 2) {
    kernels_.narrow_pairs(&x[static_cast<size_t>(t * v.dim)],
                          &x[static_cast<size_t>((t + 1) * v.dim)], v.dim,
                          v_.get() + (slot * kPageTokens + t) / 2 * v.dim);
  }
  read_mean(k, page, k_mean_.get() + slot * k.dim);
  read_mean(v, page, v_mean_.get() + slot * v.dim);
}

// Hides later tokens and tokens behind the window from each column.
void PrefillHead::mask(const Tile& tile, int64_t page, float* s) const {
  const int64_t begin = page * kPageTokens;
  const bool behind = begin < visible_.begin(tile.last_token);
  if (begin + kPageTokens <= visible_.end(tile.first_token) && !behind) return;
  for (int64_t c = 0; c < tile.rows; ++c) {
    const int64_t position = first_token_ + (tile.first_row + c) / group_;
    const int64_t first = visible_.begin(position) - begin, end = visible_.end(position) - begin;
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if (t < first || t >= end) s[t * kCols + c] = kNegInf;
    }
  }
}

// Up to four pages: scores, the new maximum, weights, and the output brought along.
// `slot` is where the first of them was decoded to.
void PrefillHead::attend_pages(Tile& tile, Scratch& scratch, int64_t slot, int64_t page,
                               int64_t pages) const {
  const int64_t dk = store_.layout.k.dim, dv = store_.layout.v.dim;
  alignas(64) float top[kCols], offset[kCols], factor[kCols], sum[kCols];
  const AlignedFloats& scores = scratch.scores;
  const AlignedWords& p = scratch.p;
  kernels_.matmul({.a = k_.get() + slot * kPageTokens * dk / 2,
                   .a_row = dk / 2,
                   .a_k = 1,
                   .b = tile.q_pairs.get(),
                   .c = scores.get(),
                   .m = pages * kPageTokens,
                   .k = dk / 2});
  std::copy_n(tile.m.get(), kCols, top);
  for (int64_t j = 0; j < pages; ++j) {
    float* s = scores.get() + j * kPageTokens * kCols;
    if (store_.layout.k.layered) {
      kernels_.dot_columns(k_mean_.get() + (slot + j) * dk, tile.q.get(), dk, offset);
      kernels_.add_offset(s, kPageTokens, offset);
    }
    if (request_.config.softcap > 0) {
      tile_softcap({s, kPageTokens, kCols}, request_.config.softcap);
    }
    mask(tile, page + j, s);
    kernels_.column_max(s, kPageTokens, top);
  }
  if (!std::equal(top, top + kCols, tile.m.get())) {
    kernels_.rescale(tile.m.get(), top, factor);
    kernels_.scale_columns(tile.o.get(), dv, factor);
    kernels_.scale_columns(tile.l.get(), 1, factor);
    std::copy_n(top, kCols, tile.m.get());
  }
  for (int64_t j = 0; j < pages; ++j) {
    kernels_.weights(scores.get() + j * kPageTokens * kCols, top,
                     p.get() + j * kPageTokens / 2 * kCols, sum);
    for (int64_t c = 0; c < kCols; ++c) tile.l[c] += sum[c];
    if (store_.layout.v.layered && page + j < open_from_) {
      kernels_.add_outer(tile.o.get(), v_mean_.get() + (slot + j) * dv, dv, sum);
    }
  }
  kernels_.matmul({.a = v_.get() + slot * kPageTokens / 2 * dv,
                   .a_row = 1,
                   .a_k = dv,
                   .b = p.get(),
                   .c = tile.o.get(),
                   .m = dv,
                   .k = pages * kPageTokens / 2,
                   .accumulate = true});
}

void PrefillHead::write(const Tile& tile) {
  const int64_t dv = store_.layout.v.dim;
  for (int64_t c = 0; c < tile.rows; ++c) {
    const int64_t r = tile.first_row + c;
    SoftmaxScalar total{tile.m[c], tile.l[c]};
    float scale = 1.0f;
    if (request_.sink_logits != nullptr) {
      const float m = total.m;
      total.merge({request_.sink_logits[q_head(r)], 1.0f});
      scale = softmax_rescale(m, total.m);
    }
    const float inverse = total.l > 0 ? scale / total.l : 0.0f;
    float* out = request_.out.row(r / group_, q_head(r));
    for (int64_t d = 0; d < dv; ++d) out[d] = tile.o[d * kCols + c] * inverse;
    if (store_.layout.v.rotated) hadamard_rows(out, 1, dv, dv);  // back to V's own basis
    if (request_.lse.data) *request_.lse.row(r / group_, q_head(r)) = total.lse();
  }
}

void PrefillHead::run(AttendStats* stats) {
  const auto tiles = static_cast<int64_t>(tiles_.size());
  tbb::parallel_for(int64_t{0}, tiles, [&](int64_t i) { make_tile(i); });
  int64_t begin = tiles_.front().page_begin;
  const int64_t end = tiles_.back().page_end;
  begin = begin / kStepPages * kStepPages;  // steps are groups of absolute page numbers
  for (int64_t block = begin; block < end; block += kBlockPages) {
    const int64_t block_end = std::min(end, block + kBlockPages);
    tbb::parallel_for(block, block_end, [&](int64_t page) {
      if (page >= tiles_.front().page_begin) decode_page(page, page - block);
    });
    tbb::parallel_for(int64_t{0}, tiles, [&](int64_t i) {
      Tile& tile = tiles_[static_cast<size_t>(i)];
      Scratch scratch;
      for (int64_t step = block; step < block_end; step += kStepPages) {
        const int64_t first = std::max(step, tile.page_begin);
        const int64_t last = std::min({step + kStepPages, block_end, tile.page_end});
        if (first < last) attend_pages(tile, scratch, first - block, first, last - first);
      }
    });
  }
  tbb::parallel_for(int64_t{0}, tiles, [&](int64_t i) { write(tiles_[static_cast<size_t>(i)]); });
  if (stats != nullptr) add_stats(*stats);
}

// What decode's rule reports of masses does not exist in prefill: nothing is chosen.
void PrefillHead::add_stats(AttendStats& stats) const {
  for (int64_t i = 0; i < request_.q.tokens; ++i) {
    const int64_t position = first_token_ + i;
    const int64_t first = visible_.begin(position), end = visible_.end(position);
    RowStats row(stats, store_.layout, store_.policy.promote);
    for (int64_t page = first / kPageTokens; page * kPageTokens < end; ++page) {
      const int64_t begin = std::max(first, page * kPageTokens);
      const int64_t tokens = std::min(end, (page + 1) * kPageTokens) - begin;
      if (!store_.layout.any_layered() || page >= open_from_) {
        row.add_plain(tokens, store_.layout.any_layered());
      } else {
        row.add_page(view_.residual(page, kv_head_) ? PageRead::full : PageRead::base, tokens);
      }
    }
    row.finish(group_);
  }
}

}  // namespace thriftattn
