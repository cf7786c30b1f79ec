// Per-target inline codecs (Highway): decode for the attention kernels, and the E4M3 and FP16
// arithmetic that encoders share. Include it after "hwy/foreach_target.h" and "hwy/highway.h",
// and call it from HWY_NAMESPACE. Results are bit-equal to the scalar truth (nvfp4.h,
// row_codec.h) for every input, NaN codes included.
//
// Subnormals: E4M3 and FP16 subnormals are decoded by a subtraction of normal numbers rather
// than by multiplying an FP32 subnormal, which costs a microcode assist per vector on Intel and
// gives zero under flush-to-zero.

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

// E4M3 codes (0..255 in u32 lanes) to FP32.
template <class DF, class VU = hn::Vec<hn::RebindToUnsigned<DF>>>
HWY_INLINE hn::Vec<DF> DecodeE4m3(DF df, VU code) {
  const hn::RebindToUnsigned<DF> du;
  const VU mag = hn::And(code, hn::Set(du, 0x7fu));
  const VU sign = hn::ShiftLeft<24>(hn::And(code, hn::Set(du, 0x80u)));
  const VU body = hn::ShiftLeft<20>(mag);
  const auto normal = hn::BitCast(df, hn::Add(body, hn::Set(du, 120u << 23)));
  // 2^-6 + mantissa * 2^-9, less 2^-6.
  const auto small =
      hn::Sub(hn::BitCast(df, hn::Add(body, hn::Set(du, 121u << 23))), hn::Set(df, 0x1p-6f));
  const auto is_small = hn::RebindMask(df, hn::Lt(mag, hn::Set(du, 8u)));
  const auto is_nan = hn::RebindMask(df, hn::Eq(mag, hn::Set(du, 0x7fu)));
  const auto nan = hn::BitCast(df, hn::Set(du, 0x7fc00000u));
  const auto value = hn::IfThenElse(is_nan, nan, hn::IfThenElse(is_small, small, normal));
  return hn::Or(value, hn::BitCast(df, sign));
}

// FP32 (not NaN) to E4M3 codes in u32 lanes.
template <class DF>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> EncodeE4m3(DF df, hn::Vec<DF> x) {
  const hn::RebindToUnsigned<DF> du;
  // Clamping to 448 first leaves no value that could round to the NaN code.
  const auto a = hn::Min(hn::Abs(x), hn::Set(df, kE4m3Max));
  const auto bits = hn::BitCast(du, a);
  const auto sign = hn::ShiftRight<24>(hn::And(hn::BitCast(du, x), hn::Set(du, 0x80000000u)));
  const auto odd = hn::And(hn::ShiftRight<20>(bits), hn::Set(du, 1u));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(du, 0x7ffffu)), odd);
  const auto normal = hn::Sub(hn::ShiftRight<20>(rounded), hn::Set(du, 120u << 3));
  const auto small =
      hn::Sub(hn::BitCast(du, hn::Add(a, hn::Set(df, 0x1p14f))), hn::Set(du, 0x46800000u));
  const auto is_small = hn::RebindMask(du, hn::Lt(a, hn::Set(df, 0x1p-6f)));
  return hn::Or(hn::IfThenElse(is_small, small, normal), sign);
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

// ------------------------------------------------------------------ NVFP4

// E2M1 values are BF16 numbers: these are the low and high bytes of each code's BF16. (int8
// tables and a conversion would take two operations less per 16 elements but lose -0, and with
// it the bit-equality with the scalar truth.)
alignas(16) inline constexpr uint8_t kE2m1LowBytes[16] = {
    0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0, 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
alignas(16) inline constexpr uint8_t kE2m1HighBytes[16] = {
    0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};

#if HWY_TARGET != HWY_SCALAR

// 16 codes (one a byte, 0..15) of one scale block to 16 FP32 values.
template <class D>
HWY_INLINE void DecodeE2m1Block(D d, hn::Vec<hn::FixedTag<uint8_t, 16>> codes, float scale,
                                hn::Vec<D> page_scale, float* HWY_RESTRICT out) {
  constexpr size_t kLanes = hn::MaxLanes(D());
  static_assert(kLanes == 4 || kLanes == 8 || kLanes == 16);
  const auto block_scale = hn::Set(d, scale);
  const auto emit = [&](hn::Vec<D> value, size_t at) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::Mul(value, block_scale), page_scale), d, out + at);
  };
  if constexpr (kLanes == 16) {
    const hn::RebindToUnsigned<D> du;
    const auto table = hn::LoadU(d, kE2m1Values.data());
    const auto index = hn::BitCast(hn::RebindToSigned<D>(), hn::PromoteTo(du, codes));
    emit(hn::TableLookupLanes(table, hn::IndicesFromVec(d, index)), 0);
  } else {
    const hn::FixedTag<uint8_t, 16> du8;
    const hn::FixedTag<uint16_t, 8> du16;
    const auto low = hn::TableLookupBytes(hn::Load(du8, kE2m1LowBytes), codes);
    const auto high = hn::TableLookupBytes(hn::Load(du8, kE2m1HighBytes), codes);
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

template <class D>
HWY_INLINE void DecodeNvfp4Fixed(D d, const uint8_t* codes, const uint8_t* scales, float page_scale,
                                 int64_t elements, float* HWY_RESTRICT out) {
  const hn::FixedTag<uint8_t, 16> du8;
  const hn::FixedTag<uint8_t, 8> du8_half;
  const auto nibble = hn::Set(du8, uint8_t{15});
  const auto page = hn::Set(d, page_scale);
  const int64_t blocks = elements / kNvfp4Group;
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) {
    const auto raw = hn::LoadU(du8, codes + b * 8);
    const auto even = hn::And(raw, nibble);
    const auto odd = hn::ShiftRight<4>(raw);
    DecodeE2m1Block(d, hn::InterleaveLower(du8, even, odd), kE4m3Values[scales[b]], page,
                    out + b * 16);
    DecodeE2m1Block(d, hn::InterleaveUpper(du8, even, odd), kE4m3Values[scales[b + 1]], page,
                    out + b * 16 + 16);
  }
  if (b < blocks) {
    const auto raw = hn::ZeroExtendVector(du8, hn::LoadU(du8_half, codes + b * 8));
    const auto even = hn::And(raw, nibble);
    const auto odd = hn::ShiftRight<4>(raw);
    DecodeE2m1Block(d, hn::InterleaveLower(du8, even, odd), kE4m3Values[scales[b]], page,
                    out + b * 16);
  }
}

#endif  // HWY_TARGET != HWY_SCALAR

// `rows` dense rows of a plane: codes [rows][dim / 2], scales [rows][dim / 16], out [rows][dim].
// D is any tag of FP32 with 4, 8 or 16 lanes.
template <class D>
HWY_INLINE void DecodeNvfp4Rows(D d, const uint8_t* codes, const uint8_t* scales, float page_scale,
                                int64_t rows, int64_t dim, float* HWY_RESTRICT out) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    DecodeNvfp4Fixed(d, codes, scales, page_scale, rows * dim, out);
    return;
  }
#endif
  (void)d;
  nvfp4_decode_page_scalar(codes, scales, page_scale, rows, dim, out);
}

// ------------------------------------------------------------------ plain formats

#if HWY_TARGET != HWY_SCALAR

template <class D>
HWY_INLINE void DecodePlainRow(D d, Format format, const uint8_t* in, int64_t dim,
                               float* HWY_RESTRICT out) {
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(D()));
  const hn::RebindToUnsigned<D> du;
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
    case Format::fp8_e4m3: {
      float row_scale;
      std::memcpy(&row_scale, in, sizeof(row_scale));
      const auto scale = hn::Set(d, row_scale);
      for (; i + kLanes <= dim; i += kLanes) {
        const auto code = hn::PromoteTo(du, hn::LoadU(du8, in + 4 + i));
        hn::StoreU(hn::Mul(DecodeE4m3(d, code), scale), d, out + i);
      }
      break;
    }
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
      return;  // not a row format
  }
  // The tail of an element-wise format.
  float row_scale = 1.0f;
  if (format == Format::fp8_e4m3) std::memcpy(&row_scale, in, sizeof(row_scale));
  for (; i < dim; ++i) {
    uint16_t h = 0;
    if (format != Format::fp8_e4m3) std::memcpy(&h, in + 2 * i, sizeof(h));
    out[i] = format == Format::bf16   ? bf16_to_f32(h)
             : format == Format::fp16 ? fp16_to_f32(h)
                                      : kE4m3Values[in[4 + i]] * row_scale;
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
