// Decode of all KV heads of a store at one or more positions of one page: a DecodeTile for each,
// worked through page by page, so that the cache is read in the order in which it lies in memory.
// (A head at a time reads 5 KB of every 78 KB: a third of the bandwidth on the machines measured,
// docs/budget-cpu.md.)
#pragma once

#include <cstdint>
#include <vector>

#include "attend/decode_tile.h"
#include "base/scratch_pool.h"

namespace thriftattn {

class DecodeHeads {
 public:
  // The positions of `spec`; its kv_head is not looked at.
  DecodeHeads(const LayerView& view, const AttendRequest& request, const TileSpec& spec,
              const DecodeKernels& kernels, ScratchPool& scratch);

  void run(bool parallel, AttendStats* stats);

 private:
  template <typename F>
  void over_parts(bool parallel, const F& f);
  template <typename F>
  void over_heads(bool parallel, const F& f);
  void score(int64_t split, int64_t head_begin, int64_t head_end);
  void accumulate(int64_t split, int64_t head_begin, int64_t head_end);

  std::vector<DecodeTile> heads_;
  // [pages][heads][blocks] of weights, written and read in that order; then the heads' floats.
  ScratchPool::Lease memory_;
};

}  // namespace thriftattn
