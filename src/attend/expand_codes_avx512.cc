// Codes in NVFP4's order, and FP32 scales by pairs of tokens (expand_codes.h).
//
// MXFP4's codes are in order and stay where they are. INT3's become nibbles by PDEP, 16 at a time.
// Q4_0 holds elements i and i + 16 of a block in a byte: the low nibbles of a block, as bytes, then
// make the first eight bytes of the row and the high ones the next eight, each two of them by one
// multiply-add with (1, 16).
//
// Q8_0's codes become BF16 in the order of expanded nibbles: vector s has byte s of every 32 bits.
#include "attend/expand_codes.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "attend/avx512_math.h"
#include "attend/bf16_tables.h"
#include "base/float_convert.h"
#include "formats/format_info.h"
#include "formats/int3.h"
#include "formats/row_codec.h"

namespace thriftattn {
namespace {

constexpr int64_t kChunk = 128;  // elements
constexpr int64_t kGroup = 32;

struct CodeValues {
  alignas(64) std::array<uint16_t, 32> bf16;
};
template <size_t N>
constexpr CodeValues code_values(const std::array<float, N>& values) {
  CodeValues v{};
  for (size_t i = 0; i < v.bf16.size(); ++i) v.bf16[i] = f32_to_bf16(values[i % N]);
  return v;
}
constexpr CodeValues kMxfp4Codes = code_values(kE2m1Values);
constexpr CodeValues kInt3Codes = code_values(kInt3Values);
constexpr CodeValues kQ4Codes = code_values(
    std::array<float, 16>{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7});

uint32_t load_u32(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

}  // namespace
}  // namespace thriftattn

THRIFTATTN_BEGIN_TARGET(THRIFTATTN_AVX512_BF16)

namespace thriftattn {
namespace {

// Up to four bytes.
inline uint32_t load_bytes(const uint8_t* p, int64_t n) {
  if (n == 4) return load_u32(p);
  uint32_t x = 0;
  std::memcpy(&x, p, static_cast<size_t>(n));
  return x;
}

// Four scales of two tokens, a byte each, as [4 groups][a a b b].
inline __m512 e8m0_scales(uint32_t a, uint32_t b) {
  const __m128i both = _mm_set_epi32(0, 0, static_cast<int>(b), static_cast<int>(a));
  const __m128i order = _mm_setr_epi8(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(both, order)), 23));
}
// E4M3 bits << 7 are the FP16 of value / 256.
inline __m512 e4m3_scales(uint32_t a, uint32_t b) {
  const __m128i both = _mm_set_epi32(0, 0, static_cast<int>(b), static_cast<int>(a));
  const __m128i order = _mm_setr_epi8(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
  return _mm512_cvtph_ps(
      _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(both, order)), 7));
}
constexpr float kE4m3Unit = 256.0f;

// Two bytes each.
inline __m512 fp16_scales(uint64_t a, uint64_t b) {
  const __m128i both = _mm_set_epi64x(static_cast<int64_t>(b), static_cast<int64_t>(a));
  const __m256i order = _mm256_setr_epi8(0, 1, 0, 1, 8, 9, 8, 9, 2, 3, 2, 3, 10, 11, 10, 11,  //
                                         4, 5, 4, 5, 12, 13, 12, 13, 6, 7, 6, 7, 14, 15, 14, 15);
  return _mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(both), order));
}

struct Mxfp4Rows {
  static constexpr const CodeValues& kValues = kMxfp4Codes;
  static constexpr float kUnit = 1.0f;

  static __m512 scales(const StoredRows& in, int64_t t, int64_t group, int64_t n) {
    const uint8_t* at = in.scales + t * in.row_scales + group;
    return e8m0_scales(load_bytes(at, n), load_bytes(at + in.row_scales, n));
  }
};

struct Int3Rows {
  static constexpr const CodeValues& kValues = kInt3Codes;
  static constexpr float kUnit = kE4m3Unit;

  static __m512 scales(const StoredRows& in, int64_t t, int64_t group, int64_t n) {
    const uint8_t* at = in.scales + t * in.row_scales + group;
    return e4m3_scales(load_bytes(at, n), load_bytes(at + in.row_scales, n));
  }
  static void row(const uint8_t* in, int64_t dim, uint8_t* out) {
    for (int64_t d = 0; d < dim; d += kGroup, in += kInt3GroupBytes, out += kGroup / 2) {
      // Codes 0 .. 15 in the first 48 bits, the others in the last 48.
      uint64_t low, high;
      std::memcpy(&low, in, sizeof(low));
      std::memcpy(&high, in + kInt3GroupBytes - sizeof(high), sizeof(high));
      low = _pdep_u64(low, 0x7777777777777777u);
      high = _pdep_u64(high >> 16, 0x7777777777777777u);
      std::memcpy(out, &low, sizeof(low));
      std::memcpy(out + sizeof(low), &high, sizeof(high));
    }
  }
};

// Up to four scales of ggml's blocks.
template <int64_t kBlockBytes>
inline uint64_t block_scales(const StoredRows& in, int64_t row, int64_t group, int64_t n) {
  if (row >= in.tokens) return 0;
  const uint8_t* blocks = in.rows + row * in.row_bytes + group * kBlockBytes;
  uint64_t scales = 0;
  for (int64_t g = 0; g < n; ++g) {
    uint16_t half;
    std::memcpy(&half, blocks + g * kBlockBytes, sizeof(half));
    scales |= uint64_t{half} << 16 * g;
  }
  return scales;
}
template <int64_t kBlockBytes>
inline __m512 pair_of_block_scales(const StoredRows& in, int64_t t, int64_t group, int64_t n) {
  if (n == 4) {  // unrolled
    return fp16_scales(block_scales<kBlockBytes>(in, t, group, 4),
                       block_scales<kBlockBytes>(in, t + 1, group, 4));
  }
  return fp16_scales(block_scales<kBlockBytes>(in, t, group, n),
                     block_scales<kBlockBytes>(in, t + 1, group, n));
}

struct Q4Rows {
  static constexpr const CodeValues& kValues = kQ4Codes;
  static constexpr float kUnit = 1.0f;

  static __m512 scales(const StoredRows& in, int64_t t, int64_t group, int64_t n) {
    return pair_of_block_scales<kQ4BlockBytes>(in, t, group, n);
  }
  static void row(const uint8_t* in, int64_t dim, uint8_t* out) {
    const __m256i nibble = _mm256_set1_epi8(15), pairs = _mm256_set1_epi16(0x1001);
    int64_t d = 0;
    const auto codes = [&](int64_t at) {
      const uint8_t* block = in + at / kGgmlBlock * kQ4BlockBytes + 2;
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(block));
    };
    const auto ordered = [&](__m256i x) {
      const __m256i low = _mm256_and_si256(x, nibble);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
      return _mm256_packus_epi16(_mm256_maddubs_epi16(low, pairs),
                                 _mm256_maddubs_epi16(high, pairs));
    };
    for (; d + 64 <= dim; d += 64, out += 32) {
      const __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(codes(d)), codes(d + 32), 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), ordered(x));
    }
    if (d < dim) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                       _mm256_castsi256_si128(ordered(_mm256_castsi128_si256(codes(d)))));
    }
  }
};

// The codes of a chunk of four blocks; zeros behind the last.
struct Q8Chunk {
  __m512i first, second;

  static __m512i join(__m256i a, __m256i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
  Q8Chunk(const uint8_t* in, int64_t d, int64_t dim) {
    const uint8_t* blocks = in + d / kGroup * kQ8BlockBytes + 2;
    const auto block = [&](int64_t g) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks + g * kQ8BlockBytes));
    };
    const __m256i none = _mm256_setzero_si256();
    const int64_t groups = (dim - d) / kGroup;
    if (groups >= 4) {
      first = join(block(0), block(1));
      second = join(block(2), block(3));
    } else {
      first = join(block(0), groups > 1 ? block(1) : none);
      second = join(groups > 2 ? block(2) : none, none);
    }
  }
};

struct Q8Rows {
  static __m512 scales(const StoredRows& in, int64_t t, int64_t group, int64_t n) {
    return pair_of_block_scales<kQ8BlockBytes>(in, t, group, n);
  }
  template <int kByte>
  static __m512 bytes(__m512i x) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24 - 8 * kByte), 24));
  }
  template <int kByte>
  static void store(const Q8Chunk& chunk, uint16_t* out) {
    _mm512_store_si512(out + 32 * kByte,
                       narrow_both(bytes<kByte>(chunk.first), bytes<kByte>(chunk.second)));
  }
  void row(const uint8_t* in, int64_t dim, uint16_t* out) const {
    for (int64_t d = 0; d < dim; d += kChunk, out += kChunk) {
      const Q8Chunk chunk(in, d, dim);
      store<0>(chunk, out);
      store<1>(chunk, out);
      store<2>(chunk, out);
      store<3>(chunk, out);
    }
  }
};

template <class Rows>
inline void lay_out_scales(const StoredRows& in, int64_t dim, int64_t t, ExpandedRows& out) {
  const int64_t chunks = (dim + kChunk - 1) / kChunk;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t groups = std::min(kChunk, dim - c * kChunk) / kGroup;
    _mm512_store_ps(out.group_scale + (t / 2 * chunks + c) * 16,
                    Rows::scales(in, t, c * (kChunk / kGroup), groups));
  }
}

// Rows without a token have the scale 0, and codes of 0.
template <class Rows>
void lay_out_nibbles(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  constexpr bool kInPlace = std::is_same_v<Rows, Mxfp4Rows>;
  auto* codes = reinterpret_cast<uint8_t*>(out.values);
  for (int64_t t = 0; t < kPageTokens; t += 2) {
    lay_out_scales<Rows>(in, dim, t, out);
    if constexpr (!kInPlace) {
      for (int64_t row = t; row < t + 2; ++row) {
        uint8_t* to = codes + row * (dim / 2);
        if (row < in.tokens) {
          Rows::row(in.rows + row * in.row_bytes, dim, to);
        } else {
          std::memset(to, 0, static_cast<size_t>(dim / 2));
        }
      }
    }
  }
  out.form = ExpandedRows::Form::codes;
  out.tokens = in.tokens;
  out.codes = kInPlace ? in.rows : codes;
  out.code_values = Rows::kValues.bf16.data();
  out.page_scale = in.page_scale * Rows::kUnit;
}

// Always part of its caller, whose instruction set is that of the rows.
template <class Rows>
[[gnu::always_inline]] inline void lay_out_ordered(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  const Rows rows;
  const int64_t row_elements = (dim + kChunk - 1) / kChunk * kChunk;
  auto* values = reinterpret_cast<uint16_t*>(out.values);
  for (int64_t t = 0; t < kPageTokens; t += 2) {
    lay_out_scales<Q8Rows>(in, dim, t, out);
    for (int64_t row = t; row < t + 2; ++row) {
      uint16_t* to = values + row * row_elements;
      if (row < in.tokens) {
        rows.row(in.rows + row * in.row_bytes, dim, to);
      } else {
        std::memset(to, 0, static_cast<size_t>(row_elements) * sizeof(*to));
      }
    }
  }
  out.form = ExpandedRows::Form::ordered;
  out.tokens = in.tokens;
  out.page_scale = 1.0f;
}

}  // namespace

void lay_out_codes(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  switch (in.format) {
    case Format::mxfp4:
      return lay_out_nibbles<Mxfp4Rows>(in, dim, out);
    case Format::int3:
      return lay_out_nibbles<Int3Rows>(in, dim, out);
    case Format::q4_0:
      return lay_out_nibbles<Q4Rows>(in, dim, out);
    default:
      return lay_out_ordered<Q8Rows>(in, dim, out);
  }
}

}  // namespace thriftattn

THRIFTATTN_END_TARGET

THRIFTATTN_BEGIN_TARGET(THRIFTATTN_AVX512_VBMI)

namespace thriftattn {
namespace {

struct Magnitude {
  static constexpr float decode(uint32_t code) { return static_cast<float>(code); }
};

// Bytes s and s + 1 of the 32 words of a chunk, in the order of store_interleaved().
struct ByteOrder {
  alignas(64) std::array<uint8_t, 64> bytes;
};
constexpr ByteOrder byte_order(size_t s) {
  ByteOrder order{};
  for (size_t i = 0; i < 64; ++i) {
    const size_t qword = i / 8, word = qword / 2 * 8 + i % 8;
    order.bytes[i] = static_cast<uint8_t>(4 * word + s + qword % 2);
  }
  return order;
}
constexpr ByteOrder kByteOrders[2] = {byte_order(0), byte_order(2)};

// By table of magnitudes: -127 .. 127, all that Q8_0 has.
struct Q8TableRows {
  static constexpr ByteTables<128> kTables = byte_tables<Magnitude, 128>();
  __m512i low[2], high[2], order[2];

  Q8TableRows() {
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(kTables.low.data() + 64 * i);
      high[i] = _mm512_load_si512(kTables.high.data() + 64 * i);
      order[i] = _mm512_load_si512(kByteOrders[i].bytes.data());
    }
  }
  void row(const uint8_t* in, int64_t dim, uint16_t* out) const {
    for (int64_t d = 0; d < dim; d += kChunk, out += kChunk) {
      const Q8Chunk chunk(in, d, dim);
      for (int i = 0; i < 2; ++i) {
        const __m512i code = _mm512_permutex2var_epi8(chunk.first, order[i], chunk.second);
        const __m512i magnitude = _mm512_abs_epi8(code);
        // magnitude's upper byte | (code & 0x80)
        const __m512i upper = _mm512_ternarylogic_epi64(
            _mm512_permutex2var_epi8(high[0], magnitude, high[1]), code,
            _mm512_set1_epi8(-0x80), 0xf8);
        store_interleaved(out + 64 * i, _mm512_permutex2var_epi8(low[0], magnitude, low[1]),
                          upper);
      }
    }
  }
};

}  // namespace

void lay_out_codes_vbmi(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  if (in.format != Format::q8_0) return lay_out_codes(in, dim, out);
  lay_out_ordered<Q8TableRows>(in, dim, out);
}

}  // namespace thriftattn

THRIFTATTN_END_TARGET

#endif
