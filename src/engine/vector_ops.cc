// SIMD kernels of vector_ops.h.
#include "engine/vector_ops.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/vector_ops.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After highway.h, so apart from the block that clang-format sorts.

#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;
using V = hn::Vec<F>;

// exp(-z) stays finite in FP32 and inside the range of hn::Exp; 1 / (1 + e^87) is below any
// activation that matters.
constexpr float kSigmoidLimit = 87.0f;

// The same function for whole vectors and, through a padded copy, for what is left: so an
// element's result does not depend on where it lies.
template <typename Function>
HWY_INLINE void Map(const float* a, const float* b, int64_t count, float* y, Function function) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    hn::StoreU(function(d, hn::LoadU(d, a + i), hn::LoadU(d, b + i)), d, y + i);
  }
  if (i == count) return;
  HWY_ALIGN float pa[hn::MaxLanes(d)] = {};
  HWY_ALIGN float pb[hn::MaxLanes(d)] = {};
  for (int64_t j = i; j < count; ++j) {
    pa[j - i] = a[j];
    pb[j - i] = b[j];
  }
  hn::Store(function(d, hn::Load(d, pa), hn::Load(d, pb)), d, pa);
  for (int64_t j = i; j < count; ++j) y[j] = pa[j - i];
}

HWY_INLINE V Sigmoid(F d, V z) {
  const V limit = hn::Set(d, kSigmoidLimit);
  const V clamped = hn::Max(hn::Min(z, limit), hn::Neg(limit));
  const V one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, hn::Exp(d, hn::Neg(clamped))));
}

struct Silu {
  HWY_INLINE V operator()(F d, V gate, V up) const {
    return hn::Mul(hn::Mul(gate, Sigmoid(d, gate)), up);
  }
};

// 0.5 x (1 + tanh(z)) = x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3).
struct GeluTanh {
  HWY_INLINE V operator()(F d, V gate, V up) const {
    const V cubic = hn::MulAdd(hn::Mul(hn::Mul(gate, gate), gate), hn::Set(d, 0.044715f), gate);
    const V z2 = hn::Mul(cubic, hn::Set(d, 2.0f * 0.7978845608f));
    return hn::Mul(hn::Mul(gate, Sigmoid(d, z2)), up);
  }
};

struct Sum {
  HWY_INLINE V operator()(F, V a, V b) const { return hn::Add(a, b); }
};

void GatedActivation(Activation activation, const float* gate, const float* up, int64_t count,
                     float* y) {
  if (activation == Activation::silu) {
    Map(gate, up, count, y, Silu());
  } else {
    Map(gate, up, count, y, GeluTanh());
  }
}

void AddTo(float* x, const float* y, int64_t count) { Map(x, y, count, x, Sum()); }

void RmsNorm(const float* x, const float* weight, int64_t count, float eps, float* y) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V s0 = hn::Zero(d);
  V s1 = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const V a = hn::LoadU(d, x + i);
    const V b = hn::LoadU(d, x + i + lanes);
    s0 = hn::MulAdd(a, a, s0);
    s1 = hn::MulAdd(b, b, s1);
  }
  double sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1)));
  for (; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  if (!std::isfinite(sum)) {
    // Squares overflow FP32 from 1.8e19 on: x / Inf would be a silent row of zeros.
    sum = 0.0;
    for (i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  }
  const float scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(count) + eps));
  for (i = 0; i + lanes <= count; i += lanes) {
    const V scaled = hn::Mul(hn::LoadU(d, x + i), hn::Set(d, scale));
    hn::StoreU(hn::Mul(scaled, hn::LoadU(d, weight + i)), d, y + i);
  }
  for (; i < count; ++i) y[i] = x[i] * scale * weight[i];
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(GatedActivation);
HWY_EXPORT(AddTo);
HWY_EXPORT(RmsNorm);

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* y) {
  HWY_DYNAMIC_DISPATCH(RmsNorm)(x, weight, count, eps, y);
}

void gated_activation(Activation activation, const float* gate, const float* up, int64_t count,
                      float* y) {
  HWY_DYNAMIC_DISPATCH(GatedActivation)(activation, gate, up, count, y);
}

void add(float* x, const float* y, int64_t count) { HWY_DYNAMIC_DISPATCH(AddTo)(x, y, count); }

void soft_cap(float* x, int64_t count, float cap) {
  for (int64_t i = 0; i < count; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

bool all_finite(const float* x, int64_t count) {
  // 0 * x is NaN exactly for NaN and Inf, and a NaN survives every sum.
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += 0.0f * x[i];
  return sum == 0.0f;
}

}  // namespace thriftattn
#endif  // HWY_ONCE
