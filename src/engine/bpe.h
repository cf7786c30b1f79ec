// Byte-pair encoding of one word: starts from its bytes and applies the merge of the lowest rank,
// the leftmost first, until none applies.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace thriftattn {

class BpeMerges {
 public:
  struct Merge {
    int32_t rank;  // the lower, the earlier
    int32_t result;
  };

  void reserve(size_t merges);
  // The first of two equal pairs stays.
  void add(int32_t left, int32_t right, Merge merge);
  const Merge* find(int32_t left, int32_t right) const;

  // Replaces `symbols` by what merging leaves. O(n log n).
  void apply(std::vector<int32_t>& symbols) const;

 private:
  // Open addressing; a slot with rank < 0 is empty. Lookups dominate encoding, and this halves
  // their time against std::unordered_map.
  struct Slot {
    uint64_t pair = 0;
    Merge merge{-1, -1};
  };
  size_t slot_of(uint64_t pair) const;
  void apply_scan(std::vector<int32_t>& symbols) const;
  void apply_heap(std::vector<int32_t>& symbols) const;

  std::vector<Slot> slots_;
  size_t count_ = 0;
};

// GPT-2's alphabet, which writes every byte as a printable character, back to bytes. Characters
// outside it stand for themselves.
std::string decode_byte_alphabet(std::string_view text);

}  // namespace thriftattn
