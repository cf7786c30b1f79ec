// MXFP4 of a page on the best SIMD target; mxfp4_scalar.cc says what the bytes must be.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/mxfp4.cc"
// clang-format off: foreach_target.h comes before what it includes again for each target.
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// clang-format on
#include "formats/codec_simd-inl.h"
#include "formats/mxfp4.h"
#include "formats/plane_codec.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {
namespace {

#if HWY_TARGET != HWY_SCALAR

using DF = hn::CappedTag<float, 16>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(DF()));

HWY_INLINE void EncodeGroup(const float* HWY_RESTRICT x, uint8_t* HWY_RESTRICT codes,
                            uint8_t* HWY_RESTRICT scale) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  *scale = mxfp4_scale(AmaxOfVectors(d, x, kMxfp4Group));
  const auto divisor = hn::Set(d, kE8m0Values[*scale]);
  alignas(16) uint8_t doubled[kMxfp4Group];
  for (int64_t i = 0; i < kMxfp4Group; i += kLanes) {
    const auto v = hn::LoadU(d, x + i);
    StoreDoubled(d, RoundE2m1(d, hn::Abs(v), divisor), v, hn::Set(du, 0x80000000u), doubled + i);
  }
  PackE2m1(doubled, kMxfp4Group, codes);
}

#endif  // HWY_TARGET != HWY_SCALAR

void EncodePage(const float* x, int64_t rows, int64_t dim, uint8_t* codes, uint8_t* scales) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    for (int64_t g = 0; g < rows * dim / kMxfp4Group; ++g) {
      EncodeGroup(x + g * kMxfp4Group, codes + g * kMxfp4Group / 2, scales + g);
    }
    return;
  }
#endif
  mxfp4_encode_page_scalar(x, rows, dim, codes, scales);
}

void DecodePage(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t dim,
                float* out) {
  DecodeMxfp4Rows(hn::CappedTag<float, 16>(), codes, scales, rows, dim, out);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(EncodePage);
HWY_EXPORT(DecodePage);

void mxfp4_encode_page(const float* x, int64_t rows, int64_t dim, uint8_t* codes, uint8_t* scales) {
  check_plane_dim(Format::mxfp4, dim);
  HWY_DYNAMIC_DISPATCH(EncodePage)(x, rows, dim, codes, scales);
}

void mxfp4_decode_page(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t dim,
                       float* out) {
  check_plane_dim(Format::mxfp4, dim);
  HWY_DYNAMIC_DISPATCH(DecodePage)(codes, scales, rows, dim, out);
}

}  // namespace thriftattn
#endif  // HWY_ONCE
