// Adding an item's values to the output (attend_decode_warp.cuh).
#pragma once

#include "cuda/attend_decode_warp.cuh"

namespace thriftattn::cuda {

// Moves O to the maximum that this item brings; f: what P.V is multiplied with, lf: mean(V).
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::take_factors(const Pending& p, float (&f)[2 * NT],
                                                        float (&lf)[2 * NT]) {
  float move[2 * NT];
  bool moved = false;
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) {
    const bool in = !(p.out >> c & 1) && p.l[c] > 0;
    // Sums are FP32: the reference moves only where the item is far above it.
    const float top = in && p.m[c] > m_[c] + 16.0f ? p.m[c] : m_[c];
    move[c] = top == m_[c] ? 1.0f : exp2_approx(m_[c] - top);
    const float b = in ? exp2_approx(p.m[c] - top) : 0.0f;
    moved |= move[c] != 1.0f;
    m_[c] = top;
    lf[c] = p.l[c] * b;
    if (!in) lf[c] = 0;
    l_[c] = l_[c] * move[c] + lf[c];
    f[c] = p.skip >> c & 1 ? 0.0f : b * 0x1p-10f;
  }
  if (__any_sync(0xffffffffu, moved)) scale_output<D, NT>(move, o_);
}

// Clears the rows of a stage of V from `from` on.
template <int D, int NT, class Shared>
template <class Rows>
__device__ void DecodeWarp<D, NT, Shared>::clear_rows(uint8_t* stage, int from) const {
  if (from >= Rows::kRows) return;
  for (int i = from * Rows::kStride / 4 + lane_; i < Rows::kRows * Rows::kStride / 4; i += 32) {
    reinterpret_cast<uint32_t*>(stage)[i] = 0;
  }
  fence_stores_before_copies();
  __syncwarp();
}

// 16 rows of V, of tokens 16 * slice on.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::values_bf16(const uint8_t* rows,
                                                       const uint32_t (&p)[4][NT][2], int slice,
                                                       const float (&f)[2 * NT]) {
  constexpr int kWords = D / 64;
  // P in FP16 is a BF16 number and what that leaves, exactly.
  uint32_t high[NT][2], low[NT][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i != slice) continue;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const BrainPair pair = split_weights(p[i][n][h]);
        high[n][h] = pair.high;
        low[n][h] = pair.low;
      }
    }
  }
  const int t0 = 2 * j_ + (j_ & 1);
  const int t1 = t0 + 1 - 2 * (j_ & 1);
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint8_t* at = rows + 16 * (g_ * kWords + w);
    constexpr int kStride = StageSizes<D>::kRowStride;
    const uint4 y0 = *reinterpret_cast<const uint4*>(at + t0 * kStride);
    const uint4 y1 = *reinterpret_cast<const uint4*>(at + t1 * kStride);
    const uint4 y2 = *reinterpret_cast<const uint4*>(at + (t0 + 8) * kStride);
    const uint4 y3 = *reinterpret_cast<const uint4*>(at + (t1 + 8) * kStride);
    const uint32_t x0[4] = {y0.x, y0.y, y0.z, y0.w}, x1[4] = {y1.x, y1.y, y1.z, y1.w};
    const uint32_t x2[4] = {y2.x, y2.y, y2.z, y2.w}, x3[4] = {y3.x, y3.y, y3.z, y3.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t v[4] = {__byte_perm(x0[i], x1[i], 0x5410), __byte_perm(x0[i], x1[i], 0x7632),
                             __byte_perm(x2[i], x3[i], 0x5410), __byte_perm(x2[i], x3[i], 0x7632)};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float acc[4] = {0, 0, 0, 0};
        mma_bf16(acc, v, high[n][0], high[n][1]);
        mma_bf16(acc, v, low[n][0], low[n][1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          o_[4 * w + i][n][e] = fmaf(acc[e], f[2 * n + (e & 1)], o_[4 * w + i][n][e]);
        }
      }
    }
  }
}

// 32 rows of V, of tokens 32 * unit on.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::values_fp8(const uint8_t* rows,
                                                      const uint32_t (&p)[4][NT][2], int unit,
                                                      const float (&f)[2 * NT]) {
  constexpr int kWords = D / 64;
  // The scales of the rows go into P, relative to the largest.
  const int t0 = 2 * j_ + (j_ & 1);
  const int t1 = t0 + 1 - 2 * (j_ & 1);
  float2 scale[2][2];
  float top = 0x1p-126f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint8_t* at = rows + (16 * i + 8 * h) * (D + 4);
      scale[i][h] = make_float2(*reinterpret_cast<const float*>(at + t0 * (D + 4)),
                                *reinterpret_cast<const float*>(at + t1 * (D + 4)));
      top = fmaxf(top, fmaxf(scale[i][h].x, scale[i][h].y));
    }
  }
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
  uint32_t pt[2][NT][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i / 2 != unit) continue;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 y = __half22float2(reinterpret_cast<const __half2&>(p[i][n][h]));
        const __half2 z =
            __floats2half2_rn(y.x * (scale[i % 2][h].x / top), y.y * (scale[i % 2][h].y / top));
        pt[i % 2][n][h] = reinterpret_cast<const uint32_t&>(z);
      }
    }
  }
  float factor[2 * NT];
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) factor[c] = f[c] * top * 256.0f;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // dims 0 to 3 and 4 to 7 of the eight
      float acc[2][NT][4];
      clear(acc);
#pragma unroll
      for (int slice = 0; slice < 2; ++slice) {
        const uint8_t* at = rows + 16 * slice * (D + 4) + 4 + 8 * (g_ * kWords + w) + 4 * part;
        const uint32_t x0 = *reinterpret_cast<const uint32_t*>(at + t0 * (D + 4));
        const uint32_t x1 = *reinterpret_cast<const uint32_t*>(at + t1 * (D + 4));
        const uint32_t x2 = *reinterpret_cast<const uint32_t*>(at + (t0 + 8) * (D + 4));
        const uint32_t x3 = *reinterpret_cast<const uint32_t*>(at + (t1 + 8) * (D + 4));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t even = i == 0 ? 0x4400 : 0x6622, odd = i == 0 ? 0x5511 : 0x7733;
          const uint32_t v[4] = {
              expand_e4m3(__byte_perm(x0, x1, even)), expand_e4m3(__byte_perm(x0, x1, odd)),
              expand_e4m3(__byte_perm(x2, x3, even)), expand_e4m3(__byte_perm(x2, x3, odd))};
#pragma unroll
          for (int n = 0; n < NT; ++n) mma_f16(acc[i][n], v, pt[slice][n][0], pt[slice][n][1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& o = o_[4 * w + 2 * part + i][n][e];
            o = fmaf(acc[i][n][e], factor[2 * n + (e & 1)], o);
          }
        }
      }
    }
  }
}

// Adds the values of an item; `next` is the item whose V may be fetched meanwhile.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::values(Pending& p, Pending& next) {
  float f[2 * NT], lf[2 * NT];
  if (p.units != 0) take_factors(p, f, lf);
  const ItemNote note = s_.notes[p.note];
  const bool planes = a_.g.v.layered() && note.kind() != kItemOpen;
  // V of what is left of this item, then of the next, as stages become free.
  for (int u = 0;; ++u) {
    issue_v(p, next);
    if (u == p.units) return;
    const int stage = v_used_ % kRing;
    uint8_t* at = s_.v[stage];
    barrier_wait(&s_.v_bar[stage], v_used_ / kRing & 1);
    if (planes) {
      if (u == 0) add_mean<D, NT>(at + plane_bytes(a_.g.v), lane_, lf, o_);
      if (!p.mean_only) {
        with_plane<kGroups>(u == 0 ? a_.g.v.kind : SideKind::nvfp4, [&]<class Format>(Format) {
          const float scale = (u == 0 ? p.v_scale : p.v_res_scale) * Format::kUnit;
          float factor[2 * NT];
#pragma unroll
          for (int c = 0; c < 2 * NT; ++c) factor[c] = f[c] * scale;
          add_values<D, NT, 4, Format>(
              at, lane_, [&](int i, int n) { return make_uint2(p.p[i][n][0], p.p[i][n][1]); },
              factor, o_);
        });
      }
    } else {
      // Rows that do not exist have P = 0, but their bytes may be anything.
      const bool fp8 = a_.g.v.kind == SideKind::fp8;
      if (fp8) {
        clear_rows<Fp8Rows<D>>(at, note.held() - 32 * u);
      } else {
        clear_rows<BrainRows16<D>>(at, note.held() - 16 * u);
      }
      if (fp8) {
        values_fp8(at, p.p, u, f);
      } else {
        values_bf16(at, p.p, u, f);
      }
    }
    ++v_used_;
    __syncwarp();
  }
}

}  // namespace thriftattn::cuda
