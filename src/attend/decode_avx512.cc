// Decode kernels with AVX-512 BF16 dot products (decode_kernels.h). Only the functions between the
// target pragmas are compiled for that instruction set - not what the headers define, which the
// linker may share with other files. decode_kernels_bf16() looks before it hands them out.
//
// K. A token's 128 codes are one 64-byte load. As 16-bit words they hold elements 4j .. 4j+3, and
// VPERMW looks at the low five bits of a word only: with a table of the 16 values written twice, the
// words shifted by 0, 4, 8 and 12 bits are the indices, no masking. So four shuffles give all 128
// elements in BF16, in the order k, 4+k, 8+k, ... for shift k; the queries are packed in that order.
// VDPBF16PS adds neighbours, so lane l of the sum holds elements 8l .. 8l+7: two lanes a scale.
//
// V. The words of tokens t and t+1 are interleaved first, so that a dot product adds the two tokens
// of one element: acc[d] += (p_t s_t, p_t+1 s_t+1) . (v_t[d], v_t+1[d]). Within 128 bits all
// elements belong to one group of 16, so the products p x scale are spread by one VPERMD.
#include "attend/decode_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "attend/avx512_math.h"
#include "base/cpu_info.h"
#include "base/float_convert.h"

THRIFTATTN_BEGIN_TARGET(THRIFTATTN_AVX512_BF16)

namespace thriftattn {
namespace {

constexpr int64_t kChunk = 128;  // elements: one load of codes
constexpr int64_t kRows = kRowBlock;
constexpr int64_t kPairs = kPageTokens / 2;
// E4M3 bits << 7 are the FP16 of value / 256.
constexpr float kScaleUnit = 256.0f;

int64_t chunks_of(int64_t dim) { return (dim + kChunk - 1) / kChunk; }
int64_t chunk_elements(int64_t dim, int64_t c) { return std::min(kChunk, dim - c * kChunk); }

// E2M1 values 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives in BF16, twice.
alignas(64) constexpr uint16_t kE2m1Bf16[32] = {
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,  //
    0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,  //
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,  //
    0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

template <int kShift>
inline __m512i expand(__m512i words, __m512i table) {
  if constexpr (kShift == 0) return _mm512_permutexvar_epi16(words, table);
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, kShift), table);
}

// ---- queries: per chunk [layout 2][row 4][32 x 4 BF16]; layout 0 in the order of expanded codes,
// layout 1 in natural order.

constexpr int64_t kQueryRow = kChunk;                   // elements of a row in a chunk
constexpr int64_t kQueryLayout = kRows * kQueryRow;     // of a layout
constexpr int64_t kQueryChunk = 2 * kQueryLayout;       // of a chunk
int64_t query_elements(int64_t dim) { return chunks_of(dim) * kQueryChunk; }
int64_t query_bytes(int64_t dim) { return query_elements(dim) * 2; }

void pack_queries(const float* const* rows, int64_t dim, std::byte* packed) {
  auto* out = reinterpret_cast<uint16_t*>(packed);
  std::fill_n(out, query_elements(dim), uint16_t{0});
  for (int64_t r = 0; r < kRows; ++r) {
    if (rows[r] == nullptr) continue;
    for (int64_t d = 0; d < dim; ++d) {
      const uint16_t q = f32_to_bf16(rows[r][d]);
      uint16_t* chunk = out + d / kChunk * kQueryChunk + r * kQueryRow;
      const int64_t i = d % kChunk;
      chunk[i % 4 * 32 + i / 4] = q;
      chunk[kQueryLayout + i] = q;
    }
  }
}

// ---- scores. Four tokens at a time, so that each part of a query is loaded once for the four.

constexpr int kTokens = 4;

// A value a row, in the lanes of that row.
inline __m512 spread_rows(const float* rows) {
  const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
  return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(rows)));
}

// Sums over neighbouring lanes of two tokens: 128 bits hold [a01, a23, b01, b23]. Lanes 4L .. 4L + 3
// are elements 32 L .. 32 L + 31 of a chunk, so these are the sums over its groups of 16.
inline __m512 add_neighbours(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

// The scales of NVFP4 as they are stored: of tokens t and t + 1 over the n elements of chunk c.
struct StoredScales {
  const uint8_t* scales;
  int64_t row_scales;

  const uint8_t* at(int64_t t, int64_t c) const {
    return scales + t * row_scales + c * (kChunk / kNvfp4Group);
  }
  static __mmask16 mask(int64_t n) {
    return static_cast<__mmask16>((1u << (n / kNvfp4Group)) - 1);
  }
  static __m512 widen(__m128i codes) {
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 7));
  }
  // As add_neighbours(): [a of group 2L, a of 2L + 1, b of 2L, b of 2L + 1].
  __m512 by_neighbours(int64_t t, int64_t c, int64_t n) const {
    const __m128i a = _mm_maskz_loadu_epi8(mask(n), at(t, c));
    return widen(_mm_unpacklo_epi16(a, _mm_maskz_loadu_epi8(mask(n), at(t + 1, c))));
  }
  // [group][token]
  __m512 by_group(int64_t t, int64_t c, int64_t n) const {
    const __m128i a = _mm_maskz_loadu_epi8(mask(n), at(t, c));
    return widen(_mm_unpacklo_epi8(a, _mm_maskz_loadu_epi8(mask(n), at(t + 1, c))));
  }
};

// FP32 scales of groups of 32, which expand_rows_bf16() has put in the order of add_neighbours().
struct LaidOutScales {
  const float* scales;
  int64_t chunks;

  __m512 by_neighbours(int64_t t, int64_t c, int64_t) const {
    return _mm512_load_ps(scales + (t / 2 * chunks + c) * 16);
  }
  __m512 by_group(int64_t t, int64_t c, int64_t n) const {
    return _mm512_permute_ps(by_neighbours(t, c, n), 0xd8);
  }
};

template <bool kHigh>
inline __m512i interleave(__m512i a, __m512i b) {
  return kHigh ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
}

// Codes of 4 bits, with their 16 values in BF16, twice.
struct Nibbles {
  const uint8_t* codes;
  const uint16_t* values;
  int64_t row_bytes;

  const uint8_t* at(int64_t t, int64_t c) const { return codes + t * row_bytes + c * (kChunk / 2); }
  __m512i table() const { return _mm512_load_si512(values); }
  static void expand_all(__m512i words, __m512i table, __m512i* x) {
    x[0] = expand<0>(words, table);
    x[1] = expand<4>(words, table);
    x[2] = expand<8>(words, table);
    x[3] = expand<12>(words, table);
  }
  // The n elements of chunk c of a token; words of two tokens side by side.
  void load(int64_t t, int64_t c, int64_t n, __m512i table, __m512i* x) const {
    expand_all(_mm512_maskz_loadu_epi8(byte_mask(n / 2), at(t, c)), table, x);
  }
  template <bool kHigh>
  void load_pair(int64_t t, int64_t c, int64_t n, __m512i table, __m512i* x) const {
    const __mmask64 mask = byte_mask(n / 2);
    expand_all(interleave<kHigh>(_mm512_maskz_loadu_epi8(mask, at(t, c)),
                                 _mm512_maskz_loadu_epi8(mask, at(t + 1, c))),
               table, x);
  }
};

// BF16 that expand_rows_bf16() has put in the order in which codes come out.
struct OrderedValues {
  const uint16_t* values;
  int64_t chunks;

  const uint16_t* at(int64_t t, int64_t c) const { return values + (t * chunks + c) * kChunk; }
  __m512i table() const { return _mm512_setzero_si512(); }
  void load(int64_t t, int64_t c, int64_t, __m512i, __m512i* x) const {
    for (int k = 0; k < 4; ++k) x[k] = _mm512_load_si512(at(t, c) + 32 * k);
  }
  template <bool kHigh>
  void load_pair(int64_t t, int64_t c, int64_t, __m512i, __m512i* x) const {
    for (int k = 0; k < 4; ++k) {
      x[k] = interleave<kHigh>(_mm512_load_si512(at(t, c) + 32 * k),
                               _mm512_load_si512(at(t + 1, c) + 32 * k));
    }
  }
};

// Rows in the order of codes.
template <class Codes, class Scales>
struct CodeRows {
  Codes codes;
  Scales scales;
  float page_scale;
};

CodeRows<Nibbles, StoredScales> code_rows(const Nvfp4ConstPlane& plane, int64_t dim) {
  return {{plane.codes, kE2m1Bf16, dim / 2},
          {plane.scales, dim / kNvfp4Group},
          plane.page_scale * kScaleUnit};
}

// f(rows) in the form that they have; false if that is not the order of codes.
template <typename F>
bool with_code_rows(const ExpandedRows& rows, int64_t dim, const F& f) {
  const LaidOutScales scales{rows.group_scale, chunks_of(dim)};
  if (rows.form == ExpandedRows::Form::codes) {
    const Nibbles nibbles{rows.codes, rows.code_values, dim / 2};
    f(CodeRows<Nibbles, LaidOutScales>{nibbles, scales, rows.page_scale});
  } else if (rows.form == ExpandedRows::Form::ordered) {
    const OrderedValues values{reinterpret_cast<const uint16_t*>(rows.values), chunks_of(dim)};
    f(CodeRows<OrderedValues, LaidOutScales>{values, scales, rows.page_scale});
  } else {
    return false;
  }
  return true;
}

// What is left to add of a block: [row][token pair], as add_neighbours() leaves it. The result is
// in the order of score_index().
inline __m512 add_up(const __m512 (*sum)[kTokens / 2]) {
  __m512 pair[2];
  for (int p = 0; p < 2; ++p) {
    const __m512 rows01 = add_neighbours(sum[0][p], sum[1][p]);  // [t0 r0, t1 r0, t0 r1, t1 r1]
    const __m512 rows23 = add_neighbours(sum[2][p], sum[3][p]);
    pair[p] = _mm512_add_ps(_mm512_shuffle_f32x4(rows01, rows23, 0x88),
                            _mm512_shuffle_f32x4(rows01, rows23, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88),
                       _mm512_shuffle_f32x4(pair[0], pair[1], 0xdd));
}

// The dot products of one query row with four tokens, over a chunk: 16 lanes each to be added.
struct TokenSums {
  __m512 x[kTokens];

  TokenSums(const __m512i (*k)[4], const uint16_t* q, int vectors) {
    for (int i = 0; i < kTokens; ++i) x[i] = _mm512_setzero_ps();
    for (int v = 0; v < vectors; ++v) {
      const __m512i part = _mm512_load_si512(q + v * 32);
      for (int i = 0; i < kTokens; ++i) x[i] = dot_bf16_pairs(x[i], k[i][v], part);
    }
  }
};

// kDim: head_dim at compile time; 0 takes any. The codes are expanded once for B blocks: with two,
// everything just about fits the 32 registers.
template <int B, int64_t kDim, class Rows>
void score_codes_blocks(const Rows& k, int64_t any_dim, const uint16_t* q,
                        const float* offset, float* s, bool accumulate, const NextRows& next) {
  const int64_t dim = kDim > 0 ? kDim : any_dim;
  const int64_t chunks = chunks_of(dim), block_q = query_elements(dim);
  const __m512i table = k.codes.table();
  const __m512 page_scale = _mm512_set1_ps(k.page_scale);
  for (int64_t t = 0; t < kPageTokens; t += kTokens) {
    next.fetch(t, kTokens);
    __m512 sum[B * kRows][kTokens / 2];
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t n = chunk_elements(dim, c);
      __m512i x[kTokens][4];
      for (int i = 0; i < kTokens; ++i) k.codes.load(t + i, c, n, table, x[i]);
      const __m512 scale[2] = {k.scales.by_neighbours(t, c, n), k.scales.by_neighbours(t + 2, c, n)};
      for (int r = 0; r < B * kRows; ++r) {
        const TokenSums dots(
            x, q + r / kRows * block_q + c * kQueryChunk + r % kRows * kQueryRow, 4);
        for (int p = 0; p < 2; ++p) {
          const __m512 groups = add_neighbours(dots.x[2 * p], dots.x[2 * p + 1]);
          sum[r][p] = c == 0 ? _mm512_mul_ps(groups, scale[p])
                             : _mm512_fmadd_ps(groups, scale[p], sum[r][p]);
        }
      }
    }
    for (int b = 0; b < B; ++b) {
      float* out = s + b * kBlockScores + t * kRows;
      const __m512 start = accumulate ? _mm512_load_ps(out) : spread_rows(offset + b * kRows);
      _mm512_store_ps(out, _mm512_fmadd_ps(add_up(sum + b * kRows), page_scale, start));
    }
  }
}

template <int B, class Rows>
void score_codes_any(const Rows& k, int64_t dim, const uint16_t* q,
                     const float* offset, float* s, bool accumulate, const NextRows& next) {
  switch (dim) {
    case 64:
      return score_codes_blocks<B, 64>(k, dim, q, offset, s, accumulate, next);
    case 128:
      return score_codes_blocks<B, 128>(k, dim, q, offset, s, accumulate, next);
    default:
      return score_codes_blocks<B, 0>(k, dim, q, offset, s, accumulate, next);
  }
}

template <class Rows>
void score_codes(const Rows& k, int64_t dim, const std::byte* q, int64_t blocks,
                 const float* offset, float* s, bool accumulate, const NextRows& next) {
  const auto* packed = reinterpret_cast<const uint16_t*>(q);
  const int64_t step = query_elements(dim);
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) {
    score_codes_any<2>(k, dim, packed + b * step, offset + b * kRows, s + b * kBlockScores,
                       accumulate, b == 0 ? next : NextRows{});
  }
  if (b < blocks) {
    score_codes_any<1>(k, dim, packed + b * step, offset + b * kRows, s + b * kBlockScores,
                       accumulate, b == 0 ? next : NextRows{});
  }
}

void score_nvfp4(const Nvfp4ConstPlane& k, int64_t dim, const std::byte* q, int64_t blocks,
                 const float* offset, float* s, bool accumulate, const NextRows& next) {
  score_codes(code_rows(k, dim), dim, q, blocks, offset, s, accumulate, next);
}

template <int64_t kDim>
void score_bf16_block(const Bf16Rows& k, int64_t any_dim, const uint16_t* q, const float* offset,
                      float* s, const NextRows& next) {
  const int64_t dim = kDim > 0 ? kDim : any_dim;
  const __m512 start = spread_rows(offset);
  for (int64_t t = 0; t < kPageTokens; t += kTokens) {
    next.fetch(t, kTokens);
    __m512 sum[kRows][kTokens / 2];
    for (int64_t c = 0; c < chunks_of(dim); ++c) {
      const int64_t n = chunk_elements(dim, c);
      const int vectors = static_cast<int>((n + 31) / 32);
      __m512i x[kTokens][4];
      for (int i = 0; i < kTokens; ++i) {
        for (int v = 0; v < vectors; ++v) {
          const int64_t left = t + i < k.tokens ? n - v * 32 : 0;
          const auto mask = static_cast<__mmask32>(left >= 32 ? ~0u : (1u << left) - 1);
          x[i][v] =
              _mm512_maskz_loadu_epi16(mask, k.data + (t + i) * k.stride + c * kChunk + v * 32);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const TokenSums dots(x, q + c * kQueryChunk + kQueryLayout + r * kQueryRow, vectors);
        for (int p = 0; p < 2; ++p) {
          const __m512 pair = add_neighbours(dots.x[2 * p], dots.x[2 * p + 1]);
          sum[r][p] = c == 0 ? pair : _mm512_add_ps(sum[r][p], pair);
        }
      }
    }
    _mm512_store_ps(s + t * kRows, _mm512_add_ps(add_up(sum), start));
  }
}

void score_bf16(const Bf16Rows& k, int64_t dim, const std::byte* q, int64_t blocks,
                const float* offset, float* s, const NextRows& next) {
  const auto* packed = reinterpret_cast<const uint16_t*>(q);
  const auto score = dim == 64    ? score_bf16_block<64>
                     : dim == 128 ? score_bf16_block<128>
                                  : score_bf16_block<0>;
  for (int64_t b = 0; b < blocks; ++b) {
    score(k, dim, packed + b * query_elements(dim), offset + b * kRows, s + b * kBlockScores,
          b == 0 ? next : NextRows{});
  }
}

inline Bf16Rows bf16_rows(const ExpandedRows& rows, int64_t dim) {
  return {.data = reinterpret_cast<const uint16_t*>(rows.values),
          .stride = expanded_bf16_stride(dim),
          .tokens = rows.tokens};
}

// Tokens t .. t + 3, each in the lanes of its scores.
inline __m512 spread_tokens(const float* of_tokens) {
  const __m512i index = _mm512_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3);
  return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_load_ps(of_tokens)));
}

void score_expanded(const ExpandedRows& k, int64_t dim, const std::byte* q, int64_t blocks,
                    const float* offset, float* s, const NextRows& next) {
  if (with_code_rows(k, dim, [&](const auto& rows) {
        score_codes(rows, dim, q, blocks, offset, s, false, next);
      })) {
    return;
  }
  static constexpr float kNone[kMaxBlocks * kRows] = {};
  score_bf16(bf16_rows(k, dim), dim, q, blocks, kNone, s, next);
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512 start = spread_rows(offset + b * kRows);
    for (int64_t t = 0; t < kPageTokens; t += 4) {
      float* at = s + b * kBlockScores + t * kRows;
      _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), spread_tokens(k.scale + t), start));
    }
  }
}

inline __m512 widen(const uint16_t* v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))), 16));
}

// dim is a multiple of 16.
void dot_bf16(const uint16_t* v, int64_t dim, const float* rows, float* out) {
  __m512 acc[kRows] = {};
  for (int64_t d = 0; d < dim; d += 16) {
    const __m512 x = widen(v + d);
    for (int r = 0; r < kRows; ++r) {
      acc[r] = _mm512_fmadd_ps(x, _mm512_loadu_ps(rows + r * dim + d), acc[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = _mm512_reduce_add_ps(acc[r]);
}

// ---- softmax

// cap * tanh(s / cap), tanh(x) = 1 - 2 / (exp(2x) + 1) with exp of a value <= 0.
inline __m512 capped(__m512 s, float cap) {
  const __m512 x = _mm512_mul_ps(s, _mm512_set1_ps(1.0f / cap));
  const __m512 e = exp_nonpositive(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0f)));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 t = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  return _mm512_mul_ps(_mm512_set1_ps(cap), _mm512_or_ps(t, sign));
}

// The largest of each row's lanes, in all of them; the same for sums.
inline __m512 fold_max(__m512 x) {
  x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return _mm512_max_ps(x, _mm512_permute_ps(x, 0xb1));
}
inline __m512 fold_add(__m512 x) {
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
}
// Lanes 0, 2, 4, 6: the rows.
inline void store_rows(__m512 x, float* out) {
  const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(index, x)));
}

void page_softmax(float* s, float softcap, const BlockMask* mask, float* m, float* l) {
  if (softcap > 0) {
    for (int64_t i = 0; i < kBlockScores; i += 16) {
      _mm512_store_ps(s + i, capped(_mm512_load_ps(s + i), softcap));
    }
  }
  if (mask != nullptr) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t t = 0; t < kPageTokens; ++t) {
        if (t < mask->first[r] || t >= mask->end[r]) s[score_index(t, r)] = -__builtin_inff();
      }
    }
  }
  __m512 top = _mm512_load_ps(s);
  for (int64_t i = 16; i < kBlockScores; i += 16) top = _mm512_max_ps(top, _mm512_load_ps(s + i));
  top = fold_max(top);
  const __m512 ref = _mm512_max_ps(top, _mm512_set1_ps(-3.0e38f));
  __m512 sum[2] = {};
  for (int64_t i = 0; i < kBlockScores; i += 32) {
    for (int j = 0; j < 2; ++j) {
      const __m512 p = exp_difference(_mm512_load_ps(s + i + 16 * j), ref);
      _mm512_store_ps(s + i + 16 * j, p);
      sum[j] = _mm512_add_ps(sum[j], p);
    }
  }
  store_rows(top, m);
  store_rows(fold_add(_mm512_add_ps(sum[0], sum[1])), l);
}

// Weights are kept in FP16.
constexpr int64_t kWeightsBytes = kBlockScores * 2;

void store_weights(const float* s, uint32_t rows, std::byte* p) {
  // Lanes 2r, 2r + 1 and 8 + 2r, 9 + 2r are row r.
  const uint32_t pairs = _pdep_u32(rows, 0x55u) * 3u;
  const auto mask = static_cast<__mmask16>(pairs | pairs << 8);
  auto* out = reinterpret_cast<uint16_t*>(p);
  for (int64_t i = 0; i < kBlockScores; i += 16) {
    const __m256i half = _mm512_cvtps_ph(_mm512_load_ps(s + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(out + i, mask, half);
  }
}

inline __m512 load_weights(const std::byte* p, int64_t i) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p + 2 * i)));
}

inline __mmask16 pages_mask(int64_t pages) { return lane_mask(pages * kRows); }

void merge_pages(const float* m, const float* l, int64_t pages, float* total_m, float* total_l) {
  const __m512 none = _mm512_set1_ps(-__builtin_inff());
  const __m512 start = _mm512_broadcast_f32x4(_mm_loadu_ps(total_m));
  __m512 top = start;
  for (int64_t j = 0; j < pages; j += 4) {
    top = _mm512_max_ps(top, _mm512_mask_loadu_ps(none, pages_mask(pages - j), m + j * kRows));
  }
  top = _mm512_max_ps(top, _mm512_shuffle_f32x4(top, top, 0x4e));
  top = _mm512_max_ps(top, _mm512_shuffle_f32x4(top, top, 0xb1));
  const __m512 ref = _mm512_max_ps(top, _mm512_set1_ps(-3.0e38f));
  __m512 sum = _mm512_maskz_mul_ps(0xf, _mm512_broadcast_f32x4(_mm_loadu_ps(total_l)),
                                   exp_difference(start, ref));
  for (int64_t j = 0; j < pages; j += 4) {
    const __mmask16 mask = pages_mask(pages - j);
    const __m512 e = exp_difference(_mm512_mask_loadu_ps(none, mask, m + j * kRows), ref);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, l + j * kRows), e, sum);
  }
  sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e));
  sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xb1));
  _mm_storeu_ps(total_m, _mm512_castps512_ps128(top));
  _mm_storeu_ps(total_l, _mm512_castps512_ps128(sum));
}

void page_masses(const float* m, const float* l, int64_t pages, const float* lse, float* mass,
                 float* factor) {
  const __m512 ref = _mm512_broadcast_f32x4(_mm_loadu_ps(lse));
  const __mmask16 seen = _mm512_cmp_ps_mask(ref, _mm512_set1_ps(-3.0e38f), _CMP_GT_OQ);
  for (int64_t j = 0; j < pages; j += 4) {
    const __mmask16 mask = pages_mask(pages - j);
    const __m512 top = _mm512_maskz_loadu_ps(mask, m + j * kRows);
    const __m512 e = _mm512_maskz_mov_ps(seen, exp_difference(top, ref));
    _mm512_mask_storeu_ps(factor + j * kRows, mask, e);
    _mm512_mask_storeu_ps(mass + j * kRows, mask,
                          _mm512_mul_ps(e, _mm512_maskz_loadu_ps(mask, l + j * kRows)));
  }
}

// ---- values. Accumulators of a block: [chunk][codes: 2 halves][row][shift 4][16], then
// [chunk][BF16 rows: 2 halves][row][vector 4][16], then the means [row][dim rounded up to 128].

constexpr int64_t kAccHalf = kRows * 4 * 16;
constexpr int64_t kAccChunk = 2 * kAccHalf;
int64_t bf16_accumulators(int64_t dim) { return chunks_of(dim) * kAccChunk; }
int64_t mean_accumulators(int64_t dim) { return 2 * bf16_accumulators(dim); }
int64_t accumulator_floats(int64_t dim) {
  return mean_accumulators(dim) + kRows * chunks_of(dim) * kChunk;
}

// One half of the words of a chunk: P x scale of token pairs [32][row][8 groups x 2], BF16.
template <bool kHigh, class Codes>
void weigh_half(const Codes& codes, int64_t c, int64_t n, const uint16_t* weights, float* acc) {
  const __m512i table = codes.table();
  const int h = kHigh ? 1 : 0;
  const __m512i groups = _mm512_setr_epi32(h, h, h, h, 2 + h, 2 + h, 2 + h, 2 + h, 4 + h, 4 + h,
                                           4 + h, 4 + h, 6 + h, 6 + h, 6 + h, 6 + h);
  __m512 sum[kRows][4];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < 4; ++k) sum[r][k] = _mm512_load_ps(acc + (r * 4 + k) * 16);
  }
  for (int64_t j = 0; j < kPairs; ++j) {
    __m512i v[4];
    codes.template load_pair<kHigh>(2 * j, c, n, table, v);
    for (int r = 0; r < kRows; ++r) {
      const __m256i pairs =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + (j * kRows + r) * 16));
      const __m512i w = _mm512_permutexvar_epi32(groups, _mm512_castsi256_si512(pairs));
      for (int k = 0; k < 4; ++k) sum[r][k] = dot_bf16_pairs(sum[r][k], v[k], w);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < 4; ++k) _mm512_store_ps(acc + (r * 4 + k) * 16, sum[r][k]);
  }
}

template <class Rows>
void weigh_codes(const Rows& v, int64_t dim, const std::byte* p, const float* factor, float* acc,
                 const NextRows& next) {
  alignas(64) float scaled[kBlockScores];
  alignas(64) uint16_t weights[kPairs * kRows * 16];
  const __m512 f = _mm512_mul_ps(spread_rows(factor), _mm512_set1_ps(v.page_scale));
  for (int64_t i = 0; i < kBlockScores; i += 16) {
    _mm512_store_ps(scaled + i, _mm512_mul_ps(load_weights(p, i), f));
  }
  for (int64_t c = 0; c < chunks_of(dim); ++c) {
    const int64_t n = chunk_elements(dim, c);
    for (int64_t j = 0; j < kPairs; ++j) {
      if (c == 0) next.fetch(2 * j, 2);
      const __m512 scale = v.scales.by_group(2 * j, c, n);
      for (int r = 0; r < kRows; r += 2) {
        __m512 w[2];
        for (int i = 0; i < 2; ++i) {
          double pair;
          std::memcpy(&pair, scaled + j * 8 + (r + i) * 2, sizeof pair);
          w[i] = _mm512_mul_ps(scale, _mm512_castpd_ps(_mm512_set1_pd(pair)));
        }
        _mm512_store_si512(weights + (j * kRows + r) * 16,
                           reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(w[1], w[0])));
      }
    }
    float* at = acc + c * kAccChunk;
    weigh_half<false>(v.codes, c, n, weights, at);
    weigh_half<true>(v.codes, c, n, weights, at + kAccHalf);
  }
}

void weigh_nvfp4(const Nvfp4ConstPlane& v, int64_t dim, const std::byte* p, const float* factor,
                 float* acc, const NextRows& next) {
  weigh_codes(code_rows(v, dim), dim, p, factor, acc, next);
}

// All 32 pairs whatever the tokens: with a number of rounds that is known, the sums stay in registers.
template <bool kHigh>
void weigh_bf16_half(const Bf16Rows& v, int64_t first, int64_t n, const uint32_t* weights,
                     float* acc, const NextRows& next) {
  __mmask32 mask[4];
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t left = n - i * 32;
    mask[i] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
  }
  __m512 sum[kRows][4];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < 4; ++k) sum[r][k] = _mm512_load_ps(acc + (r * 4 + k) * 16);
  }
  const uint16_t* values = v.data + first;
  for (int64_t j = 0; j < kPairs; ++j) {
    if constexpr (!kHigh) next.fetch(2 * j, 2);
    // A row without a token has weight zero; what it is multiplied with must be finite: row 0.
    const uint16_t* a = values + (2 * j < v.tokens ? 2 * j * v.stride : 0);
    const uint16_t* b = values + (2 * j + 1 < v.tokens ? (2 * j + 1) * v.stride : 0);
    __m512i x[4];
    for (int k = 0; k < 4; ++k) {
      x[k] = interleave<kHigh>(_mm512_maskz_loadu_epi16(mask[k], a + k * 32),
                               _mm512_maskz_loadu_epi16(mask[k], b + k * 32));
    }
    for (int r = 0; r < kRows; ++r) {
      const __m512i w = _mm512_set1_epi32(static_cast<int>(weights[j * kRows + r]));
      for (int k = 0; k < 4; ++k) sum[r][k] = dot_bf16_pairs(sum[r][k], x[k], w);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < 4; ++k) _mm512_store_ps(acc + (r * 4 + k) * 16, sum[r][k]);
  }
}

// P of pairs of tokens in BF16, times the factor of its row and of its token.
template <bool kTokenScales>
void weigh_rows(const Bf16Rows& v, int64_t dim, const std::byte* p, const float* factor,
                const float* token_scales, float* acc, const NextRows& next) {
  alignas(64) uint32_t weights[kPairs * kRows];
  const __m512 f = spread_rows(factor);
  for (int64_t i = 0; i < kBlockScores; i += 16) {
    __m512 w = _mm512_mul_ps(load_weights(p, i), f);
    if constexpr (kTokenScales) w = _mm512_mul_ps(w, spread_tokens(token_scales + i / kRows));
    _mm256_store_si256(reinterpret_cast<__m256i*>(weights + i / 2),
                       reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(w)));
  }
  for (int64_t c = 0; c < chunks_of(dim); ++c) {
    float* at = acc + bf16_accumulators(dim) + c * kAccChunk;
    const int64_t n = chunk_elements(dim, c);
    weigh_bf16_half<false>(v, c * kChunk, n, weights, at, c == 0 ? next : NextRows{});
    weigh_bf16_half<true>(v, c * kChunk, n, weights, at + kAccHalf, {});
  }
}

void weigh_bf16(const Bf16Rows& v, int64_t dim, const std::byte* p, const float* factor,
                float* acc, const NextRows& next) {
  weigh_rows<false>(v, dim, p, factor, nullptr, acc, next);
}

void weigh_expanded(const ExpandedRows& v, int64_t dim, const std::byte* p, const float* factor,
                    float* acc, const NextRows& next) {
  if (with_code_rows(v, dim, [&](const auto& rows) {
        weigh_codes(rows, dim, p, factor, acc, next);
      })) {
    return;
  }
  weigh_rows<true>(bf16_rows(v, dim), dim, p, factor, v.scale, acc, next);
}

void add_mean(const uint16_t* mean, int64_t dim, const float* weight, float* acc) {
  const int64_t padded = chunks_of(dim) * kChunk;
  float* out = acc + mean_accumulators(dim);
  __m512 w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = _mm512_set1_ps(weight[r]);
  for (int64_t d = 0; d < dim; d += 16) {
    const __m512 x = widen(mean + d);
    for (int r = 0; r < kRows; ++r) {
      float* at = out + r * padded + d;
      _mm512_store_ps(at, _mm512_fmadd_ps(x, w[r], _mm512_load_ps(at)));
    }
  }
}

void add_row(const float* acc, int64_t dim, int64_t row, float* out) {
  const float* mean = acc + mean_accumulators(dim) + row * chunks_of(dim) * kChunk;
  for (int64_t d = 0; d < dim; ++d) {
    const int64_t c = d / kChunk, i = d % kChunk;
    // Codes: element 32 L + 16 H + 4 j + k is lane 4 L + j of half H, shift k.
    const int64_t code = c * kAccChunk + i % 32 / 16 * kAccHalf + (row * 4 + i % 4) * 16 +
                         i / 32 * 4 + i % 16 / 4;
    // Rows: element 32 v + 8 L + 4 H + j is lane 4 L + j of half H, vector v.
    const int64_t plain = bf16_accumulators(dim) + c * kAccChunk + i % 8 / 4 * kAccHalf +
                          (row * 4 + i / 32) * 16 + i % 32 / 8 * 4 + i % 4;
    out[d] += acc[code] + acc[plain] + mean[d];
  }
}

constexpr DecodeKernels kKernels = {
    .name = "AVX-512 BF16",
    .query_bytes = query_bytes,
    .pack_queries = pack_queries,
    .score_nvfp4 = score_nvfp4,
    .score_bf16 = score_bf16,
    .expand = expand_rows_bf16,
    .score_expanded = score_expanded,
    .dot_bf16 = dot_bf16,
    .page_softmax = page_softmax,
    .weights_bytes = kWeightsBytes,
    .store_weights = store_weights,
    .merge_pages = merge_pages,
    .page_masses = page_masses,
    .accumulator_floats = accumulator_floats,
    .weigh_nvfp4 = weigh_nvfp4,
    .weigh_bf16 = weigh_bf16,
    .weigh_expanded = weigh_expanded,
    .add_mean = add_mean,
    .add_row = add_row,
};

}  // namespace
}  // namespace thriftattn

THRIFTATTN_END_TARGET

namespace thriftattn {

const DecodeKernels* decode_kernels_bf16() {
  return cpu_has_avx512_bf16() ? &kKernels : nullptr;
}

}  // namespace thriftattn

#else

namespace thriftattn {

const DecodeKernels* decode_kernels_bf16() { return nullptr; }

}  // namespace thriftattn

#endif
