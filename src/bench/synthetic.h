// Keys, values and queries whose attention masses are known, so that a benchmark can ask for the
// fractions of pages that a policy promotes and skips while the whole rule runs on real pages.
//
// The query heads of a group point in a few directions u_r of their KV head. A page's K is noise
// plus sum_r a_r * u_r, and since the scores of direction r rise by a_r * |q| * scale, a_r sets the
// share of the attention that the page holds for it. Every head spreads a mass of 1 over heavy
// pages (above `promote`), base pages (between the thresholds), the rest (below `skip`), and its
// own open page, which takes what is left.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "thriftattn/attention.h"
#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

namespace thriftattn::bench {

// Whether the mass rule may promote pages, or skip their V, under this policy.
bool can_promote(const LayerPolicy& policy);
bool can_skip(const LayerPolicy& policy);

struct SyntheticSpec {
  LayerShape shape;
  LayerPolicy policy;
  int64_t tokens = 0;   // of a sequence, the queries' own included
  int64_t queries = 1;  // the last tokens
  double promoted = 0;  // fraction of the complete pages; 0 where the policy cannot promote
  double skipped = 0;   // the same for skipping
  uint64_t seed = 1;
};

class SyntheticData {
 public:
  // Throws Error where no attention can be drawn that gives these fractions.
  explicit SyntheticData(const SyntheticSpec& spec);
  ~SyntheticData();
  SyntheticData(SyntheticData&&) noexcept;

  // K and V of `n` tokens from `first` on as [n][kv_heads][head_dim]; threaded. Sequences differ
  // in their noise only.
  void fill(int64_t sequence, int64_t first, int64_t n, float* k, float* v) const;
  // What a page adds to the K of its tokens, [kv_heads][head_dim_k]: for those who draw their noise
  // elsewhere. Of every page after the last complete one, what its tokens get.
  void page_mean(int64_t page, float* out) const;
  // [queries][q_heads][head_dim_k], for a softmax scale of 1 / sqrt(head_dim_k).
  std::vector<float> queries() const;

  // Throws Error if what decode queries found is off by more than 20 %; pages that the policy
  // reads in full whatever their mass come on top of those asked for. `slack`, a fraction of the
  // pages, is allowed where 20 % are less.
  void check(const AttendStats& found, double slack = 0) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace thriftattn::bench
