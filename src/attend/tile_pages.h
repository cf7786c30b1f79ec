// What every kind of tile does with its pages: which it sees, how they are cut into splits, and the
// cap on promotion.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "attend/request.h"
#include "precision/mass_cap.h"
#include "precision/mass_rule.h"

namespace thriftattn {

// Pages per split: a constant of the absolute page index, so that results depend neither on
// the number of threads nor on what else is attended.
inline constexpr int64_t kSplitPages = 32;

struct TileSpec {
  int64_t kv_head = 0;
  int64_t first_query = 0;  // index into the request's q
  int64_t positions = 0;    // consecutive tokens, all in one page
  int64_t first_token = 0;  // token index of first_query
};

// The pages of a tile: [begin, end), from open_from on in open form.
struct PageRange {
  int64_t begin = 0, end = 0, open_from = 0;

  PageRange(const Visibility& visible, const TileSpec& spec)
      : begin(visible.begin(spec.first_token) / kPageTokens),
        end((visible.end(spec.first_token) - 1) / kPageTokens + 1),
        open_from(visible.open_from(spec.first_token)) {}

  int64_t pages() const { return end - begin; }
  int64_t sealed_end() const { return std::min(open_from, end); }
  int64_t first_split() const { return begin / kSplitPages; }
  int64_t splits() const { return (end - 1) / kSplitPages + 1 - first_split(); }
  // Pages of a split, counted from the first.
  int64_t first(int64_t split) const {
    return std::max(begin, (first_split() + split) * kSplitPages);
  }
  int64_t last(int64_t split) const {
    return std::min(end, (first_split() + split + 1) * kSplitPages);
  }
};

// A position's threshold: `promote`, or higher where more pages than the cap allows would be
// promoted. Pages that are read with their residual anyway count neither way. `first` is the first
// page that the position sees: behind the first position's window a later one sees less.
// facts(page) and mass(page) are the position's.
template <typename Facts, typename Mass>
float promote_under_cap(const PageRange& range, int64_t first, float promote, double max_promoted,
                        const Facts& facts, const Mass& mass) {
  std::vector<float> masses;
  for (int64_t page = first; page < range.sealed_end(); ++page) {
    const PageFacts f = facts(page);
    if (f.has_residual && !f.forced_full) masses.push_back(mass(page));
  }
  const int64_t cap = promotion_cap(max_promoted, range.sealed_end() - first);
  return capped_promote(std::move(masses), promote, cap);
}

}  // namespace thriftattn
