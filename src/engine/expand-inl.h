// Per-target inline expansion of GGUF's quantised blocks (layouts: ggml_types.cc) to FP32 vectors
// in registers. Include it after "hwy/foreach_target.h" and "hwy/highway.h", and call it from
// HWY_NAMESPACE. Every value is bit-equal to dequantize(): the same integer, one multiplication,
// and for types with a minimum one subtraction, each rounded on its own.
//
// A block's values go to a sink, 16 at a time: sink.Add<chain>(at, vector), where `at` is the
// element's place in the row and chain is at / 16 % 4. So a sink that sums keeps four independent
// chains, and any sink that follows this rule sums in the same order.

// Toggled per target: this header is included once for each.
#if defined(THRIFTATTN_ENGINE_EXPAND_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THRIFTATTN_ENGINE_EXPAND_INL_H_
#undef THRIFTATTN_ENGINE_EXPAND_INL_H_
#else
#define THRIFTATTN_ENGINE_EXPAND_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "base/float_convert.h"
#include "engine/ggml_types.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline constexpr int64_t kUnit = 16;  // elements that share a chain
inline constexpr int kChains = 4;

using F = hn::CappedTag<float, kUnit>;
using V = hn::Vec<F>;

HWY_INLINE float LoadHalf(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return fp16_to_f32(bits);
}

// What a block of a type holds; each type's struct has Expand<chain of its first unit>() besides.
template <int kElementCount, int kByteCount>
struct Layout {
  static constexpr int64_t kElements = kElementCount;
  static constexpr int64_t kBytes = kByteCount;
};

// Vectors of unknown length (SVE, RVV) and the one-lane target take the scalar truth.
#if HWY_TARGET == HWY_SCALAR || HWY_HAVE_SCALABLE || HWY_TARGET == HWY_SVE_256 || \
    HWY_TARGET == HWY_SVE2_128

template <GgmlType kType, int kElementCount, int kByteCount>
struct ScalarBlocks : Layout<kElementCount, kByteCount> {
  template <int kChain, class Sink>
  static HWY_INLINE void Expand(const uint8_t* in, int64_t at, Sink& sink) {
    float values[kElementCount];
    dequantize(kType, in, kElementCount, values);
    if constexpr (kElementCount == 2 * kUnit) {
      Unit<kChain>(values, at, sink);
      Unit<kChain + 1>(values + kUnit, at + kUnit, sink);
    } else {
      for (int64_t i = 0; i < kElementCount; i += kChains * kUnit) {
        Unit<0>(values + i, at + i, sink);
        Unit<1>(values + i + kUnit, at + i + kUnit, sink);
        Unit<2>(values + i + 2 * kUnit, at + i + 2 * kUnit, sink);
        Unit<3>(values + i + 3 * kUnit, at + i + 3 * kUnit, sink);
      }
    }
  }

 private:
  template <int kChain, class Sink>
  static HWY_INLINE void Unit(const float* values, int64_t at, Sink& sink) {
    const F d;
    for (int64_t i = 0; i < kUnit; i += static_cast<int64_t>(hn::Lanes(d))) {
      sink.template Add<kChain>(at + i, hn::LoadU(d, values + i));
    }
  }
};
using BlocksQ4_0 = ScalarBlocks<GgmlType::q4_0, 32, 18>;
using BlocksQ5_0 = ScalarBlocks<GgmlType::q5_0, 32, 22>;
using BlocksQ8_0 = ScalarBlocks<GgmlType::q8_0, 32, 34>;
using BlocksQ4K = ScalarBlocks<GgmlType::q4_k, 256, 144>;
using BlocksQ5K = ScalarBlocks<GgmlType::q5_k, 256, 176>;
using BlocksQ6K = ScalarBlocks<GgmlType::q6_k, 256, 210>;
#else

inline constexpr int64_t kLanes = hn::MaxLanes(F());
static_assert(kUnit % kLanes == 0);
using D32 = hn::RebindToSigned<F>;
using DCodes = hn::Rebind<uint8_t, F>;  // as many bytes as a vector has floats
using DSigned = hn::Rebind<int8_t, F>;

// What the codes 0 to 15 stand for, (code - kOffset) * scale - min: a table where a vector holds
// sixteen values (one shuffle instead of a conversion and two operations), else arithmetic.
template <int kOffset, bool kHasMin>
class Levels {
 public:
  HWY_INLINE Levels(float scale, float min) : scale_(hn::Set(F(), scale)), min_(hn::Set(F(), min)) {
    if constexpr (kLanes == 16) table_ = Compute(hn::Iota(D32(), 0));
  }
  HWY_INLINE V Of(hn::Vec<D32> code) const {
    if constexpr (kLanes == 16) {
      return hn::TableLookupLanes(table_, hn::IndicesFromVec(F(), code));
    } else {
      return Compute(code);
    }
  }

 private:
  HWY_INLINE V Compute(hn::Vec<D32> code) const {
    if constexpr (kOffset != 0) code = hn::Sub(code, hn::Set(D32(), kOffset));
    const V product = hn::Mul(scale_, hn::ConvertTo(F(), code));
    return kHasMin ? hn::Sub(product, min_) : product;
  }
  V scale_, min_, table_ = hn::Zero(F());
};

// Sixteen bytes: the low nibbles are the elements from at_low on, the high ones from at_high on.
template <int kChainLow, int kChainHigh, class Table, class Sink>
HWY_INLINE void ExpandNibbles(const uint8_t* in, const Table& low, const Table& high,
                              int64_t at_low, int64_t at_high, Sink& sink) {
  const D32 d;
  for (int64_t i = 0; i < kUnit; i += kLanes) {
    const auto codes = hn::PromoteTo(d, hn::LoadU(DCodes(), in + i));
    sink.template Add<kChainLow>(at_low + i, low.Of(hn::And(codes, hn::Set(d, 15))));
    sink.template Add<kChainHigh>(at_high + i, high.Of(hn::ShiftRight<4>(codes)));
  }
}

// Sixteen signed codes under one scale.
template <int kChain, bool kHasMin, class Sink>
HWY_INLINE void ExpandCodes(const int8_t* codes, float scale, float min, int64_t at, Sink& sink) {
  const F d;
  for (int64_t i = 0; i < kUnit; i += kLanes) {
    const auto integers = hn::PromoteTo(D32(), hn::LoadU(DSigned(), codes + i));
    V value = hn::Mul(hn::Set(d, scale), hn::ConvertTo(d, integers));
    if constexpr (kHasMin) value = hn::Sub(value, hn::Set(d, min));
    sink.template Add<kChain>(at + i, value);
  }
}

// Codes of more than four bits are put together as bytes first, 16 or 32 at a time.
using DBytes = hn::CappedTag<uint8_t, 32>;
inline constexpr int64_t kByteLanes = hn::MaxLanes(DBytes());

template <int kBits>
HWY_INLINE hn::Vec<DBytes> ShiftBytesLeft(hn::Vec<DBytes> v) {
  const hn::Repartition<uint16_t, DBytes> d16;
  return hn::BitCast(DBytes(), hn::ShiftLeft<kBits>(hn::BitCast(d16, v)));
}
template <int kBits>
HWY_INLINE hn::Vec<DBytes> ShiftBytesRight(hn::Vec<DBytes> v) {
  const hn::Repartition<uint16_t, DBytes> d16;
  return hn::BitCast(DBytes(), hn::ShiftRight<kBits>(hn::BitCast(d16, v)));
}
// `low` and the bits of `high` that `mask` keeps, less `offset`.
HWY_INLINE void StoreCodes(hn::Vec<DBytes> low, hn::Vec<DBytes> high, uint8_t mask, int offset,
                           int8_t* out) {
  const DBytes d;
  const auto code = hn::Or(low, hn::And(high, hn::Set(d, mask)));
  const hn::RebindToSigned<DBytes> di;
  hn::StoreU(hn::Sub(hn::BitCast(di, code), hn::Set(di, static_cast<int8_t>(offset))), di, out);
}

// The eight 6-bit scales and minima of Q4_K and Q5_K, times d and dmin.
struct GroupScales {
  alignas(16) float scale[8];
  alignas(16) float min[8];
};
HWY_INLINE GroupScales LoadGroupScales(const uint8_t* in) {
  uint32_t words[3];
  std::memcpy(words, in + 4, sizeof words);
  const uint32_t tops = 0x03030303u, nibbles = 0x0f0f0f0fu, sixes = 0x3f3f3f3fu;
  const uint32_t codes[4] = {words[0] & sixes, (words[2] & nibbles) | (words[0] >> 6 & tops) << 4,
                             words[1] & sixes,
                             (words[2] >> 4 & nibbles) | (words[1] >> 6 & tops) << 4};
  uint8_t bytes[16];
  std::memcpy(bytes, codes, sizeof bytes);
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<int32_t, 4> d32;
  const hn::FixedTag<uint8_t, 4> d8;
  const auto scale = hn::Set(d, LoadHalf(in));
  const auto min = hn::Set(d, LoadHalf(in + 2));
  const auto four = [&](int i) HWY_ATTR {
    return hn::ConvertTo(d, hn::PromoteTo(d32, hn::LoadU(d8, bytes + i)));
  };
  GroupScales out;
  hn::Store(hn::Mul(scale, four(0)), d, out.scale);
  hn::Store(hn::Mul(scale, four(4)), d, out.scale + 4);
  hn::Store(hn::Mul(min, four(8)), d, out.min);
  hn::Store(hn::Mul(min, four(12)), d, out.min + 4);
  return out;
}

struct BlocksQ4_0 : Layout<32, 18> {
  template <int kChain, class Sink>
  static HWY_INLINE void Expand(const uint8_t* in, int64_t at, Sink& sink) {
    const Levels<8, false> levels(LoadHalf(in), 0.0f);
    ExpandNibbles<kChain, kChain + 1>(in + 2, levels, levels, at, at + kUnit, sink);
  }
};

struct BlocksQ5_0 : Layout<32, 22> {
  template <int kChain, class Sink>
  static HWY_INLINE void Expand(const uint8_t* in, int64_t at, Sink& sink) {
    const hn::FixedTag<uint8_t, 16> d;
    const hn::RebindToSigned<decltype(d)> di;
    alignas(16) static constexpr uint8_t kByteOf[32] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1,
                                                        1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2,
                                                        2, 2, 3, 3, 3, 3, 3, 3, 3, 3};
    alignas(16) static constexpr uint8_t kBitOf[16] = {1, 2, 4, 8, 16, 32, 64, 128,
                                                       1, 2, 4, 8, 16, 32, 64, 128};
    // The four bytes of fifth bits, and twelve that are not looked at.
    const auto bits = hn::LoadU(d, in + 2);
    const auto nibbles = hn::LoadU(d, in + 6);
    alignas(16) int8_t codes[32];
    const auto store = [&](auto low, int half) HWY_ATTR {
      const auto spread = hn::TableLookupBytes(bits, hn::Load(d, kByteOf + 16 * half));
      const auto fifth =
          hn::IfThenElseZero(hn::TestBit(spread, hn::Load(d, kBitOf)), hn::Set(d, uint8_t{16}));
      const auto code = hn::BitCast(di, hn::Or(low, fifth));
      hn::Store(hn::Sub(code, hn::Set(di, int8_t{16})), di, codes + 16 * half);
    };
    const hn::Repartition<uint16_t, decltype(d)> d16;
    const auto nibble = hn::Set(d, uint8_t{15});
    store(hn::And(nibbles, nibble), 0);
    store(hn::And(hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(d16, nibbles))), nibble), 1);
    const float scale = LoadHalf(in);
    ExpandCodes<kChain, false>(codes, scale, 0.0f, at, sink);
    ExpandCodes<kChain + 1, false>(codes + kUnit, scale, 0.0f, at + kUnit, sink);
  }
};

struct BlocksQ8_0 : Layout<32, 34> {
  template <int kChain, class Sink>
  static HWY_INLINE void Expand(const uint8_t* in, int64_t at, Sink& sink) {
    const float scale = LoadHalf(in);
    const auto* codes = reinterpret_cast<const int8_t*>(in + 2);
    ExpandCodes<kChain, false>(codes, scale, 0.0f, at, sink);
    ExpandCodes<kChain + 1, false>(codes + kUnit, scale, 0.0f, at + kUnit, sink);
  }
};

struct BlocksQ4K : Layout<256, 144> {
  template <int kChain, class Sink>
  static HWY_INLINE void Expand(const uint8_t* in, int64_t at, Sink& sink) {
    const GroupScales s = LoadGroupScales(in);
    for (int c = 0; c < 4; ++c) {
      const uint8_t* q = in + 16 + 32 * c;
      const Levels<0, true> low(s.scale[2 * c], s.min[2 * c]);
      const Levels<0, true> high(s.scale[2 * c + 1], s.min[2 * c + 1]);
      const int64_t to = at + 64 * c;
      ExpandNibbles<kChain, kChain + 2>(q, low, high, to, to + 32, sink);
      ExpandNibbles<kChain + 1, kChain + 3>(q + kUnit, low, high, to + kUnit, to + 48, sink);
    }
  }
};

struct BlocksQ5K : Layout<256, 176> {
  template <int kChain, class Sink>
  static HWY_INLINE void Expand(const uint8_t* in, int64_t at, Sink& sink) {
    const GroupScales s = LoadGroupScales(in);
    alignas(32) int8_t codes[256];
    UnpackPair<0>(in, codes);
    UnpackPair<1>(in, codes);
    UnpackPair<2>(in, codes);
    UnpackPair<3>(in, codes);
    for (int g = 0; g < 8; g += 2) {
      const int8_t* q = codes + 32 * g;
      const int64_t to = at + 32 * g;
      ExpandCodes<kChain, true>(q, s.scale[g], s.min[g], to, sink);
      ExpandCodes<kChain + 1, true>(q + 16, s.scale[g], s.min[g], to + 16, sink);
      ExpandCodes<kChain + 2, true>(q + 32, s.scale[g + 1], s.min[g + 1], to + 32, sink);
      ExpandCodes<kChain + 3, true>(q + 48, s.scale[g + 1], s.min[g + 1], to + 48, sink);
    }
  }

 private:
  // Groups 2c and 2c + 1: bits 2c and 2c + 1 of the bytes of fifth bits.
  template <int c>
  static HWY_INLINE void UnpackPair(const uint8_t* in, int8_t* codes) {
    const DBytes d;
    const auto nibble = hn::Set(d, uint8_t{15});
    for (int64_t l = 0; l < 32; l += kByteLanes) {
      const auto fifth = ShiftBytesRight<2 * c>(hn::LoadU(d, in + 16 + l));
      const auto q = hn::LoadU(d, in + 48 + 32 * c + l);
      StoreCodes(hn::And(q, nibble), ShiftBytesLeft<4>(fifth), 16, 0, codes + 64 * c + l);
      StoreCodes(hn::And(ShiftBytesRight<4>(q), nibble), ShiftBytesLeft<3>(fifth), 16, 0,
                 codes + 64 * c + 32 + l);
    }
  }
};

struct BlocksQ6K : Layout<256, 210> {
  template <int kChain, class Sink>
  static HWY_INLINE void Expand(const uint8_t* in, int64_t at, Sink& sink) {
    alignas(32) int8_t codes[256];
    const DBytes d;
    const auto nibble = hn::Set(d, uint8_t{15});
    for (int half = 0; half < 2; ++half) {
      for (int64_t l = 0; l < 32; l += kByteLanes) {
        const auto a = hn::LoadU(d, in + 64 * half + l);
        const auto b = hn::LoadU(d, in + 64 * half + 32 + l);
        const auto high = hn::LoadU(d, in + 128 + 32 * half + l);
        int8_t* out = codes + 128 * half + l;
        StoreCodes(hn::And(a, nibble), ShiftBytesLeft<4>(high), 0x30, 32, out);
        StoreCodes(hn::And(b, nibble), ShiftBytesLeft<2>(high), 0x30, 32, out + 32);
        StoreCodes(hn::And(ShiftBytesRight<4>(a), nibble), high, 0x30, 32, out + 64);
        StoreCodes(hn::And(ShiftBytesRight<4>(b), nibble), ShiftBytesRight<2>(high), 0x30, 32,
                   out + 96);
      }
    }
    alignas(16) float scales[16];
    const hn::FixedTag<float, 4> d4;
    const hn::FixedTag<int32_t, 4> di4;
    const hn::FixedTag<int8_t, 4> d8;
    const auto scale = hn::Set(d4, LoadHalf(in + 208));
    for (int g = 0; g < 16; g += 4) {
      const auto bytes = hn::LoadU(d8, reinterpret_cast<const int8_t*>(in + 192 + g));
      hn::Store(hn::Mul(scale, hn::ConvertTo(d4, hn::PromoteTo(di4, bytes))), d4, scales + g);
    }
    for (int g = 0; g < 16; g += 4) {
      const int8_t* q = codes + 16 * g;
      const int64_t to = at + 16 * g;
      ExpandCodes<kChain, false>(q, scales[g], 0.0f, to, sink);
      ExpandCodes<kChain + 1, false>(q + 16, scales[g + 1], 0.0f, to + 16, sink);
      ExpandCodes<kChain + 2, false>(q + 32, scales[g + 2], 0.0f, to + 32, sink);
      ExpandCodes<kChain + 3, false>(q + 48, scales[g + 3], 0.0f, to + 48, sink);
    }
  }
};
#endif  // fixed vectors

// `count` elements from a place in the row that is a multiple of 64, as whole blocks.
template <class B, class Sink>
HWY_INLINE void ExpandRun(const uint8_t* in, int64_t at, int64_t count, Sink& sink) {
  const int64_t end = at + count;
  if constexpr (B::kElements == 2 * kUnit) {
    for (; at + 4 * kUnit <= end; at += 4 * kUnit, in += 2 * B::kBytes) {
      B::template Expand<0>(in, at, sink);
      B::template Expand<2>(in + B::kBytes, at + 2 * kUnit, sink);
    }
    if (at < end) B::template Expand<0>(in, at, sink);
  } else {
    for (; at < end; at += B::kElements, in += B::kBytes) B::template Expand<0>(in, at, sink);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#endif  // include guard
