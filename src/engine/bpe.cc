// Byte-pair merging. Words are mostly shorter than a dozen bytes: there, looking through all pairs
// for the best one is fastest. Longer words (a line of dashes, base64) use a heap over a linked
// list, so that no text takes quadratic time. Both give the same result.
#include "engine/bpe.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "engine/utf8.h"

namespace thriftattn {
namespace {

constexpr size_t kScanLimit = 24;
constexpr int32_t kNoMerge = std::numeric_limits<int32_t>::max();

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

// The byte of each code point of GPT-2's alphabet: printable Latin-1 stands for itself, the other
// bytes follow in order from U+0100. -1: not in the alphabet.
constexpr std::array<int16_t, 0x144> make_alphabet() {
  std::array<int16_t, 0x144> byte_of{};
  for (auto& b : byte_of) b = -1;
  int next = 0x100;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    byte_of[static_cast<size_t>(printable ? b : next++)] = static_cast<int16_t>(b);
  }
  return byte_of;
}
constexpr auto kByteOf = make_alphabet();
static_assert(kByteOf[0x143] == 0xAD, "the alphabet ends with the soft hyphen at U+0143");

}  // namespace

std::string decode_byte_alphabet(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t n = utf8_char_bytes(text, at);
    const uint32_t c = n > 0 ? utf8_decode(text, at, n) : 0xFFFFFFFF;
    if (c < kByteOf.size() && kByteOf[c] >= 0) {
      out += static_cast<char>(kByteOf[c]);
    } else {
      out += text.substr(at, std::max<size_t>(n, 1));
    }
    at += std::max<size_t>(n, 1);
  }
  return out;
}

void BpeMerges::reserve(size_t merges) {
  const size_t wanted = std::bit_ceil(std::max<size_t>(16, merges * 2));
  if (wanted <= slots_.size()) return;
  std::vector<Slot> old(wanted);
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (slot.merge.rank >= 0) slots_[slot_of(slot.pair)] = slot;
  }
}

size_t BpeMerges::slot_of(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  // Fibonacci hashing; the upper half of the product depends on all bits of the pair.
  size_t i = static_cast<size_t>((pair * 0x9E3779B97F4A7C15u) >> 32) & mask;
  while (slots_[i].merge.rank >= 0 && slots_[i].pair != pair) i = (i + 1) & mask;
  return i;
}

void BpeMerges::add(int32_t left, int32_t right, Merge merge) {
  if ((count_ + 1) * 2 > slots_.size()) reserve(std::max<size_t>(16, slots_.size()));
  Slot& slot = slots_[slot_of(pair_key(left, right))];
  if (slot.merge.rank >= 0) return;
  slot = {pair_key(left, right), merge};
  ++count_;
}

const BpeMerges::Merge* BpeMerges::find(int32_t left, int32_t right) const {
  if (slots_.empty()) return nullptr;
  const Slot& slot = slots_[slot_of(pair_key(left, right))];
  return slot.merge.rank >= 0 ? &slot.merge : nullptr;
}

void BpeMerges::apply(std::vector<int32_t>& symbols) const {
  if (symbols.size() <= kScanLimit) {
    apply_scan(symbols);
  } else {
    apply_heap(symbols);
  }
}

void BpeMerges::apply_scan(std::vector<int32_t>& symbols) const {
  size_t n = symbols.size();
  if (n < 2) return;
  constexpr Merge kNone{kNoMerge, -1};
  const auto merge_at = [&](size_t i) {
    const Merge* m = i + 1 < n ? find(symbols[i], symbols[i + 1]) : nullptr;
    return m != nullptr ? *m : kNone;
  };
  std::array<Merge, kScanLimit> merges;  // of the pair that begins at i
  for (size_t i = 0; i < n; ++i) merges[i] = merge_at(i);
  for (;;) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (merges[i].rank < merges[best].rank) best = i;
    }
    if (n < 2 || merges[best].rank == kNoMerge) break;
    symbols[best] = merges[best].result;
    --n;
    for (size_t i = best + 1; i < n; ++i) {
      symbols[i] = symbols[i + 1];
      merges[i] = merges[i + 1];
    }
    merges[best] = merge_at(best);
    if (best > 0) merges[best - 1] = merge_at(best - 1);
  }
  symbols.resize(n);
}

void BpeMerges::apply_heap(std::vector<int32_t>& symbols) const {
  struct Candidate {
    int32_t rank;
    uint32_t at, right;  // positions of the two symbols
    int32_t left_symbol, right_symbol, result;
    bool operator<(const Candidate& o) const {  // std heaps are max heaps
      return rank != o.rank ? rank > o.rank : at > o.at;
    }
  };
  constexpr uint32_t kEnd = std::numeric_limits<uint32_t>::max();
  const auto n = static_cast<uint32_t>(symbols.size());
  std::vector<uint32_t> previous(n), next(n);
  std::vector<Candidate> heap;
  const auto candidate = [&](uint32_t left, uint32_t right) {
    if (left == kEnd || right == kEnd) return false;
    const Merge* m = find(symbols[left], symbols[right]);
    if (m == nullptr) return false;
    heap.push_back({m->rank, left, right, symbols[left], symbols[right], m->result});
    return true;
  };
  for (uint32_t i = 0; i < n; ++i) {
    previous[i] = i == 0 ? kEnd : i - 1;
    next[i] = i + 1 == n ? kEnd : i + 1;
    candidate(i, next[i]);
  }
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    const Candidate c = heap.front();
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    // A candidate is stale if either symbol has been merged since (a merged right one is -1).
    if (symbols[c.at] != c.left_symbol || symbols[c.right] != c.right_symbol ||
        next[c.at] != c.right) {
      continue;
    }
    symbols[c.at] = c.result;
    symbols[c.right] = -1;
    next[c.at] = next[c.right];
    if (next[c.at] != kEnd) previous[next[c.at]] = c.at;
    if (candidate(c.at, next[c.at])) std::push_heap(heap.begin(), heap.end());
    if (candidate(previous[c.at], c.at)) std::push_heap(heap.begin(), heap.end());
  }
  std::erase(symbols, -1);
}

}  // namespace thriftattn
