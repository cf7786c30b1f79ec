// The walks over simple items (attend_decode_warp.cuh): pages of which every row sees every token
// and may do the same. They are nearly all pages of a long context, so these loops do nothing else,
// and their code is short: what serves every case in one loop spends most of its time outside of
// the products, and a fifth of it waiting for instructions.
#pragma once

#include "cuda/attend_decode_scores.cuh"
#include "cuda/attend_decode_values.cuh"

namespace thriftattn::cuda {

// P = 2^(s - m_ + 8) of scores that are s - m_ + 8 already, and each column's sum. Where a score is
// far above the reference m_, that is raised, and with it `waiting`, the factors of what is not
// added yet: rarely after the first pages.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::weigh(float (&s)[4][NT][4], uint32_t (&p)[4][NT][2],
                                                 float (&sum)[2 * NT], float (&waiting)[2 * NT]) {
  bool above = fresh_;
  float top[2 * NT];
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) {
    const int n = c / 2, e = c & 1;
    top[c] = fmaxf(s[0][n][e], s[0][n][e + 2]);
#pragma unroll
    for (int i = 1; i < 4; ++i) top[c] = fmaxf(top[c], fmaxf(s[i][n][e], s[i][n][e + 2]));
    above |= !(top[c] <= 15.0f);
  }
  if (__any_sync(0xffffffffu, above)) {
    float move[2 * NT];
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        top[c] = fmaxf(top[c], __shfl_xor_sync(0xffffffffu, top[c], step));
      }
      const float up = fresh_ ? top[c] - 8.0f : fmaxf(0.0f, top[c] - 8.0f);
      move[c] = fresh_ ? 1.0f : exp2_approx(-up);  // nothing is there to be moved
      m_[c] += up;
      l_[c] *= move[c];
      waiting[c] *= move[c];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i][c / 2][c & 1] -= up;
        s[i][c / 2][(c & 1) + 2] -= up;
      }
    }
    scale_output<D, NT>(move, o_);
    fresh_ = false;
  }
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) {
    const int n = c / 2, e = c & 1;
    sum[c] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i][n][e] = exp2_approx(s[i][n][e]);
      s[i][n][e + 2] = exp2_approx(s[i][n][e + 2]);
      sum[c] += s[i][n][e] + s[i][n][e + 2];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const __half2 a = __floats2half2_rn(s[i][n][0], s[i][n][1]);
      const __half2 b = __floats2half2_rn(s[i][n][2], s[i][n][3]);
      p[i][n][0] = transpose_8x8(reinterpret_cast<const uint32_t&>(a));
      p[i][n][1] = transpose_8x8(reinterpret_cast<const uint32_t&>(b));
    }
  }
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], step);
    }
    sum[c] *= 0x1p-8f;
  }
}

// What all rows of the tile do with a page; said by the tile that has a position's first row.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::write_tile_decisions(int page, Decision decision) const {
  for (int i = (v_.first_row + a_.g.group - 1) / a_.g.group; i <= v_.i_last; ++i) {
    *decision_at(i, page) = static_cast<uint8_t>(decision);
  }
}

// Whole pages of BF16 rows.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::walk_rows() {
  for (int base = 0; base < items_; base += 32) {
    const uint32_t items = __shfl_sync(0xffffffffu, simple_, base / 32);
    if (items == 0) continue;
    begin_walk();
    ItemNote mine;
    if (exists(base + lane_)) mine = describe(base + lane_);
    uint32_t k_ahead = items, v_ahead = items;
    int k_unit = 0, v_unit = 0;
    const auto fetch = [&](const SideGeometry& side, uint64_t* bars, uint8_t* to, uint32_t& ahead,
                           int& unit, int& issued) {
      if (ahead == 0) return;
      const int slot = __shfl_sync(0xffffffffu, mine.slot, __ffs(static_cast<int>(ahead)) - 1);
      const StageCopy copy{&bars[issued % kRing], lane_};
      copy.begin(16 * 2 * D);
      copy.copy(to, StageSizes<D>::kRowStride, side_at(side, slot) + side.rows + unit * 16 * 2 * D,
                2 * D, 2 * D, 16);
      copy.end();
      ++issued;
      if (++unit == 4) {
        unit = 0;
        ahead &= ahead - 1;
      }
    };
    const auto fetch_k = [&] {
      fetch(a_.g.k, s_.k_bar, s_.k[k_issued_ % kRing], k_ahead, k_unit, k_issued_);
    };
    const auto fetch_v = [&] {
      fetch(a_.g.v, s_.v_bar, s_.v[v_issued_ % kRing], v_ahead, v_unit, v_issued_);
    };
    for (int i = 0; i < kRing; ++i) {
      fetch_k();
      fetch_v();
    }
    for (uint32_t left = items; left != 0; left &= left - 1) {
      uint32_t p[4][NT][2];
      float s[4][NT][4], sum[2 * NT], factor[2 * NT] = {};
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[u][t][e] = 0;
        }
        const int stage = k_used_ % kRing;
        barrier_wait(&s_.k_bar[stage], k_used_ / kRing & 1);
        scores_bf16(s_.k[stage], s[u]);
        ++k_used_;
        __syncwarp();
        fetch_k();
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][t][e] += 8.0f - m_[2 * t + (e & 1)];
        }
      }
      weigh(s, p, sum, factor);  // nothing waits
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        l_[c] += sum[c];
        factor[c] = 0x1p-8f;
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int stage = v_used_ % kRing;
        barrier_wait(&s_.v_bar[stage], v_used_ / kRing & 1);
        values_bf16(s_.v[stage], p, u, factor);
        ++v_used_;
        __syncwarp();
        fetch_v();
      }
      if (a_.call.decisions != nullptr) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        if (lane_ == 0) write_tile_decisions(v_.page_begin + item_of(base + bit), Decision::plain);
      }
    }
  }
}

}  // namespace thriftattn::cuda
