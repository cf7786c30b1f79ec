// One tile of attention: the query heads of one KV head's group at one or more positions of one
// page, over every page they see. Two phases over fixed splits of pages: scores from the base
// planes, then - with the LSE over everything visible - each page's mass decides its precision
// and P.V is accumulated. Splits meet only in finish(), through softmax_state.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attend/request.h"
#include "attend/softmax_state.h"
#include "attend/tile_kernels.h"
#include "attend/tile_pages.h"
#include "cache/kv_cache_impl.h"
#include "thriftattn/attention.h"

namespace thriftattn {

class AttendTile {
 public:
  AttendTile(const LayerView& view, const AttendRequest& request, const TileSpec& spec);

  int64_t splits() const { return range_.splits(); }
  void score(int64_t split);       // phase 1, independent across splits
  void combine();                  // after every score()
  void accumulate(int64_t split);  // phase 2, independent across splits
  void finish(AttendStats* stats);  // writes out and lse

 private:
  using Buffer = std::unique_ptr<float[]>;

  struct SplitState {
    std::vector<float> m, l;  // [cols] over final scores
    Buffer o;                 // [cols][head_dim_v]
  };

  bool is_sealed(int64_t page) const { return page < range_.open_from; }
  int64_t page_tokens(int64_t page) const;  // tokens of the page held so far
  float* scores(int64_t page) { return scores_.get() + (page - range_.begin) * kPageTokens * cols_; }
  PageRead& read(int64_t page, int64_t i) {
    return reads_[static_cast<size_t>((page - range_.begin) * spec_.positions + i)];
  }
  // The layer's query head of a group's head: the index into q, out, lse and sink_logits.
  int64_t q_head(int64_t group_head) const {
    return store_.model_head(spec_.kv_head) * group_ + group_head;
  }
  const float* sink(int64_t group_head) const;

  void load_queries();
  void load_values(const SideLayout& side, int64_t page, float* out) const;
  void load_k_offset(int64_t page, std::vector<float>& offset) const;
  void mask(int64_t page, float* s) const;
  ScoreBlock capped_scores(int64_t page, float* s, std::vector<float>& copy) const;
  void score_with_residual(const std::vector<int64_t>& columns, const float* residual,
                           float* s) const;
  void choose_by_budget();
  void apply_cap();
  float top_mass(int64_t page, int64_t i) const;
  PageFacts facts(int64_t page, int64_t i) const;
  void decide(int64_t page);
  PageRead read_as(int64_t page, int64_t i);
  std::vector<int64_t> columns_of(int64_t page, PageRead kind);
  void accumulate_v(int64_t page, SplitState& state, float* p, const float* page_sum,
                    std::vector<float>& v);
  void add_stats(AttendStats& stats, const std::vector<float>& lse);

  const LayerView& view_;
  const AttendRequest& request_;
  const LayerStore& store_;
  Visibility visible_;
  TileSpec spec_;
  int64_t group_, rows_, cols_;  // rows = positions * group; cols = rows padded to lanes
  PageRange range_;
  Buffer queries_;  // [head_dim_k][cols], transformed as K is, times softmax_scale
  Buffer scores_;   // [pages][64][cols], before the softcap
  std::vector<PageRead> reads_;        // [pages][positions]
  std::vector<uint8_t> budget_choice_;  // [positions][pages]: PromoteRule::budget
  std::vector<float> page_score_;      // [pages][cols]: PromoteRule::budget, but for the oracle
  std::vector<float> page_lse_full_;   // [pages][cols]: for the oracle
  std::vector<float> promote_;         // [positions]: the policy's, or higher by the cap
  bool needs_mass_ = false;  // decode over layered pages: the rule decides
  std::vector<float> page_m_, page_l_;  // [pages][cols]: the page's own state, base scores
  std::vector<float> page_mass_;       // [pages][cols]: base mass
  std::vector<float> page_sum_;        // [pages][cols]: sum of P, against the split's m
  std::vector<SplitState> states_;
};

}  // namespace thriftattn
