// Base planes in groups of 32 in attend_prefill's filling warps (attend_prefill_fill.cuh): where
// NVFP4 has a thread's block of 16 in 8 bytes of codes and one of 4 scales, MXFP4 has the same
// codes and half as many scales, and INT3 6 bytes of codes that begin at a multiple of 2.
#pragma once

#include "cuda/attend_prefill_fill.cuh"

namespace thriftattn::cuda {

// Where the scale of a thread's block lies in the 4 bytes that it fetches.
template <int D>
__device__ inline int group_scale(int token, int panel, int block) {
  return token * (D / 32) + panel * 2 + block / 2;
}

// As fetch_blocks(): codes into the thread's lower chunk, scales into the upper one.
template <int D>
template <class Format>
__device__ void TileFiller<D>::fetch_groups(uint32_t tile, const uint8_t* plane) const {
  constexpr int kRow = Format::row_bytes(D);
  const uint8_t* scales = plane + 64 * kRow;
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = tile + p * kPanel + i * 1024;
      const int token = token_ + 8 * i;
      const uint8_t* codes = plane + token * kRow + p * Format::row_bytes(64);
      if constexpr (Format::row_bytes(8) == 3) {
        codes += 6 * block_ - 2 * (block_ & 1);  // the 4 bytes in which it begins, and the next
        copy_async<4>(at + low_, codes);
        copy_async<4>(at + low_ + 4, codes + 4);
      } else {
        copy_async<8>(at + low_, codes + 8 * block_);
      }
      copy_async<4>(at + high_, scales + (group_scale<D>(token, p, block_) & ~3));
    }
  }
}

template <int D>
__device__ void TileFiller<D>::fetch_base(const SideGeometry& side, uint32_t tile,
                                          const uint8_t* plane) const {
  if (side.kind == SideKind::int3) return fetch_groups<Int3Plane>(tile, plane);
  if (side.kind == SideKind::mxfp4) return fetch_groups<Mxfp4Plane>(tile, plane);
  fetch_blocks(tile, plane, 0);
}

// A scale as an FP16 pair, for codes as Format::expand() leaves them.
template <class Format>
__device__ inline uint32_t tile_scale(uint32_t code, const BaseFactor& base) {
  if constexpr (Format::kBrainValues) {
    // E2M1 comes times 2^-14; the tile's largest codes have scales of at most 2^15 here.
    return Format::key_scale(code, base.exponent + 128);
  } else {
    return hmul2(Format::key_scale(code, 0), base.factor);
  }
}

// As expand_blocks().
template <int D>
template <class Format, bool kBoth, bool kMean>
__device__ void TileFiller<D>::expand_groups(uint32_t tile, const BaseFactor& base,
                                             uint32_t residual, uint32_t mean) const {
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
    uint32_t m[8] = {};
    if constexpr (kMean) load_mean(mean, p, m);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = tile + p * kPanel + i * 1024;
      const uint4 x = load_chunk(at + low_);
      const uint2 scales = load_half_chunk(at + high_);
      uint32_t words[2] = {x.x, x.y};
      if constexpr (Format::row_bytes(8) == 3) {
        const int shift = 16 * (block_ & 1);
        words[0] = __funnelshift_r(x.x, x.y, shift);
        words[1] = __funnelshift_r(words[0], x.y >> shift, 24);
      }
      const int place = group_scale<D>(token_ + 8 * i, p, block_) & 3;
      const uint32_t s = tile_scale<Format>(scales.x >> (8 * place) & 255u, base);
      const uint32_t s_res =
          kBoth ? hmul2(scale_both(scales.y >> (8 * block_) & 255u), residual) : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Expanded e = Format::expand(Format::nibbles(words[h]));
        store_chunk(at + (h == 0 ? low_ : high_),
                    chunk_of_codes<kBoth>(e, s, m + 4 * h, h == 0 ? x.z : x.w, s_res));
      }
    }
  }
}

}  // namespace thriftattn::cuda
