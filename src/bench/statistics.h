// The statistics of a few noisy timings: the least, the middle one, and the middle of differences.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

namespace thriftattn::bench {

// The mean of the two middle ones for an even count; 0 of nothing.
inline double median(std::span<const double> samples) {
  if (samples.empty()) return 0.0;
  std::vector<double> x(samples.begin(), samples.end());
  std::sort(x.begin(), x.end());
  const size_t n = x.size();
  return n % 2 == 1 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

inline double minimum(std::span<const double> samples) {
  return samples.empty() ? 0.0 : *std::min_element(samples.begin(), samples.end());
}

// The median of a[i] - b[i]: samples of one round share the machine's state, so that what moves
// between rounds cancels.
inline double median_difference(std::span<const double> a, std::span<const double> b) {
  std::vector<double> d(std::min(a.size(), b.size()));
  for (size_t i = 0; i < d.size(); ++i) d[i] = a[i] - b[i];
  return median(d);
}

}  // namespace thriftattn::bench
