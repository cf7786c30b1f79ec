// Rotary position embeddings in FP32: angles are computed in FP64, because a position of
// 100 000 times an FP32 frequency is off by a hundredth of a radian.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/model_config.h"

namespace thriftattn {

// Radians per position for each of dims/2 pairs. `factors` is rope_freqs.weight (dims/2
// values that divide the frequencies), or empty.
std::vector<double> rope_frequencies(const RopeConfig& config, const std::vector<float>& factors);

// What cos and sin are multiplied with, for q and for k: YaRN's attn_factor * (1 + ln(factor) /
// 10), which sharpens the attention over the longer context; 1 without YaRN.
double rope_magnitude(const RopeConfig& config);

// cos and sin for the positions first .. first + count - 1, times `magnitude`: [count][dims/2]
// each.
struct RopeTable {
  RopeTable() = default;
  RopeTable(const std::vector<double>& frequencies, int64_t first, int64_t count,
            double magnitude = 1.0);

  int64_t pairs = 0;
  std::vector<float> cos, sin;
};

// Turns one head in place by row `row` of the table. Elements from 2 * pairs on are untouched.
void apply_rope(const RopeTable& table, int64_t row, RopeLayout layout, float* head);

}  // namespace thriftattn
