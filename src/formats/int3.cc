// INT3 of a page on the best SIMD target; int3_scalar.cc says what the bytes must be.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/int3.cc"
// clang-format off: foreach_target.h comes before what it includes again for each target.
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// clang-format on
#include <cstring>
#include <limits>

#include "formats/codec_simd-inl.h"
#include "formats/int3.h"
#include "formats/plane_codec.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {
namespace {

#if HWY_TARGET != HWY_SCALAR

using DF = hn::CappedTag<float, 16>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(DF()));

// The grid's midpoints are the whole numbers: truncation is the nearest, ties outwards.
HWY_INLINE hn::Vec<hn::RebindToSigned<DF>> Steps(hn::Vec<DF> a, hn::Vec<DF> divisor) {
  const DF d;
  const auto q = hn::Min(hn::Div(a, divisor), hn::Set(d, 3.0f));
  return hn::ConvertTo(hn::RebindToSigned<DF>(), q);
}

// What divides by a zero scale must give zero.
HWY_INLINE hn::Vec<DF> Divisor(float scale) {
  return hn::Set(DF(), scale == 0.0f ? std::numeric_limits<float>::infinity() : scale);
}

// The squared error of a group under `scale`, as a tree of adjacent pairs.
HWY_INLINE float GroupError(const float* HWY_RESTRICT t, float scale) {
  const DF d;
  const auto divisor = Divisor(scale);
  const auto multiplier = hn::Set(d, scale);
  alignas(64) float quads[kInt3Group];
  for (int64_t i = 0; i < kInt3Group; i += kLanes) {
    const auto a = hn::Abs(hn::Load(d, t + i));
    const auto value = hn::Add(hn::ConvertTo(d, Steps(a, divisor)), hn::Set(d, 0.5f));
    const auto diff = hn::Sub(a, hn::Mul(value, multiplier));
    auto sum = hn::Mul(diff, diff);
    sum = hn::Add(sum, hn::Shuffle2301(sum));  // adjacent pairs
    sum = hn::Add(sum, hn::Shuffle1032(sum));  // pairs of pairs
    hn::Store(sum, d, quads + i);
  }
  const float low = (quads[0] + quads[4]) + (quads[8] + quads[12]);
  return low + ((quads[16] + quads[20]) + (quads[24] + quads[28]));
}

HWY_INLINE void EncodeGroup(const float* HWY_RESTRICT x, float page_scale,
                            uint8_t* HWY_RESTRICT codes, uint8_t* HWY_RESTRICT scale) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> du8;
  alignas(64) float t[kInt3Group];
  auto amax = hn::Zero(d);
  for (int64_t i = 0; i < kInt3Group; i += kLanes) {
    const auto v = hn::Div(hn::LoadU(d, x + i), hn::Set(d, page_scale));
    hn::Store(v, d, t + i);
    amax = hn::Max(amax, hn::Abs(v));
  }
  const float whole = hn::GetLane(hn::MaxOfLanes(d, amax)) / kInt3CodeMax;
  float least = 0.0f;
  for (size_t s = 0; s < kInt3Shares.size(); ++s) {
    const uint8_t code = f32_to_e4m3(whole * kInt3Shares[s]);
    const float error = GroupError(t, kE4m3Values[code]);
    if (s > 0 && !(error < least)) continue;
    least = error;
    *scale = code;
  }
  const auto divisor = Divisor(kE4m3Values[*scale]);
  const auto sign_bit = hn::Set(du, *scale == 0 ? 0u : 0x80000000u);  // no signs either
  alignas(16) uint8_t bytes[kInt3Group];
  for (int64_t i = 0; i < kInt3Group; i += kLanes) {
    const auto v = hn::Load(d, t + i);
    const auto sign = hn::ShiftRight<29>(hn::And(hn::BitCast(du, v), sign_bit));
    const auto code = hn::Or(Steps(hn::Abs(v), divisor), hn::BitCast(di, sign));
    hn::StoreU(hn::DemoteTo(du8, code), du8, bytes + i);
  }
  for (int64_t w = 0; w < kInt3Group / 8; ++w) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * w, sizeof(eight));
    store_u24(gather_3bit(eight), codes + 3 * w);
  }
}

#endif  // HWY_TARGET != HWY_SCALAR

float EncodePage(const float* x, int64_t rows, int64_t dim, uint8_t* codes, uint8_t* scales) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    const int64_t n = rows * dim;
    const float page_scale = usable_scale(AmaxOfVectors(DF(), x, n) / kInt3Max);
    for (int64_t g = 0; g < n / kInt3Group; ++g) {
      EncodeGroup(x + g * kInt3Group, page_scale, codes + g * kInt3GroupBytes, scales + g);
    }
    return page_scale;
  }
#endif
  return int3_encode_page_scalar(x, rows, dim, codes, scales);
}

void DecodePage(const uint8_t* codes, const uint8_t* scales, float page_scale, int64_t rows,
                int64_t dim, float* out) {
  DecodeInt3Rows(hn::CappedTag<float, 16>(), codes, scales, page_scale, rows, dim, out);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(EncodePage);
HWY_EXPORT(DecodePage);

float int3_encode_page(const float* x, int64_t rows, int64_t dim, uint8_t* codes, uint8_t* scales) {
  check_plane_dim(Format::int3, dim);
  return HWY_DYNAMIC_DISPATCH(EncodePage)(x, rows, dim, codes, scales);
}

void int3_decode_page(const uint8_t* codes, const uint8_t* scales, float page_scale, int64_t rows,
                      int64_t dim, float* out) {
  check_plane_dim(Format::int3, dim);
  HWY_DYNAMIC_DISPATCH(DecodePage)(codes, scales, page_scale, rows, dim, out);
}

}  // namespace thriftattn
#endif  // HWY_ONCE
