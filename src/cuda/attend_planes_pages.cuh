// Scores of whole pages of NVFP4 planes, and what each deserves: what both forms of attend_planes
// share (attend_planes_solo.cuh, attend_planes_team.cuh).
//
// P is FP16, relative to a reference m of the row: P = 2^(s - m + 8). m comes from the floor of the
// LSE, and is raised where P would be beyond FP16: rarely. A page's sum is taken from P as rounded,
// by one more product.
#pragma once

#include "cuda/attend_decode.cuh"

namespace thriftattn::cuda {

inline constexpr int kBatch = 16;  // items that are described at a time

struct PageItem {
  const uint8_t *k, *v;  // the base planes
  int32_t residual, flags;
};

// A row's numbers of one scores warp, and its batch of items.
template <int NT>
struct PageShared {
  TileRows<NT> rows;
  alignas(8) float reference[8 * NT];   // m
  float promote[8 * NT], skip[8 * NT];  // sums above which a page is promoted, or not skipped
  float raised[8 * NT];                 // by how much m was raised and O does not know yet
  alignas(16) float record[kBatch][4 + 8 * NT];
  PageItem item[kBatch];
  uint32_t noted_rows[kBatch];  // of an item: who promoted it
};

// Shared has `page`, a PageShared.
template <int D, int NT, class Shared>
class PageScores : protected ItemWalk<D, NT> {
 protected:
  using Base = ItemWalk<D, NT>;
  using Base::a_, Base::v_, Base::b_, Base::tile_, Base::head_, Base::seq_, Base::lane_, Base::g_,
      Base::j_, Base::items_, Base::first_, Base::lead_;
  using Base::describe, Base::exists, Base::item_of, Base::column_row, Base::side_at,
      Base::residual_at, Base::query_nvfp4, Base::decision_at;
  // The reference of an empty sum: finite, so that differences are.
  static constexpr float kEmpty = -1e30f;

  __device__ PageScores(const Base& walk, Shared& shared) : Base(walk), s_(shared) {
    single_ = v_.i_first == v_.i_last;
    const int rows = v_.end_row - v_.first_row;
    real_ = rows >= 32 ? ~0u : (1u << rows) - 1;
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) l_[c] = 0;
  }
  // Once the rows are filled in.
  __device__ void start() {
    // Where the LSE has a floor, m is what lets P of its tokens be in the middle of FP16's range.
    const float floor = lane_ < 8 * NT ? b_.floor[lane_] : INFINITY;
    fresh_ = __any_sync(~0u, floor == -INFINITY);
    if (lane_ < 8 * NT) {
      s_.page.reference[lane_] = fresh_ || floor == INFINITY ? 0.0f : floor - 4.0f;
      s_.page.raised[lane_] = 0;
    }
    set_thresholds();
  }

  // ---- a batch of items

  struct Batch {
    int first;
    uint32_t pages, full;  // bits: whole pages alike for all rows; of these, always with residual
    uint32_t rest;         // other items
  };
  // Seen after the next __syncwarp().
  __device__ Batch batch(int first) const {
    Batch b;
    b.first = first;
    const bool exists = lane_ < kBatch && this->exists(first + lane_);
    ItemNote note;
    if (exists) note = describe(first + lane_);
    const int how = note.flags & (kItemKind | kItemMixed | kItemWhole);
    const bool walks = exists && a_.softcap == 0;
    b.full = __ballot_sync(~0u, walks && how == (kItemFull | kItemWhole));
    b.pages = __ballot_sync(~0u, walks && how == (kItemSealed | kItemWhole)) | b.full;
    b.rest = __ballot_sync(~0u, exists) & ~b.pages;
    if (b.pages >> lane_ & 1) {
      s_.page.item[lane_] = {side_at(a_.g.k, note.slot) + a_.g.k.codes,
                             side_at(a_.g.v, note.slot) + a_.g.v.codes, note.residual, note.flags};
    }
    if constexpr (Base::kByPosition) {
      uint32_t some = __ballot_sync(~0u, (note.flags & kItemChosen) != 0) & b.pages;
      for (; some != 0; some &= some - 1) {
        const int bit = __ffs(static_cast<int>(some)) - 1;
        const uint32_t rows = rows_choosing(page_of(b, bit));
        if (lane_ == bit) s_.page.noted_rows[bit] = rows;
      }
    }
    return b;
  }
  // Likewise; later than the first copies, which need not wait for them.
  __device__ void load_records(const Batch& b) const {
    if (!(b.pages >> lane_ & 1)) return;
    const float4* from = reinterpret_cast<const float4*>(
        page_record(a_, int64_t{seq_} * a_.g.kv_heads + head_, tile_, page_of(b, lane_)));
    float4* to = reinterpret_cast<float4*>(s_.page.record[lane_]);
#pragma unroll
    for (int i = 0; i < 1 + 2 * NT; ++i) to[i] = from[i];
  }
  __device__ int page_of(const Batch& b, int bit) const {
    return v_.page_begin + item_of(b.first + bit);
  }
  __device__ const uint8_t* residual_of(int bit) const {
    return residual_at(s_.page.item[bit].residual);
  }
  // Bits of `rest` where DecodeWarp looks for them.
  __device__ void take_rest(const Batch& b, uint32_t& other) const {
    if (lane_ == b.first / 32) other |= b.rest << b.first % 32;
  }

  // ---- scores

  __device__ void set_thresholds() {
    __syncwarp();
    if (lane_ < 8 * NT) {
      const float f = b_.floor[lane_] - s_.page.reference[lane_] + 8.0f;
      s_.page.promote[lane_] = exp2_approx(a_.log2_promote + f);
      s_.page.skip[lane_] = exp2_approx(a_.log2_skip + f);
    }
    __syncwarp();
  }
  // Raises the references of columns whose largest score x = s - m + 8 in this lane is far above 8,
  // or which are new.
  __device__ void raise(float (&top)[2 * NT]) {
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
        top[c] = fmaxf(top[c], __shfl_xor_sync(~0u, top[c], step));
      float up = fresh_ ? top[c] - 8.0f : fmaxf(0.0f, top[c] - 8.0f);
      // References of 2^27 and more take no smaller step, and who calls this comes back until scores fit.
      if (up > 0) up = fmaxf(up, fabsf(s_.page.reference[column_row(c)]) * 0x1p-22f);
      __syncwarp();
      if (!fresh_) l_[c] *= exp2_approx(-up);
      if (g_ == 0) {
        s_.page.reference[column_row(c)] += up;
        if (!fresh_) s_.page.raised[column_row(c)] += up;
      }
    }
    moved_ |= !fresh_;
    fresh_ = false;
    set_thresholds();
  }
  // What O is to be multiplied with, where m was raised since the last call.
  __device__ bool take_move(float (&move)[2 * NT]) {
    if (!moved_) return false;
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) move[c] = exp2_approx(-s_.page.raised[column_row(c)]);
    __syncwarp();
    if (lane_ < 8 * NT) s_.page.raised[lane_] = 0;
    __syncwarp();
    moved_ = false;
    return true;
  }

  // P of a page to p (this lane's fragments), from its base plane and, if kFull, its residual
  // plane; query(n, step): this lane's fragment of the queries; sum: of each column, times 2^8.
  template <bool kFull, class Query>
  __device__ void weigh(const uint8_t* base, const uint8_t* residual, const Query& query, int bit,
                        uint2* p, float (&sum)[2 * NT]) {
    const float* record = s_.page.record[bit];
    float k_scale = record[0], ratio = 1.0f;
    bool adds = kFull;
    if constexpr (kFull) {
      // base * (scale / residual scale) + residual, all times the residual scale; but a ratio
      // beyond FP32's reach means that the residual is nothing beside the base.
      ratio = k_scale / record[2];
      adds = ratio < 0x1p60f;
      if (adds) k_scale = record[2];
    }
    // Measured first where there is no reference yet; again where P was beyond FP16.
    for (bool measure = fresh_;;) {
      float factor[2 * NT], offset[2 * NT], sums[NT][4] = {}, top[2 * NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float2 f = *reinterpret_cast<const float2*>(&b_.row_factor[8 * n + 2 * j_]);
        const float2 o = *reinterpret_cast<const float2*>(record + 4 + 8 * n + 2 * j_);
        const float2 m = *reinterpret_cast<const float2*>(&s_.page.reference[8 * n + 2 * j_]);
        factor[2 * n] = 128.0f * k_scale * f.x;
        factor[2 * n + 1] = 128.0f * k_scale * f.y;
        offset[2 * n] = o.x - m.x + 8.0f;
        offset[2 * n + 1] = o.y - m.y + 8.0f;
        top[2 * n] = top[2 * n + 1] = -INFINITY;
      }
      SliceAddress from = k_slice<D>(base, lane_);
#pragma unroll 1
      for (int slice = 0; slice < 4; ++slice) {
        float x[NT][4] = {};
        score_slice<D, NT>(from, query, x);
        if constexpr (kFull) {
          if (adds) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
              for (int e = 0; e < 4; ++e) x[n][e] *= ratio;
            }
            const auto to_residual = residual - base;
            score_slice<D, NT>({from.codes + to_residual, from.scales + to_residual}, query, x);
          }
        }
        from.codes += 16 * (D / 2);
        from.scales += 16 * (D / 16);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            x[n][e] = fmaf(x[n][e], factor[2 * n + (e & 1)], offset[2 * n + (e & 1)]);
          }
        }
        if (__builtin_expect(measure, 0)) {
#pragma unroll
          for (int c = 0; c < 2 * NT; ++c) {
            top[c] = fmaxf(top[c], fmaxf(x[c / 2][c & 1], x[c / 2][(c & 1) + 2]));
          }
          continue;
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const __half2 a = __floats2half2_rn(exp2_approx(x[n][0]), exp2_approx(x[n][1]));
          const __half2 b = __floats2half2_rn(exp2_approx(x[n][2]), exp2_approx(x[n][3]));
          uint2 y;
          y.x = transpose_8x8(reinterpret_cast<const uint32_t&>(a));
          y.y = transpose_8x8(reinterpret_cast<const uint32_t&>(b));
          p[(slice * NT + n) * 32] = y;
          const uint32_t ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
          mma_f16(sums[n], ones, y.x, y.y);
        }
      }
      if (__builtin_expect(measure, 0)) {
        raise(top);
        measure = false;
        continue;
      }
      bool over = false;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        sum[c] = sums[c / 2][c & 1];
        over |= sum[c] > 65504.0f;  // NaN, of queries that are, stays
      }
      if (!__any_sync(~0u, over)) return;
      measure = true;
    }
  }

  // ---- decisions

  // Rows that promote a page, or skip its values, by what it holds of each; whole positions do.
  __device__ void decide(int flags, const float (&sum)[2 * NT], uint32_t& promoted,
                         uint32_t& skipped) const {
    bool over_promote = false, over_skip = false;
    if (single_) {
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        over_promote |= sum[c] > s_.page.promote[column_row(c)];
        over_skip |= sum[c] > s_.page.skip[column_row(c)];
      }
      if ((flags & kItemPromotable) && __any_sync(~0u, over_promote)) {
        promoted = real_;
      } else if ((flags & kItemSkippable) && !__any_sync(~0u, over_skip)) {
        skipped = real_;
      }
      return;
    }
    uint32_t promoting = 0, keeping = 0;
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      promoting |= (sum[c] > s_.page.promote[column_row(c)] ? 1u : 0u) << column_row(c);
      keeping |= (sum[c] > s_.page.skip[column_row(c)] ? 1u : 0u) << column_row(c);
    }
    promoting = __reduce_or_sync(~0u, promoting);
    keeping = __reduce_or_sync(~0u, keeping);
    const uint32_t mine = rows_of_position();
    if (flags & kItemPromotable) promoted = __ballot_sync(~0u, (promoting & mine) != 0) & real_;
    if (flags & kItemSkippable)
      skipped = __ballot_sync(~0u, (keeping & mine) == 0) & real_ & ~promoted;
  }
  // The rows of the tile that are of the same position as row `lane`.
  __device__ uint32_t rows_of_position() const {
    const int group = a_.g.group;
    const int first = (v_.first_row + lane_) / group * group - v_.first_row;
    const uint32_t to = first + group >= 32 ? ~0u : (1u << (first + group)) - 1;
    return to & ~(first <= 0 ? 0u : (1u << first) - 1) & real_;
  }
  // Rows whose position promotes a page by budget. Rows need not be filled in yet.
  __device__ uint32_t rows_choosing(int page) const {
    const int row = v_.first_row + lane_;
    return __ballot_sync(~0u, row < v_.end_row && this->choices_at(page)[row / a_.g.group] != 0);
  }
  // Each position's first row writes, where it is in this tile.
  __device__ void write_decisions(int page, Decision decision, uint32_t rows) const {
    if (a_.call.decisions == nullptr || lane_ >= 8 * NT || !(rows >> lane_ & 1)) return;
    const int row = v_.first_row + lane_;
    if (row % a_.g.group == 0)
      *decision_at(row / a_.g.group, page) = static_cast<uint8_t>(decision);
  }
  // P of rows that take no part becomes zero.
  __device__ void clear_weights(uint2* p, uint32_t rows) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      if (rows >> (8 * n + g_) & 1) {
        for (int i = 0; i < 4; ++i) p[(i * NT + n) * 32] = make_uint2(0, 0);
      }
    }
  }
  // What a page is to be added with.
  struct Share {
    uint32_t rows;     // that take part; none: the page is left out
    uint32_t skipped;  // of them, those that only take its mean
    __device__ bool mean_only() const { return (rows & ~skipped) == 0; }
  };
  // Decides what item `bit` of the batch deserves, notes who promotes it, and takes it into l: then
  // sum is each column's mass, relative to m.
  __device__ Share settle(const Batch& b, int bit, bool full, bool again, uint2* p,
                          float (&sum)[2 * NT]) {
    constexpr int kChosen = Base::kByPosition ? kItemChosen : 0;
    const int flags = s_.page.item[bit].flags;
    Share share{real_, 0};
    if (full) {
      if (again) share.rows = s_.page.noted_rows[bit];
    } else if (flags & (kItemPromotable | kItemSkippable | kChosen)) {
      uint32_t promoted = 0;
      decide(flags, sum, promoted, share.skipped);
      if (flags & kChosen) promoted = s_.page.noted_rows[bit];
      if (promoted != 0) {
        noted_ |= 1u << bit;
        // What a budget chose stands there already, and other lanes may be reading it.
        if (lane_ == 0 && !(flags & kChosen)) s_.page.noted_rows[bit] = promoted;
        share.rows &= ~promoted;
      }
    }
    if (a_.call.decisions != nullptr) {
      write_decisions(page_of(b, bit), full ? Decision::full : Decision::base,
                      share.rows & ~share.skipped);
      write_decisions(page_of(b, bit), Decision::skip, share.skipped);
    }
    if (share.rows != real_ || (share.skipped != 0 && !share.mean_only())) {
      clear_weights(p, (~share.rows | share.skipped) & real_);
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        if (!(share.rows >> column_row(c) & 1)) sum[c] = 0;
      }
    }
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      sum[c] *= 0x1p-8f;
      l_[c] += sum[c];
    }
    return share;
  }

  // Merges sums that another walk left in head_l, head_m (a row each) into l and m: O is to be
  // multiplied with `own`, the other's with `other`.
  __device__ void merge(const float* head_l, const float* head_m, float (&own)[2 * NT],
                        float (&other)[2 * NT]) {
    float tops[2 * NT];
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      const float l = head_l[column_row(c)], m = head_m[column_row(c)];
      const float mine = l_[c] > 0 ? s_.page.reference[column_row(c)] : kEmpty;
      tops[c] = fmaxf(mine, m);
      other[c] = exp2_approx(m - tops[c]);
      own[c] = exp2_approx(mine - tops[c]);
      l_[c] = l_[c] * own[c] + l * other[c];
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      if (g_ == 0) s_.page.reference[column_row(c)] = tops[c];
    }
    fresh_ = false;
    __syncwarp();
  }
  // m of what was summed up.
  __device__ float reference(int c) const {
    return l_[c] > 0 ? s_.page.reference[column_row(c)] : kEmpty;
  }

  Shared& s_;
  bool single_, fresh_ = true, moved_ = false;
  uint32_t real_;       // rows that exist
  uint32_t noted_ = 0;  // items of the batch that some row promoted
  float l_[2 * NT];
};

// What a warp of a block leaves of a unit: its sums, and l and m of each row.
struct WarpSums {
  uint8_t* state;
  const float *l, *m;
};
// The sums of a block's warps become the unit's partial, in the order of warps; a part by each of
// them.
template <int D, int NT, int kWays>
__device__ void add_up(const AttendArgs& a, const WarpSums (&from)[kWays], int way, int lane,
                       int64_t first_row) {
  const int g = lane / 4, j = lane % 4;
  for (int part = way; part < NT * (D / 64) * 2; part += kWays) {
    const int parity = part % 2, w = part / 2 % (D / 64), n = part / 2 / (D / 64);
    const int row = 8 * n + 2 * j + parity;
    float top = -INFINITY, l = 0, x[8] = {};
#pragma unroll
    for (int t = 0; t < kWays; ++t) top = fmaxf(top, from[t].m[row]);
#pragma unroll
    for (int t = 0; t < kWays; ++t) {
      const float f = exp2_approx(from[t].m[row] - top);
      l = fmaf(from[t].l[row], f, l);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 y = *state_at<D, NT>(from[t].state, n, w, parity, half, lane);
        x[4 * half] = fmaf(y.x, f, x[4 * half]);
        x[4 * half + 1] = fmaf(y.y, f, x[4 * half + 1]);
        x[4 * half + 2] = fmaf(y.z, f, x[4 * half + 2]);
        x[4 * half + 3] = fmaf(y.w, f, x[4 * half + 3]);
      }
    }
    float4* to = reinterpret_cast<float4*>(workspace_at<float>(a, a.ws.partial_o) +
                                           (first_row + row) * D + 8 * (g * (D / 64) + w));
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
    if (w == 0 && g == 0)
      workspace_at<float2>(a, a.ws.partial_ml)[first_row + row] = make_float2(top, l);
  }
}

}  // namespace thriftattn::cuda
