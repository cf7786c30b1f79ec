// Rows to BF16 with AVX-512 (expand_rows.h), 32 elements a vector.
//
// FP6: a byte shuffle puts the 16 bits from a code's byte on into the code's word, a shift by word
// brings the code to bit 0, and VPERMW, which looks at five bits of a word, finds the magnitude. FP8:
// by way of FP16, which contains E5M2, and E4M3 divided by 256.
//
// With VBMI: FP8's 128 magnitudes as two tables of bytes for VPERMI2B, whose index ignores the sign;
// FP6's 64 codes, taken apart by one multishift, as two for VPERMB, which ignores what is above them.
#include "attend/expand_rows.h"

#if defined(__x86_64__)
#include <fmt/format.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "attend/avx512_math.h"
#include "attend/bf16_tables.h"
#include "attend/expand_codes.h"
#include "base/cpu_info.h"
#include "base/float_convert.h"
#include "formats/format_info.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

constexpr int64_t kVector = 32;  // BF16 elements

struct Words {
  alignas(64) uint16_t v[kVector];
};

// For word i the byte of its code and the next, and the bit at which the code begins.
struct Window {
  alignas(64) std::array<int8_t, 2 * kVector> bytes;
  Words shifts;
};

// Eight codes of 6 bits from the first 6 bytes of every 128 bits, where kSixBitWords puts them.
constexpr Window kSixBits = [] {
  Window w{};
  for (int i = 0; i < kVector; ++i) {
    const int bit = 6 * (i % 8);
    w.bytes[static_cast<size_t>(2 * i)] = static_cast<int8_t>(bit / 8);
    w.bytes[static_cast<size_t>(2 * i + 1)] = static_cast<int8_t>(bit / 8 + 1);
    w.shifts.v[i] = static_cast<uint16_t>(bit % 8);
  }
  return w;
}();
constexpr Words kSixBitWords = [] {
  Words w{};
  for (int i = 0; i < kVector; ++i) w.v[i] = static_cast<uint16_t>(i / 8 * 3 + i % 8);
  return w;
}();

template <class Float>
constexpr Words six_bit_magnitudes() {
  Words w{};
  for (uint32_t i = 0; i < 32; ++i) w.v[i] = f32_to_bf16(Float::decode(i));
  return w;
}

// Qwords in this order, two vectors of bytes that are interleaved within 128 bits give elements 0 .. 31
// and 32 .. 63.
constexpr std::array<int64_t, 8> kUnpackOrder = {0, 4, 1, 5, 2, 6, 3, 7};

// Where the bytes of eight codes of 6 bits go, in that order, and the bit at which each code begins.
struct SixBitBytes {
  alignas(64) std::array<uint8_t, 64> bytes, bits;
};
constexpr SixBitBytes kSixBitBytes = [] {
  SixBitBytes s{};
  for (size_t i = 0; i < 64; ++i) {
    s.bytes[i] = static_cast<uint8_t>(6 * kUnpackOrder[i / 8] + static_cast<int64_t>(i % 8));
    s.bits[i] = static_cast<uint8_t>(6 * (i % 8));
  }
  return s;
}();

float load_f32(const uint8_t* p) {
  float x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

}  // namespace
}  // namespace thriftattn

THRIFTATTN_BEGIN_TARGET(THRIFTATTN_AVX512_BF16)

namespace thriftattn {
namespace {

inline __m512i load_words(const Words& w) { return _mm512_load_si512(w.v); }

// Each expander: 32 elements at a time of a row, and the scale of a row.

template <class Float>
struct Fp6Expander {
  static constexpr int64_t kStep = 32;
  static constexpr Words kMagnitudes = six_bit_magnitudes<Float>();
  __m512i words, bytes, shifts, magnitudes;

  Fp6Expander()
      : words(load_words(kSixBitWords)),
        bytes(_mm512_load_si512(kSixBits.bytes.data())),
        shifts(load_words(kSixBits.shifts)),
        magnitudes(load_words(kMagnitudes)) {}

  float row_scale(const StoredRows& in, int64_t row) const {
    return load_f32(in.rows + row * in.row_bytes);
  }
  void expand(const StoredRows& in, int64_t row, int64_t d, int64_t left, uint16_t* out) const {
    const uint8_t* codes = in.rows + row * in.row_bytes + sizeof(float) + d / 4 * 3;
    const auto mask = static_cast<__mmask32>(left >= 32 ? 0xffffffu : (1u << left * 6 / 8) - 1);
    const __m512i spread = _mm512_permutexvar_epi16(
        words, _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(mask, codes)));
    const __m512i code = _mm512_srlv_epi16(_mm512_shuffle_epi8(spread, bytes), shifts);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(code, 10), _mm512_set1_epi16(-0x8000));
    _mm512_store_si512(out, _mm512_or_si512(_mm512_permutexvar_epi16(code, magnitudes), sign));
  }
};

// By way of FP16: E5M2 is its upper byte, E4M3's exponent and mantissa the seven bits from bit 7 on.
template <class Float>
struct Fp8Expander {
  static constexpr bool kE4m3 = Float::kMantissaBits == 3;
  static constexpr int64_t kStep = 32;

  float row_scale(const StoredRows& in, int64_t row) const {
    return load_f32(in.rows + row * in.row_bytes) * (kE4m3 ? 256.0f : 1.0f);
  }
  void expand(const StoredRows& in, int64_t row, int64_t d, int64_t left, uint16_t* out) const {
    const uint8_t* codes = in.rows + row * in.row_bytes + sizeof(float) + d;
    const auto mask = static_cast<__mmask32>(byte_mask(left));
    __m512i half = _mm512_slli_epi16(
        _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, codes)), 8);
    if constexpr (kE4m3) {
      half = _mm512_and_si512(_mm512_srai_epi16(half, 1), _mm512_set1_epi16(-0x4001));
    }
    _mm512_store_si512(out, narrow_both(_mm512_cvtph_ps(_mm512_castsi512_si256(half)),
                                        _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1))));
  }
};

// Always part of its caller, whose instruction set is the expander's.
template <class Expander>
[[gnu::always_inline]] inline void expand_all(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  const Expander expander;
  const int64_t stride = expanded_bf16_stride(dim);
  auto* values = reinterpret_cast<uint16_t*>(out.values);
  for (int64_t t = 0; t < kPageTokens; ++t) {
    out.scale[t] = t < in.tokens ? expander.row_scale(in, t) : 0.0f;
    if (t >= in.tokens) continue;
    for (int64_t d = 0; d < dim; d += Expander::kStep) {
      expander.expand(in, t, d, dim - d, values + t * stride + d);
    }
  }
  out.tokens = in.tokens;
  out.form = ExpandedRows::Form::rows;
}

template <class Expander>
void expand_with(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  expand_all<Expander>(in, dim, out);
}

}  // namespace
}  // namespace thriftattn

THRIFTATTN_END_TARGET

THRIFTATTN_BEGIN_TARGET(THRIFTATTN_AVX512_VBMI)

namespace thriftattn {
namespace {

// 64 elements by table.
template <class Float>
struct Fp8TableExpander {
  static constexpr int64_t kStep = 64;
  static constexpr ByteTables<128> kTables = byte_tables<Float, 128>();
  __m512i low[2], high[2], order;

  Fp8TableExpander() : order(_mm512_loadu_si512(kUnpackOrder.data())) {
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(kTables.low.data() + 64 * i);
      high[i] = _mm512_load_si512(kTables.high.data() + 64 * i);
    }
  }

  float row_scale(const StoredRows& in, int64_t row) const {
    return load_f32(in.rows + row * in.row_bytes);
  }
  void expand(const StoredRows& in, int64_t row, int64_t d, int64_t left, uint16_t* out) const {
    const uint8_t* codes = in.rows + row * in.row_bytes + sizeof(float) + d;
    const __m512i code =
        _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(byte_mask(left), codes));
    // magnitude | (code & 0x80)
    const __m512i upper =
        _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(high[0], code, high[1]), code,
                                  _mm512_set1_epi8(-0x80), 0xf8);
    store_interleaved(out, _mm512_permutex2var_epi8(low[0], code, low[1]), upper);
  }
};

// The same, codes taken apart by one multishift, whose bits above the code VPERMB ignores.
template <class Float>
struct Fp6TableExpander {
  static constexpr int64_t kStep = 64;
  static constexpr ByteTables<64> kTables = byte_tables<Float, 64>();
  __m512i low, high, bytes, bits;

  Fp6TableExpander()
      : low(_mm512_load_si512(kTables.low.data())),
        high(_mm512_load_si512(kTables.high.data())),
        bytes(_mm512_load_si512(kSixBitBytes.bytes.data())),
        bits(_mm512_load_si512(kSixBitBytes.bits.data())) {}

  float row_scale(const StoredRows& in, int64_t row) const {
    return load_f32(in.rows + row * in.row_bytes);
  }
  void expand(const StoredRows& in, int64_t row, int64_t d, int64_t left, uint16_t* out) const {
    const uint8_t* codes = in.rows + row * in.row_bytes + sizeof(float) + d / 4 * 3;
    const __mmask64 mask = byte_mask(std::min<int64_t>(left, kStep) * 6 / 8);
    const __m512i spread = _mm512_permutexvar_epi8(bytes, _mm512_maskz_loadu_epi8(mask, codes));
    const __m512i code = _mm512_multishift_epi64_epi8(bits, spread);
    store_interleaved(out, _mm512_permutexvar_epi8(code, low),
                      _mm512_permutexvar_epi8(code, high));
  }
};

template <class Expander>
void expand_with_vbmi(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  expand_all<Expander>(in, dim, out);
}

}  // namespace
}  // namespace thriftattn

THRIFTATTN_END_TARGET

namespace thriftattn {
namespace {

using Expand = void (*)(const StoredRows&, int64_t, ExpandedRows&);

Expand expander_of(Format format, bool vbmi) {
  switch (base_format(format)) {
    case Format::fp8_e4m3:
      return vbmi ? expand_with_vbmi<Fp8TableExpander<E4m3>> : expand_with<Fp8Expander<E4m3>>;
    case Format::fp8_e5m2:
      return vbmi ? expand_with_vbmi<Fp8TableExpander<E5m2>> : expand_with<Fp8Expander<E5m2>>;
    case Format::fp6_e3m2:
      return vbmi ? expand_with_vbmi<Fp6TableExpander<E3m2>> : expand_with<Fp6Expander<E3m2>>;
    case Format::fp6_e2m3:
      return vbmi ? expand_with_vbmi<Fp6TableExpander<E2m3>> : expand_with<Fp6Expander<E2m3>>;
    case Format::q8_0:
    case Format::q4_0:
    case Format::mxfp4:
    case Format::int3:
      return vbmi ? lay_out_codes_vbmi : lay_out_codes;
    case Format::f32:
    case Format::fp16:
    case Format::bf16:
    case Format::nvfp4:
    case Format::nvfp4x2:
      break;
  }
  throw Error(ErrorCode::unsupported,
              fmt::format("rows of {} are not expanded to BF16; use expand_rows_f32",
                          format_info(format).name));
}

}  // namespace

void expand_rows_bf16(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  expander_of(in.format, cpu_has_avx512_vbmi())(in, dim, out);
}

void expand_rows_bf16_without_vbmi(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  expander_of(in.format, false)(in, dim, out);
}

}  // namespace thriftattn

#endif
