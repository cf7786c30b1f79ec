// Kernels of prefill in BF16 arithmetic (prefill_head.h). A pair is two BF16 numbers in 32 bits, the
// first in the low half: neighbours along the dimension that a product sums over. Query rows lie
// side by side (a column each), as in tile_kernels.h.
#pragma once

#include <cstdint>

namespace thriftattn {

inline constexpr int64_t kPrefillColumns = 64;  // query rows of a tile

// C[m][64] (+)= sum over pairs k of A(m, k) . B[k][64], A(m, k) = a[m * a_row + k * a_k].
struct PairMatmul {
  const uint32_t* a = nullptr;
  int64_t a_row = 0, a_k = 0;
  const uint32_t* b = nullptr;  // [k][64]
  float* c = nullptr;           // [m][64]
  int64_t m = 0, k = 0;
  bool accumulate = false;
};

struct PrefillKernels {
  void (*matmul)(const PairMatmul& args);
  // s[t][c] += offset[c] for `tokens` rows of one page.
  void (*add_offset)(float* s, int64_t tokens, const float* offset);
  // top[c] = max over the rows, which may hold -inf.
  void (*column_max)(const float* s, int64_t tokens, float* top);
  // Rows of one page [64]: p = exp(s - m) as pairs of tokens [32][64]; sum[c] = sum of p before
  // rounding. -inf gives 0.
  void (*weights)(const float* s, const float* m, uint32_t* p, float* sum);
  // x[rows][64] *= factor[64].
  void (*scale_columns)(float* x, int64_t rows, const float* factor);
  // o[d][c] += v[d] * w[c], the product of a column and a row.
  void (*add_outer)(float* o, const float* v, int64_t dim, const float* w);
  // out[c] = sum_d v[d] * q[d][c] in FP32.
  void (*dot_columns)(const float* v, const float* q, int64_t dim, float* out);
  // factor[c] = exp(from[c] - to[c]), 0 where from is -inf.
  void (*rescale)(const float* from, const float* to, float* factor);
  // FP32 to BF16, to nearest even.
  void (*narrow)(const float* x, int64_t n, uint16_t* out);
  // Two rows of FP32 to pairs: out[i] = (a[i], b[i]).
  void (*narrow_pairs)(const float* a, const float* b, int64_t n, uint32_t* out);
};

// Null where this build or machine has no AVX-512 BF16.
const PrefillKernels* prefill_kernels_bf16();

}  // namespace thriftattn
