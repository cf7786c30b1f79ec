// Per-target inline codecs (Highway): decode for the attention kernels, and the arithmetic of small
// floats and of E2M1 that encoders share. Include it after "hwy/foreach_target.h" and
// "hwy/highway.h", and call it from HWY_NAMESPACE. Results are bit-equal to the scalar truth
// (nvfp4.h, mxfp4.h, int3.h, row_codec.h) for every input, NaN codes included.
//
// Subnormals: those of the small floats and of FP16 are decoded by a subtraction of normal numbers
// rather than by multiplying an FP32 subnormal, which costs a microcode assist per vector on Intel
// and gives zero under flush-to-zero.

// Toggled per target: this header is included once for each.
#if defined(THRIFTATTN_FORMATS_CODEC_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THRIFTATTN_FORMATS_CODEC_SIMD_INL_H_
#undef THRIFTATTN_FORMATS_CODEC_SIMD_INL_H_
#else
#define THRIFTATTN_FORMATS_CODEC_SIMD_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "base/float_convert.h"
#include "formats/bit_pack.h"
#include "formats/int3.h"
#include "formats/mxfp4.h"
#include "formats/nvfp4.h"
#include "formats/row_codec.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Vectors of unknown length (SVE, RVV) and the one-lane target take the scalar truth.
#if HWY_TARGET == HWY_SCALAR || HWY_HAVE_SCALABLE || HWY_TARGET == HWY_SVE_256 || \
    HWY_TARGET == HWY_SVE2_128
inline constexpr bool kFixedVectors = false;
#else
inline constexpr bool kFixedVectors = true;
#endif

// ------------------------------------------------------------------ element conversions

// Codes of a SmallFloat (in u32 lanes) to FP32.
template <class Float, class DF, class VU = hn::Vec<hn::RebindToUnsigned<DF>>>
HWY_INLINE hn::Vec<DF> DecodeSmallFloat(DF df, VU code) {
  const hn::RebindToUnsigned<DF> du;
  const VU mag = hn::And(code, hn::Set(du, Float::kSign - 1));
  const VU sign = hn::ShiftLeft<32 - Float::kBits>(hn::And(code, hn::Set(du, Float::kSign)));
  const VU body = hn::ShiftLeft<23 - Float::kMantissaBits>(mag);
  const auto normal = hn::BitCast(df, hn::Add(body, hn::Set(du, Float::kRebias << 23)));
  // (the smallest normal + mantissa * step), less the smallest normal.
  const auto small =
      hn::Sub(hn::BitCast(df, hn::Add(body, hn::Set(du, (Float::kRebias + 1) << 23))),
              hn::Set(df, Float::kMinNormal));
  const auto is_small = hn::RebindMask(df, hn::Lt(mag, hn::Set(du, 1u << Float::kMantissaBits)));
  auto value = hn::IfThenElse(is_small, small, normal);
  if constexpr (Float::kHasNan) {
    const auto is_special = hn::RebindMask(df, hn::Gt(mag, hn::Set(du, Float::kLast)));
    auto special = hn::Set(du, 0x7fc00000u);
    if constexpr (Float::kHasInf) {
      const auto is_inf = hn::Eq(mag, hn::Set(du, Float::kLast + 1));
      special = hn::IfThenElse(is_inf, hn::Set(du, 0x7f800000u), special);
    }
    value = hn::IfThenElse(is_special, hn::BitCast(df, special), value);
  }
  return hn::Or(value, hn::BitCast(df, sign));
}

// FP32 (not NaN) to codes in u32 lanes, saturating.
template <class Float, class DF>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> EncodeSmallFloat(DF df, hn::Vec<DF> x) {
  constexpr int kShift = 23 - Float::kMantissaBits;
  constexpr uint32_t kRounderBits = (Float::kRebias + 1 + kShift) << 23;  // of Float::kRounder
  const hn::RebindToUnsigned<DF> du;
  // Clamping first leaves no value that could round beyond the last code.
  const auto a = hn::Min(hn::Abs(x), hn::Set(df, Float::kMax));
  const auto bits = hn::BitCast(du, a);
  const auto sign =
      hn::ShiftRight<32 - Float::kBits>(hn::And(hn::BitCast(du, x), hn::Set(du, 0x80000000u)));
  const auto odd = hn::And(hn::ShiftRight<kShift>(bits), hn::Set(du, 1u));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(du, (1u << (kShift - 1)) - 1)), odd);
  const auto normal =
      hn::Sub(hn::ShiftRight<kShift>(rounded), hn::Set(du, Float::kRebias << Float::kMantissaBits));
  const auto small =
      hn::Sub(hn::BitCast(du, hn::Add(a, hn::Set(df, Float::kRounder))), hn::Set(du, kRounderBits));
  const auto is_small = hn::RebindMask(du, hn::Lt(a, hn::Set(df, Float::kMinNormal)));
  return hn::Or(hn::IfThenElse(is_small, small, normal), sign);
}

template <class DF, class VU = hn::Vec<hn::RebindToUnsigned<DF>>>
HWY_INLINE hn::Vec<DF> DecodeE4m3(DF df, VU code) {
  return DecodeSmallFloat<E4m3>(df, code);
}

template <class DF>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> EncodeE4m3(DF df, hn::Vec<DF> x) {
  return EncodeSmallFloat<E4m3>(df, x);
}

// FP16 codes (in u32 lanes) to FP32.
template <class DF, class VU = hn::Vec<hn::RebindToUnsigned<DF>>>
HWY_INLINE hn::Vec<DF> DecodeFp16(DF df, VU code) {
  const hn::RebindToUnsigned<DF> du;
  const VU mag = hn::And(code, hn::Set(du, 0x7fffu));
  const VU sign = hn::ShiftLeft<16>(hn::And(code, hn::Set(du, 0x8000u)));
  const VU body = hn::ShiftLeft<13>(mag);
  const auto normal = hn::BitCast(df, hn::Add(body, hn::Set(du, 112u << 23)));
  const auto small =
      hn::Sub(hn::BitCast(df, hn::Add(body, hn::Set(du, 113u << 23))), hn::Set(df, 0x1p-14f));
  const VU quiet = hn::IfThenElseZero(hn::Gt(mag, hn::Set(du, 0x7c00u)), hn::Set(du, 0x400000u));
  const auto special = hn::BitCast(df, hn::Or(hn::Or(body, hn::Set(du, 0x7f800000u)), quiet));
  const auto is_small = hn::RebindMask(df, hn::Lt(mag, hn::Set(du, 0x400u)));
  const auto is_special = hn::RebindMask(df, hn::Gt(mag, hn::Set(du, 0x7bffu)));
  const auto value = hn::IfThenElse(is_special, special, hn::IfThenElse(is_small, small, normal));
  return hn::Or(value, hn::BitCast(df, sign));
}

// FP32 to FP16 codes in u32 lanes.
template <class DF>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> EncodeFp16(DF df, hn::Vec<DF> x) {
  const hn::RebindToUnsigned<DF> du;
  const auto a = hn::Abs(x);
  const auto bits = hn::BitCast(du, a);
  const auto sign = hn::ShiftRight<16>(hn::And(hn::BitCast(du, x), hn::Set(du, 0x80000000u)));
  const auto odd = hn::And(hn::ShiftRight<13>(bits), hn::Set(du, 1u));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(du, 0xfffu)), odd);
  const auto normal = hn::Sub(hn::ShiftRight<13>(rounded), hn::Set(du, 112u << 10));
  const auto small =
      hn::Sub(hn::BitCast(du, hn::Add(a, hn::Set(df, 0.5f))), hn::Set(du, 0x3f000000u));
  const auto is_small = hn::RebindMask(du, hn::Lt(a, hn::Set(df, 0x1p-14f)));
  const auto is_huge = hn::Gt(bits, hn::Set(du, 0x477fffffu));  // >= 65536
  const auto is_nan = hn::Gt(bits, hn::Set(du, 0x7f800000u));
  const auto payload = hn::And(hn::ShiftRight<13>(bits), hn::Set(du, 0x3ffu));
  auto code = hn::IfThenElse(is_small, small, normal);
  code = hn::IfThenElse(is_huge, hn::Set(du, 0x7c00u), code);
  code = hn::IfThenElse(is_nan, hn::Or(payload, hn::Set(du, 0x7e00u)), code);
  return hn::Or(code, sign);
}

// u16 little-endian values at any address, widened to u32 lanes.
template <class DF>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> LoadU16(DF /*df*/, const uint8_t* in) {
  const hn::Rebind<uint16_t, DF> du16;
  const hn::Repartition<uint8_t, decltype(du16)> du8;
  return hn::PromoteTo(hn::RebindToUnsigned<DF>(), hn::BitCast(du16, hn::LoadU(du8, in)));
}

// ------------------------------------------------------------------ planes

// The values of a plane's codes: FP32, and as BF16 numbers, which all of them are, in bytes. (int8
// tables and a conversion would take two operations less per 16 elements but lose E2M1's -0, and
// with it the bit-equality with the scalar truth.)
struct E2m1Table {
  static constexpr const float* kValues = kE2m1Values.data();
  alignas(16) static constexpr uint8_t kLow[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
                                                   0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
  alignas(16) static constexpr uint8_t kHigh[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                                    0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
};
struct Int3Table {  // eight values, twice
  static constexpr float kValues[16] = {0.5f, 1.5f, 2.5f, 3.5f, -0.5f, -1.5f, -2.5f, -3.5f,
                                        0.5f, 1.5f, 2.5f, 3.5f, -0.5f, -1.5f, -2.5f, -3.5f};
  alignas(16) static constexpr uint8_t kLow[16] = {0x00, 0xc0, 0x20, 0x60, 0x00, 0xc0, 0x20, 0x60,
                                                   0x00, 0xc0, 0x20, 0x60, 0x00, 0xc0, 0x20, 0x60};
  alignas(16) static constexpr uint8_t kHigh[16] = {0x3f, 0x3f, 0x40, 0x40, 0xbf, 0xbf, 0xc0, 0xc0,
                                                    0x3f, 0x3f, 0x40, 0x40, 0xbf, 0xbf, 0xc0, 0xc0};
};

// The scales of a plane of E2M1 codes.
struct Nvfp4Scales {
  static constexpr int64_t kGroup = kNvfp4Group;
  static constexpr const float* kValues = kE4m3Values.data();
};
struct Mxfp4Scales {
  static constexpr int64_t kGroup = kMxfp4Group;
  static constexpr const float* kValues = kE8m0Values.data();
};

#if HWY_TARGET != HWY_SCALAR

// 16 codes (one a byte, 0..15) that share a scale to 16 FP32 values.
template <class Table, class D>
HWY_INLINE void DecodeBlock(D d, hn::Vec<hn::FixedTag<uint8_t, 16>> codes, float scale,
                            hn::Vec<D> page_scale, float* HWY_RESTRICT out) {
  constexpr size_t kLanes = hn::MaxLanes(D());
  static_assert(kLanes == 4 || kLanes == 8 || kLanes == 16);
  const auto block_scale = hn::Set(d, scale);
  const auto emit = [&](hn::Vec<D> value, size_t at) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::Mul(value, block_scale), page_scale), d, out + at);
  };
  if constexpr (kLanes == 16) {
    const hn::RebindToUnsigned<D> du;
    const auto table = hn::LoadU(d, Table::kValues);
    const auto index = hn::BitCast(hn::RebindToSigned<D>(), hn::PromoteTo(du, codes));
    emit(hn::TableLookupLanes(table, hn::IndicesFromVec(d, index)), 0);
  } else {
    const hn::FixedTag<uint8_t, 16> du8;
    const hn::FixedTag<uint16_t, 8> du16;
    const auto low = hn::TableLookupBytes(hn::Load(du8, Table::kLow), codes);
    const auto high = hn::TableLookupBytes(hn::Load(du8, Table::kHigh), codes);
    const auto first = hn::BitCast(du16, hn::InterleaveLower(du8, low, high));
    const auto second = hn::BitCast(du16, hn::InterleaveUpper(du8, low, high));
    if constexpr (kLanes == 8) {
      const hn::RebindToUnsigned<D> du32;
      emit(hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du32, first))), 0);
      emit(hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du32, second))), 8);
    } else {
      const auto zero = hn::Zero(du16);  // the lower halves of the FP32 values
      emit(hn::BitCast(d, hn::InterleaveLower(du16, zero, first)), 0);
      emit(hn::BitCast(d, hn::InterleaveUpper(du16, zero, first)), 4);
      emit(hn::BitCast(d, hn::InterleaveLower(du16, zero, second)), 8);
      emit(hn::BitCast(d, hn::InterleaveUpper(du16, zero, second)), 12);
    }
  }
}

template <class Scales, class D>
HWY_INLINE void DecodeE2m1Plane(D d, const uint8_t* codes, const uint8_t* scales, float page_scale,
                                int64_t elements, float* HWY_RESTRICT out) {
  const hn::FixedTag<uint8_t, 16> du8;
  const hn::FixedTag<uint8_t, 8> du8_half;
  const auto nibble = hn::Set(du8, uint8_t{15});
  const auto page = hn::Set(d, page_scale);
  const auto scale_of = [&](int64_t block) HWY_ATTR {
    return Scales::kValues[scales[block * 16 / Scales::kGroup]];
  };
  const int64_t blocks = elements / 16;
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) {
    const auto raw = hn::LoadU(du8, codes + b * 8);
    const auto even = hn::And(raw, nibble);
    const auto odd = hn::ShiftRight<4>(raw);
    DecodeBlock<E2m1Table>(d, hn::InterleaveLower(du8, even, odd), scale_of(b), page, out + b * 16);
    DecodeBlock<E2m1Table>(d, hn::InterleaveUpper(du8, even, odd), scale_of(b + 1), page,
                           out + b * 16 + 16);
  }
  if (b < blocks) {
    const auto raw = hn::ZeroExtendVector(du8, hn::LoadU(du8_half, codes + b * 8));
    const auto even = hn::And(raw, nibble);
    const auto odd = hn::ShiftRight<4>(raw);
    DecodeBlock<E2m1Table>(d, hn::InterleaveLower(du8, even, odd), scale_of(b), page, out + b * 16);
  }
}

template <class D>
HWY_INLINE void DecodeInt3Plane(D d, const uint8_t* codes, const uint8_t* scales, float page_scale,
                                int64_t elements, float* HWY_RESTRICT out) {
  const hn::FixedTag<uint8_t, 16> du8;
  const auto page = hn::Set(d, page_scale);
  for (int64_t g = 0; g < elements / kInt3Group; ++g) {
    alignas(16) uint64_t bytes[kInt3Group / 8];
    for (int64_t w = 0; w < kInt3Group / 8; ++w) {
      bytes[w] = spread_3bit(load_u24(codes + g * kInt3GroupBytes + w * 3));
    }
    const float scale = kE4m3Values[scales[g]];
    for (int64_t half = 0; half < 2; ++half) {
      const auto code = hn::Load(du8, reinterpret_cast<const uint8_t*>(bytes + 2 * half));
      DecodeBlock<Int3Table>(d, code, scale, page, out + g * kInt3Group + half * 16);
    }
  }
}

// E2M1 for encoders. |t| / scale on the grid: adding and subtracting 2^23 steps rounds to a
// multiple of the step, ties to an even multiple, which is the even code.
template <class D>
HWY_INLINE hn::Vec<D> RoundE2m1(D d, hn::Vec<D> a, hn::Vec<D> scale) {
  const auto q = hn::Min(hn::Div(a, scale), hn::Set(d, kE2m1Max));
  auto magic =
      hn::IfThenElse(hn::Lt(q, hn::Set(d, 2.0f)), hn::Set(d, 0x1p22f), hn::Set(d, 0x1p23f));
  magic = hn::IfThenElse(hn::Lt(q, hn::Set(d, 4.0f)), magic, hn::Set(d, 0x1p24f));
  return hn::Sub(hn::Add(q, magic), magic);
}

// Twice a grid value (0, 1, 2, 3, 4, 6, 8, 12), + 16 where the bit of `sign_bit` is set in x: a
// byte an element, which PackE2m1 turns into codes.
template <class D>
HWY_INLINE void StoreDoubled(D /*d*/, hn::Vec<D> value, hn::Vec<D> x,
                             hn::Vec<hn::RebindToUnsigned<D>> sign_bit, uint8_t* out) {
  const hn::RebindToSigned<D> di;
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint8_t, D> du8;
  const auto doubled = hn::ConvertTo(di, hn::Add(value, value));
  const auto sign = hn::ShiftRight<27>(hn::And(hn::BitCast(du, x), sign_bit));
  hn::StoreU(hn::DemoteTo(du8, hn::Or(doubled, hn::BitCast(di, sign))), du8, out);
}

// n (a multiple of 16) doubled values to codes, two a byte; `doubled` is aligned to 16 bytes.
HWY_INLINE void PackE2m1(const uint8_t* HWY_RESTRICT doubled, int64_t n,
                         uint8_t* HWY_RESTRICT out) {
  const hn::FixedTag<uint8_t, 16> du8;
  const hn::FixedTag<uint16_t, 8> du16;
  const hn::FixedTag<int16_t, 8> di16;
  const hn::FixedTag<uint8_t, 8> du8_half;
  alignas(16) static constexpr uint8_t kCodeOfDoubled[16] = {0, 1, 2, 3, 4, 0, 5, 0,
                                                             6, 0, 0, 0, 7, 0, 0, 0};
  const auto table = hn::Load(du8, kCodeOfDoubled);
  for (int64_t i = 0; i < n; i += 16) {
    const auto raw = hn::Load(du8, doubled + i);
    const auto magnitude = hn::TableLookupBytes(table, hn::And(raw, hn::Set(du8, uint8_t{15})));
    const auto sign = hn::And(hn::ShiftRight<1>(raw), hn::Set(du8, uint8_t{8}));
    const auto pair = hn::BitCast(du16, hn::Or(magnitude, sign));
    const auto low = hn::And(pair, hn::Set(du16, uint16_t{0x000f}));
    const auto high = hn::And(hn::ShiftRight<4>(pair), hn::Set(du16, uint16_t{0x00f0}));
    const auto packed = hn::BitCast(di16, hn::Or(low, high));
    hn::StoreU(hn::DemoteTo(du8_half, packed), du8_half, out + i / 2);
  }
}

// max |x| of n elements, a multiple of the lanes.
template <class D>
HWY_INLINE float AmaxOfVectors(D d, const float* x, int64_t n) {
  const int64_t lanes = static_cast<int64_t>(hn::MaxLanes(D()));
  auto amax = hn::Zero(d);
  for (int64_t i = 0; i < n; i += lanes) amax = hn::Max(amax, hn::Abs(hn::LoadU(d, x + i)));
  return hn::GetLane(hn::MaxOfLanes(d, amax));
}

#endif  // HWY_TARGET != HWY_SCALAR

// `rows` dense rows of a plane: codes [rows][dim / 2], scales [rows][dim / 16], out [rows][dim].
// D is any tag of FP32 with 4, 8 or 16 lanes.
template <class D>
HWY_INLINE void DecodeNvfp4Rows(D d, const uint8_t* codes, const uint8_t* scales, float page_scale,
                                int64_t rows, int64_t dim, float* HWY_RESTRICT out) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    DecodeE2m1Plane<Nvfp4Scales>(d, codes, scales, page_scale, rows * dim, out);
    return;
  }
#endif
  (void)d;
  nvfp4_decode_page_scalar(codes, scales, page_scale, rows, dim, out);
}

// The same for MXFP4: scales [rows][dim / 32], no page scale.
template <class D>
HWY_INLINE void DecodeMxfp4Rows(D d, const uint8_t* codes, const uint8_t* scales, int64_t rows,
                                int64_t dim, float* HWY_RESTRICT out) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    DecodeE2m1Plane<Mxfp4Scales>(d, codes, scales, 1.0f, rows * dim, out);
    return;
  }
#endif
  (void)d;
  mxfp4_decode_page_scalar(codes, scales, rows, dim, out);
}

// The same for INT3: codes [rows][dim / 8][3 bytes], scales [rows][dim / 32].
template <class D>
HWY_INLINE void DecodeInt3Rows(D d, const uint8_t* codes, const uint8_t* scales, float page_scale,
                               int64_t rows, int64_t dim, float* HWY_RESTRICT out) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    DecodeInt3Plane(d, codes, scales, page_scale, rows * dim, out);
    return;
  }
#endif
  (void)d;
  int3_decode_page_scalar(codes, scales, page_scale, rows, dim, out);
}

// ------------------------------------------------------------------ plain formats

#if HWY_TARGET != HWY_SCALAR

// A row of SmallFloat codes, one a byte or four of 6 bits in 3 bytes, behind its FP32 scale.
template <class Float, class D>
HWY_INLINE void DecodeSmallFloatRow(D d, const uint8_t* in, int64_t dim, float* HWY_RESTRICT out) {
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(D()));
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint8_t, D> du8;
  float row_scale;
  std::memcpy(&row_scale, in, sizeof(row_scale));
  in += sizeof(row_scale);
  const auto scale = hn::Set(d, row_scale);
  int64_t i = 0;
  if constexpr (Float::kBits == 8) {
    for (; i + kLanes <= dim; i += kLanes) {
      const auto code = hn::PromoteTo(du, hn::LoadU(du8, in + i));
      hn::StoreU(hn::Mul(DecodeSmallFloat<Float>(d, code), scale), d, out + i);
    }
    for (; i < dim; ++i) out[i] = Float::decode(in[i]) * row_scale;
  } else {
    static_assert(Float::kBits == 6);
    uint32_t bytes[kLanes / 4];
    for (; i + kLanes <= dim; i += kLanes) {
      for (int64_t w = 0; w < kLanes / 4; ++w) {
        bytes[w] = spread_6bit(load_u24(in + (i / 4 + w) * 3));
      }
      const auto code = hn::PromoteTo(du, hn::LoadU(du8, reinterpret_cast<const uint8_t*>(bytes)));
      hn::StoreU(hn::Mul(DecodeSmallFloat<Float>(d, code), scale), d, out + i);
    }
    for (; i < dim; ++i) {
      out[i] = Float::decode(load_u24(in + i / 4 * 3) >> 6 * (i % 4) & 63u) * row_scale;
    }
  }
}

template <class D>
HWY_INLINE void DecodePlainRow(D d, Format format, const uint8_t* in, int64_t dim,
                               float* HWY_RESTRICT out) {
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(D()));
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> du8;
  const hn::Rebind<int8_t, D> di8;
  int64_t i = 0;
  const auto block_scale = [](const uint8_t* block) HWY_ATTR {
    uint16_t h;
    std::memcpy(&h, block, sizeof(h));
    return fp16_to_f32(h);
  };
  switch (format) {
    case Format::f32:
      std::memcpy(out, in, static_cast<size_t>(dim) * sizeof(float));
      return;
    case Format::bf16:
      for (; i + kLanes <= dim; i += kLanes) {
        hn::StoreU(hn::BitCast(d, hn::ShiftLeft<16>(LoadU16(d, in + 2 * i))), d, out + i);
      }
      break;
    case Format::fp16:
      for (; i + kLanes <= dim; i += kLanes) {
#if HWY_TARGET <= HWY_AVX2 && HWY_ARCH_X86 && !defined(HWY_DISABLE_F16C)
        const hn::Rebind<hwy::float16_t, D> df16;
        const hn::Repartition<uint8_t, decltype(df16)> dbytes;
        const auto half = hn::BitCast(df16, hn::LoadU(dbytes, in + 2 * i));
        hn::StoreU(hn::PromoteTo(d, half), d, out + i);
#else
        hn::StoreU(DecodeFp16(d, LoadU16(d, in + 2 * i)), d, out + i);
#endif
      }
      break;
    case Format::fp8_e4m3:
      return DecodeSmallFloatRow<E4m3>(d, in, dim, out);
    case Format::fp8_e5m2:
      return DecodeSmallFloatRow<E5m2>(d, in, dim, out);
    case Format::fp6_e3m2:
      return DecodeSmallFloatRow<E3m2>(d, in, dim, out);
    case Format::fp6_e2m3:
      return DecodeSmallFloatRow<E2m3>(d, in, dim, out);
    case Format::q8_0:
      for (; i < dim; i += kGgmlBlock, in += kQ8BlockBytes) {
        const auto scale = hn::Set(d, block_scale(in));
        for (int64_t j = 0; j < kGgmlBlock; j += kLanes) {
          const auto code = hn::PromoteTo(di, hn::BitCast(di8, hn::LoadU(du8, in + 2 + j)));
          hn::StoreU(hn::Mul(hn::ConvertTo(d, code), scale), d, out + i + j);
        }
      }
      return;
    case Format::q4_0:
      for (; i < dim; i += kGgmlBlock, in += kQ4BlockBytes) {
        const auto scale = hn::Set(d, block_scale(in));
        const auto eight = hn::Set(di, 8);
        for (int64_t j = 0; j < kGgmlBlock / 2; j += kLanes) {
          const auto pair = hn::PromoteTo(di, hn::LoadU(du8, in + 2 + j));
          const auto low = hn::Sub(hn::And(pair, hn::Set(di, 15)), eight);
          const auto high = hn::Sub(hn::ShiftRight<4>(pair), eight);
          hn::StoreU(hn::Mul(hn::ConvertTo(d, low), scale), d, out + i + j);
          hn::StoreU(hn::Mul(hn::ConvertTo(d, high), scale), d, out + i + j + kGgmlBlock / 2);
        }
      }
      return;
    case Format::nvfp4:
    case Format::nvfp4x2:
    case Format::mxfp4:
    case Format::int3:
      return;  // not a row format
  }
  for (; i < dim; ++i) {  // the tail of a 16-bit format
    uint16_t h;
    std::memcpy(&h, in + 2 * i, sizeof(h));
    out[i] = format == Format::bf16 ? bf16_to_f32(h) : fp16_to_f32(h);
  }
}

#endif  // HWY_TARGET != HWY_SCALAR

// Rows of a plain format; in_stride in bytes, out_stride in elements. The format must have rows
// of this dim (row_bytes() throws otherwise; this does not check).
template <class D>
HWY_INLINE void DecodePlainRows(D d, Format format, const uint8_t* in, int64_t in_stride,
                                int64_t rows, int64_t dim, float* HWY_RESTRICT out,
                                int64_t out_stride) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    for (int64_t r = 0; r < rows; ++r) {
      DecodePlainRow(d, format, in + r * in_stride, dim, out + r * out_stride);
    }
    return;
  }
#endif
  (void)d;
  decode_rows_scalar(format, in, in_stride, rows, dim, out, out_stride);
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#endif  // include guard
