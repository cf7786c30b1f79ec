// Scores of a page that are known before attention, for PromoteRule::budget (DESIGN section 6:
// for comparison with the mass rule). `mean` needs the page's stored mean only. `quest` and
// `variance` need the elementwise bounds or variance of K, which the summaries do not hold
// (metadata is small on purpose): they are taken from the decoded base plane. All are of K as it
// is stored - equalised, rotated, centred - and of q in the same basis.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "thriftattn/policy.h"

namespace thriftattn {

// K of one page for scoring: what is added to the offset q'.mean.
struct ScoredPage {
  const float* k = nullptr;  // [tokens][dim], decoded base plane
  int64_t tokens = 0, dim = 0;
  int64_t index = 0;  // absolute page index
};

// Query rows side by side, times softmax_scale: [dim][cols].
struct ScoredQueries {
  const float* q = nullptr;
  int64_t cols = 0;
  const float* offset = nullptr;  // [cols]: q'.mean of the page
};

// out[cols]; every score but `oracle`, which attention itself computes. A column is one chain of
// additions over dim, so that it does not depend on its neighbours.
inline void block_scores(BlockScore score, const ScoredPage& page, const ScoredQueries& queries,
                         float* out) {
  const int64_t cols = queries.cols;
  if (score == BlockScore::local) {
    std::fill_n(out, cols, static_cast<float>(page.index));
    return;
  }
  std::copy_n(queries.offset, cols, out);
  if (score != BlockScore::quest && score != BlockScore::variance) return;
  const auto n = static_cast<size_t>(page.dim);
  std::vector<float> low(page.k, page.k + n), high(low), sum(n, 0.0f), squares(n, 0.0f);
  for (int64_t t = 0; t < page.tokens; ++t) {
    for (size_t d = 0; d < n; ++d) {
      const float x = page.k[static_cast<size_t>(t) * n + d];
      low[d] = std::min(low[d], x);
      high[d] = std::max(high[d], x);
      sum[d] += x;
      squares[d] += x * x;
    }
  }
  const float count = static_cast<float>(page.tokens);
  for (size_t d = 0; d < n; ++d) {
    const float* q = queries.q + static_cast<int64_t>(d) * cols;
    const float mean = sum[d] / count;
    const float variance = std::max(0.0f, squares[d] / count - mean * mean);
    for (int64_t c = 0; c < cols; ++c) {
      if (score == BlockScore::quest) {
        out[c] += std::max(q[c] * low[d], q[c] * high[d]);
      } else {
        // mean: of the decoded codes, near 0 where the page is centred.
        out[c] += q[c] * mean + 0.5f * q[c] * q[c] * variance;
      }
    }
  }
}

}  // namespace thriftattn
