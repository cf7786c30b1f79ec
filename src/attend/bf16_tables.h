// BF16 by tables of bytes: what the AVX-512 expanders of rows share.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>

#include "attend/avx512_target.h"
#include "base/float_convert.h"

namespace thriftattn {
namespace {

// BF16 of the first N codes, high and low bytes apart.
template <uint32_t N>
struct ByteTables {
  alignas(64) std::array<uint8_t, N> low, high;
};
template <class Float, uint32_t N>
constexpr ByteTables<N> byte_tables() {
  ByteTables<N> t{};
  for (uint32_t i = 0; i < N; ++i) {
    const uint16_t value = f32_to_bf16(Float::decode(i));
    t.low[i] = static_cast<uint8_t>(value);
    t.high[i] = static_cast<uint8_t>(value >> 8);
  }
  return t;
}

}  // namespace
}  // namespace thriftattn

THRIFTATTN_BEGIN_TARGET(THRIFTATTN_AVX512_BF16)

namespace thriftattn {
namespace {

// FP32 to BF16, the first 16 elements in the lower half.
inline __m512i narrow_both(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// Bytes of 64 elements: qwords 0, 2, 4, 6 are the first 32, the others the rest.
inline void store_interleaved(uint16_t* out, __m512i lower, __m512i upper) {
  _mm512_store_si512(out, _mm512_unpacklo_epi8(lower, upper));
  _mm512_store_si512(out + 32, _mm512_unpackhi_epi8(lower, upper));
}

}  // namespace
}  // namespace thriftattn

THRIFTATTN_END_TARGET
