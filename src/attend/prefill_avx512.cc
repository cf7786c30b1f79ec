// Prefill kernels with AVX-512 BF16 dot products (prefill_kernels.h). As in decode_avx512.cc, only
// what stands between the target pragmas is compiled for that instruction set.
#include "attend/prefill_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "attend/avx512_math.h"
#include "base/cpu_info.h"

THRIFTATTN_BEGIN_TARGET(THRIFTATTN_AVX512_BF16)

namespace thriftattn {
namespace {

constexpr int64_t kCols = kPrefillColumns;
constexpr int kVectors = kCols / 16;
constexpr int64_t kTokens = 64;  // of a page

// R rows of C in registers: 4 R accumulators, four vectors of B, one broadcast of A. Each element of
// C is one chain over k whatever R is.
template <int R>
void matmul_rows(const PairMatmul& t, int64_t m0) {
  float* c = t.c + m0 * kCols;
  __m512 acc[R][kVectors];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = t.accumulate ? _mm512_load_ps(c + i * kCols + j * 16) : _mm512_setzero_ps();
    }
  }
  const uint32_t* a = t.a + m0 * t.a_row;
  const uint32_t* b = t.b;
  for (int64_t k = 0; k < t.k; ++k) {
    __m512i bv[kVectors];
    for (int j = 0; j < kVectors; ++j) bv[j] = _mm512_load_si512(b + j * 16);
    for (int i = 0; i < R; ++i) {
      const __m512i av = _mm512_set1_epi32(static_cast<int>(a[i * t.a_row]));
      for (int j = 0; j < kVectors; ++j) acc[i][j] = dot_bf16_pairs(acc[i][j], av, bv[j]);
    }
    a += t.a_k;
    b += kCols;
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < kVectors; ++j) _mm512_store_ps(c + i * kCols + j * 16, acc[i][j]);
  }
}

void matmul(const PairMatmul& t) {
  int64_t m = 0;
  for (; m + 6 <= t.m; m += 6) matmul_rows<6>(t, m);
  if (m + 4 <= t.m) {
    matmul_rows<4>(t, m);
    m += 4;
  }
  if (m + 2 <= t.m) {
    matmul_rows<2>(t, m);
    m += 2;
  }
  if (m < t.m) matmul_rows<1>(t, m);
}

void add_offset(float* s, int64_t tokens, const float* offset) {
  for (int j = 0; j < kVectors; ++j) {
    const __m512 off = _mm512_load_ps(offset + j * 16);
    for (int64_t t = 0; t < tokens; ++t) {
      float* at = s + t * kCols + j * 16;
      _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), off));
    }
  }
}

void column_max(const float* s, int64_t tokens, float* top) {
  for (int j = 0; j < kVectors; ++j) {
    __m512 best = _mm512_load_ps(top + j * 16);
    for (int64_t t = 0; t < tokens; ++t) {
      best = _mm512_max_ps(best, _mm512_load_ps(s + t * kCols + j * 16));
    }
    _mm512_store_ps(top + j * 16, best);
  }
}

// Two vectors of FP32 as 16 pairs (a[i], b[i]).
inline __m512i pairs(__m512 a, __m512 b) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

void weights(const float* s, const float* m, uint32_t* p, float* sum) {
  for (int j = 0; j < kVectors; ++j) {
    const __m512 ref = _mm512_max_ps(_mm512_load_ps(m + j * 16), _mm512_set1_ps(-3.0e38f));
    __m512 total[2] = {};
    for (int64_t t = 0; t < kTokens; t += 2) {
      const float* at = s + t * kCols + j * 16;
      const __m512 a = exp_difference(_mm512_load_ps(at), ref);
      const __m512 b = exp_difference(_mm512_load_ps(at + kCols), ref);
      total[0] = _mm512_add_ps(total[0], a);
      total[1] = _mm512_add_ps(total[1], b);
      _mm512_store_si512(p + t / 2 * kCols + j * 16, pairs(a, b));
    }
    _mm512_store_ps(sum + j * 16, _mm512_add_ps(total[0], total[1]));
  }
}

void scale_columns(float* x, int64_t rows, const float* factor) {
  for (int j = 0; j < kVectors; ++j) {
    const __m512 f = _mm512_load_ps(factor + j * 16);
    for (int64_t r = 0; r < rows; ++r) {
      float* at = x + r * kCols + j * 16;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), f));
    }
  }
}

void add_outer(float* o, const float* v, int64_t dim, const float* w) {
  __m512 wv[kVectors];
  for (int j = 0; j < kVectors; ++j) wv[j] = _mm512_load_ps(w + j * 16);
  for (int64_t d = 0; d < dim; ++d) {
    const __m512 x = _mm512_set1_ps(v[d]);
    for (int j = 0; j < kVectors; ++j) {
      float* at = o + d * kCols + j * 16;
      _mm512_store_ps(at, _mm512_fmadd_ps(x, wv[j], _mm512_load_ps(at)));
    }
  }
}

void dot_columns(const float* v, const float* q, int64_t dim, float* out) {
  __m512 acc[kVectors][2] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const __m512 x = _mm512_set1_ps(v[d]);
    for (int j = 0; j < kVectors; ++j) {
      acc[j][d % 2] = _mm512_fmadd_ps(x, _mm512_load_ps(q + d * kCols + j * 16), acc[j][d % 2]);
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    _mm512_store_ps(out + j * 16, _mm512_add_ps(acc[j][0], acc[j][1]));
  }
}

void rescale(const float* from, const float* to, float* factor) {
  for (int j = 0; j < kVectors; ++j) {
    const __m512 ref = _mm512_max_ps(_mm512_load_ps(to + j * 16), _mm512_set1_ps(-3.0e38f));
    _mm512_store_ps(factor + j * 16, exp_difference(_mm512_load_ps(from + j * 16), ref));
  }
}

void narrow(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lane_mask(n - i);
    _mm256_mask_storeu_epi16(
        out + i, mask,
        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i))));
  }
}

void narrow_pairs(const float* a, const float* b, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lane_mask(n - i);
    _mm512_mask_storeu_epi32(
        out + i, mask,
        pairs(_mm512_maskz_loadu_ps(mask, a + i), _mm512_maskz_loadu_ps(mask, b + i)));
  }
}

constexpr PrefillKernels kKernels = {
    .matmul = matmul,
    .add_offset = add_offset,
    .column_max = column_max,
    .weights = weights,
    .scale_columns = scale_columns,
    .add_outer = add_outer,
    .dot_columns = dot_columns,
    .rescale = rescale,
    .narrow = narrow,
    .narrow_pairs = narrow_pairs,
};

}  // namespace
}  // namespace thriftattn

THRIFTATTN_END_TARGET

namespace thriftattn {

const PrefillKernels* prefill_kernels_bf16() {
  return cpu_has_avx512_bf16() ? &kKernels : nullptr;
}

}  // namespace thriftattn

#else

namespace thriftattn {

const PrefillKernels* prefill_kernels_bf16() { return nullptr; }

}  // namespace thriftattn

#endif
