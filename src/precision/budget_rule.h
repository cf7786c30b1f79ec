// Promotion by budget: the best pages by a score known before attention, for comparison with
// the mass rule (the paper's rule, "5 % by block mean").
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace thriftattn {

// How many pages: a number of them, or ceil(fraction * candidates).
struct PageBudget {
  double fraction = 0;
  int64_t pages = 0;  // 0 = by fraction
};

// Flags the candidate pages with the highest scores; ties go to the lower index. `candidate[j]`
// is false for pages that are always in and not counted.
inline std::vector<uint8_t> select_by_budget(std::span<const float> scores,
                                             std::span<const uint8_t> candidate,
                                             const PageBudget& budget) {
  std::vector<int32_t> order;
  for (size_t j = 0; j < scores.size(); ++j) {
    if (candidate[j]) order.push_back(static_cast<int32_t>(j));
  }
  const double wanted =
      budget.pages > 0 ? static_cast<double>(budget.pages)
                       : std::ceil(budget.fraction * static_cast<double>(order.size()) - 1e-9);
  const auto count = static_cast<size_t>(std::min(static_cast<double>(order.size()), wanted));
  const auto better = [&](int32_t a, int32_t b) {
    const float sa = scores[static_cast<size_t>(a)], sb = scores[static_cast<size_t>(b)];
    return sa > sb || (sa == sb && a < b);
  };
  std::vector<uint8_t> selected(scores.size(), 0);
  if (count > 0 && count < order.size()) {
    std::nth_element(order.begin(), order.begin() + static_cast<ptrdiff_t>(count - 1), order.end(),
                     better);
  }
  for (size_t i = 0; i < count; ++i) selected[static_cast<size_t>(order[i])] = 1;
  return selected;
}

}  // namespace thriftattn
