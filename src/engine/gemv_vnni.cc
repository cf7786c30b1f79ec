// Kernels of gemv_vnni.h, with intrinsics: Debian's Highway has no byte dot product. 256-bit
// vectors, since 32 elements are the group of every type: a vector has one scale (Q6_K: two). Four
// rows of W share the loads of x. The order of a sum depends on k alone.
#include "engine/gemv_vnni.h"

#include <algorithm>
#include <cstring>

#include "base/cpu_info.h"
#include "hwy/base.h"

#if HWY_ARCH_X86
#include <immintrin.h>

HWY_PUSH_ATTRIBUTES("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512vnni")

namespace thriftattn {
namespace {

constexpr int64_t kRun = FixedRows::kRun;
constexpr int64_t kGroups = kRun / FixedRows::kGroup;
constexpr int kRows = 4;             // of W at a time
constexpr int64_t kShortRow = 1024;  // bytes

// A run of one row of W: value = code * scale - min, or (code - offset) * scale.
struct Codes {
  alignas(32) uint8_t q[kRun];
};
struct Scales {
  __m512 scale, min;  // of sixteen elements each
};

HWY_INLINE __m256i Load32(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
HWY_INLINE __m128i Load16(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
HWY_INLINE void Store32(__m256i v, uint8_t* p) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), v);
}
HWY_INLINE void Store16(__m128i v, void* p) { _mm_store_si128(static_cast<__m128i*>(p), v); }
HWY_INLINE uint16_t LoadBits(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
HWY_INLINE __m512 BroadcastHalf(const uint8_t* p) {
  return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(LoadBits(p))));
}
HWY_INLINE __m512 FromBytes(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
HWY_INLINE __m256i Nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }

// The eight 6-bit scales and minima of Q4_K and Q5_K (layout: ggml_types.cc), each for two halves.
HWY_INLINE Scales KScales(const uint8_t* in) {
  uint32_t words[3];
  std::memcpy(words, in + 4, sizeof words);
  const uint32_t tops = 0x03030303u, nibbles = 0x0f0f0f0fu, sixes = 0x3f3f3f3fu;
  const __m128i codes =
      _mm_set_epi32(static_cast<int>((words[2] >> 4 & nibbles) | (words[1] >> 6 & tops) << 4),
                    static_cast<int>(words[1] & sixes),
                    static_cast<int>((words[2] & nibbles) | (words[0] >> 6 & tops) << 4),
                    static_cast<int>(words[0] & sixes));
  const __m128i twice = _mm_set_epi8(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m128i mins = _mm_unpackhi_epi64(codes, codes);
  return {_mm512_mul_ps(BroadcastHalf(in), FromBytes(_mm_shuffle_epi8(codes, twice))),
          _mm512_mul_ps(BroadcastHalf(in + 2), FromBytes(_mm_shuffle_epi8(mins, twice)))};
}

// Each type: what its codes are and how a run of them is unpacked.
struct Q4K {
  static constexpr int64_t kElements = 256, kBytes = 144;
  static constexpr bool kHasMin = true, kHalves = false;
  static constexpr int kOffsetBits = 0;
  static HWY_INLINE Scales Unpack(const uint8_t* in, int64_t, Codes& out) {
    for (int c = 0; c < 4; ++c) {
      const __m256i q = Load32(in + 16 + 32 * c);
      Store32(Nibbles(q), out.q + 64 * c);
      Store32(Nibbles(_mm256_srli_epi16(q, 4)), out.q + 64 * c + 32);
    }
    return KScales(in);
  }
};

struct Q5K {
  static constexpr int64_t kElements = 256, kBytes = 176;
  static constexpr bool kHasMin = true, kHalves = false;
  static constexpr int kOffsetBits = 0;
  static HWY_INLINE Scales Unpack(const uint8_t* in, int64_t, Codes& out) {
    const __m256i bit = _mm256_set1_epi8(16);
    const __m256i fifths = Load32(in + 16);
    for (int c = 0; c < 4; ++c) {
      const __m256i q = Load32(in + 48 + 32 * c);
      // Bit 2c in bit 4, then bit 2c + 1; what crosses bytes is masked off.
      const __m256i shifted = _mm256_srl_epi16(fifths, _mm_cvtsi32_si128(2 * c));
      const __m256i low = _mm256_slli_epi16(shifted, 4);
      const __m256i high = _mm256_slli_epi16(shifted, 3);
      Store32(_mm256_or_si256(Nibbles(q), _mm256_and_si256(bit, low)), out.q + 64 * c);
      Store32(_mm256_or_si256(Nibbles(_mm256_srli_epi16(q, 4)), _mm256_and_si256(bit, high)),
              out.q + 64 * c + 32);
    }
    return KScales(in);
  }
};

// Low nibbles, and bits 4 and 5 of `high`.
HWY_INLINE __m256i SixBits(__m256i low, __m256i high) {
  return _mm256_or_si256(Nibbles(low), _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
}

struct Q6K {
  static constexpr int64_t kElements = 256, kBytes = 210;
  static constexpr bool kHasMin = false, kHalves = true;
  static constexpr int kOffsetBits = 5;
  static HWY_INLINE Scales Unpack(const uint8_t* in, int64_t, Codes& out) {
    for (int half = 0; half < 2; ++half) {
      const __m256i a = Load32(in + 64 * half);
      const __m256i b = Load32(in + 64 * half + 32);
      const __m256i high = Load32(in + 128 + 32 * half);
      uint8_t* to = out.q + 128 * half;
      Store32(SixBits(a, _mm256_slli_epi16(high, 4)), to);
      Store32(SixBits(b, _mm256_slli_epi16(high, 2)), to + 32);
      Store32(SixBits(_mm256_srli_epi16(a, 4), high), to + 64);
      Store32(SixBits(_mm256_srli_epi16(b, 4), _mm256_srli_epi16(high, 2)), to + 96);
    }
    const __m512 scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Load16(in + 192)));
    return {_mm512_mul_ps(BroadcastHalf(in + 208), scales), _mm512_setzero_ps()};
  }
};

// Types of 32 elements a block: up to eight blocks, and zeros behind the last.
template <class Block>
HWY_INLINE Scales UnpackBlocks(const uint8_t* in, int64_t elements, Codes& out) {
  alignas(64) float scale[kRun / 16] = {};
  for (int64_t g = 0; g < kGroups; ++g) {
    uint8_t* to = out.q + 32 * g;
    if (32 * g >= elements) {
      Store32(_mm256_setzero_si256(), to);
      continue;
    }
    const uint8_t* block = in + g * Block::kBytes;
    Store32(Block::Code(block), to);
    scale[2 * g] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(LoadBits(block))));
    scale[2 * g + 1] = scale[2 * g];
  }
  return {_mm512_load_ps(scale), _mm512_setzero_ps()};
}

// Sixteen bytes of nibbles as 32 codes.
HWY_INLINE __m256i SpreadNibbles(__m128i q) {
  return Nibbles(_mm256_inserti128_si256(_mm256_castsi128_si256(q), _mm_srli_epi16(q, 4), 1));
}

struct Q4_0 {
  static constexpr int64_t kElements = 32, kBytes = 18;
  static constexpr bool kHasMin = false, kHalves = false;
  static constexpr int kOffsetBits = 3;
  static HWY_INLINE __m256i Code(const uint8_t* in) { return SpreadNibbles(Load16(in + 2)); }
  static HWY_INLINE Scales Unpack(const uint8_t* in, int64_t elements, Codes& out) {
    return UnpackBlocks<Q4_0>(in, elements, out);
  }
};

struct Q5_0 {
  static constexpr int64_t kElements = 32, kBytes = 22;
  static constexpr bool kHasMin = false, kHalves = false;
  static constexpr int kOffsetBits = 4;
  static HWY_INLINE __m256i Code(const uint8_t* in) {
    uint32_t fifths;
    std::memcpy(&fifths, in + 2, sizeof fifths);
    return _mm256_or_si256(SpreadNibbles(Load16(in + 6)), _mm256_maskz_set1_epi8(fifths, 16));
  }
  static HWY_INLINE Scales Unpack(const uint8_t* in, int64_t elements, Codes& out) {
    return UnpackBlocks<Q5_0>(in, elements, out);
  }
};

struct Q8_0 {
  static constexpr int64_t kElements = 32, kBytes = 34;
  static constexpr bool kHasMin = false, kHalves = false;
  static constexpr int kOffsetBits = 7;
  static HWY_INLINE __m256i Code(const uint8_t* in) {
    return _mm256_xor_si256(Load32(in + 2), _mm256_set1_epi8(-128));
  }
  static HWY_INLINE Scales Unpack(const uint8_t* in, int64_t elements, Codes& out) {
    return UnpackBlocks<Q8_0>(in, elements, out);
  }
};

// The sums of code times x over four elements each. |x| < 2^22 and |code - offset| <= 128 keep them
// within 32 bits; on the way there, arithmetic modulo 2^32 does no harm.
template <class Type>
HWY_INLINE __m256 GroupSums(const uint8_t* codes, const __m256i* digits, __m256i sums) {
  const __m256i q = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
  __m256i t = _mm256_dpbusd_epi32(_mm256_setzero_si256(), q, digits[0]);
  t = _mm256_dpbusd_epi32(_mm256_slli_epi32(t, 8), q, digits[1]);
  t = _mm256_dpbusd_epi32(_mm256_slli_epi32(t, 8), q, digits[2]);
  if constexpr (Type::kOffsetBits != 0) {
    t = _mm256_sub_epi32(t, _mm256_slli_epi32(sums, Type::kOffsetBits));
  }
  return _mm256_cvtepi32_ps(t);
}

template <class Type>
HWY_INLINE __m256 GroupFactor(const float* factors) {
  const __m256 first = _mm256_broadcast_ss(factors);
  if constexpr (!Type::kHalves) return first;
  return _mm256_mask_blend_ps(0xf0, first, _mm256_broadcast_ss(factors + 1));
}

struct Sums {
  __m256 products[kRows];
  __m512 mins[kRows];
};

// R rows of W, a run at a time, with all rows of x.
template <class Type, int R>
HWY_INLINE void MultiplyRows(const uint8_t* w, const GemvArgs& a, const FixedRows& fixed,
                             float* y) {
  const int64_t row_bytes = a.k / Type::kElements * Type::kBytes;
  Sums sums[kGemvRows];
  for (int64_t m = 0; m < a.m; ++m) {
    for (int r = 0; r < R; ++r) {
      sums[m].products[r] = _mm256_setzero_ps();
      sums[m].mins[r] = _mm512_setzero_ps();
    }
  }
  constexpr int64_t kRunBytes = kRun / Type::kElements * Type::kBytes;
  // Four interleaved rows are no stream that the hardware would fetch in time: measured from
  // memory, 9 G weights/s without and 19 with. The same place of the next four rows, into L1 if
  // they fit.
  const int64_t ahead = R * row_bytes;
  const bool short_rows = row_bytes <= kShortRow;
  Codes codes[R];
  Scales scales[R];
  alignas(64) float factors[R][kRun / 16];
  for (int64_t run = 0; run * kRun < a.k; ++run) {
    const int64_t elements = std::min(kRun, a.k - run * kRun);
    for (int r = 0; r < R; ++r) {
      const uint8_t* in = w + r * row_bytes + run * kRunBytes;
      for (int64_t i = 0; i < kRunBytes; i += 64) {
        short_rows ? _mm_prefetch(in + ahead + i, _MM_HINT_T0)
                   : _mm_prefetch(in + ahead + i, _MM_HINT_T1);
      }
      scales[r] = Type::Unpack(in, elements, codes[r]);
    }
    for (int64_t m = 0; m < a.m; ++m) {
      const FixedRows::Run& x = fixed.row(m)[run];
      Sums& sum = sums[m];
      const __m512 x_scale = _mm512_load_ps(x.scale);
      for (int r = 0; r < R; ++r) {
        _mm512_store_ps(factors[r], _mm512_mul_ps(scales[r].scale, x_scale));
        if constexpr (Type::kHasMin) {
          sum.mins[r] = _mm512_fmadd_ps(scales[r].min, _mm512_load_ps(x.totals), sum.mins[r]);
        }
      }
      for (int64_t g = 0; g < kGroups; ++g) {
        const auto* digits = reinterpret_cast<const __m256i*>(x.digits[g]);
        const __m256i d[3] = {_mm256_load_si256(digits), _mm256_load_si256(digits + 1),
                              _mm256_load_si256(digits + 2)};
        const __m256i four = _mm256_load_si256(reinterpret_cast<const __m256i*>(x.sums[g]));
        for (int r = 0; r < R; ++r) {
          sum.products[r] = _mm256_fmadd_ps(GroupSums<Type>(codes[r].q + 32 * g, d, four),
                                            GroupFactor<Type>(factors[r] + 2 * g), sum.products[r]);
        }
      }
    }
  }
  for (int64_t m = 0; m < a.m; ++m) {
    for (int r = 0; r < R; ++r) {
      const __m256 p = sums[m].products[r];
      __m128 half = _mm_add_ps(_mm256_castps256_ps128(p), _mm256_extractf128_ps(p, 1));
      half = _mm_add_ps(half, _mm_movehl_ps(half, half));
      half = _mm_add_ss(half, _mm_movehdup_ps(half));
      float value = _mm_cvtss_f32(half);
      if constexpr (Type::kHasMin) value -= _mm512_reduce_add_ps(sums[m].mins[r]);
      y[m * a.y_stride + r] = value;
    }
  }
}

template <class Type>
void Multiply(const GemvArgs& a, const FixedRows& x) {
  const int64_t row_bytes = a.k / Type::kElements * Type::kBytes;
  int64_t n = 0;
  for (; n + kRows <= a.n; n += kRows) {
    MultiplyRows<Type, kRows>(a.w + n * row_bytes, a, x, a.y + n);
  }
  for (; n < a.n; ++n) MultiplyRows<Type, 1>(a.w + n * row_bytes, a, x, a.y + n);
}

HWY_INLINE __m512 FloatOfBits(uint32_t bits) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits)));
}

// Sixteen elements, scaled to integers: their digits, their sums by four and their total.
HWY_INLINE void FixHalf(__m512 scaled, int64_t g, int half, FixedRows::Run& out) {
  // Rounding may reach 2^22 itself, for which the sums of Q8_0 have no room.
  const __m512i limit = _mm512_set1_epi32((1 << 22) - 1);
  const __m512i least = _mm512_set1_epi32(-(1 << 22) + 1);
  const __m512i v = _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(scaled), limit), least);
  // v = a 2^16 + b 2^8 + c with b and c in [-128, 127]: a digit is the low byte of what is left.
  const __m512i bias = _mm512_set1_epi32(128);
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(v, bias), 8);
  const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(upper, bias), 8);
  Store16(_mm512_cvtepi32_epi8(top), out.digits[g][0] + 16 * half);
  Store16(_mm512_cvtepi32_epi8(upper), out.digits[g][1] + 16 * half);
  Store16(_mm512_cvtepi32_epi8(v), out.digits[g][2] + 16 * half);
  const __m512i pairs = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
  const __m512i fours = _mm512_add_epi32(pairs, _mm512_shuffle_epi32(pairs, _MM_PERM_BADC));
  const __m512i pick = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  Store16(_mm512_castsi512_si128(_mm512_permutexvar_epi32(pick, fours)), out.sums[g] + 4 * half);
  out.totals[2 * g + half] = static_cast<float>(_mm512_reduce_add_epi32(v));
}

// 32 elements of x, zeros behind the last: the scale is the power of two that puts the largest
// below 2^22.
void FixGroup(const float* x, int64_t count, int64_t g, FixedRows::Run& out) {
  const uint32_t mask = count >= 32 ? ~0u : (1u << count) - 1;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + 16);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  // As integers, so that Inf and NaN are the largest.
  const __m512i bits = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                        _mm512_and_si512(_mm512_castps_si512(high), magnitude));
  // The largest is below 2^(exponent - 126). A scale is at least 2^-126, a normal number.
  const uint32_t exponent = _mm512_reduce_max_epu32(bits) >> 23;
  const uint32_t biased = std::max(exponent, 22u) - 21;
  const __m512 inverse = FloatOfBits((254 - biased) << 23);
  const __m512 scale = FloatOfBits(exponent == 255 ? 0x7fc00000u : biased << 23);
  FixHalf(_mm512_mul_ps(low, inverse), g, 0, out);
  FixHalf(_mm512_mul_ps(high, inverse), g, 1, out);
  for (int64_t i = 2 * g; i < 2 * g + 2; ++i) {
    out.scale[i] = _mm512_cvtss_f32(scale);
    out.totals[i] *= out.scale[i];
  }
}

}  // namespace

FixedRows::FixedRows(const float* x, int64_t m, int64_t k)
    : runs_((k + kRun - 1) / kRun), rows_(static_cast<size_t>(m * runs_)) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t g = 0; g * kGroup < k; ++g) {
      FixGroup(x + i * k + g * kGroup, std::min(kGroup, k - g * kGroup), g % kGroups,
               rows_[static_cast<size_t>(i * runs_ + g / kGroups)]);
    }
  }
}

void gemv_vnni(const GemvArgs& a, const FixedRows& x) {
  switch (a.type) {
    case GgmlType::q4_0:
      return Multiply<Q4_0>(a, x);
    case GgmlType::q5_0:
      return Multiply<Q5_0>(a, x);
    case GgmlType::q8_0:
      return Multiply<Q8_0>(a, x);
    case GgmlType::q4_k:
      return Multiply<Q4K>(a, x);
    case GgmlType::q5_k:
      return Multiply<Q5K>(a, x);
    case GgmlType::q6_k:
      return Multiply<Q6K>(a, x);
    case GgmlType::f32:
    case GgmlType::f16:
    case GgmlType::bf16:
      return;  // gemv_vnni_takes() says no
  }
}

}  // namespace thriftattn
HWY_POP_ATTRIBUTES

namespace thriftattn {

bool gemv_vnni_available() { return cpu_has_avx512_vnni(); }

}  // namespace thriftattn

#else  // not x86

namespace thriftattn {

FixedRows::FixedRows(const float*, int64_t, int64_t) {}
void gemv_vnni(const GemvArgs&, const FixedRows&) {}
bool gemv_vnni_available() { return false; }

}  // namespace thriftattn
#endif

namespace thriftattn {

bool gemv_vnni_takes(GgmlType type) {
  return type != GgmlType::f32 && type != GgmlType::f16 && type != GgmlType::bf16;
}

}  // namespace thriftattn
