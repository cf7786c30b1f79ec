// Plain formats on the best SIMD target; row_codec_scalar.cc says what the bytes must be.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/row_codec.cc"
// clang-format off: foreach_target.h comes before what it includes again for each target.
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// clang-format on
#include <cstring>

#include "formats/codec_simd-inl.h"
#include "formats/row_codec.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {
namespace {

#if HWY_TARGET != HWY_SCALAR

using DF = hn::CappedTag<float, 16>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(DF()));
static_assert(kGgmlBlock / 2 % kLanes == 0);

// u32 lanes below 65536 to little-endian u16 at any address.
HWY_INLINE void StoreU16(hn::Vec<hn::RebindToUnsigned<DF>> v, uint8_t* out) {
  const hn::Rebind<uint16_t, DF> du16;
  const hn::Repartition<uint8_t, decltype(du16)> du8;
  const auto narrow = hn::DemoteTo(du16, hn::BitCast(hn::RebindToSigned<DF>(), v));
  hn::StoreU(hn::BitCast(du8, narrow), du8, out);
}

void StoreScale16(uint8_t* out, float scale) {
  const uint16_t half = f32_to_fp16(scale);
  std::memcpy(out, &half, sizeof(half));
}

float Amax(const float* x, int64_t n) {
  const int64_t whole = n - n % kLanes;
  float amax = AmaxOfVectors(DF(), x, whole);
  for (int64_t i = whole; i < n; ++i) amax = HWY_MAX(amax, x[i] < 0 ? -x[i] : x[i]);
  return amax;
}

void EncodeBf16(const float* x, int64_t dim, uint8_t* out) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const auto bits = hn::BitCast(du, hn::LoadU(d, x + i));
    const auto top = hn::ShiftRight<16>(bits);
    const auto odd = hn::And(top, hn::Set(du, 1u));
    const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du, 0x7fffu)), odd));
    const auto magnitude = hn::And(bits, hn::Set(du, 0x7fffffffu));
    const auto is_nan = hn::Gt(magnitude, hn::Set(du, 0x7f800000u));
    StoreU16(hn::IfThenElse(is_nan, hn::Or(top, hn::Set(du, 0x40u)), rounded), out + 2 * i);
  }
  for (; i < dim; ++i) {
    const uint16_t b = f32_to_bf16(x[i]);
    std::memcpy(out + 2 * i, &b, sizeof(b));
  }
}

void EncodeFp16Row(const float* x, int64_t dim, uint8_t* out) {
  const DF d;
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) StoreU16(EncodeFp16(d, hn::LoadU(d, x + i)), out + 2 * i);
  for (; i < dim; ++i) StoreScale16(out + 2 * i, x[i]);
}

template <class Float>
void EncodeSmallFloatRow(const float* x, int64_t dim, uint8_t* out) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> du8;
  const float scale = usable_scale(Amax(x, dim) / Float::kMax);
  std::memcpy(out, &scale, sizeof(scale));
  out += sizeof(scale);
  const auto divisor = hn::Set(d, scale);
  const auto encode = [&](const float* from, uint8_t* to) HWY_ATTR {
    const auto code = EncodeSmallFloat<Float>(d, hn::Div(hn::LoadU(d, from), divisor));
    hn::StoreU(hn::DemoteTo(du8, hn::BitCast(di, code)), du8, to);
  };
  int64_t i = 0;
  if constexpr (Float::kBits == 8) {
    for (; i + kLanes <= dim; i += kLanes) encode(x + i, out + i);
    for (; i < dim; ++i) out[i] = Float::encode(x[i] / scale);
  } else {
    uint32_t bytes[kLanes / 4];
    for (; i + kLanes <= dim; i += kLanes) {
      encode(x + i, reinterpret_cast<uint8_t*>(bytes));
      for (int64_t w = 0; w < kLanes / 4; ++w) {
        store_u24(gather_6bit(bytes[w]), out + (i / 4 + w) * 3);
      }
    }
    for (; i < dim; i += 4) {
      uint32_t word = 0;
      for (int64_t j = 0; j < 4; ++j) word |= uint32_t{Float::encode(x[i + j] / scale)} << 6 * j;
      store_u24(word, out + i / 4 * 3);
    }
  }
}

void EncodeQ8(const float* x, uint8_t* out) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<int8_t, DF> di8;
  const hn::Rebind<uint8_t, DF> du8;
  const float scale = AmaxOfVectors(DF(), x, kGgmlBlock) / 127.0f;
  StoreScale16(out, scale);
  const auto inverse = hn::Set(d, ggml_inverse(scale));
  for (int64_t i = 0; i < kGgmlBlock; i += kLanes) {
    const auto v = hn::Mul(hn::LoadU(d, x + i), inverse);
    // roundf: half away from zero. trunc(v + .5) would round 0.49999997 up.
    const auto whole = hn::ConvertTo(d, hn::ConvertTo(di, v));
    const auto away = hn::Ge(hn::Abs(hn::Sub(v, whole)), hn::Set(d, 0.5f));
    const auto step = hn::CopySign(hn::Set(d, 1.0f), v);
    const auto rounded = hn::Add(whole, hn::IfThenElseZero(away, step));
    const auto code = hn::DemoteTo(di8, hn::ConvertTo(di, rounded));
    hn::StoreU(hn::BitCast(du8, code), du8, out + 2 + i);
  }
}

void EncodeQ4(const float* x, uint8_t* out) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> du8;
  const float amax = AmaxOfVectors(DF(), x, kGgmlBlock);
  float signed_max = 0.0f;
  for (int64_t i = 0; i < kGgmlBlock && amax > 0.0f; ++i) {
    if (x[i] == amax || x[i] == -amax) {  // the first of equal magnitudes gives the sign
      signed_max = x[i];
      break;
    }
  }
  const float scale = signed_max / -8.0f;
  StoreScale16(out, scale);
  const auto inverse = hn::Set(d, ggml_inverse(scale));
  const auto quantize = [&](const float* from) HWY_ATTR {
    const auto scaled = hn::Mul(hn::LoadU(d, from), inverse);
    const auto code = hn::ConvertTo(di, hn::Add(scaled, hn::Set(d, 8.5f)));
    return hn::Min(code, hn::Set(di, 15));
  };
  for (int64_t i = 0; i < kGgmlBlock / 2; i += kLanes) {
    const auto pair = hn::Or(quantize(x + i), hn::ShiftLeft<4>(quantize(x + i + kGgmlBlock / 2)));
    hn::StoreU(hn::DemoteTo(du8, pair), du8, out + 2 + i);
  }
}

void EncodeRow(Format format, const float* x, int64_t dim, uint8_t* out) {
  switch (format) {
    case Format::f32:
      std::memcpy(out, x, static_cast<size_t>(dim) * sizeof(float));
      return;
    case Format::bf16:
      return EncodeBf16(x, dim, out);
    case Format::fp16:
      return EncodeFp16Row(x, dim, out);
    case Format::fp8_e4m3:
      return EncodeSmallFloatRow<E4m3>(x, dim, out);
    case Format::fp8_e5m2:
      return EncodeSmallFloatRow<E5m2>(x, dim, out);
    case Format::fp6_e3m2:
      return EncodeSmallFloatRow<E3m2>(x, dim, out);
    case Format::fp6_e2m3:
      return EncodeSmallFloatRow<E2m3>(x, dim, out);
    case Format::q8_0:
      for (int64_t b = 0; b < dim / kGgmlBlock; ++b) {
        EncodeQ8(x + b * kGgmlBlock, out + b * kQ8BlockBytes);
      }
      return;
    case Format::q4_0:
      for (int64_t b = 0; b < dim / kGgmlBlock; ++b) {
        EncodeQ4(x + b * kGgmlBlock, out + b * kQ4BlockBytes);
      }
      return;
    case Format::nvfp4:
    case Format::nvfp4x2:
    case Format::mxfp4:
    case Format::int3:
      return;  // row_bytes() has thrown
  }
}

#endif  // HWY_TARGET != HWY_SCALAR

void EncodeRows(Format format, const float* x, int64_t rows, int64_t dim, int64_t x_stride,
                uint8_t* out, int64_t out_stride) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    for (int64_t r = 0; r < rows; ++r)
      EncodeRow(format, x + r * x_stride, dim, out + r * out_stride);
    return;
  }
#endif
  encode_rows_scalar(format, x, rows, dim, x_stride, out, out_stride);
}

void DecodeRows(Format format, const uint8_t* in, int64_t in_stride, int64_t rows, int64_t dim,
                float* out, int64_t out_stride) {
  DecodePlainRows(hn::CappedTag<float, 16>(), format, in, in_stride, rows, dim, out, out_stride);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(EncodeRows);
HWY_EXPORT(DecodeRows);

void encode_rows(Format format, const float* x, int64_t rows, int64_t dim, int64_t x_stride,
                 uint8_t* out, int64_t out_stride) {
  row_bytes(format, dim);  // throws for what has no rows
  HWY_DYNAMIC_DISPATCH(EncodeRows)(format, x, rows, dim, x_stride, out, out_stride);
}

void decode_rows(Format format, const uint8_t* in, int64_t in_stride, int64_t rows, int64_t dim,
                 float* out, int64_t out_stride) {
  row_bytes(format, dim);
  HWY_DYNAMIC_DISPATCH(DecodeRows)(format, in, in_stride, rows, dim, out, out_stride);
}

}  // namespace thriftattn
#endif  // HWY_ONCE
