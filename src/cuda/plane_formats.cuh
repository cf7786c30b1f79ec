// What tells the base planes of layered formats apart, for the kernels that multiply their codes: a
// struct a format. A word is eight codes of a token; its numbers come as pairs of 16-bit floats in
// units of their own: those of keys as FP16, those of values as FP16, or as BF16 where scales span
// more than FP16 does (kBrainValues).
//
//   row_bytes(D)        of a token's codes; scales follow the codes of all tokens
//   nibbles(x)          the word with a code every four bits
//   expand(n), values(n, scale)   nibbles to pairs (0, 4), (2, 6), (1, 5), (3, 7), without and with
//                       the scales of two tokens, one in each half
//   key_scale(code, top), key_unit(page_scale, top)   a token's scale in both halves; what brings
//                       scores back. top: largest_scale() of the page.
//   value_scales(a, b)  scales of two tokens; kUnit brings values back, beside the page scale
#pragma once

#include <cuda_fp16.h>

#include "cuda/geometry.h"
#include "cuda/mma.cuh"

namespace thriftattn::cuda {

// Eight INT3 codes, of which the word has the low 24 bits, to nibbles: groups of 12, 6 and 3 bits
// move apart, and what they leave between them is cut off at the end.
__device__ inline uint32_t spread_int3(uint32_t x) {
  const auto choose = [](uint32_t a, uint32_t b, uint32_t mask) {
    return (a & mask) | (b & ~mask);
  };
  x = choose(x, x << 4, 0x0000ffffu);
  x = choose(x, x << 2, 0x00ff00ffu);
  x = choose(x, x << 1, 0x0f0f0f0fu);
  return x & 0x77777777u;
}

// Nibbles of INT3 to FP16: the upper byte of a value is all of it, and a byte permute looks up
// four.
__device__ inline Expanded expand_int3(uint32_t n) {
  constexpr uint32_t kPositive = 0x43413e38u, kNegative = 0xc3c1beb8u;  // 0.5, 1.5, 2.5, 3.5
  const uint32_t low = __byte_perm(kPositive, kNegative, __byte_perm(n, 0, 0x4420));
  const uint32_t high = __byte_perm(kPositive, kNegative, __byte_perm(n, 0, 0x4431));
  return {__byte_perm(low, 0, 0x2404), __byte_perm(high, 0, 0x2404), low & 0xff00ff00u,
          high & 0xff00ff00u};
}

// The value of the INT3 code in the low three bits.
__device__ inline float int3_value(uint32_t code) {
  const float magnitude = static_cast<float>(code & 3u) + 0.5f;
  return __uint_as_float(__float_as_uint(magnitude) | (code & 4u) << 29);
}

__device__ inline Expanded times(const Expanded& x, uint32_t scale) {
  return {hmul2(x.even_low, scale), hmul2(x.even_high, scale), hmul2(x.odd_low, scale),
          hmul2(x.odd_high, scale)};
}

struct Nvfp4Plane {
  static constexpr int kGroup = 16;
  static constexpr bool kBrainValues = false;
  static constexpr float kUnit = 128.0f;  // E2M1 times 2^-14, E4M3 times 2^7
  static constexpr int row_bytes(int dim) { return dim / 2; }

  __device__ static uint32_t nibbles(uint32_t x) { return x; }
  __device__ static Expanded expand(uint32_t n) { return expand_e2m1(n); }
  __device__ static Expanded values(uint32_t n, uint32_t scales) {
    return times(expand(n), scales);
  }
  __device__ static uint32_t key_scale(uint32_t code, int) { return scale_both(code); }
  __device__ static float key_unit(float page_scale, int) { return page_scale * kUnit; }
  __device__ static uint32_t value_scales(uint32_t a, uint32_t b) { return scale_pair(a, b); }
  template <int D>
  __device__ static int largest_scale(const uint8_t*, int) {
    return 0;
  }
};

struct Int3Plane {
  static constexpr int kGroup = 32;
  static constexpr bool kBrainValues = false;
  static constexpr float kUnit = 256.0f;  // the bits of an E4M3 number, as FP16, are it times 2^-8
  static constexpr int row_bytes(int dim) { return dim * 3 / 8; }

  __device__ static uint32_t nibbles(uint32_t x) { return spread_int3(x); }
  __device__ static Expanded expand(uint32_t n) { return expand_int3(n); }
  __device__ static Expanded values(uint32_t n, uint32_t scales) {
    return times(expand(n), scales);
  }
  __device__ static uint32_t key_scale(uint32_t code, int) { return code * 0x00800080u; }
  __device__ static float key_unit(float page_scale, int) { return page_scale * kUnit; }
  __device__ static uint32_t value_scales(uint32_t a, uint32_t b) { return (a | b << 16) << 7; }
  template <int D>
  __device__ static int largest_scale(const uint8_t*, int) {
    return 0;
  }
};

// Keys are relative to the page's largest scale: scores lose what is below 2^-24 of that, far less
// than FP16 queries do. Values are exact.
struct Mxfp4Plane {
  static constexpr int kGroup = 32;
  static constexpr bool kBrainValues = true;
  static constexpr float kUnit = 1.0f;
  static constexpr int row_bytes(int dim) { return dim / 2; }

  __device__ static uint32_t nibbles(uint32_t x) { return x; }
  __device__ static Expanded expand(uint32_t n) { return expand_e2m1(n); }
  // Where BF16 has the low bits of its exponent and the first of its mantissa, E2M1 codes are their
  // values times 2^-126. Exact, the smallest scale being 2^-125.
  __device__ static Expanded values(uint32_t n, uint32_t scales) {
    const auto pair = [&](uint32_t magnitudes, uint32_t signs) {
      const uint32_t x = (magnitudes & 0x01c001c0u) | (signs & 0x80008000u);
      return multiply_bf16(multiply_bf16(x, 0x7e807e80u), scales);  // 2^126
    };
    return {pair(n << 6, n << 12), pair(n >> 2, n << 4), pair(n << 2, n << 8), pair(n >> 6, n)};
  }
  // 2^(code - top + 15) in both halves.
  __device__ static uint32_t key_scale(uint32_t code, int top) {
    const float scale = __int_as_float(max(static_cast<int>(code) - top + 142, 0) << 23);
    const __half2 both = __floats2half2_rn(scale, scale);
    return reinterpret_cast<const uint32_t&>(both);
  }
  __device__ static float key_unit(float, int top) { return __int_as_float((top - 1) << 23); }
  // An E8M0 code is BF16's exponent.
  __device__ static uint32_t value_scales(uint32_t a, uint32_t b) { return (a | b << 16) << 7; }
  // Of a page in shared or global memory, by a whole warp.
  template <int D>
  __device__ static int largest_scale(const uint8_t* plane, int lane) {
    const auto* words = reinterpret_cast<const uint32_t*>(plane + 64 * row_bytes(D));
    uint32_t top = words[lane];
#pragma unroll
    for (int i = 1; i < D / 64; ++i) top = __vmaxu4(top, words[lane + 32 * i]);
    top = __vmaxu4(top, top >> 16);
    top = max(top & 0xffu, top >> 8 & 0xffu);
    return static_cast<int>(__reduce_max_sync(0xffffffffu, top));
  }
};

// Calls body(format) for the base planes of a side: those in groups of 32 only in kernels that have
// them.
template <bool kGroups, class Body>
__device__ __forceinline__ void with_plane(SideKind kind, const Body& body) {
  if constexpr (kGroups) {
    if (kind == SideKind::int3) return body(Int3Plane());
    if (kind == SideKind::mxfp4) return body(Mxfp4Plane());
  }
  body(Nvfp4Plane());
}

}  // namespace thriftattn::cuda
