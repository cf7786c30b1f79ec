// What the AVX-512 files share.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attend/avx512_target.h"

THRIFTATTN_BEGIN_TARGET(THRIFTATTN_AVX512_BF16)

namespace thriftattn {
namespace {

// The first n lanes, or all.
inline __mmask16 lane_mask(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1);
}
inline __mmask64 byte_mask(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

inline __m512 dot_bf16_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// exp(x), x <= 0 or -inf (gives 0). Relative error below 3e-7: x = n ln 2 + r in two parts, a
// polynomial of degree 6 on |r| <= ln 2 / 2.
inline __m512 exp_nonpositive(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720.0f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 120.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 24.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 6.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

// exp(s - ref) where s > -inf, else 0: keeps -inf - -inf out.
inline __m512 exp_difference(__m512 s, __m512 ref) {
  const __mmask16 finite = _mm512_cmp_ps_mask(s, _mm512_set1_ps(-3.0e38f), _CMP_GT_OQ);
  return _mm512_maskz_mov_ps(finite, exp_nonpositive(_mm512_sub_ps(s, ref)));
}

}  // namespace
}  // namespace thriftattn

THRIFTATTN_END_TARGET
