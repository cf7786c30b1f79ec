// The attending warps of attend_prefill: scores, softmax and values of 16 query rows each, page by
// page, and what they leave.
#pragma once

#include "base/float_convert.h"
#include "cuda/attend_args.cuh"
#include "cuda/attend_prefill_convert.cuh"
#include "cuda/attend_prefill_rotate.cuh"
#include "cuda/attend_prefill_tile.cuh"

namespace thriftattn::cuda {

// 16 rows of a warp; a lane has rows g and g + 8 of them (attend_prefill_tile.cuh).
template <int D, int kFillers>
class PrefillRows {
 public:
  __device__ PrefillRows(const AttendArgs& a, const TileView& v, int head)
      : a_(a), v_(v), head_(head) {
    const int warp = threadIdx.x / 32 - 4 * kFillers, lane = threadIdx.x % 32;
    j_ = lane % 4;
    row_ = warp * 16 + lane / 4;
    const int last = v.end_row - 1;
    const int first_i = min(v.first_row + warp * 16, last) / a.g.group;
    const int last_i = min(v.first_row + warp * 16 + 15, last) / a.g.group;
    whole_from_ = v.begin(last_i);
    whole_to_ = v.end(first_i);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      m_[r] = kEmpty;
      l_[r] = 0;
    }
#pragma unroll
    for (int n = 0; n < D / 64; ++n) {
#pragma unroll
      for (int k = 0; k < 8; ++k) o_[n][k][0] = o_[n][k][1] = o_[n][k][2] = o_[n][k][3] = 0;
    }
  }

  struct Tiles {
    uint32_t q[2] = {};  // shared addresses of the terms of q'
    uint32_t k = 0, v = 0;
  };
  template <int kTerms, int kTiles>
  __device__ void run(PrefillShared& shared, const Tiles& tiles);
  __device__ void rotate_back() { cuda::rotate_back<D>(o_, j_, a_.hadamard_factor); }
  __device__ void store() const;

 private:
  static constexpr float kEmpty = -1e30f;  // finite, so that differences are
  static constexpr float kShift = 8.0f;    // P is at most 2^15: FP16 goes to 2^16
#ifdef THRIFTATTN_WGMMA
  static constexpr bool kOverlap = D <= 128;
#else
  static constexpr bool kOverlap = false;
#endif

  // Of row r of the lane; rows that do not exist see what the last one does.
  __device__ int position(int r) const {
    return min(v_.first_row + row_ + 8 * r, v_.end_row - 1) / a_.g.group;
  }
  __device__ void mask(float (&s)[8][4], float (&factor)[2], float (&offset)[2], int page) const;
  __device__ bool weigh(float (&s)[8][4], const float (&factor)[2], const float (&offset)[2],
                        float (&move)[2]);
  // Of a page: scores s * factor + offset, units of its V, whether rows do not see all of it (or
  // have a softcap).
  struct PageTerms {
    float factor[2], offset[2];
    int v_exponent, page;
    bool masked;
  };
  __device__ PageTerms page_terms(PrefillShared& shared, int n, int stage) const;
  __device__ bool weigh_page(PrefillShared& shared, PageTerms& terms, int stage, float (&s)[8][4],
                             float (&move)[2]);
  static __device__ void pack(const float (&s)[8][4], uint32_t (&p)[4][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) p[n / 2][n % 2 * 2 + r] = half_pair(s[n][2 * r], s[n][2 * r + 1]);
    }
  }
  __device__ void scale_output(const float (&by)[2]) {
#pragma unroll
    for (int n = 0; n < D / 64; ++n) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[n][k][e] *= by[e / 2];
      }
    }
  }

  const AttendArgs& a_;
  const TileView& v_;
  int head_, row_, j_;
  int whole_from_, whole_to_;  // tokens that all of the warp's rows see
  int exponent_ = 0;           // o_ is in units of 2^exponent_
  float m_[2], l_[2];
  float o_[D / 64][8][4];
};

// Scores in base-2 units with the softcap, -inf where a row does not see a token.
template <int D, int kFillers>
__device__ void PrefillRows<D, kFillers>::mask(float (&s)[8][4], float (&factor)[2],
                                               float (&offset)[2], int page) const {
  const float to_power = a_.softcap > 0 ? 2.0f * kLog2e / a_.softcap : 0.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = position(r);
    const int from = v_.begin(i) - page * kPage, to = v_.end(i) - page * kPage;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x = fmaf(s[n][2 * r + e], factor[r], offset[r]);
        // cap * tanh(x / cap), tanh(y) = 1 - 2 / (1 + e^2y).
        if (a_.softcap > 0) {
          const float y = exp2_approx(x * to_power);
          x = fmaf(-2.0f * a_.softcap, __fdividef(1.0f, 1.0f + y), a_.softcap);
        }
        const int token = 8 * n + 2 * j_ + e;
        s[n][2 * r + e] = token >= from && token < to ? x : -INFINITY;
      }
    }
    factor[r] = 1.0f;
    offset[r] = 0.0f;
  }
}

// Scores s * factor + offset become P, and are summed. Whether the reference moved: O must be
// multiplied with `move` before these P are used.
template <int D, int kFillers>
__device__ bool PrefillRows<D, kFillers>::weigh(float (&s)[8][4], const float (&factor)[2],
                                                const float (&offset)[2], float (&move)[2]) {
  float top[2];
  bool above = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int n = 1; n < 8; ++n) top[r] = fmaxf(top[r], fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top[r] = fmaf(top[r], factor[r], offset[r]);
    above |= top[r] > m_[r] + (15.0f - kShift);
  }
  move[0] = move[1] = 1.0f;
  const bool moved = __any_sync(0xffffffffu, above);
  if (moved) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
      const float m = top[r] > m_[r] + (15.0f - kShift) ? top[r] : m_[r];
      move[r] = exp2_approx(m_[r] - m);
      m_[r] = m;
      l_[r] *= move[r];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float base = offset[r] - m_[r] + kShift;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float& p0 = s[n][2 * r];
      float& p1 = s[n][2 * r + 1];
      p0 = exp2_approx(fmaf(p0, factor[r], base));
      p1 = exp2_approx(fmaf(p1, factor[r], base));
      sum += p0 + p1;
    }
    l_[r] += sum;
  }
  return moved;
}

// Of item n, whose K is in its stage.
template <int D, int kFillers>
__device__ typename PrefillRows<D, kFillers>::PageTerms PrefillRows<D, kFillers>::page_terms(
    PrefillShared& shared, int n, int stage) const {
  const int batch = n / kPageBatch;
  if (a_.g.k.layered() && n % kPageBatch == 0) {
    barrier_wait(&shared.offsets_full[batch % 2], batch / 2 & 1);
  }
  const StageNote note = shared.notes[stage];
  const int page = v_.page_begin + n;
  PageTerms t = {{}, {0, 0}, note.v_exponent, page, false};
  t.masked = a_.softcap > 0 || page * kPage < whole_from_ || (page + 1) * kPage > whole_to_;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    t.factor[r] = shared.row_factor[row_ + 8 * r] * note.k_factor;
    if (a_.g.k.layered()) {
      t.offset[r] = shared.offsets[batch % 2][n % kPageBatch][row_ + 8 * r];
    }
  }
  return t;
}

// From a page's scores to P; gives the stage of its K back. What weigh() says.
template <int D, int kFillers>
__device__ bool PrefillRows<D, kFillers>::weigh_page(PrefillShared& shared, PageTerms& terms,
                                                     int stage, float (&s)[8][4],
                                                     float (&move)[2]) {
  barrier_arrive_warp(&shared.k_empty[stage], threadIdx.x % 32);
  if (terms.masked) mask(s, terms.factor, terms.offset, terms.page);
  return weigh(s, terms.factor, terms.offset, move);
}

template <int D, int kFillers>
template <int kTerms, int kTiles>
__device__ void PrefillRows<D, kFillers>::run(PrefillShared& shared, const Tiles& tiles) {
  constexpr uint32_t kTile = prefill_tile_bytes(D);
  const int lane = threadIdx.x % 32;
  const int q_row = (threadIdx.x / 128 - kFillers) * 64;
  struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void next(int stages) {
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  } keys, values;  // of the next scores, and of the values of the page before
  // With one filler there are registers for Q' as well: shared memory is then read for K alone.
  constexpr bool kHeld = kFillers == 1 && kOverlap && kTerms == 1 && kTiles == 1;
  [[maybe_unused]] HeldQueries<kHeld ? D : 16> held;
  if constexpr (kHeld) held.load(tiles.q[0], q_row + threadIdx.x / 32 % 4 * 16);
  float s[8][4] = {}, move[2];
  uint32_t p[4][4];
  bool moved;
  // S of a page whose K may be in two tiles; the last one's stage is given back by weigh_page().
  const auto scores = [&] {
#pragma unroll
    for (int part = 0; part < kTiles; ++part) {
      if (part > 0) {
        barrier_arrive_warp(&shared.k_empty[keys.stage], lane);
        keys.next(a_.stages);
      }
      barrier_wait(&shared.k_full[keys.stage], keys.parity);
      begin_scores<D, kTerms>(tiles.q, q_row, tiles.k + keys.stage * kTile, s, part > 0);
      products_wait<0>();
      end_scores(s);
    }
  };
  scores();
  PageTerms terms = page_terms(shared, 0, keys.stage);
  moved = weigh_page(shared, terms, keys.stage, s, move);
  exponent_ = terms.v_exponent;
  pack(s, p);
  keys.next(a_.stages);
  for (int n = 1; n < v_.items; ++n) {
    hold_values<D>(p, o_);
    if constexpr (kOverlap && kTiles == 1) {
      barrier_wait(&shared.k_full[keys.stage], keys.parity);
      if constexpr (kHeld) {
        begin_scores<D>(held, tiles.k + keys.stage * kTile, s);
      } else {
        begin_scores<D, kTerms>(tiles.q, q_row, tiles.k + keys.stage * kTile, s);
      }
      barrier_wait(&shared.v_full[values.stage], values.parity);
      begin_values<D>(p, tiles.v + values.stage * kTile, o_);
      // Not before: its loads would keep the tensor cores waiting for the values.
      terms = page_terms(shared, n, keys.stage);
      products_wait<1>();
      end_scores(s);
      moved = weigh_page(shared, terms, keys.stage, s, move);
      // Full for long; but a compiler does not move exponentials behind a loop, as it does behind
      // products_wait(), where they would run beside nothing.
      end_scores(s);
      barrier_wait(&shared.v_full[values.stage], values.parity);
      products_wait<0>();
      hold_values<D>(p, o_);
      end_scores(s);
      barrier_arrive_warp(&shared.v_empty[values.stage], lane);
    } else {
      barrier_wait(&shared.v_full[values.stage], values.parity);
      begin_values<D>(p, tiles.v + values.stage * kTile, o_);
      products_wait<0>();
      hold_values<D>(p, o_);
      barrier_arrive_warp(&shared.v_empty[values.stage], lane);
      scores();
      terms = page_terms(shared, n, keys.stage);
      moved = weigh_page(shared, terms, keys.stage, s, move);
    }
    if (moved || terms.v_exponent != exponent_) {
      const int change = max(-126, min(126, exponent_ - terms.v_exponent));
      const float unit = exp2f(static_cast<float>(change));
      scale_output({move[0] * unit, move[1] * unit});
      exponent_ = terms.v_exponent;
    }
    pack(s, p);
    keys.next(a_.stages);
    values.next(a_.stages);
  }
  hold_values<D>(p, o_);
  barrier_wait(&shared.v_full[values.stage], values.parity);
  begin_values<D>(p, tiles.v + values.stage * kTile, o_);
  products_wait<0>();
  hold_values<D>(p, o_);
}

__device__ inline void store_two(const AttendCall& c, int64_t i, float x, float y) {
  if (c.out_element == Element::f32) {
    *reinterpret_cast<float2*>(static_cast<float*>(c.out) + i) = make_float2(x, y);
  } else {
    const bool bf16 = c.out_element == Element::bf16;
    const uint32_t low = bf16 ? f32_to_bf16(x) : f32_to_fp16(x);
    const uint32_t high = bf16 ? f32_to_bf16(y) : f32_to_fp16(y);
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(c.out) + i) = low | high << 16;
  }
}

// Out, LSE and its floor of the rows.
template <int D, int kFillers>
__device__ void PrefillRows<D, kFillers>::store() const {
  const int64_t q_heads = int64_t{a_.g.kv_heads} * a_.g.group;
  const int64_t stride = a_.call.out_token_stride ? a_.call.out_token_stride : q_heads * D;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float l = l_[r];
    l += __shfl_xor_sync(0xffffffffu, l, 1);
    l += __shfl_xor_sync(0xffffffffu, l, 2);
    const int row = v_.first_row + row_ + 8 * r;
    const bool real = row < v_.end_row;
    const int q_head = head_ * a_.g.group + row % a_.g.group;
    float sink = -INFINITY;
    if (a_.call.sink_logits != nullptr && real) sink = a_.call.sink_logits[q_head] * kLog2e;
    const float top = fmaxf(m_[r], sink);
    const float own = exp2f(m_[r] - top);
    const float sum = l * own * 0x1p-8f + (sink > -INFINITY ? exp2f(sink - top) : 0.0f);
    const float factor = sum > 0 ? own * 0x1p-8f / sum : 0.0f;
    const float unit = exp2f(static_cast<float>(exponent_));
    const int64_t token = v_.t.first_row + a_.first_q + row / a_.g.group;
    const int64_t at = token * stride + int64_t{q_head} * D;
#pragma unroll
    for (int n = 0; n < D / 64; ++n) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        // The lane has the dims at places 2j, 2j + 1: after an exchange with lane j ^ 2, dims 2j,
        // 2j + 1.
        const float x = o_[n][k][2 * r] * factor * unit, y = o_[n][k][2 * r + 1] * factor * unit;
        const float other = __shfl_xor_sync(0xffffffffu, j_ < 2 ? y : x, 2);
        if (real) {
          store_two(a_.call, at + 64 * n + 8 * k + 2 * j_, j_ < 2 ? x : other, j_ < 2 ? other : y);
        }
      }
    }
    if (!real || j_ != 0) continue;
    if (a_.call.lse != nullptr) {
      a_.call.lse[token * q_heads + q_head] = sum > 0 ? (top + log2f(sum)) * kLn2 : -INFINITY;
    }
    if (a_.call.lse_floor != nullptr) a_.call.lse_floor[token * q_heads + q_head] = sink * kLn2;
  }
}

}  // namespace thriftattn::cuda
