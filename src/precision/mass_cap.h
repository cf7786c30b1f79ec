// The cap of the mass rule (DESIGN section 6): a query that would read more pages with their
// residual than `max` allows gets a higher threshold, so that what is promoted is still "every
// page above a threshold", and the report can say which.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace thriftattn {

// Pages that a query with `pages` complete ones may promote. Rounded up as budgets are, so that
// a short context may promote one.
inline int64_t promotion_cap(double max_promoted, int64_t pages) {
  return static_cast<int64_t>(std::ceil(max_promoted * static_cast<double>(pages) - 1e-9));
}

// The threshold under which at most `cap` of the masses are greater, strictly: `promote`, or the
// mass of the best page that is left out. Equal masses at the edge are all left out.
inline float capped_promote(std::vector<float> masses, float promote, int64_t cap) {
  std::erase_if(masses, [&](float mass) { return !(mass > promote); });
  if (static_cast<int64_t>(masses.size()) <= cap) return promote;
  const auto edge = masses.begin() + static_cast<ptrdiff_t>(cap);
  std::nth_element(masses.begin(), edge, masses.end(), std::greater<>());
  return *edge;
}

}  // namespace thriftattn
