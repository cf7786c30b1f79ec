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

// The next stage of K or of V: of the first item ahead.
template <int D, int NT, class Shared>
template <class Rows>
__device__ void DecodeWarp<D, NT, Shared>::fetch_rows(const SideGeometry& side, bool keys,
                                                      RowCopies& copies) {
  uint32_t& ahead = keys ? copies.k_ahead : copies.v_ahead;
  int& unit = keys ? copies.k_unit : copies.v_unit;
  int& issued = keys ? k_issued_ : v_issued_;
  if (ahead == 0) return;
  const int slot = __shfl_sync(0xffffffffu, copies.note.slot, __ffs(static_cast<int>(ahead)) - 1);
  const int stage = issued % kRing;
  const StageCopy copy{keys ? &s_.k_bar[stage] : &s_.v_bar[stage], lane_};
  uint8_t* to = keys ? s_.k[stage] : s_.v[stage];
  const uint8_t* from = side_at(side, slot) + side.rows;
  const int held = copies.base == 0 && (ahead & 1) != 0 ? tail_ : kPage;
  const int rows = min(Rows::kRows, held - unit * Rows::kRows);
  if constexpr (Rows::kKind == SideKind::fp8) {
    // Whole 16 bytes; the slot goes on behind the last row.
    const int bytes = (rows * Rows::kStride + 15) / 16 * 16;
    copy.begin(bytes);
    copy.copy_once(to, from + unit * Rows::kRows * Rows::kStride, bytes);
  } else {
    copy.begin(rows * 2 * D);
    copy.template copy<true>(to, Rows::kStride, from + unit * Rows::kRows * 2 * D, 2 * D, 2 * D, rows);
  }
  copy.end();
  ++issued;
  if (++unit * Rows::kRows >= held) {
    unit = 0;
    ahead &= ahead - 1;
  }
}

template <int D, int NT, class Shared>
template <class Rows>
__device__ void DecodeWarp<D, NT, Shared>::begin_rows(int base, RowCopies& copies) {
  copies = RowCopies{.base = base};
  if (exists(base + lane_)) copies.note = describe(base + lane_);
  copies.k_ahead = copies.v_ahead = __shfl_sync(0xffffffffu, simple_, base / 32);
  for (int i = 0; i < kRing; ++i) {
    fetch_rows<Rows>(a_.g.k, true, copies);
    fetch_rows<Rows>(a_.g.v, false, copies);
  }
}

// Pages of rows: whole, and the last one of one position.
template <int D, int NT, class Shared>
template <class Rows>
__device__ void DecodeWarp<D, NT, Shared>::walk_rows(RowCopies& copies) {
  constexpr int kUnits = kPage / Rows::kRows;
  for (int base = 0; base < items_; base += 32) {
    const uint32_t items = __shfl_sync(0xffffffffu, simple_, base / 32);
    if (items == 0) continue;
    begin_walk();
    if (copies.base != base) begin_rows<Rows>(base, copies);
    for (uint32_t left = items; left != 0; left &= left - 1) {
      const int held = base == 0 && (left & 1) != 0 ? tail_ : kPage;
      uint32_t p[4][NT][2];
      float s[4][NT][4], sum[2 * NT], factor[2 * NT] = {};
      clear(s);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (u * Rows::kRows >= held) continue;
        const int stage = k_used_ % kRing;
        barrier_wait(&s_.k_bar[stage], k_used_ / kRing & 1);
        if constexpr (Rows::kKind == SideKind::fp8) {
          scores_fp8(s_.k[stage], 0, s[2 * u]);
          scores_fp8(s_.k[stage], 1, s[2 * u + 1]);
        } else {
          scores_bf16(s_.k[stage], s[u]);
        }
        ++k_used_;
        __syncwarp();
        fetch_rows<Rows>(a_.g.k, true, copies);
      }
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const int t = c / 2, e = c & 1;
        const float f = Rows::kKind == SideKind::fp8 ? b_.row_factor[column_row(c)] : 1.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[i][t][e] = fmaf(s[i][t][e], f, 8.0f - m_[c]);
          s[i][t][e + 2] = fmaf(s[i][t][e + 2], f, 8.0f - m_[c]);
        }
      }
      if (held != kPage) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (8 * k + perm_ < held) continue;
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            s[k / 2][t][2 * (k & 1)] = s[k / 2][t][2 * (k & 1) + 1] = -INFINITY;
          }
        }
      }
      weigh(s, p, sum, factor);  // nothing waits
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        l_[c] += sum[c];
        factor[c] = 0x1p-8f;
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (u * Rows::kRows >= held) continue;
        const int stage = v_used_ % kRing;
        barrier_wait(&s_.v_bar[stage], v_used_ / kRing & 1);
        // Rows that do not exist have P = 0, but their bytes may be anything.
        clear_rows<Rows>(s_.v[stage], held - u * Rows::kRows);
        if constexpr (Rows::kKind == SideKind::fp8) {
          values_fp8(s_.v[stage], p, u, factor);
        } else {
          values_bf16(s_.v[stage], p, u, factor);
        }
        ++v_used_;
        __syncwarp();
        fetch_rows<Rows>(a_.g.v, false, copies);
      }
      if (a_.call.decisions != nullptr) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        if (lane_ == 0) write_tile_decisions(v_.page_begin + item_of(base + bit), Decision::plain);
      }
    }
  }
}

}  // namespace thriftattn::cuda
