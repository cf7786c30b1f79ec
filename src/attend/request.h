// The checks that attend() and attend_reference() share, and what a request reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "cache/kv_cache_impl.h"
#include "thriftattn/attention.h"

namespace thriftattn {

// Throws Error naming what is wrong with any of the requests, also between them (outputs that
// share memory); else what request i reads: one view for each group of KV heads with a policy of
// its own.
std::vector<std::vector<LayerView>> checked_views(const KvCache& cache,
                                                  std::span<const AttendRequest> requests);

// One request for each sequence of a packed batch, after the checks of its own form.
std::vector<AttendRequest> requests_of(const KvCache& cache, const PackedQueries& batch);

// What queries see: the positions of a request's queries and the pages that are open for them.
class Visibility {
 public:
  Visibility(const LayerView& view, const AttendRequest& request)
      : length_(view.length()),
        committed_(view.committed()),
        window_(view.store().shape.window),
        mode_(request.config.mode),
        causal_(request.config.causal) {}

  // Tokens that the query at `position` sees end here; also what `recent` is relative to.
  int64_t end(int64_t position) const { return causal_ ? position + 1 : length_; }
  int64_t begin(int64_t position) const {
    return window_ > 0 ? std::max<int64_t>(0, position + 1 - window_) : 0;
  }
  // Pages from this one on are read in open form.
  int64_t open_from(int64_t position) const {
    if (mode_ == AttendMode::prefill) return committed_ / kPageTokens;
    return (end(position) - 1) / kPageTokens;
  }

 private:
  int64_t length_, committed_, window_;
  AttendMode mode_;
  bool causal_;
};

}  // namespace thriftattn
