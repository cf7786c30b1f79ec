// The walk of attend_groups over simple items: whole pages of base planes of which one or both have
// groups of 32, alike for all rows, by the mass rule (attend_decode_walk.cuh says what simple items
// are). V is fetched once it is known that it is read, and used one page later.
#pragma once

#include "cuda/attend_decode_walk.cuh"

namespace thriftattn::cuda {

template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::walk_groups() {
  constexpr int kRecord = 16 + 32 * NT;
  constexpr bool kQueryInRegisters = NT == 1 && D <= 128;
  const int k_bytes = a_.g.k.plane_bytes(), v_bytes = a_.g.v.plane_bytes();
  const uint2* const query = query_nvfp4();
  uint2 q[kQueryInRegisters ? D / 16 : 1];
  if constexpr (kQueryInRegisters) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) q[i] = query[i * 32];
  }
  // Of the page that waits for its V: P, what P is multiplied with, each row's sum, V's page scale.
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
    uint32_t ahead = left;  // to be fetched
    ItemNote mine;
    if (exists(base + lane_)) mine = describe(base + lane_);
    const auto fetch = [&] {
      if (ahead == 0) return;
      const int bit = __ffs(static_cast<int>(ahead)) - 1;
      ahead &= ahead - 1;
      const int slot = __shfl_sync(0xffffffffu, mine.slot, bit);
      const int stage = k_issued_ % kRing;
      const StageCopy copy{&s_.k_bar[stage], lane_};
      copy.begin(k_bytes + kRecord);
      copy.copy(s_.k[stage], 0, side_at(a_.g.k, slot) + a_.g.k.codes, 0, k_bytes, 1);
      copy.copy(
          reinterpret_cast<uint8_t*>(s_.record[stage]), 0,
          reinterpret_cast<const uint8_t*>(page_record(a_, int64_t{seq_} * a_.g.kv_heads + head_,
                                                       tile_, v_.page_begin + item_of(base + bit))),
          0, kRecord, 1);
      copy.end();
      ++k_issued_;
    };
    for (int i = 0; i < kRing; ++i) fetch();
    while (true) {
      uint32_t next_p[4][NT][2];
      float sum[2 * NT];
      float next_scale = 0;
      Decision decision = Decision::none;
      if (left != 0) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        left &= left - 1;
        const int stage = k_used_ % kRing;
        float s[4][NT][4];
        clear(s);
        barrier_wait(&s_.k_bar[stage], k_used_ / kRing & 1);
        const float* record = s_.record[stage];
        float k_factor = 0;
        with_plane<true>(a_.g.k.kind, [&]<class Format>(Format) {
          const int top = Format::template largest_scale<D>(s_.k[stage], lane_);
          k_factor = Format::key_unit(record[0], top);
          SliceAddress from = k_slice<D, Format>(s_.k[stage], lane_);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            score_slice<D, NT, Format>(
                from,
                [&](int t, int step) {
                  if constexpr (kQueryInRegisters) return q[step];
                  return query[(t * (D / 16) + step) * 32];
                },
                s[i], top);
            from.codes += 16 * Format::row_bytes(D);
            from.scales += 16 * (D / Format::kGroup);
          }
        });
        next_scale = record[1];
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const float2 offset = *reinterpret_cast<const float2*>(record + 4 + 8 * t + 2 * j_);
          const float2 f = *reinterpret_cast<const float2*>(&b_.row_factor[8 * t + 2 * j_]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              s[i][t][e] = fmaf(s[i][t][e], k_factor * (e & 1 ? f.y : f.x),
                                (e & 1 ? offset.y : offset.x) - m_[2 * t + (e & 1)] + 8.0f);
            }
          }
        }
        ++k_used_;
        __syncwarp();
        fetch();
        weigh(s, next_p, sum, factor);
        // As decide(), for all rows of the tile: what may be promoted has one position.
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
            if (lane_ == 0) *noted_rows(item_of(n)) = ~0u;
          } else if ((flags & kItemSkippable) && !(top > a_.log2_skip)) {
            decision = Decision::skip;
          }
        }
        if (a_.call.decisions != nullptr && decision != Decision::full && lane_ == 0) {
          write_tile_decisions(v_.page_begin + item_of(base + bit), decision);
        }
        if (decision != Decision::full) {
          const int slot = __shfl_sync(0xffffffffu, mine.slot, bit);
          const int v_stage = v_issued_ % kRing;
          const StageCopy copy{&s_.v_bar[v_stage], lane_};
          const int skipped = decision == Decision::base ? 0 : v_bytes;
          const int bytes = v_bytes + 2 * D - skipped;  // the mean lies behind the plane
          copy.begin(bytes);
          copy.copy(s_.v[v_stage] + skipped, 0, side_at(a_.g.v, slot) + a_.g.v.codes + skipped, 0,
                    bytes, 1);
          copy.end();
          ++v_issued_;
#pragma unroll
          for (int c = 0; c < 2 * NT; ++c) l_[c] += sum[c];
        }
      }
      if (waiting == Decision::base || waiting == Decision::skip) {
        const int stage = v_used_ % kRing;
        barrier_wait(&s_.v_bar[stage], v_used_ / kRing & 1);
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) mass[c] *= factor[c];
        add_mean<D, NT>(s_.v[stage] + v_bytes, lane_, mass, o_);
        if (waiting == Decision::base) {
          with_plane<true>(a_.g.v.kind, [&]<class Format>(Format) {
            float by[2 * NT];
#pragma unroll
            for (int c = 0; c < 2 * NT; ++c)
              by[c] = factor[c] * v_scale * (Format::kUnit * 0x1p-8f);
            add_values<D, NT, 4, Format>(
                s_.v[stage], lane_,
                [&](int i, int n) { return make_uint2(p[i][n][0], p[i][n][1]); }, by, o_);
          });
        }
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

}  // namespace thriftattn::cuda
