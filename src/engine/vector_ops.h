// What a transformer does between its matrix products, one row of FP32 activations at a time.
#pragma once

#include <cstdint>

#include "engine/model_config.h"

namespace thriftattn {

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* y);
// y = activation(gate) * up; y may be gate.
void gated_activation(Activation activation, const float* gate, const float* up, int64_t count,
                      float* y);
// x += y.
void add(float* x, const float* y, int64_t count);
// x = cap * tanh(x / cap).
void soft_cap(float* x, int64_t count, float cap);
// Whether no value is NaN or Inf.
bool all_finite(const float* x, int64_t count);

}  // namespace thriftattn
