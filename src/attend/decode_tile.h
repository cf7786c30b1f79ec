// Decode of one KV head for a few queries: the query heads of its group at one or more positions of
// one page, in blocks of four rows. Two phases over fixed splits of pages, as in AttendTile: the
// scores of a split from the base planes, left as exp(s - m) of each page; then, with the LSE over
// everything visible, each page's mass decides its precision and the values are weighed. All
// partial sums are relative to that LSE, so splits are added, in their order.
//
// This is the path of AttendMath::fast for every pair of formats under the mass rule; AttendTile
// does the other rules, and everything in AttendMath::f32.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attend/decode_kernels.h"
#include "attend/decode_source.h"
#include "attend/tile_pages.h"
#include "base/aligned.h"

namespace thriftattn {

class DecodeTile {
 public:
  // Whether this layer's rule and group are in the kernels' reach.
  static bool supports(const LayerStore& store);
  // The kernels that this layer's formats want: BF16 dot products where the machine has them and no
  // side is FP32 or FP16, which BF16 would take digits from.
  static const DecodeKernels& kernels_for(const LayerStore& store);

  // Memory of the caller, uninitialised, on 64-byte lines. Weights between the phases: page j's of
  // all blocks, weights_bytes() of them, at weights + j * weights_stride, pages counted from the
  // first that is read. Sums and states: floats() of them.
  struct Memory {
    std::byte* weights = nullptr;
    int64_t weights_stride = 0;
    float* floats = nullptr;
  };

  DecodeTile(const LayerView& view, const AttendRequest& request, const TileSpec& spec,
             const DecodeKernels& kernels);

  int64_t pages() const { return range_.pages(); }
  int64_t weights_bytes() const { return blocks_ * kernels_.weights_bytes; }
  int64_t floats() const;
  void set_memory(const Memory& memory);  // before anything below

  int64_t splits() const { return range_.splits(); }
  // Pages of a split: [first, last). Phase 1 takes any page in any order, phase 2 those of a split
  // in theirs, between begin_split() and the next one's. `next` is what is read afterwards.
  int64_t page_first(int64_t split) const { return range_.first(split); }
  int64_t page_last(int64_t split) const { return range_.last(split); }
  void score_page(int64_t page, const NextRows& next);  // phase 1
  void combine();                                       // after every page
  void begin_split(int64_t split);                      // phase 2
  void weigh_page(int64_t split, int64_t page, const NextRows& next);
  void write_output();  // out and lse, after every split
  void add_stats(AttendStats& stats) const;
  // Where the rows lie that phase 1, phase 2 will read of a page; nothing if they are near already
  // or will not be read.
  NextRows keys_to_come(int64_t page) const;
  NextRows values_to_come(int64_t page) const;

 private:
  struct Page {
    int64_t index;  // of the sequence
    bool sealed;    // complete before the queries, or plain
    bool whole;     // every row sees all 64 tokens
  };

  Page page(int64_t index) const;
  std::byte* weights(int64_t page, int64_t block) {
    return memory_.weights + (page - range_.begin) * memory_.weights_stride +
           block * kernels_.weights_bytes;
  }
  size_t state(int64_t page, int64_t block) const {
    return static_cast<size_t>((block * pages() + page - range_.begin) * kRowBlock);
  }
  int64_t states() const { return pages() * blocks_ * kRowBlock; }
  int64_t accumulator_floats() const {
    return blocks_ * kernels_.accumulator_floats(store_.layout.v.dim);
  }
  // A split's accumulators, then the sums of weights of its rows.
  int64_t split_floats() const { return accumulator_floats() + kMaxBlocks * kRowBlock; }
  float* split_sums(int64_t split) const { return sums_ + split * split_floats(); }
  int64_t position_of(int64_t row) const { return row / group_; }
  // The layer's query head of a row: the index into q, out, lse and sink_logits.
  int64_t q_head(int64_t row) const {
    return store_.model_head(spec_.kv_head) * group_ + row % group_;
  }
  PageRead read(int64_t page, int64_t row) const {
    return reads_[static_cast<size_t>((page - range_.begin) * spec_.positions + position_of(row))];
  }

  void pack_queries();
  NextRows rows_to_come(const SideLayout& side, int64_t page) const;
  float base_scale(const SideLayout& side, const Page& page) const;
  void score(const Page& page, int64_t first_block, int64_t blocks, float* s,
             const NextRows& next) const;
  void softmax_page(const Page& page, int64_t block, float* s, float* m, float* l) const;
  float top_mass(int64_t page, int64_t position) const;
  PageFacts facts(int64_t page, int64_t position) const;
  void apply_cap();
  void decide(const Page& page);
  void promote(const Page& page, int64_t block, float* sums, float* factor);
  void weigh(const Page& page, float* accumulators, float* sums, const NextRows& next);
  bool reads_values(int64_t page) const;

  const AttendRequest& request_;
  const LayerStore& store_;
  const DecodeKernels& kernels_;
  Visibility visible_;
  TileSpec spec_;
  int64_t group_, rows_, blocks_;
  PageRange range_;
  DecodeSource source_;
  bool layered_;  // some side has planes: pages have tiers

  std::vector<float> queries_;  // [blocks * 4][dim] FP32, transformed and scaled
  AlignedBuffer<std::byte> packed_;
  Memory memory_;
  // In memory_. States are [block][pages][4], masses relative to lse_.
  float *m_ = nullptr, *l_ = nullptr;  // each page's own
  float *mass_ = nullptr, *factor_ = nullptr;
  float* final_mass_ = nullptr;  // after promotion
  float* sums_ = nullptr;        // per split: split_floats()
  std::vector<float> v_scale_;   // [pages]: kept from phase 1, which has the line
  std::vector<float> lse_;       // [blocks * 4], of base scores, sinks included
  std::vector<PageRead> reads_;  // [pages][positions]
  std::vector<float> promote_;   // [positions]: the policy's, or higher by the cap
};

}  // namespace thriftattn
