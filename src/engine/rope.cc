// Rotary position embeddings: frequencies, tables and the rotation itself.
#include "engine/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace thriftattn {

namespace {

// The index of the pair that turns `turns` times within the original context; not an integer.
double pair_of_turns(const RopeConfig& config, double turns) {
  const double wavelength = static_cast<double>(config.yarn->original_context) / turns;
  return static_cast<double>(config.dims) * std::log(wavelength / (2.0 * std::numbers::pi)) /
         (2.0 * std::log(config.freq_base));
}

}  // namespace

std::vector<double> rope_frequencies(const RopeConfig& config, const std::vector<float>& factors) {
  // The ramp of YaRN begins and ends at whole pairs, as in its authors' code.
  double begin = 0.0, end = 0.0;
  if (config.yarn) {
    begin = std::max(0.0, std::floor(pair_of_turns(config, config.yarn->beta_fast)));
    end = std::min(static_cast<double>(config.dims - 1),
                   std::ceil(pair_of_turns(config, config.yarn->beta_slow)));
  }
  std::vector<double> frequencies(static_cast<size_t>(config.dims / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(config.dims);
    double trained = std::pow(config.freq_base, exponent);
    if (config.freq_factors) trained /= static_cast<double>(factors.at(i));
    frequencies[i] = trained / config.linear_factor;
    if (config.yarn) {
      const double ramp = (static_cast<double>(i) - begin) / std::max(0.001, end - begin);
      const double stretched = std::clamp(ramp, 0.0, 1.0);
      frequencies[i] = frequencies[i] * stretched + trained * (1.0 - stretched);
    }
  }
  return frequencies;
}

double rope_magnitude(const RopeConfig& config) {
  if (!config.yarn) return 1.0;
  return config.yarn->attn_factor * (1.0 + 0.1 * std::log(config.linear_factor));
}

RopeTable::RopeTable(const std::vector<double>& frequencies, int64_t first, int64_t count,
                     double magnitude)
    : pairs(static_cast<int64_t>(frequencies.size())) {
  cos.reserve(static_cast<size_t>(count * pairs));
  sin.reserve(static_cast<size_t>(count * pairs));
  for (int64_t t = 0; t < count; ++t) {
    for (const double frequency : frequencies) {
      const double angle = static_cast<double>(first + t) * frequency;
      cos.push_back(static_cast<float>(magnitude * std::cos(angle)));
      sin.push_back(static_cast<float>(magnitude * std::sin(angle)));
    }
  }
}

void apply_rope(const RopeTable& table, int64_t row, RopeLayout layout, float* head) {
  const float* cos = table.cos.data() + row * table.pairs;
  const float* sin = table.sin.data() + row * table.pairs;
  const int64_t step = layout == RopeLayout::interleaved ? 2 : 1;
  const int64_t other = layout == RopeLayout::interleaved ? 1 : table.pairs;
  for (int64_t i = 0; i < table.pairs; ++i) {
    float& a = head[i * step];
    float& b = head[i * step + other];
    const float a0 = a;
    a = a0 * cos[i] - b * sin[i];
    b = a0 * sin[i] + b * cos[i];
  }
}

}  // namespace thriftattn
