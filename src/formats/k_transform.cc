// The K transform on the best SIMD target; k_transform_scalar.cc says what the bits must be.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/k_transform.cc"
// clang-format off: foreach_target.h comes before what it includes again for each target.
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// clang-format on
#include <cmath>
#include <cstring>

#include "formats/k_transform.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
#if HWY_TARGET == HWY_SCALAR
using D4 = hn::CappedTag<float, 1>;
#else
using D4 = hn::FixedTag<float, 4>;
#endif

// Strides 1 and 2 inside each group of four. In the lane that keeps a - b the butterfly is
// b' + (-b) with a swapped in: the same sum, the same rounding.
HWY_INLINE void ButterflyInner(float* row, int64_t dim) {
#if HWY_TARGET != HWY_SCALAR
  const D4 d;
  const hn::RebindToUnsigned<D4> du;
  alignas(16) static constexpr uint32_t kOdd1[4] = {0, 0x80000000u, 0, 0x80000000u};
  alignas(16) static constexpr uint32_t kOdd2[4] = {0, 0, 0x80000000u, 0x80000000u};
  const auto odd1 = hn::BitCast(d, hn::Load(du, kOdd1));
  const auto odd2 = hn::BitCast(d, hn::Load(du, kOdd2));
  for (int64_t i = 0; i < dim; i += 4) {
    auto v = hn::LoadU(d, row + i);
    v = hn::Add(hn::Shuffle2301(v), hn::Xor(v, odd1));
    v = hn::Add(hn::Shuffle1032(v), hn::Xor(v, odd2));
    hn::StoreU(v, d, row + i);
  }
#else
  (void)row;
  (void)dim;
#endif
}

// One stride, a multiple of the lanes of D.
template <class D>
HWY_INLINE void ButterflyOuter(D d, float* row, int64_t dim, int64_t step) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t base = 0; base < dim; base += 2 * step) {
    for (int64_t i = base; i < base + step; i += lanes) {
      const auto a = hn::LoadU(d, row + i);
      const auto b = hn::LoadU(d, row + i + step);
      hn::StoreU(hn::Add(a, b), d, row + i);
      hn::StoreU(hn::Sub(a, b), d, row + i + step);
    }
  }
}

void HadamardRows(float* x, int64_t rows, int64_t dim, int64_t stride) {
  const int64_t n = hadamard_block(dim);
  const DF d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  if (HWY_TARGET == HWY_SCALAR || n < 4) return hadamard_rows_scalar(x, rows, dim, stride);
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  const auto scale = hn::Set(d, factor);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x + r * stride;
    ButterflyInner(row, dim);
    for (int64_t step = 4; step < n; step *= 2) {
      if (step >= lanes) {
        ButterflyOuter(d, row, dim, step);
      } else {
        ButterflyOuter(D4(), row, dim, step);
      }
    }
    int64_t i = 0;
    for (; i + lanes <= dim; i += lanes)
      hn::StoreU(hn::Mul(hn::LoadU(d, row + i), scale), d, row + i);
    for (; i < dim; ++i) row[i] *= factor;
  }
}

void EqualizeRow(const float* in, int64_t dim, const float* s, bool invert, float* out) {
  const DF d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) {
    const auto v = hn::LoadU(d, in + i);
    const auto f = hn::LoadU(d, s + i);
    hn::StoreU(invert ? hn::Div(v, f) : hn::Mul(v, f), d, out + i);
  }
  for (; i < dim; ++i) out[i] = invert ? in[i] / s[i] : in[i] * s[i];
}

void EqualizeRotateRows(const float* in, int64_t in_stride, int64_t rows, int64_t dim,
                        const float* s, bool invert, bool rotate, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = in + r * in_stride;
    float* to = out + r * out_stride;
    if (s != nullptr) {
      EqualizeRow(from, dim, s, invert, to);
    } else if (from != to) {
      std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(float));
    }
    if (rotate) HadamardRows(to, 1, dim, out_stride);
  }
}

// Sum of `rows` rows of the columns at x, as the tree of adjacent pairs: split at the largest
// power of two below rows.
template <class D>
hn::Vec<D> TreeSum(D d, const float* x, int64_t rows, int64_t dim) {
  if (rows == 1) return hn::LoadU(d, x);
  if (rows == 8) {
    const auto pair = [&](int64_t r) HWY_ATTR {
      return hn::Add(hn::LoadU(d, x + r * dim), hn::LoadU(d, x + (r + 1) * dim));
    };
    return hn::Add(hn::Add(pair(0), pair(2)), hn::Add(pair(4), pair(6)));
  }
  int64_t half = 1;
  while (2 * half < rows) half *= 2;
  return hn::Add(TreeSum(d, x, half, dim), TreeSum(d, x + half * dim, rows - half, dim));
}

void PageMean(const float* x, int64_t rows, int64_t dim, float* mean) {
  const DF d;
  const hn::CappedTag<float, 1> d1;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float count = static_cast<float>(rows);
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) {
    hn::StoreU(hn::Div(TreeSum(d, x + i, rows, dim), hn::Set(d, count)), d, mean + i);
  }
  for (; i < dim; ++i) mean[i] = hn::GetLane(TreeSum(d1, x + i, rows, dim)) / count;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(HadamardRows);
HWY_EXPORT(EqualizeRotateRows);
HWY_EXPORT(PageMean);

void hadamard_rows(float* x, int64_t rows, int64_t dim, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(HadamardRows)(x, rows, dim, stride);
}

void equalize_rotate_rows(const float* in, int64_t in_stride, int64_t rows, int64_t dim,
                          const float* s_or_null, bool invert, bool rotate, float* out,
                          int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(EqualizeRotateRows)
  (in, in_stride, rows, dim, s_or_null, invert, rotate, out, out_stride);
}

void page_mean(const float* x, int64_t rows, int64_t dim, float* mean) {
  HWY_DYNAMIC_DISPATCH(PageMean)(x, rows, dim, mean);
}

}  // namespace thriftattn
#endif  // HWY_ONCE
