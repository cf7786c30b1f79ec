// Decode of one KV head for a few queries: the query heads of its group at one or more positions of
// one page, in blocks of four rows. Two phases over fixed splits of pages, as in AttendTile: the
// scores of a split from the base planes, left as exp(s - m) of each page; then, with the LSE over
// everything visible, each page's mass decides its precision and the values are weighed. All
// partial sums are relative to that LSE, so splits are added, in their order.
//
// This is the fast path of AttendMath::fast for K and V in nvfp4, nvfp4x2 and bf16; AttendTile does
// the rest, and everything in AttendMath::f32.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned.h"
#include "base/scratch_pool.h"
#include "attend/attend_tile.h"
#include "attend/decode_kernels.h"

namespace thriftattn {

class DecodeTile {
 public:
  // Whether this layer's formats and rule are in the kernels' reach.
  static bool supports(const LayerStore& store);

  DecodeTile(const LayerView& view, const AttendRequest& request, const TileSpec& spec,
             const DecodeKernels& kernels, ScratchPool& scratch);

  int64_t splits() const { return split_end_ - split_begin_; }
  void score(int64_t split);       // phase 1, independent across splits
  void combine();                  // after every score()
  void accumulate(int64_t split);  // phase 2, independent across splits
  void finish(AttendStats* stats);  // writes out and lse

 private:
  struct Page {
    int64_t index;  // of the sequence
    bool sealed;    // complete before the queries, or plain
    bool whole;     // every row sees all 64 tokens
  };

  int64_t page_first(int64_t split) const;
  int64_t page_last(int64_t split) const;
  Page page(int64_t index) const;
  int64_t at(int64_t page, int64_t block) const {
    return (page - page_begin_) * blocks_ + block;
  }
  float* weights(int64_t page, int64_t block) {
    return p_.get() + at(page, block) * kBlockScores;
  }
  int64_t position_of(int64_t row) const { return row / group_; }
  // The layer's query head of a row: the index into q, out, lse and sink_logits.
  int64_t q_head(int64_t row) const {
    return store_.model_head(spec_.kv_head) * group_ + row % group_;
  }
  PageRead read(int64_t page, int64_t row) const {
    return reads_[static_cast<size_t>((page - page_begin_) * spec_.positions + position_of(row))];
  }

  void pack_queries();
  Bf16Rows bf16_rows(const SideLayout& side, const Page& page) const;
  Nvfp4ConstPlane base_plane(const SideLayout& side, const Page& page) const;
  Nvfp4ConstPlane residual_plane(const SideLayout& side, const Page& page) const;
  const uint16_t* k_mean(const Page& page) const;
  NextRows rows_to_come(const SideLayout& side, int64_t page) const;
  void score_page(const Page& page, int64_t first_block, int64_t blocks, float* s,
                  const NextRows& next) const;
  void softmax_page(const Page& page, int64_t block, float* s, float* m, float* l) const;
  float top_mass(int64_t page, int64_t position) const;
  PageFacts facts(int64_t page, int64_t position) const;
  void apply_cap();
  void decide(const Page& page);
  void promote(const Page& page, int64_t block, float* sums, float* factor);
  void weigh(const Page& page, float* accumulators, float* sums, const NextRows& next);
  bool reads_values(int64_t page) const;
  void add_stats(AttendStats& stats) const;

  const LayerView& view_;
  const AttendRequest& request_;
  const LayerStore& store_;
  const DecodeKernels& kernels_;
  Visibility visible_;
  TileSpec spec_;
  int64_t group_, rows_, blocks_;
  int64_t page_begin_, page_end_, open_from_;
  int64_t split_begin_, split_end_;
  bool layered_;  // some side has planes: pages have tiers

  std::vector<float> queries_;                 // [rows][dim] FP32, transformed and scaled
  std::vector<const float*> query_rows_;       // [blocks * 4], null behind the last row
  AlignedBuffer<std::byte> packed_;
  ScratchPool::Lease p_;                       // [pages][blocks][256]: exp(s - m) of each page
  std::vector<float> m_, l_;                   // [block][pages][4]: each page's own state
  std::vector<float> mass_, factor_;           // [block][pages][4], relative to lse_
  std::vector<float> final_mass_;              // [block][pages][4]: after promotion
  std::vector<float> lse_;                     // [blocks * 4], of base scores, sinks included
  std::vector<PageRead> reads_;                // [pages][positions]
  std::vector<float> promote_;                 // [positions]: the policy's, or higher by the cap
  std::vector<AlignedFloats> accumulators_;    // per split, [blocks]
  std::vector<std::vector<float>> sums_;       // per split, [blocks * 4]: of weights
};

}  // namespace thriftattn
