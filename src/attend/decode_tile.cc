// Decode of one KV head for a few queries (decode_tile.h).
#include "attend/decode_tile.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "attend/read_stats.h"
#include "attend/softmax_state.h"
#include "formats/k_transform.h"

namespace thriftattn {

bool DecodeTile::supports(const LayerStore& store) {
  const int64_t group = store.shape.q_heads / store.shape.kv_heads;
  return store.policy.rule == PromoteRule::mass && group <= kMaxBlocks * kRowBlock;
}

const DecodeKernels& DecodeTile::kernels_for(const LayerStore& store) {
  const DecodeKernels* bf16 = decode_kernels_bf16();
  const auto wide = [](const SideLayout& side) {
    return side.format == Format::f32 || side.format == Format::fp16;
  };
  if (bf16 == nullptr || wide(store.layout.k) || wide(store.layout.v)) return *decode_kernels_f32();
  return *bf16;
}

DecodeTile::DecodeTile(const LayerView& view, const AttendRequest& request, const TileSpec& spec,
                       const DecodeKernels& kernels)
    : request_(request),
      store_(view.store()),
      kernels_(kernels),
      visible_(view, request),
      spec_(spec),
      range_(visible_, spec),
      source_(view, spec.kv_head) {
  group_ = store_.shape.q_heads / store_.shape.kv_heads;
  rows_ = spec.positions * group_;
  blocks_ = (rows_ + kRowBlock - 1) / kRowBlock;
  layered_ = store_.layout.any_layered();

  v_scale_.assign(static_cast<size_t>(pages()), 1.0f);
  lse_.assign(static_cast<size_t>(blocks_ * kRowBlock), kNegInf);
  reads_.assign(static_cast<size_t>(pages() * spec.positions), PageRead::base);
  promote_.assign(static_cast<size_t>(spec.positions), static_cast<float>(store_.policy.promote));
  pack_queries();
}

int64_t DecodeTile::floats() const {
  const int64_t lines = (5 * states() + 15) / 16;
  return lines * 16 + splits() * split_floats();
}

void DecodeTile::set_memory(const Memory& memory) {
  memory_ = memory;
  m_ = memory.floats;
  l_ = m_ + states();
  mass_ = l_ + states();
  factor_ = mass_ + states();
  final_mass_ = factor_ + states();
  sums_ = memory.floats + (floats() - splits() * split_floats());
}

DecodeTile::Page DecodeTile::page(int64_t index) const {
  const int64_t window = store_.shape.window;
  const int64_t last_token = spec_.first_token + spec_.positions - 1;
  const bool past = index < range_.open_from;
  return {.index = index,
          .sealed = past || !layered_,
          .whole = past && (window == 0 || index * kPageTokens > last_token - window)};
}

void DecodeTile::pack_queries() {
  const int64_t dim = store_.layout.k.dim;
  queries_.assign(static_cast<size_t>(blocks_ * kRowBlock * dim), 0.0f);
  std::vector<const float*> rows(static_cast<size_t>(blocks_ * kRowBlock), nullptr);
  const float* eq = store_.equalizer.empty() ? nullptr : &store_.equalizer[spec_.kv_head * dim];
  for (int64_t r = 0; r < rows_; ++r) {
    const float* q = request_.q.row(spec_.first_query + position_of(r), q_head(r));
    float* row = &queries_[static_cast<size_t>(r * dim)];
    if (store_.layout.k.layered) {
      equalize_rotate_rows(q, dim, 1, dim, eq, true, store_.layout.k.rotated, row, dim);
    } else {
      std::copy_n(q, dim, row);
    }
    for (int64_t d = 0; d < dim; ++d) row[d] *= request_.config.softmax_scale;
    rows[static_cast<size_t>(r)] = row;
  }
  const int64_t bytes = kernels_.query_bytes(dim);
  packed_ = aligned_buffer<std::byte>(blocks_ * bytes);
  for (int64_t b = 0; b < blocks_; ++b) {
    kernels_.pack_queries(&rows[static_cast<size_t>(b * kRowBlock)], dim,
                          packed_.get() + b * bytes);
  }
}

// Where the base rows of a side of a later page lie.
NextRows DecodeTile::rows_to_come(const SideLayout& side, int64_t index) const {
  if (index >= range_.end) return {};
  if (side.layered && !page(index).sealed) return {};  // the open page is warm
  return source_.next_rows(side, index);
}

// Of a side's base plane; 1 where there is none.
float DecodeTile::base_scale(const SideLayout& side, const Page& page) const {
  if (!side.layered || !page.sealed) return 1.0f;
  return &side == &store_.layout.k ? source_.meta(page.index).k_scale
                                   : v_scale_[static_cast<size_t>(page.index - range_.begin)];
}

// Linear base scores of `blocks` blocks.
void DecodeTile::score(const Page& page, int64_t first_block, int64_t blocks, float* s,
                       const NextRows& next) const {
  const SideLayout& side = store_.layout.k;
  const std::byte* q = packed_.get() + first_block * kernels_.query_bytes(side.dim);
  float offset[kMaxBlocks * kRowBlock] = {};
  if (const uint16_t* mean = source_.k_mean(page.index, page.sealed)) {
    for (int64_t b = 0; b < blocks; ++b) {
      kernels_.dot_bf16(mean, side.dim,
                        &queries_[static_cast<size_t>((first_block + b) * kRowBlock * side.dim)],
                        offset + b * kRowBlock);
    }
  }
  const float scale = base_scale(side, page);
  switch (DecodeSource::form(side, page.sealed)) {
    case DecodeSource::Form::nvfp4:
      return kernels_.score_nvfp4(source_.base_plane(side, page.index, scale), side.dim, q, blocks,
                                  offset, s, false, next);
    case DecodeSource::Form::bf16:
      return kernels_.score_bf16(source_.bf16_rows(side, page.index), side.dim, q, blocks, offset,
                                 s, next);
    case DecodeSource::Form::expanded: {
      ExpandedRows rows;
      kernels_.expand(source_.stored_rows(side, page.index, scale), side.dim, rows);
      return kernels_.score_expanded(rows, side.dim, q, blocks, offset, s, next);
    }
  }
}

// Caps, hides what each row may not see, and turns scores into exp(s - m).
void DecodeTile::softmax_page(const Page& page, int64_t block, float* s, float* m, float* l) const {
  if (page.whole) {
    kernels_.page_softmax(s, request_.config.softcap, nullptr, m, l);
    return;
  }
  const int64_t begin = page.index * kPageTokens;
  BlockMask mask;
  for (int64_t r = 0; r < kRowBlock; ++r) {
    const int64_t row = block * kRowBlock + r;
    const int64_t position = spec_.first_token + (row < rows_ ? position_of(row) : 0);
    const int64_t first = std::max<int64_t>(0, visible_.begin(position) - begin);
    mask.first[r] = static_cast<int32_t>(std::min(first, kPageTokens));
    mask.end[r] = static_cast<int32_t>(std::min(kPageTokens, visible_.end(position) - begin));
  }
  kernels_.page_softmax(s, request_.config.softcap, &mask, m, l);
}

void DecodeTile::score_page(int64_t index, const NextRows& next) {
  const Page p = page(index);
  if (layered_ && p.sealed) {
    v_scale_[static_cast<size_t>(index - range_.begin)] = source_.meta(index).v_scale;
  }
  alignas(64) float s[kMaxBlocks * kBlockScores];
  score(p, 0, blocks_, s, next);
  for (int64_t b = 0; b < blocks_; ++b) {
    const size_t at = state(index, b);
    softmax_page(p, b, s + b * kBlockScores, &m_[at], &l_[at]);
    kernels_.store_weights(s + b * kBlockScores, kAllRows, weights(index, b));
  }
}

// The LSE over everything visible, each page's mass, and from it how each page is read.
void DecodeTile::combine() {
  for (int64_t b = 0; b < blocks_; ++b) {
    float m[kRowBlock], l[kRowBlock];
    for (int64_t r = 0; r < kRowBlock; ++r) {
      m[r] = kNegInf;
      l[r] = 0.0f;
      const int64_t row = b * kRowBlock + r;
      if (request_.sink_logits != nullptr && row < rows_) {
        m[r] = request_.sink_logits[q_head(row)];
        l[r] = 1.0f;
      }
    }
    const size_t first = state(range_.begin, b);
    kernels_.merge_pages(&m_[first], &l_[first], pages(), m, l);
    float* lse = &lse_[static_cast<size_t>(b * kRowBlock)];
    for (int64_t r = 0; r < kRowBlock; ++r) lse[r] = SoftmaxScalar{m[r], l[r]}.lse();
    kernels_.page_masses(&m_[first], &l_[first], pages(), lse, &mass_[first], &factor_[first]);
  }
  std::copy_n(mass_, states(), final_mass_);
  if (store_.policy.max_promoted < 1 && layered_) apply_cap();
  for (int64_t j = range_.begin; j < range_.sealed_end() && layered_; ++j) decide(page(j));
}

// The mass that decides: the largest over the query heads of the group.
float DecodeTile::top_mass(int64_t page, int64_t position) const {
  float top = 0;
  for (int64_t row = position * group_; row < (position + 1) * group_; ++row) {
    top = std::max(top, mass_[state(page, row / kRowBlock) + static_cast<size_t>(row % kRowBlock)]);
  }
  return top;
}

PageFacts DecodeTile::facts(int64_t page, int64_t position) const {
  return page_facts(store_.layout, store_.policy, page, visible_.end(spec_.first_token + position),
                    store_.shape.window, source_.has_residual(page));
}

void DecodeTile::apply_cap() {
  for (int64_t i = 0; i < spec_.positions; ++i) {
    float& promote = promote_[static_cast<size_t>(i)];
    promote = promote_under_cap(
        range_, visible_.begin(spec_.first_token + i) / kPageTokens, promote,
        store_.policy.max_promoted, [&](int64_t page) { return facts(page, i); },
        [&](int64_t page) { return top_mass(page, i); });
  }
}

void DecodeTile::decide(const Page& page) {
  const int64_t j = page.index - range_.begin;
  for (int64_t i = 0; i < spec_.positions; ++i) {
    const MassRule rule{promote_[static_cast<size_t>(i)], static_cast<float>(store_.policy.skip)};
    reads_[static_cast<size_t>(j * spec_.positions + i)] =
        read_by_mass(rule, facts(page.index, i), top_mass(page.index, i));
  }
}

// Rows of the block that are read in full get new weights, of base + residual scores. Returns
// through `factor` what every row's weights are multiplied with (0 for a skipped row).
void DecodeTile::promote(const Page& page, int64_t block, float* sums, float* factor) {
  const SideLayout& side = store_.layout.k;
  const size_t at = state(page.index, block);
  alignas(64) float s[kBlockScores];
  float m[kRowBlock], l[kRowBlock], mass[kRowBlock], again[kRowBlock];
  score(page, block, 1, s, {});
  if (side.layered) {
    kernels_.score_nvfp4(source_.residual_plane(side, page.index), side.dim,
                         packed_.get() + block * kernels_.query_bytes(side.dim), 1, nullptr, s,
                         true, {});
  }
  softmax_page(page, block, s, m, l);
  kernels_.page_masses(m, l, 1, &lse_[static_cast<size_t>(block * kRowBlock)], mass, again);
  uint32_t promoted = 0;
  for (int64_t r = 0; r < kRowBlock; ++r) {
    const int64_t row = block * kRowBlock + r;
    if (row >= rows_ || read(page.index, row) != PageRead::full) continue;
    promoted |= 1u << r;
    factor[r] = again[r];
    sums[r] += mass[r] - final_mass_[at + static_cast<size_t>(r)];
    final_mass_[at + static_cast<size_t>(r)] = mass[r];
  }
  kernels_.store_weights(s, promoted, weights(page.index, block));
}

// O += P.V of one page for all blocks.
void DecodeTile::weigh(const Page& page, float* accumulators, float* sums, const NextRows& next) {
  const SideLayout& side = store_.layout.v;
  const int64_t step = kernels_.accumulator_floats(side.dim);
  const bool tiers = layered_ && page.sealed;
  const DecodeSource::Form form = DecodeSource::form(side, page.sealed);
  const float scale = base_scale(side, page);
  NextRows fetch = next;  // by the first kernel that reads this page
  ExpandedRows expanded;
  if (!reads_values(page.index)) {
    fetch.fetch_all();
  } else if (form == DecodeSource::Form::expanded) {
    kernels_.expand(source_.stored_rows(side, page.index, scale), side.dim, expanded);
  }
  for (int64_t b = 0; b < blocks_; ++b) {
    const size_t at = state(page.index, b);
    float factor[kRowBlock], full[kRowBlock] = {};
    const std::byte* p = weights(page.index, b);
    bool any = false, promoted = false;
    std::copy_n(&factor_[at], kRowBlock, factor);
    for (int64_t r = 0; r < kRowBlock; ++r) {
      const int64_t row = b * kRowBlock + r;
      const PageRead how = tiers && row < rows_ ? read(page.index, row) : PageRead::base;
      if (row >= rows_ || how == PageRead::skip) {
        factor[r] = 0.0f;
      } else {
        any = true;
        promoted |= how == PageRead::full;
      }
      sums[b * kRowBlock + r] += mass_[at + static_cast<size_t>(r)];
    }
    if (promoted) {
      promote(page, b, sums + b * kRowBlock, factor);
      for (int64_t r = 0; r < kRowBlock; ++r) {
        const int64_t row = b * kRowBlock + r;
        full[r] = row < rows_ && read(page.index, row) == PageRead::full ? factor[r] : 0.0f;
      }
    }
    float* acc = accumulators + b * step;
    if (tiers && side.layered) {
      // The page's mean of V, weighted by the row's own mass: all that a skipped page gives.
      kernels_.add_mean(source_.v_mean(page.index), side.dim, &final_mass_[at], acc);
    }
    if (any) {
      switch (form) {
        case DecodeSource::Form::nvfp4:
          kernels_.weigh_nvfp4(source_.base_plane(side, page.index, scale), side.dim, p, factor,
                               acc, std::exchange(fetch, {}));
          break;
        case DecodeSource::Form::bf16:
          kernels_.weigh_bf16(source_.bf16_rows(side, page.index), side.dim, p, factor, acc,
                              std::exchange(fetch, {}));
          break;
        case DecodeSource::Form::expanded:
          kernels_.weigh_expanded(expanded, side.dim, p, factor, acc, std::exchange(fetch, {}));
      }
    }
    if (promoted && side.layered) {
      kernels_.weigh_nvfp4(source_.residual_plane(side, page.index), side.dim, p, full, acc, {});
    }
  }
}

// Whether some position reads V's codes of a page.
bool DecodeTile::reads_values(int64_t page) const {
  const auto first = reads_.begin() + (page - range_.begin) * spec_.positions;
  return std::any_of(first, first + spec_.positions,
                     [](PageRead how) { return how != PageRead::skip; });
}

void DecodeTile::begin_split(int64_t split) {
  std::fill_n(split_sums(split), split_floats(), 0.0f);
}

void DecodeTile::weigh_page(int64_t split, int64_t index, const NextRows& next) {
  float* sums = split_sums(split);
  weigh(page(index), sums, sums + accumulator_floats(), next);
}

NextRows DecodeTile::keys_to_come(int64_t index) const {
  return rows_to_come(store_.layout.k, index);
}

NextRows DecodeTile::values_to_come(int64_t index) const {
  if (index >= range_.end) return {};
  NextRows next = rows_to_come(store_.layout.v, index);
  next.meta = nullptr;  // its scale is kept
  if (!reads_values(index)) next.rows = nullptr;
  return next;
}

void DecodeTile::write_output() {
  const int64_t dim = store_.layout.v.dim;
  const int64_t step = kernels_.accumulator_floats(dim);
  // The splits' sums, in their order.
  float* acc = split_sums(0);
  for (int64_t split = 1; split < splits(); ++split) {
    const float* more = split_sums(split);
    for (int64_t i = 0; i < split_floats(); ++i) acc[i] += more[i];
  }
  std::vector<float> o(static_cast<size_t>(dim));
  for (int64_t r = 0; r < rows_; ++r) {
    const int64_t i = position_of(r);
    const float lse = lse_[static_cast<size_t>(r)];
    float total = 0.0f;
    if (request_.sink_logits != nullptr) {
      total = softmax_rescale(request_.sink_logits[q_head(r)], lse);
    }
    std::fill(o.begin(), o.end(), 0.0f);
    total += acc[accumulator_floats() + r];
    kernels_.add_row(acc + r / kRowBlock * step, dim, r % kRowBlock, o.data());
    // Back to V's own basis, once: H is linear, so what was summed in its basis needs no more.
    if (store_.layout.v.rotated) hadamard_rows(o.data(), 1, dim, dim);
    const float inverse = total > 0 ? 1.0f / total : 0.0f;
    float* out = request_.out.row(spec_.first_query + i, q_head(r));
    for (int64_t d = 0; d < dim; ++d) out[d] = o[static_cast<size_t>(d)] * inverse;
    if (request_.lse.data) {
      *request_.lse.row(spec_.first_query + i, q_head(r)) = SoftmaxScalar{lse, total}.lse();
    }
  }
}

void DecodeTile::add_stats(AttendStats& stats) const {
  for (int64_t i = 0; i < spec_.positions; ++i) {
    const int64_t position = spec_.first_token + i;
    const int64_t first = visible_.begin(position), end = visible_.end(position);
    RowStats row_stats(stats, store_.layout, store_.policy.promote);
    for (int64_t j = range_.begin; j < range_.end; ++j) {
      const int64_t begin = std::max(first, j * kPageTokens);
      const int64_t tokens = std::min(end, (j + 1) * kPageTokens) - begin;
      if (tokens <= 0) continue;
      const Page p = page(j);
      if (!layered_ || !p.sealed) {
        row_stats.add_plain(tokens, !p.sealed);
        continue;
      }
      const PageRead how = read(j, i * group_);
      row_stats.add_page(how, tokens);
      for (int64_t row = i * group_; row < (i + 1) * group_; ++row) {
        const size_t at = state(j, row / kRowBlock) + static_cast<size_t>(row % kRowBlock);
        row_stats.add_mass(how, mass_[at], final_mass_[at]);
      }
    }
    row_stats.finish(group_);
    stats.rows_capped +=
        promote_[static_cast<size_t>(i)] > static_cast<float>(store_.policy.promote);
  }
}

}  // namespace thriftattn
