// Rotary position embeddings: frequencies, tables and the rotation itself.
#include "engine/rope.h"

#include <cmath>

namespace thriftattn {

std::vector<double> rope_frequencies(const RopeConfig& config, const std::vector<float>& factors) {
  std::vector<double> frequencies(static_cast<size_t>(config.dims / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(config.dims);
    frequencies[i] = std::pow(config.freq_base, exponent) / config.linear_factor;
    if (config.freq_factors) frequencies[i] /= static_cast<double>(factors.at(i));
  }
  return frequencies;
}

RopeTable::RopeTable(const std::vector<double>& frequencies, int64_t first, int64_t count)
    : pairs(static_cast<int64_t>(frequencies.size())) {
  cos.reserve(static_cast<size_t>(count * pairs));
  sin.reserve(static_cast<size_t>(count * pairs));
  for (int64_t t = 0; t < count; ++t) {
    for (const double frequency : frequencies) {
      const double angle = static_cast<double>(first + t) * frequency;
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
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
