// The running state of a softmax-weighted sum: the one home of its conventions.
//
// A state (m, l, o) stands for sum_i exp(s_i) v_i = exp(m) * o and sum_i exp(s_i) = exp(m) * l,
// natural logarithms, FP32. Empty: m = -inf, l = 0, o = 0. An empty row's result is out = 0,
// lse = -inf. merge() is associative up to rounding; splits are merged in their order.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace thriftattn {

inline constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// The factor that moves a sum with reference maximum `from` to the reference maximum `to`.
inline float softmax_rescale(float from, float to) {
  return from == kNegInf ? 0.0f : std::exp(from - to);
}

struct SoftmaxScalar {
  float m = kNegInf;
  float l = 0;

  void merge(const SoftmaxScalar& other) {
    const float top = std::fmax(m, other.m);
    l = l * softmax_rescale(m, top) + other.l * softmax_rescale(other.m, top);
    m = top;
  }
  float lse() const { return l > 0 ? m + std::log(l) : kNegInf; }
};

// Merges the partial (other, o_other[dim]) into (state, o[dim]).
inline void softmax_merge(SoftmaxScalar& state, float* o, const SoftmaxScalar& other,
                          const float* o_other, int64_t dim) {
  const float top = std::fmax(state.m, other.m);
  const float a = softmax_rescale(state.m, top);
  const float b = softmax_rescale(other.m, top);
  for (int64_t d = 0; d < dim; ++d) o[d] = o[d] * a + o_other[d] * b;
  state.l = state.l * a + other.l * b;
  state.m = top;
}

}  // namespace thriftattn
