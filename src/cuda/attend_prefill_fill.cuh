// A warpgroup fills a tile of attend_prefill: K or V of a page as FP16, whatever the page holds.
// What it holds is copied to where its tile will be (fetch) and, once the copies have landed,
// expanded in place (expand): a thread copies exactly what its own chunks are made of, so that it
// waits for its own copies only.
//
// Of codes (and FP8 rows) a thread has 16 dims (one block, two chunks) of two tokens of a panel, 8
// apart; of BF16 rows one chunk of every fourth token. Either way the eight lanes that store
// together hit different banks.
#pragma once

#include "base/float_convert.h"
#include "cuda/attend_args.cuh"
#include "cuda/attend_prefill_convert.cuh"
#include "cuda/attend_prefill_tile.cuh"
#include "cuda/plane_formats.cuh"

namespace thriftattn::cuda {

// What codes of a base plane are multiplied with beside their scales: an FP16 pair; of MXFP4 the
// power of two that is the tile's unit.
struct BaseFactor {
  uint32_t factor;
  int exponent;
};

template <int D>
class TileFiller {
 public:
  __device__ TileFiller(const AttendArgs& a, int head) : a_(a), head_(head) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    block_ = lane & 3;
    token_ = warp * 16 + (lane >> 2);
    low_ = token_ * 128 + (((2 * block_) ^ (token_ & 7)) << 4);
    high_ = token_ * 128 + (((2 * block_ + 1) ^ (token_ & 7)) << 4);
    row_token_ = warp * 16 + (lane >> 3);
    row_chunk_ = lane & 7;
  }

  __device__ int k_tiles() const { return k_tiles_; }

  // Of a page that holds `tokens` tokens. `mean` is the shared address of 2 * D bytes of the warp.
  __device__ void fetch_k(const PageFacts& f, int tokens, int part, uint32_t tile) const;
  __device__ void fetch_v(const PageFacts& f, int tokens, uint32_t tile, uint32_t mean) const;
  __device__ void expand_k(uint32_t tile, const PageFacts& f, int part) const;
  __device__ void expand_v(uint32_t tile, const PageFacts& f, uint32_t mean) const;

 private:
  static constexpr int kPanels = D / 64;
  static constexpr int kTogether = kPanels % 2 == 0 ? 2 : 1;  // panels expanded at a time
  static constexpr uint32_t kTile = prefill_tile_bytes(D);
  static constexpr uint32_t kPanel = 64 * 128;

  __device__ bool planes(const SideGeometry& side, const PageFacts& f) const {
    return side.layered() && f.open < 0;
  }
  __device__ const uint8_t* side_at(const SideGeometry& side, const PageFacts& f) const {
    return a_.call.memory.pages + int64_t{f.slot} * a_.g.slot_bytes + side.start +
           int64_t{head_} * side.head_bytes;
  }
  __device__ const uint8_t* rows_at(const SideGeometry& side, const PageFacts& f,
                                    int open_offset) const {
    if (!side.layered()) return side_at(side, f) + side.rows;
    return a_.call.memory.open + int64_t{f.open} * a_.g.open_bytes + open_offset +
           int64_t{head_} * (kPage * 2 * D);
  }
  __device__ const uint8_t* residual_at(const SideGeometry& side, const PageFacts& f) const {
    return a_.call.memory.residuals + int64_t{f.residual} * a_.g.residual_bytes + side.res_codes;
  }
  __device__ void fetch_plain(const SideGeometry& side, const uint8_t* rows, int tokens,
                              uint32_t tile) const {
    if (side.kind == SideKind::fp8) {
      fetch_fp8(tile, rows, tokens);
    } else {
      fetch_rows(tile, rows, tokens);
    }
  }
  __device__ void fetch_blocks(uint32_t tile, const uint8_t* plane, int behind) const;
  template <class Format>
  __device__ void fetch_groups(uint32_t tile, const uint8_t* plane) const;
  __device__ void fetch_base(const SideGeometry& side, uint32_t tile, const uint8_t* plane) const;
  __device__ void fetch_rows(uint32_t tile, const uint8_t* rows, int tokens) const;
  __device__ void fetch_fp8(uint32_t tile, const uint8_t* rows, int tokens) const;

  __device__ void expand_mean(const PageFacts& f, uint32_t mean) const;
  __device__ void load_mean(uint32_t mean, int p, uint32_t (&m)[8]) const;
  template <bool kBoth, bool kMean>
  __device__ void expand_blocks(uint32_t tile, uint32_t factor, uint32_t residual,
                                uint32_t mean) const;
  template <class Format, bool kBoth, bool kMean>
  __device__ void expand_groups(uint32_t tile, const BaseFactor& base, uint32_t residual,
                                uint32_t mean) const;
  template <bool kMean>
  __device__ void expand_planes(const SideGeometry& side, uint32_t tile, bool both,
                                const BaseFactor& base, uint32_t residual, uint32_t mean) const;
  template <bool kScaled>
  __device__ void expand_rows(uint32_t tile, float up) const;
  template <bool kLeft>
  __device__ void expand_fp8(uint32_t tile, float up) const;
  __device__ void expand_plain(const SideGeometry& side, uint32_t tile, float up) const;

  const AttendArgs& a_;
  const int head_, k_tiles_ = prefill_k_tiles(a_);
  int block_, token_, low_, high_;  // codes: the block, its first token, its two chunks in a panel
  int row_token_, row_chunk_;       // rows
};

// Codes into the thread's lower chunk, 4 scales of which one is the thread's into the upper one.
template <int D>
__device__ void TileFiller<D>::fetch_blocks(uint32_t tile, const uint8_t* plane, int behind) const {
  const uint8_t* codes = plane + token_ * (D / 2) + block_ * 8;
  const uint8_t* scales = plane + 32 * D + token_ * (D / 16);
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = tile + p * kPanel + i * 1024;
      copy_async<8>(at + low_ + behind * 8, codes + i * 8 * (D / 2) + p * 32);
      copy_async<4>(at + high_ + behind * 4, scales + i * 8 * (D / 16) + p * 4);
    }
  }
}

// Tokens that are not there yet become zeros.
template <int D>
__device__ void TileFiller<D>::fetch_rows(uint32_t tile, const uint8_t* rows, int tokens) const {
  const uint8_t* from = rows + row_token_ * (2 * D) + row_chunk_ * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = row_token_ + 4 * i;
    const uint32_t at = tile + token * 128 + ((row_chunk_ ^ (token & 7)) << 4);
    const int bytes = token < tokens ? 16 : 0;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      copy_async<16>(at + p * kPanel, from + i * 4 * (2 * D) + p * 128, bytes);
    }
  }
}

template <int D>
__device__ void TileFiller<D>::fetch_fp8(uint32_t tile, const uint8_t* rows, int tokens) const {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint8_t* row = rows + (token_ + 8 * i) * (D + 4);
    const int bytes = token_ + 8 * i < tokens ? 4 : 0;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const uint32_t at = tile + p * kPanel + i * 1024;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        copy_async<4>(at + low_ + 4 * w, row + 4 + p * 64 + block_ * 16 + 4 * w, bytes);
      }
      copy_async<4>(at + high_, row, bytes);
    }
  }
}

// Part 1 of two tiles is the residual by itself, or what FP16 left of FP8 rows.
template <int D>
__device__ void TileFiller<D>::fetch_k(const PageFacts& f, int tokens, int part,
                                       uint32_t tile) const {
  const SideGeometry& side = a_.g.k;
  if (planes(side, f)) {
    if (part == 0) fetch_base(side, tile, side_at(side, f) + side.codes);
    if (f.residual >= 0 && part == k_tiles_ - 1) {
      fetch_blocks(tile, residual_at(side, f), part == 0 ? 1 : 0);
    }
  } else if (part == 0 || side.kind == SideKind::fp8) {
    fetch_plain(side, rows_at(side, f, 0), tokens, tile);
  }
}

template <int D>
__device__ void TileFiller<D>::fetch_v(const PageFacts& f, int tokens, uint32_t tile,
                                       uint32_t mean) const {
  const SideGeometry& side = a_.g.v;
  if (!planes(side, f)) return fetch_plain(side, rows_at(side, f, a_.g.open_v), tokens, tile);
  fetch_base(side, tile, side_at(side, f) + side.codes);
  if (f.residual >= 0) fetch_blocks(tile, residual_at(side, f), 1);
  const int lane = threadIdx.x % 32;
  if (lane < D / 8) {
    copy_async<16>(mean + lane * 16, side_at(side, f) + side.mean + lane * 16);
  }
}

// V's mean, in units of the tile and in place: by the lanes that copied it, for their warp.
template <int D>
__device__ void TileFiller<D>::expand_mean(const PageFacts& f, uint32_t mean) const {
  const int lane = threadIdx.x % 32;
  if (!planes(a_.g.v, f) || lane >= D / 8) return;
  const uint32_t at = mean + lane * 16;
  store_chunk(at, chunk_of_bf16<true>(load_chunk(at), power_of_two(-f.v_exponent)));
}

// V's mean of a thread's 16 dims of panel p.
template <int D>
__device__ __forceinline__ void TileFiller<D>::load_mean(uint32_t mean, int p,
                                                         uint32_t (&m)[8]) const {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4 y = load_chunk(mean + p * 128 + block_ * 32 + h * 16);
    m[4 * h] = y.x, m[4 * h + 1] = y.y, m[4 * h + 2] = y.z, m[4 * h + 3] = y.w;
  }
}

// A chunk from codes of the base and, with kBoth, of the residual.
template <bool kBoth>
__device__ __forceinline__ uint4 chunk_of_codes(const Expanded& e, uint32_t scale,
                                                const uint32_t* mean, uint32_t residual,
                                                uint32_t residual_scale) {
  uint4 y = {hfma2(e.even_low, scale, mean[0]), hfma2(e.even_high, scale, mean[1]),
             hfma2(e.odd_low, scale, mean[2]), hfma2(e.odd_high, scale, mean[3])};
  if constexpr (kBoth) {
    const Expanded r = expand_e2m1(residual);
    y = {hfma2(r.even_low, residual_scale, y.x), hfma2(r.even_high, residual_scale, y.y),
         hfma2(r.odd_low, residual_scale, y.z), hfma2(r.odd_high, residual_scale, y.w)};
  }
  return y;
}

// Values are code * scale * factor (+ those of the residual) + mean.
template <int D>
template <bool kBoth, bool kMean>
__device__ void TileFiller<D>::expand_blocks(uint32_t tile, uint32_t factor, uint32_t residual,
                                             uint32_t mean) const {
#pragma unroll
  for (int first = 0; first < kPanels; first += kTogether) {
    uint4 codes[kTogether][2];  // words of the base, then of the residual
    uint2 scales[kTogether][2];
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t at = tile + (first + p) * kPanel + i * 1024;
        codes[p][i] = load_chunk(at + low_);
        scales[p][i] = load_half_chunk(at + high_);
      }
    }
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
      uint32_t m[8] = {};
      if constexpr (kMean) load_mean(mean, first + p, m);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 x = codes[p][i];
        const uint32_t s = hmul2(scale_both(scales[p][i].x >> (8 * block_) & 255u), factor);
        const uint32_t s_res =
            kBoth ? hmul2(scale_both(scales[p][i].y >> (8 * block_) & 255u), residual) : 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Expanded e = expand_e2m1(h == 0 ? x.x : x.y);
          store_chunk(tile + (first + p) * kPanel + i * 1024 + (h == 0 ? low_ : high_),
                      chunk_of_codes<kBoth>(e, s, m + 4 * h, h == 0 ? x.z : x.w, s_res));
        }
      }
    }
  }
}

// A base plane, and where it is held the residual.
template <int D>
template <bool kMean>
__device__ void TileFiller<D>::expand_planes(const SideGeometry& side, uint32_t tile, bool both,
                                             const BaseFactor& base, uint32_t residual,
                                             uint32_t mean) const {
  const auto expand = [&]<bool kBoth>() {
    if (side.kind == SideKind::int3) {
      expand_groups<Int3Plane, kBoth, kMean>(tile, base, residual, mean);
    } else if (side.kind == SideKind::mxfp4) {
      expand_groups<Mxfp4Plane, kBoth, kMean>(tile, base, residual, mean);
    } else {
      expand_blocks<kBoth, kMean>(tile, base.factor, residual, mean);
    }
  };
  if (both) {
    expand.template operator()<true>();
  } else {
    expand.template operator()<false>();
  }
}

template <int D>
template <bool kScaled>
__device__ void TileFiller<D>::expand_rows(uint32_t tile, float up) const {
  // Rows 4 apart: chunks of every second one are swapped alike.
  const uint32_t even = tile + row_token_ * 128 + ((row_chunk_ ^ (row_token_ & 7)) << 4);
  const uint32_t odd = tile + (row_token_ + 4) * 128 + ((row_chunk_ ^ ((row_token_ + 4) & 7)) << 4);
#pragma unroll
  for (int first = 0; first < kPanels; first += kTogether) {
    uint4 x[kTogether][4];
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[p][i] = load_chunk((i % 2 == 0 ? even : odd) + i / 2 * 1024 + (first + p) * kPanel);
      }
    }
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_chunk((i % 2 == 0 ? even : odd) + i / 2 * 1024 + (first + p) * kPanel,
                    chunk_of_bf16<kScaled>(x[p][i], up));
      }
    }
  }
}

template <int D>
template <bool kLeft>
__device__ void TileFiller<D>::expand_fp8(uint32_t tile, float up) const {
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = tile + p * kPanel + i * 1024;
      const uint4 x = load_chunk(at + low_);
      const float scale = __uint_as_float(load_half_chunk(at + high_).x) * up * 256.0f;
      const uint32_t s = half_pair(scale, scale);
      const float left = scale - __half2float(__float2half_rn(scale));
      const uint32_t rest = half_pair(left, left);
      store_chunk(at + low_, chunk_of_fp8<kLeft>(x.x, x.y, s, rest));
      store_chunk(at + high_, chunk_of_fp8<kLeft>(x.z, x.w, s, rest));
    }
  }
}

template <int D>
__device__ void TileFiller<D>::expand_plain(const SideGeometry& side, uint32_t tile,
                                            float up) const {
  if (side.kind == SideKind::fp8) {
    expand_fp8<false>(tile, up);
  } else if (up == 1.0f) {
    expand_rows<false>(tile, up);
  } else {
    expand_rows<true>(tile, up);
  }
}

template <int D>
__device__ void TileFiller<D>::expand_k(uint32_t tile, const PageFacts& f, int part) const {
  constexpr uint32_t kOne = 0x3c003c00;
  const uint32_t ratio = half_pair(f.k_tile, f.k_tile);
  const bool in_planes = planes(a_.g.k, f);
  if (in_planes && part == 0) {
    const int exponent = (__float_as_int(f.k_factor) >> 23) - 127;  // of MXFP4's k_factor
    expand_planes<false>(a_.g.k, tile, k_tiles_ == 1 && f.residual >= 0, {kOne, exponent}, ratio,
                         0);
  } else if (in_planes && f.residual >= 0) {
    expand_blocks<false, false>(tile, ratio, 0, 0);
  } else if (part == 0) {
    expand_plain(a_.g.k, tile, f.k_tile);
  } else if (a_.g.k.kind == SideKind::fp8) {
    expand_fp8<true>(tile, f.k_tile);
  } else {
    for (uint32_t i = threadIdx.x % 128; i < kTile / 16; i += 128) {
      store_chunk(tile + i * 16, make_uint4(0, 0, 0, 0));
    }
  }
}

template <int D>
__device__ void TileFiller<D>::expand_v(uint32_t tile, const PageFacts& f, uint32_t mean) const {
  if (planes(a_.g.v, f)) {
    expand_mean(f, mean);
    __syncwarp();
    const uint32_t factor = __byte_perm(f.v_factors, 0, 0x1010);
    const uint32_t residual = __byte_perm(f.v_factors, 0, 0x3232);
    expand_planes<true>(a_.g.v, tile, f.residual >= 0, {factor, f.v_exponent}, residual, mean);
  } else {
    expand_plain(a_.g.v, tile, power_of_two(-f.v_exponent));
  }
}

}  // namespace thriftattn::cuda
