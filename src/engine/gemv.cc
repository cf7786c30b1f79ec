// SIMD kernels of gemv.h. A tile of 4 x 1 or 2 x 4 (rows of W x rows of x) accumulators keeps
// enough independent chains in flight; the rows of W of a tile stay in L1 while all of x passes.
#include "engine/gemv.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/gemv.cc"
#include "base/float_convert.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;
using V = hn::Vec<F>;

HWY_INLINE V LoadWeights(F d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE V LoadWeights(F d, const uint16_t* p) {
  const hn::Rebind<uint16_t, F> d16;
  const hn::RebindToUnsigned<F> d32;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, p))));
}
HWY_INLINE float Scalar(float w) { return w; }
HWY_INLINE float Scalar(uint16_t w) { return bf16_to_f32(w); }

template <int R, int M, typename W>
HWY_INLINE void Tile(const W* HWY_RESTRICT w, int64_t k, const float* HWY_RESTRICT x, float* y,
                     int64_t y_stride) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V acc[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) acc[r][m] = hn::Zero(d);
  }
  int64_t i = 0;
  for (; i + lanes <= k; i += lanes) {
    V xv[M];
    for (int m = 0; m < M; ++m) xv[m] = hn::LoadU(d, x + m * k + i);
    for (int r = 0; r < R; ++r) {
      const V wv = LoadWeights(d, w + r * k + i);
      for (int m = 0; m < M; ++m) acc[r][m] = hn::MulAdd(wv, xv[m], acc[r][m]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float sum = hn::GetLane(hn::SumOfLanes(d, acc[r][m]));
      for (int64_t j = i; j < k; ++j) sum += Scalar(w[r * k + j]) * x[m * k + j];
      y[m * y_stride + r] = sum;
    }
  }
}

template <int R, typename W>
HWY_INLINE void Rows(const W* HWY_RESTRICT w, const GemvArgs& a, int64_t m0, int64_t n0) {
  float* y = a.y + m0 * a.y_stride + n0;
  const float* x = a.x + m0 * a.k;
  switch (std::min<int64_t>(a.m - m0, 4)) {
    case 1:
      return Tile<R, 1>(w, a.k, x, y, a.y_stride);
    case 2:
      return Tile<R, 2>(w, a.k, x, y, a.y_stride);
    case 3:
      return Tile<R, 3>(w, a.k, x, y, a.y_stride);
    default:
      return Tile<R, 4>(w, a.k, x, y, a.y_stride);
  }
}

template <typename W>
HWY_INLINE void Gemv(const GemvArgs& a) {
  const W* w = static_cast<const W*>(a.w);
  int64_t n = 0;
  for (; a.m == 1 && n + 4 <= a.n; n += 4) Tile<4, 1>(w + n * a.k, a.k, a.x, a.y + n, a.y_stride);
  for (; n + 2 <= a.n; n += 2) {
    for (int64_t m = 0; m < a.m; m += 4) Rows<2>(w + n * a.k, a, m, n);
  }
  if (n < a.n) {
    for (int64_t m = 0; m < a.m; m += 4) Rows<1>(w + n * a.k, a, m, n);
  }
}

void GemvF32(const GemvArgs& args) { Gemv<float>(args); }
void GemvBf16(const GemvArgs& args) { Gemv<uint16_t>(args); }

void WidenBf16(const uint16_t* HWY_RESTRICT from, int64_t count, float* HWY_RESTRICT to) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::StoreU(LoadWeights(d, from + i), d, to + i);
  for (; i < count; ++i) to[i] = bf16_to_f32(from[i]);
}

void NarrowBf16(const float* HWY_RESTRICT from, int64_t count, uint16_t* HWY_RESTRICT to) {
  const F d;
  const hn::RebindToUnsigned<F> d32;
  const hn::Rebind<uint16_t, F> d16;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto one = hn::Set(d32, 1u);
  const auto half = hn::Set(d32, 0x7fffu);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto bits = hn::BitCast(d32, hn::LoadU(d, from + i));
    const auto odd = hn::And(hn::ShiftRight<16>(bits), one);
    const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, half), odd));
    // At most 0xffff, and DemoteTo saturates from signed 32-bit.
    const hn::RebindToSigned<F> di32;
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, rounded)), d16, to + i);
  }
  for (; i < count; ++i) to[i] = f32_to_bf16(from[i]);
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(GemvF32);
HWY_EXPORT(GemvBf16);
HWY_EXPORT(WidenBf16);
HWY_EXPORT(NarrowBf16);

void gemv_f32(const GemvArgs& args) { HWY_DYNAMIC_DISPATCH(GemvF32)(args); }
void gemv_bf16(const GemvArgs& args) { HWY_DYNAMIC_DISPATCH(GemvBf16)(args); }
void widen_bf16(const uint16_t* from, int64_t count, float* to) {
  HWY_DYNAMIC_DISPATCH(WidenBf16)(from, count, to);
}
void narrow_bf16(const float* from, int64_t count, uint16_t* to) {
  HWY_DYNAMIC_DISPATCH(NarrowBf16)(from, count, to);
}

}  // namespace thriftattn
#endif  // HWY_ONCE
