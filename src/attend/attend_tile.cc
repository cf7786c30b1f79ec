// One tile of attention (attend_tile.h).
#include "attend/attend_tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attend/read_stats.h"
#include "attend/tile_kernels.h"
#include "base/float_convert.h"
#include "cache/page_codec.h"
#include "formats/k_transform.h"
#include "formats/row_codec.h"
#include "precision/block_score.h"
#include "precision/budget_rule.h"

namespace thriftattn {
namespace {

std::unique_ptr<float[]> buffer(int64_t n) {
  return std::make_unique_for_overwrite<float[]>(static_cast<size_t>(n));
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void widen_bf16(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_f32(in[i]);
}

// Copies the named columns of src[rows][ld] side by side into dst[rows][dst_ld], zero-padded.
void gather_columns(const float* src, int64_t rows, int64_t ld, const std::vector<int64_t>& columns,
                    float* dst, int64_t dst_ld) {
  const int64_t n = static_cast<int64_t>(columns.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < n; ++c) dst[r * dst_ld + c] = src[r * ld + columns[static_cast<size_t>(c)]];
    for (int64_t c = n; c < dst_ld; ++c) dst[r * dst_ld + c] = 0.0f;
  }
}

void scatter_columns(const float* src, int64_t rows, int64_t src_ld,
                     const std::vector<int64_t>& columns, float* dst, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < columns.size(); ++c) {
      dst[r * ld + columns[c]] = src[r * src_ld + static_cast<int64_t>(c)];
    }
  }
}

}  // namespace

AttendTile::AttendTile(const LayerView& view, const AttendRequest& request, const TileSpec& spec)
    : view_(view),
      request_(request),
      store_(view.store()),
      visible_(view, request),
      spec_(spec),
      range_(visible_, spec) {
  group_ = store_.shape.q_heads / store_.shape.kv_heads;
  rows_ = spec.positions * group_;
  cols_ = round_up(rows_, tile_lanes());

  const int64_t pages = range_.pages();
  scores_ = buffer(pages * kPageTokens * cols_);
  reads_.assign(static_cast<size_t>(pages * spec.positions), PageRead::base);
  page_mass_.assign(static_cast<size_t>(pages * cols_), 0.0f);
  page_sum_.assign(static_cast<size_t>(pages * cols_), 0.0f);
  if (store_.policy.rule == PromoteRule::budget) {
    if (store_.policy.score == BlockScore::oracle) {
      page_lse_full_.assign(static_cast<size_t>(pages * cols_), kNegInf);
    } else {
      page_score_.assign(static_cast<size_t>(pages * cols_), 0.0f);
    }
  }
  promote_.assign(static_cast<size_t>(spec.positions), static_cast<float>(store_.policy.promote));
  needs_mass_ = request.config.mode == AttendMode::decode && store_.layout.any_layered();
  if (needs_mass_) {
    page_m_.assign(static_cast<size_t>(pages * cols_), kNegInf);
    page_l_.assign(static_cast<size_t>(pages * cols_), 0.0f);
  }
  states_.resize(static_cast<size_t>(splits()));
  load_queries();
}

int64_t AttendTile::page_tokens(int64_t page) const {
  return std::min(kPageTokens, view_.length() - page * kPageTokens);
}

const float* AttendTile::sink(int64_t group_head) const {
  if (request_.sink_logits == nullptr) return nullptr;
  return request_.sink_logits + q_head(group_head);
}

void AttendTile::load_queries() {
  const int64_t dim = store_.layout.k.dim;
  queries_ = buffer(dim * cols_);
  std::fill_n(queries_.get(), dim * cols_, 0.0f);
  std::vector<float> row(static_cast<size_t>(dim));
  const float* eq = store_.equalizer.empty() ? nullptr : &store_.equalizer[spec_.kv_head * dim];
  for (int64_t i = 0; i < spec_.positions; ++i) {
    for (int64_t g = 0; g < group_; ++g) {
      const float* q = request_.q.row(spec_.first_query + i, q_head(g));
      if (store_.layout.k.layered) {
        equalize_rotate_rows(q, dim, 1, dim, eq, true, store_.layout.k.rotated, row.data(), dim);
      } else {
        std::copy_n(q, dim, row.data());
      }
      for (int64_t d = 0; d < dim; ++d) {
        queries_[d * cols_ + i * group_ + g] = row[static_cast<size_t>(d)] * request_.config.softmax_scale;
      }
    }
  }
}

// One side of a page as the query reads it first, as FP32 [tokens][dim]: plain rows, the open
// form, or planes. Decode reads the base plane and adds the residual for the rows that want it;
// prefill reads both at once where the residual is held.
void AttendTile::load_values(const SideLayout& side, int64_t page, float* out) const {
  if (!side.layered) {
    const uint8_t* start = view_.start(side, page, spec_.kv_head);
    decode_rows(side.format, start + side.rows, side.row_bytes, page_tokens(page), side.dim, out,
                side.dim);
    return;
  }
  if (!is_sealed(page)) {
    const OpenPage& open = *view_.open(page);
    const std::vector<uint16_t>& rows = &side == &store_.layout.k ? open.k : open.v;
    widen_bf16(&rows[static_cast<size_t>(spec_.kv_head * side.dim * kPageTokens)],
               page_tokens(page) * side.dim, out);
    return;
  }
  const PageHead head = view_.head(page, spec_.kv_head);
  decode_base(store_.layout, side, head, out);
  if (request_.config.mode != AttendMode::prefill) return;
  const uint8_t* residual = view_.residual(page, spec_.kv_head);
  if (residual == nullptr) return;
  std::vector<float> r(static_cast<size_t>(kPageTokens * side.dim));
  decode_residual(store_.layout, side, head, residual, r.data());
  for (size_t i = 0; i < r.size(); ++i) out[i] += r[i];
}

// What q' is dotted with besides the values of K: the page's mean, the open page's reference, or
// zeros.
void AttendTile::load_k_offset(int64_t page, std::vector<float>& offset) const {
  const SideLayout& side = store_.layout.k;
  offset.assign(static_cast<size_t>(side.dim), 0.0f);
  if (!side.layered) return;
  const auto* mean =
      is_sealed(page)
          ? reinterpret_cast<const uint16_t*>(view_.start(side, page, spec_.kv_head) + side.mean)
          : &view_.open(page)->k_reference[static_cast<size_t>(spec_.kv_head * side.dim)];
  widen_bf16(mean, side.dim, offset.data());
}

// Hides what a position may not see: later tokens, and tokens behind the window.
void AttendTile::mask(int64_t page, float* s) const {
  const int64_t begin = page * kPageTokens;
  const int64_t held = page_tokens(page);
  for (int64_t i = 0; i < spec_.positions; ++i) {
    const int64_t position = spec_.first_token + i;
    const int64_t first = std::max<int64_t>(0, visible_.begin(position) - begin);
    const int64_t end = std::min(held, visible_.end(position) - begin);
    if (first == 0 && end >= kPageTokens) continue;
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if (t >= first && t < end) continue;
      std::fill_n(s + t * cols_ + i * group_, group_, kNegInf);
    }
  }
}

// The scores as the softmax sees them: themselves, or a capped copy in `copy`. What is stored
// stays linear in q.k, so that a residual can still be added to it.
ScoreBlock AttendTile::capped_scores(int64_t page, float* s, std::vector<float>& copy) const {
  if (request_.config.softcap <= 0) return {s, kPageTokens, cols_};
  copy.assign(s, s + kPageTokens * cols_);
  const ScoreBlock block{copy.data(), kPageTokens, cols_};
  tile_softcap(block, request_.config.softcap);
  mask(page, copy.data());  // the cap makes -inf finite
  return block;
}

void AttendTile::score(int64_t split) {
  const int64_t dim = store_.layout.k.dim;
  std::vector<float> k(static_cast<size_t>(kPageTokens * dim)), offset, q_offset(static_cast<size_t>(cols_));
  std::vector<float> capped, residual, full;
  const bool oracle = !page_lse_full_.empty();
  for (int64_t page = range_.first(split); page < range_.last(split); ++page) {
    float* s = scores(page);
    load_values(store_.layout.k, page, k.data());
    load_k_offset(page, offset);
    tile_matmul({.a = offset.data(), .a_row = 0, .a_k = 1, .b = queries_.get(), .ldb = cols_,
                 .c = q_offset.data(), .ldc = cols_, .m = 1, .n = cols_, .k = dim});
    const ScoreBlock block{s, kPageTokens, cols_};
    tile_fill_rows(block, q_offset.data());
    tile_matmul({.a = k.data(), .a_row = dim, .a_k = 1, .b = queries_.get(), .ldb = cols_, .c = s,
                 .ldc = cols_, .m = page_tokens(page), .n = cols_, .k = dim, .accumulate = true});
    mask(page, s);
    const int64_t at = (page - range_.begin) * cols_;
    if (!page_score_.empty()) {
      block_scores(store_.policy.score, {k.data(), page_tokens(page), dim, page},
                   {queries_.get(), cols_, q_offset.data()}, &page_score_[static_cast<size_t>(at)]);
    }
    if (needs_mass_) {
      tile_page_state(capped_scores(page, s, capped), &page_m_[static_cast<size_t>(at)],
                      &page_l_[static_cast<size_t>(at)]);
    }
    if (oracle) {
      full.assign(s, s + kPageTokens * cols_);
      const uint8_t* res = is_sealed(page) ? view_.residual(page, spec_.kv_head) : nullptr;
      if (res != nullptr && store_.layout.k.layered) {
        residual.resize(k.size());
        decode_residual(store_.layout, store_.layout.k, view_.head(page, spec_.kv_head), res,
                        residual.data());
        tile_matmul({.a = residual.data(), .a_row = dim, .a_k = 1, .b = queries_.get(),
                     .ldb = cols_, .c = full.data(), .ldc = cols_, .m = kPageTokens, .n = cols_,
                     .k = dim, .accumulate = true});
      }
      const ScoreBlock full_block = capped_scores(page, full.data(), capped);
      std::vector<float> m(static_cast<size_t>(cols_)), l(static_cast<size_t>(cols_));
      tile_page_state(full_block, m.data(), l.data());
      for (int64_t c = 0; c < cols_; ++c) {
        page_lse_full_[static_cast<size_t>(at + c)] =
            SoftmaxScalar{m[static_cast<size_t>(c)], l[static_cast<size_t>(c)]}.lse();
      }
    }
  }
}

// The LSE over everything visible, and from it the mass of every page: a page's own (m, l) is
// enough for both, so that the scores are exponentiated once here and once for P.
void AttendTile::combine() {
  if (!needs_mass_) return;
  const int64_t pages = range_.pages();
  for (int64_t c = 0; c < rows_; ++c) {
    SoftmaxScalar total;
    if (const float* sink_logit = sink(c % group_)) total = {*sink_logit, 1.0f};
    for (int64_t p = 0; p < pages; ++p) {
      const size_t at = static_cast<size_t>(p * cols_ + c);
      total.merge({page_m_[at], page_l_[at]});
    }
    const float lse = total.lse();
    for (int64_t p = 0; p < pages; ++p) {
      const size_t at = static_cast<size_t>(p * cols_ + c);
      page_mass_[at] = page_l_[at] * softmax_rescale(page_m_[at], lse);
    }
  }
  if (store_.policy.rule == PromoteRule::budget) choose_by_budget();
  if (store_.policy.max_promoted < 1) apply_cap();
  for (int64_t page = range_.begin; page < range_.sealed_end(); ++page) decide(page);
}

// The pages promoted for each position by a score known before attention.
void AttendTile::choose_by_budget() {
  const int64_t pages = range_.pages();
  const LayerPolicy& policy = store_.policy;
  budget_choice_.assign(static_cast<size_t>(pages * spec_.positions), 0);
  std::vector<float> score(static_cast<size_t>(pages));
  std::vector<uint8_t> candidate(static_cast<size_t>(pages));
  for (int64_t i = 0; i < spec_.positions; ++i) {
    const int64_t visible = visible_.end(spec_.first_token + i);
    std::vector<float> lse(static_cast<size_t>(group_), kNegInf);
    if (!page_lse_full_.empty()) {
      for (int64_t g = 0; g < group_; ++g) {
        SoftmaxScalar total;
        for (int64_t p = 0; p < pages; ++p) {
          total.merge({page_lse_full_[static_cast<size_t>(p * cols_ + i * group_ + g)], 1.0f});
        }
        lse[static_cast<size_t>(g)] = total.lse();
      }
    }
    for (int64_t p = 0; p < pages; ++p) {
      const int64_t page = range_.begin + p;
      const bool sinks = page * kPageTokens < policy.sinks;
      const bool recent = policy.recent > 0 && (page + 1) * kPageTokens > visible - policy.recent;
      // What is behind this position's window is a page of other positions of the tile only.
      const bool held = is_sealed(page) && view_.residual(page, spec_.kv_head) != nullptr &&
                        page >= visible_.begin(spec_.first_token + i) / kPageTokens;
      candidate[static_cast<size_t>(p)] = held && !sinks && !recent;
      if (held && (sinks || recent)) {
        budget_choice_[static_cast<size_t>(i * pages + p)] = 1;
      }
      float value = 0;
      for (int64_t g = 0; g < group_; ++g) {
        const size_t at = static_cast<size_t>(p * cols_ + i * group_ + g);
        if (page_lse_full_.empty()) {
          value += page_score_[at] / static_cast<float>(group_);
        } else {
          value = std::max(value, std::exp(page_lse_full_[at] - lse[static_cast<size_t>(g)]));
        }
      }
      score[static_cast<size_t>(p)] = value;
    }
    const std::vector<uint8_t> chosen =
        select_by_budget(score, candidate, {policy.budget, policy.budget_pages});
    for (int64_t p = 0; p < pages; ++p) {
      budget_choice_[static_cast<size_t>(i * pages + p)] |= chosen[static_cast<size_t>(p)];
    }
  }
}

// The mass that decides: the largest over the query heads of the group.
float AttendTile::top_mass(int64_t page, int64_t i) const {
  const float* mass = &page_mass_[static_cast<size_t>((page - range_.begin) * cols_)];
  float top = 0;
  for (int64_t g = 0; g < group_; ++g) top = std::max(top, mass[i * group_ + g]);
  return top;
}

PageFacts AttendTile::facts(int64_t page, int64_t i) const {
  return page_facts(store_.layout, store_.policy, page, visible_.end(spec_.first_token + i),
                    store_.shape.window, view_.residual(page, spec_.kv_head) != nullptr);
}

void AttendTile::apply_cap() {
  for (int64_t i = 0; i < spec_.positions; ++i) {
    float& promote = promote_[static_cast<size_t>(i)];
    promote = promote_under_cap(
        range_, visible_.begin(spec_.first_token + i) / kPageTokens, promote,
        store_.policy.max_promoted, [&](int64_t page) { return facts(page, i); },
        [&](int64_t page) { return top_mass(page, i); });
  }
}

// Fixes how each position reads a sealed layered page.
void AttendTile::decide(int64_t page) {
  const LayerPolicy& policy = store_.policy;
  for (int64_t i = 0; i < spec_.positions; ++i) {
    MassRule rule{promote_[static_cast<size_t>(i)], static_cast<float>(policy.skip)};
    PageFacts facts = this->facts(page, i);
    if (policy.rule == PromoteRule::budget) {
      rule.promote = 1.0f;
      facts.forced_full |=
          facts.has_residual &&
          budget_choice_[static_cast<size_t>(i * (range_.pages()) + page - range_.begin)];
    }
    read(page, i) = read_by_mass(rule, facts, top_mass(page, i));
  }
}

std::vector<int64_t> AttendTile::columns_of(int64_t page, PageRead kind) {
  std::vector<int64_t> columns;
  for (int64_t i = 0; i < spec_.positions; ++i) {
    if (read(page, i) != kind) continue;
    for (int64_t g = 0; g < group_; ++g) columns.push_back(i * group_ + g);
  }
  return columns;
}

// Adds q.k_residual to the scores of the given columns. Gathering and scattering keep every
// element one chain of additions, so a column's value is the same whatever its neighbours do.
void AttendTile::score_with_residual(const std::vector<int64_t>& columns, const float* residual,
                                     float* s) const {
  const int64_t dim = store_.layout.k.dim;
  if (static_cast<int64_t>(columns.size()) == rows_) {
    tile_matmul({.a = residual, .a_row = dim, .a_k = 1, .b = queries_.get(), .ldb = cols_, .c = s,
                 .ldc = cols_, .m = kPageTokens, .n = cols_, .k = dim, .accumulate = true});
    return;
  }
  const int64_t n = round_up(static_cast<int64_t>(columns.size()), tile_lanes());
  std::vector<float> q(static_cast<size_t>(dim * n)), part(static_cast<size_t>(kPageTokens * n));
  gather_columns(queries_.get(), dim, cols_, columns, q.data(), n);
  gather_columns(s, kPageTokens, cols_, columns, part.data(), n);
  tile_matmul({.a = residual, .a_row = dim, .a_k = 1, .b = q.data(), .ldb = n, .c = part.data(),
               .ldc = n, .m = kPageTokens, .n = n, .k = dim, .accumulate = true});
  scatter_columns(part.data(), kPageTokens, n, columns, s, cols_);
}

void AttendTile::accumulate(int64_t split) {
  SplitState& state = states_[static_cast<size_t>(split)];
  const int64_t dim_k = store_.layout.k.dim, dim_v = store_.layout.v.dim;
  state.m.assign(static_cast<size_t>(cols_), kNegInf);
  state.l.assign(static_cast<size_t>(cols_), 0.0f);
  state.o = buffer(cols_ * dim_v);
  std::fill_n(state.o.get(), cols_ * dim_v, 0.0f);
  std::vector<float> scratch(static_cast<size_t>(kPageTokens * std::max(dim_k, dim_v)));
  for (int64_t page = range_.first(split); page < range_.last(split); ++page) {
    float* s = scores(page);
    const ScoreBlock block{s, kPageTokens, cols_};
    if (needs_mass_ && is_sealed(page) && store_.layout.k.layered) {
      const std::vector<int64_t> columns = columns_of(page, PageRead::full);
      if (!columns.empty()) {
        decode_residual(store_.layout, store_.layout.k, view_.head(page, spec_.kv_head),
                        view_.residual(page, spec_.kv_head), scratch.data());
        score_with_residual(columns, scratch.data(), s);
      }
    }
    if (request_.config.softcap > 0) {
      tile_softcap(block, request_.config.softcap);
      mask(page, s);  // the cap makes -inf finite
    }
    tile_max_update(block, state.m.data());
  }
  for (int64_t page = range_.first(split); page < range_.last(split); ++page) {
    float* sum = &page_sum_[static_cast<size_t>((page - range_.begin) * cols_)];
    const ScoreBlock block{scores(page), kPageTokens, cols_};
    tile_exp_sum(block, state.m.data(), sum);
    for (int64_t c = 0; c < cols_; ++c) state.l[static_cast<size_t>(c)] += sum[c];
    accumulate_v(page, state, block.s, sum, scratch);
  }
}

// O += P.V of one page, P[token][cols] in place of the scores.
void AttendTile::accumulate_v(int64_t page, SplitState& state, float* p, const float* page_sum,
                              std::vector<float>& v) {
  const SideLayout& side = store_.layout.v;
  const int64_t dim = side.dim;
  const bool planes = is_sealed(page) && store_.layout.any_layered();
  const PageHead head = view_.head(page, spec_.kv_head);
  if (planes && side.layered) {
    // The page's mean of V, weighted by the head's own mass: all that a skipped page gives.
    std::vector<float> mean(static_cast<size_t>(dim));
    widen_bf16(reinterpret_cast<const uint16_t*>(head.v + side.mean), dim, mean.data());
    tile_matmul({.a = page_sum, .a_row = 1, .a_k = 0, .b = mean.data(), .ldb = dim,
                 .c = state.o.get(), .ldc = dim, .m = rows_, .n = dim, .k = 1, .accumulate = true});
  }
  const std::vector<int64_t> skipped =
      planes ? columns_of(page, PageRead::skip) : std::vector<int64_t>{};
  if (static_cast<int64_t>(skipped.size()) == rows_) return;
  for (int64_t c : skipped) {
    for (int64_t t = 0; t < kPageTokens; ++t) p[t * cols_ + c] = 0.0f;
  }
  load_values(side, page, v.data());
  const int64_t tokens = page_tokens(page);
  tile_matmul({.a = p, .a_row = 1, .a_k = cols_, .b = v.data(), .ldb = dim, .c = state.o.get(),
               .ldc = dim, .m = rows_, .n = dim, .k = tokens, .accumulate = true});
  if (!planes || !side.layered || !needs_mass_) return;
  const std::vector<int64_t> full = columns_of(page, PageRead::full);
  if (full.empty()) return;
  decode_residual(store_.layout, side, head, view_.residual(page, spec_.kv_head), v.data());
  for (size_t begin = 0; begin < full.size();) {  // runs of neighbouring rows
    size_t end = begin + 1;
    while (end < full.size() && full[end] == full[end - 1] + 1) ++end;
    tile_matmul({.a = p + full[begin], .a_row = 1, .a_k = cols_, .b = v.data(), .ldb = dim,
                 .c = state.o.get() + full[begin] * dim, .ldc = dim,
                 .m = static_cast<int64_t>(end - begin), .n = dim, .k = kPageTokens,
                 .accumulate = true});
    begin = end;
  }
}

void AttendTile::finish(AttendStats* stats) {
  const int64_t dim = store_.layout.v.dim;
  std::vector<float> lse(static_cast<size_t>(cols_), kNegInf), o(static_cast<size_t>(dim));
  for (int64_t r = 0; r < rows_; ++r) {
    const int64_t i = r / group_, g = r % group_;
    SoftmaxScalar total;
    std::fill(o.begin(), o.end(), 0.0f);
    if (const float* sink_logit = sink(g)) total = {*sink_logit, 1.0f};
    for (const SplitState& state : states_) {
      softmax_merge(total, o.data(), {state.m[static_cast<size_t>(r)], state.l[static_cast<size_t>(r)]},
                    state.o.get() + r * dim, dim);
    }
    // Back to V's own basis, once: H is linear, so what was summed in its basis needs no more.
    if (store_.layout.v.rotated) hadamard_rows(o.data(), 1, dim, dim);
    const float inverse = total.l > 0 ? 1.0f / total.l : 0.0f;
    float* out = request_.out.row(spec_.first_query + i, q_head(g));
    for (int64_t d = 0; d < dim; ++d) out[d] = o[static_cast<size_t>(d)] * inverse;
    lse[static_cast<size_t>(r)] = total.lse();
    if (request_.lse.data) *request_.lse.row(spec_.first_query + i, q_head(g)) = total.lse();
  }
  if (stats) add_stats(*stats, lse);
}

// How a position read a sealed page, for the statistics.
PageRead AttendTile::read_as(int64_t page, int64_t i) {
  if (needs_mass_) return read(page, i);
  return view_.residual(page, spec_.kv_head) ? PageRead::full : PageRead::base;
}

void AttendTile::add_stats(AttendStats& stats, const std::vector<float>& lse) {
  for (int64_t i = 0; i < spec_.positions; ++i) {
    const int64_t position = spec_.first_token + i;
    const int64_t first = visible_.begin(position), end = visible_.end(position);
    RowStats row_stats(stats, store_.layout, store_.policy.promote);
    for (int64_t page = range_.begin; page < range_.end; ++page) {
      const int64_t begin = std::max(first, page * kPageTokens);
      const int64_t tokens = std::min(end, (page + 1) * kPageTokens) - begin;
      if (tokens <= 0) continue;
      if (!is_sealed(page) || !store_.layout.any_layered()) {
        row_stats.add_plain(tokens, !is_sealed(page));
        continue;
      }
      const PageRead how = read_as(page, i);
      row_stats.add_page(how, tokens);
      const SplitState& state = states_[static_cast<size_t>(page / kSplitPages - range_.first_split())];
      for (int64_t g = 0; g < group_; ++g) {
        const size_t c = static_cast<size_t>(i * group_ + g);
        const size_t at = static_cast<size_t>((page - range_.begin) * cols_) + c;
        row_stats.add_mass(how, page_mass_[at],
                           page_sum_[at] *
                               static_cast<double>(softmax_rescale(state.m[c], lse[c])));
      }
    }
    row_stats.finish(group_);
    stats.rows_capped +=
        promote_[static_cast<size_t>(i)] > static_cast<float>(store_.policy.promote);
  }
}

}  // namespace thriftattn
