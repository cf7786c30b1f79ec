// The walks over simple items (attend_decode_warp.cuh): pages of which every row sees every token and
// may do the same. They are nearly all pages of a long context, so these loops do nothing else, and
// their code is short: what serves every case in one loop spends most of its time outside of the
// products, and a fifth of it waiting for instructions.
#pragma once

#include "cuda/attend_decode_scores.cuh"
#include "cuda/attend_decode_values.cuh"

namespace thriftattn::cuda {

// P = 2^(s - m_ + 8) of scores that are s - m_ + 8 already, and each column's sum. Where a score is
// far above the reference m_, that is raised, and `waiting`, the factors of what is not added yet,
// with it: rarely after the first pages.
template <int D, int NT>
__device__ void DecodeWarp<D, NT>::weigh(float (&s)[4][NT][4], uint32_t (&p)[4][NT][2],
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
      move[c] = exp2_approx(-up);
      m_[c] += up;
      l_[c] *= move[c];
      waiting[c] *= move[c];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i][c / 2][c & 1] -= up;
        s[i][c / 2][(c & 1) + 2] -= up;
      }
    }
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[i][n][e] *= move[2 * n + (e & 1)];
      }
    }
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

// Base planes of K and V, by the mass rule. V is fetched once it is known that it is read, and used
// one item later.
template <int D, int NT>
__device__ void DecodeWarp<D, NT>::walk_planes() {
  constexpr int kRecord = 16 + 32 * NT;
  const uint8_t* k_from = side_at(a_.g.k, 0) + a_.g.k.codes;
  const uint8_t* v_from = side_at(a_.g.v, 0) + a_.g.v.codes;
  const uint32_t slot_bytes = static_cast<uint32_t>(a_.g.slot_bytes);
  // What waits for its V.
  uint32_t p[4][NT][2];
  float factor[2 * NT], mass[2 * NT];
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) factor[c] = mass[c] = 0;
  float v_scale = 0;
  Decision waiting = Decision::none;
  for (int base = 0; base < items_; base += 32) {
    uint32_t left = __shfl_sync(0xffffffffu, simple_, base / 32);  // to be used
    if (left == 0) continue;
    begin_walk();
    uint32_t ahead = left;                                         // to be fetched
    const ItemNote mine = describe(min(base + lane_, items_ - 1));
    const float* records =
        page_record(a_, int64_t{seq_} * a_.g.kv_heads + head_, tile_,
                    v_.page_begin + first_item_ + base * stride_);
    const auto fetch = [&] {
      if (ahead == 0) return;
      const int bit = __ffs(static_cast<int>(ahead)) - 1;
      ahead &= ahead - 1;
      const uint32_t slot = __shfl_sync(0xffffffffu, mine.slot, bit);
      const int stage = k_issued_ % kStages;
      const StageCopy copy{&s_.k_bar[stage], lane_};
      copy.begin(36 * D + kRecord);
      copy.copy(s_.k[stage], 0, k_from + uint64_t{slot} * slot_bytes, 0, 36 * D, 1);
      copy.copy(reinterpret_cast<uint8_t*>(s_.record[stage]), 0,
                reinterpret_cast<const uint8_t*>(records + bit * stride_ * (4 + 8 * NT)), 0, kRecord, 1);
      copy.end();
      ++k_issued_;
    };
    fetch();
    fetch();
    while (true) {
      uint32_t next_p[4][NT][2];
      float sum[2 * NT];
      float next_scale = 0;
      Decision decision = Decision::none;
      if (left != 0) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        left &= left - 1;
        const int stage = k_used_ % kStages;
        float s[4][NT][4];
        clear(s);
        barrier_wait(&s_.k_bar[stage], k_used_ / kStages & 1);
        scores_nvfp4(s_.k[stage], s);
        const float* record = s_.record[stage];
        const float k_scale = 128.0f * record[0];
        next_scale = 128.0f * record[1];
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const float2 offset = *reinterpret_cast<const float2*>(record + 4 + 8 * t + 2 * j_);
          const float2 f = *reinterpret_cast<const float2*>(&b_.row_factor[8 * t + 2 * j_]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              s[i][t][e] = fmaf(s[i][t][e], k_scale * (e & 1 ? f.y : f.x),
                                (e & 1 ? offset.y : offset.x) - m_[2 * t + (e & 1)] + 8.0f);
            }
          }
        }
        ++k_used_;
        __syncwarp();
        fetch();
        weigh(s, next_p, sum, factor);
        // As decide(), where all rows are of one position.
        const int flags = __shfl_sync(0xffffffffu, mine.flags, bit);
        decision = Decision::base;
        if (flags & (kItemPromotable | kItemSkippable)) {
          float top = -INFINITY;
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            const float2 floor = *reinterpret_cast<const float2*>(&b_.floor[8 * t + 2 * j_]);
            top = fmaxf(top, m_[2 * t] + __log2f(sum[2 * t]) - floor.x);
            top = fmaxf(top, m_[2 * t + 1] + __log2f(sum[2 * t + 1]) - floor.y);
          }
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
          if ((flags & kItemPromotable) && top > a_.log2_promote) {
            decision = Decision::full;
            const int n = base + bit;
            if (lane_ == (n >> 5)) noted_ |= 1u << (n & 31);
            if (lane_ == 0) *noted_rows(first_item_ + n * stride_) = ~0u;
          } else if ((flags & kItemSkippable) && !(top > a_.log2_skip)) {
            decision = Decision::skip;
          }
        }
        if (a_.call.decisions != nullptr && decision != Decision::full) {
          if (lane_ == 0) write_tile_decisions(v_.page_begin + first_item_ + (base + bit) * stride_, decision);
        }
        if (decision != Decision::full) {
          const uint32_t slot = __shfl_sync(0xffffffffu, mine.slot, bit);
          const int v_stage = v_issued_ % kStages;
          const StageCopy copy{&s_.v_bar[v_stage], lane_};
          const int skipped = decision == Decision::base ? 0 : 36 * D;
          copy.begin(38 * D - skipped);
          copy.copy(s_.v[v_stage] + skipped, 0,
                    v_from + uint64_t{slot} * slot_bytes + skipped, 0, 38 * D - skipped, 1);
          copy.end();
          ++v_issued_;
#pragma unroll
          for (int c = 0; c < 2 * NT; ++c) l_[c] += sum[c];
        }
      }
      if (waiting == Decision::base || waiting == Decision::skip) {
        const int stage = v_used_ % kStages;
        barrier_wait(&s_.v_bar[stage], v_used_ / kStages & 1);
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) mass[c] *= factor[c];
        add_mean(s_.v[stage] + 36 * D, mass);
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) factor[c] *= 0x1p-8f;
        if (waiting == Decision::base) values_nvfp4(s_.v[stage], p, factor, v_scale);
        ++v_used_;
        __syncwarp();
      }
      waiting = decision;
      v_scale = next_scale;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        mass[c] = sum[c];
        factor[c] = 1.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < NT; ++n) p[i][n][0] = next_p[i][n][0], p[i][n][1] = next_p[i][n][1];
      }
      if (decision == Decision::none) break;
    }
  }
}

// What all rows of the tile, of one position, do with a page.
template <int D, int NT>
__device__ void DecodeWarp<D, NT>::write_tile_decisions(int page, Decision decision) const {
  if (v_.first_row % a_.g.group != 0) return;
  for (int i = v_.i_first; i <= v_.i_last; ++i) {
    a_.call.decisions[((seq_ * a_.limits.step_tokens + a_.first_q + i) * a_.limits.max_pages + page) *
                          a_.g.kv_heads +
                      head_] = static_cast<uint8_t>(decision);
  }
}

// Whole pages of BF16 rows.
template <int D, int NT>
__device__ void DecodeWarp<D, NT>::walk_rows() {
  for (int base = 0; base < items_; base += 32) {
    const uint32_t items = __shfl_sync(0xffffffffu, simple_, base / 32);
    if (items == 0) continue;
    begin_walk();
    const ItemNote mine = describe(min(base + lane_, items_ - 1));
    uint32_t k_ahead = items, v_ahead = items;
    int k_unit = 0, v_unit = 0;
    const auto fetch = [&](const SideGeometry& side, uint64_t* bars, uint8_t* to, uint32_t& ahead,
                           int& unit, int& issued) {
      if (ahead == 0) return;
      const int slot = __shfl_sync(0xffffffffu, mine.slot, __ffs(static_cast<int>(ahead)) - 1);
      const StageCopy copy{&bars[issued % kStages], lane_};
      copy.begin(16 * 2 * D);
      copy.copy(to, StageSizes<D>::kRowStride,
                side_at(side, slot) + side.rows + unit * 16 * 2 * D, 2 * D, 2 * D, 16);
      copy.end();
      ++issued;
      if (++unit == 4) {
        unit = 0;
        ahead &= ahead - 1;
      }
    };
    const auto fetch_k = [&] {
      fetch(a_.g.k, s_.k_bar, s_.k[k_issued_ % kStages], k_ahead, k_unit, k_issued_);
    };
    const auto fetch_v = [&] {
      fetch(a_.g.v, s_.v_bar, s_.v[v_issued_ % kStages], v_ahead, v_unit, v_issued_);
    };
    for (int i = 0; i < kStages; ++i) {
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
        const int stage = k_used_ % kStages;
        barrier_wait(&s_.k_bar[stage], k_used_ / kStages & 1);
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
      weigh(s, p, sum, factor);
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        l_[c] += sum[c];
        factor[c] = 0x1p-8f;
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int stage = v_used_ % kStages;
        barrier_wait(&s_.v_bar[stage], v_used_ / kStages & 1);
        values_bf16(s_.v[stage], p, u, factor);
        ++v_used_;
        __syncwarp();
        fetch_v();
      }
      if (a_.call.decisions != nullptr) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        if (lane_ == 0) write_tile_decisions(v_.page_begin + first_item_ + (base + bit) * stride_, Decision::plain);
      }
    }
  }
}

}  // namespace thriftattn::cuda
