// attend_planes for tiles of 8 query rows (decode): each warp does all of its pages.
//
// A page's values are added after the scores of the next one, so that K and V of one page each
// suffice as buffers: V arrives while scores are computed, K while values are added. Four warps of
// a block take turns in the items of a unit (a split of one sequence, KV head and tile of rows) and
// add their sums up at its end; blocks stay and take unit after unit. Loops are rolled and P goes
// through shared memory, because registers decide how many warps an SM holds.
#pragma once

#include "cuda/attend_planes_open.cuh"

namespace thriftattn::cuda {

inline constexpr int kSoloWarps = 4;
static_assert(kSoloWarps == kOpenWalks);
template <int D>
inline constexpr int kSoloBlocks = planes_blocks(D, 1);

template <int D>
struct SoloShared {
  static constexpr int kRing = 1;
  static constexpr bool kGroups = false;
  alignas(128) uint8_t k[1][36 * D];
  alignas(128) uint8_t v[1][38 * D];  // at the end of a unit, the sums
  alignas(16) uint2 p[2][4][1][32];
  PageShared<1> page;
  float l[8], m[8];
  int64_t partial;  // the first row of where the sums go
  // DecodeWarp uses k and v as its own rings.
  alignas(16) float record[2][12];
  alignas(16) ItemNote notes[kNotes];
  uint64_t k_bar[1], v_bar[1];
};
template <int D>
struct SolosShared {
  SoloShared<D> warp[kSoloWarps];
  uint2 query[D / 16][32];  // the unit's fragments
  int32_t next;             // the unit after this one
};
static_assert(kSoloBlocks<128> * (sizeof(SolosShared<128>) + 1024) <= 233472);

// How often a warp has used its buffers.
struct SoloCursor {
  int k = 0, v = 0;
};

template <int D>
class SoloWarp : PageScores<D, 1, SoloShared<D>> {
  using Shared = SoloShared<D>;
  using Walk = ItemWalk<D, 1>;
  using Pages = PageScores<D, 1, Shared>;
  using Pages::a_, Pages::s_, Pages::lane_, Pages::g_, Pages::items_, Pages::l_, Pages::noted_;
  using Pages::residual_of, Pages::column_row;
  using Pages::v_, Pages::j_, Pages::head_, Pages::seq_, Pages::tile_, Pages::first_, Pages::lead_;
  using typename Pages::Batch, typename Pages::Share;
  static_assert(8 * D * 4 <= 38 * D);

 public:
  __device__ SoloWarp(const Walk& walk, Shared& shared, SoloCursor& cursor)
      : Pages(walk, shared), at_(cursor) {
    clear(o_);
  }

  // The unit; its sums are left in shared memory. fill() fills in the rows, meanwhile() is called
  // when the first copies are on their way: nothing of the unit before is needed from then on, and
  // q, this lane's fragments of the queries, are there after it.
  template <class Fill, class Meanwhile>
  __device__ void run(const uint2* q, const Fill& fill, const Meanwhile& meanwhile) {
    uint32_t other = 0;
    Batch b = this->batch(0);
    __syncwarp();
    if (b.pages != 0) fetch_k(b.pages);
    const OpenTokens open = this->open_tokens();
    if (open.any()) {
      prefetch_rows(open.k, kOpenTokens * 2 * D, lane_);
      prefetch_rows(open.v, kOpenTokens * 2 * D, lane_);
    }
    fill();
    this->load_records(b);
    this->start();
    meanwhile();
    if (open.any()) add_open(open);
    for (;;) {
      this->take_rest(b, other);
      noted_ = 0;
      if (b.pages != 0) walk(b, q, false);
      if (noted_ != 0) {  // then what they promoted
        b.pages = b.full = noted_;
        fetch_k(b.pages);
        walk(b, q, true);
      }
      if (b.first + kBatch >= items_) break;
      b = this->batch(b.first + kBatch);
      __syncwarp();
      if (b.pages == 0) continue;
      fetch_k(b.pages);
      this->load_records(b);
      __syncwarp();
    }
    if (__any_sync(~0u, other != 0)) add_rest(other);
    store_state<D, 1>(s_.v[0], lane_, o_);
    if (g_ == 0) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        s_.l[column_row(c)] = l_[c];
        s_.m[column_row(c)] = this->reference(c);
      }
    }
    fence_stores_before_copies();
  }

 private:
  __device__ void fetch(uint64_t* bar, uint8_t* to, const uint8_t* from, int bytes) {
    const StageCopy copy{bar, lane_};
    copy.begin(bytes);
    copy.copy_once(to, from, bytes);
    copy.end();
  }
  __device__ void fetch_v(const uint8_t* from, int skipped, int bytes) {
    fetch(s_.v_bar, s_.v[0] + skipped, from + skipped, bytes);
  }
  __device__ void wait_v() {
    barrier_wait(s_.v_bar, at_.v & 1);
    ++at_.v;
  }

  __device__ void fetch_k(uint32_t pages) {
    fetch(s_.k_bar, s_.k[0], s_.page.item[__ffs(static_cast<int>(pages)) - 1].k, 36 * D);
  }

  // The pages of a batch, the first one's K on its way; `again` with residuals, for the rows noted.
  // Each round computes the scores of a page, adds the values that waited and fetches the next. For
  // a page with residuals there are rounds without scores: K's residual takes V's place, and V's
  // two planes come one after the other.
  __device__ void walk(const Batch& b, const uint2* q, bool again) {
    uint32_t left = b.pages;
    Waiting waiting = kNothing;
    const uint8_t* residual = nullptr;  // of V, to be fetched after the base
    float v_scale = 0, mass[2] = {};
    int waits = 0;  // the page that does
    while (left != 0 || waiting != kNothing) {
      const int bit = __ffs(static_cast<int>(left)) - 1;
      const bool full = left != 0 && (b.full >> bit & 1);
      const bool scores = left != 0 && residual == nullptr && !(full && waiting != kNothing);
      uint2* p = &s_.p[at_p_][0][0][lane_];
      Share share{0, 0};
      float sum[2] = {};
      if (scores) {
        left &= left - 1;
        if (full) {
          fetch_v(residual_of(bit) + a_.g.k.res_codes, 0, 36 * D);
          wait_v();
        }
        barrier_wait(s_.k_bar, at_.k & 1);
        ++at_.k;
        const auto query = [&](int, int step) { return q[step * 32]; };
        if (full) {
          this->template weigh<true>(s_.k[0], s_.v[0], query, bit, p, sum);
        } else {
          this->template weigh<false>(s_.k[0], nullptr, query, bit, p, sum);
        }
        __syncwarp();
        if (left != 0) fetch_k(left);
        share = this->settle(b, bit, full, again, p, sum);
      }
      if (waiting != kNothing) {
        wait_v();
        if (waiting != kResidual) add_mean<D, 1>(s_.v[0] + 36 * D, lane_, mass, o_);
        if (waiting != kMean) {
          const float factor[2] = {v_scale * 0.5f, v_scale * 0.5f};
          const uint2* weights = &s_.p[at_p_ ^ 1][0][0][lane_];
          add_values<D, 1, 1>(
              s_.v[0], lane_, [&](int i, int) { return weights[i * 32]; }, factor, o_);
        }
        __syncwarp();
        waiting = kNothing;
      }
      if (residual != nullptr) {
        fetch_v(residual, 0, 36 * D);
        residual = nullptr;
        waiting = kResidual;
        v_scale = s_.page.record[waits][3];
        continue;
      }
      float move[2];
      if (this->take_move(move)) scale_output<D, 1>(move, o_);
      if (share.rows == 0) continue;
      const int skipped = share.mean_only() ? 36 * D : 0;
      fetch_v(s_.page.item[bit].v, skipped, 38 * D - skipped);
      waiting = share.mean_only() ? kMean : kBase;
      waits = bit;
      v_scale = s_.page.record[bit][1];
      mass[0] = sum[0];
      mass[1] = sum[1];
      at_p_ ^= 1;
      if (full) residual = residual_of(bit) + a_.g.v.res_codes;
    }
  }

  // What this warp has of an open page that is shared.
  __device__ OpenTokens open_tokens() const {
    OpenTokens t;
    if (lead_ == 1 || first_ >= lead_) return t;
    t.page = v_.open_first;
    const int token = t.page * kPage + kOpenTokens * first_;
    t.from = max(0, v_.begin(v_.i_last) - token);
    t.to = min(kOpenTokens, v_.end(v_.i_last) - token);
    const int slot = v_.t.open[t.page % static_cast<int>(v_.t.open_pages)];
    t.k = a_.call.memory.open + int64_t{slot} * a_.g.open_bytes +
          (head_ * kPage + kOpenTokens * first_) * (2 * D);
    t.v = t.k + a_.g.open_v;
    return t;
  }
  // P of 16 tokens, whose products with q' are given, and its sum into l.
  __device__ uint2 weigh_open(const OpenTokens& open, const float (&s)[4]) {
    const float* record = page_record(a_, int64_t{seq_} * a_.g.kv_heads + head_, tile_,
                                      static_cast<int>(a_.limits.max_pages));
    const float2 offset = *reinterpret_cast<const float2*>(record + 4 + 2 * j_);
    float x[4];
    for (;;) {
      const float2 m = *reinterpret_cast<const float2*>(&s_.page.reference[2 * j_]);
      bool above = this->fresh_;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = token_of_row(g_) + 4 * (e & 2);
        x[e] = s[e] + (e & 1 ? offset.y - m.y : offset.x - m.x) + 8.0f;
        if (token < open.from || token >= open.to) x[e] = -INFINITY;
        above |= x[e] > 15.0f;
      }
      if (!__any_sync(~0u, above)) break;
      float top[2] = {fmaxf(x[0], x[2]), fmaxf(x[1], x[3])};
      this->raise(top);
    }
    float move[2];
    this->take_move(move);  // there is no O yet
    const __half2 a = __floats2half2_rn(exp2_approx(x[0]), exp2_approx(x[1]));
    const __half2 b = __floats2half2_rn(exp2_approx(x[2]), exp2_approx(x[3]));
    const uint2 p = make_uint2(transpose_8x8(reinterpret_cast<const uint32_t&>(a)),
                               transpose_8x8(reinterpret_cast<const uint32_t&>(b)));
    const uint32_t ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    float sum[4] = {};
    mma_f16(sum, ones, p.x, p.y);
    l_[0] += sum[0] * 0x1p-8f;
    l_[1] += sum[1] * 0x1p-8f;
    return p;
  }
  // The open page's share of this warp, as the first of the unit: O is empty.
  __device__ void add_open(const OpenTokens& open) {
    float s[4] = {};
    open_scores<D>(open.k, this->query_bf16(), lane_, s);
    const uint2 p = this->weigh_open(open, s);
    const BrainPair pairs[2] = {split_weights(p.x), split_weights(p.y)};
    open_values<D>(open.v, open.to, pairs, lane_, o_);
    const float unit[2] = {0x1p-8f, 0x1p-8f};
    scale_output<D, 1>(unit, o_);
    if (a_.call.decisions != nullptr && lane_ == 0)  // each of the warps says the same
      *this->decision_at(v_.i_last, open.page) = static_cast<uint8_t>(Decision::open);
  }

  // What is not whole pages alike for all rows, by DecodeWarp, whose sums are left in V's place; a
  // function of its own, so that it takes no registers from the loops above.
  __device__ static __noinline__ void walk_rest(Walk walk, Shared* s, uint32_t other,
                                                SoloCursor* at) {
    DecodeWarp<D, 1, Shared> rest(walk, *s);
    rest.walk_others(other, at->k, at->v);
    fence_stores_before_copies();
    __syncwarp();
    rest.leave_state(s->v[0], s->l, s->m);
    fence_stores_before_copies();
    __syncwarp();
  }
  __device__ void add_rest(uint32_t other) {
    SoloCursor cursor = at_;
    walk_rest(*this, &s_, other, &cursor);
    at_ = cursor;
    float own[2], state[2];
    this->merge(s_.l, s_.m, own, state);
    scale_output<D, 1>(own, o_);
    add_state<D, 1>(s_.v[0], lane_, state, o_);
    __syncwarp();
  }

  enum Waiting : int { kNothing, kMean, kBase, kResidual };  // for V

  SoloCursor& at_;
  int at_p_ = 0;
  float o_[D / 16][1][4];
};

}  // namespace thriftattn::cuda
