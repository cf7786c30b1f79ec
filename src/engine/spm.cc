// SentencePiece's BPE. Its merges cannot be confined to words (pieces may hold spaces), so the heap
// is over the whole text; pieces longer than the longest of the vocabulary are not looked up, which
// keeps a long run of one character from costing quadratic time.
#include "engine/spm.h"

#include <algorithm>
#include <limits>

#include "engine/utf8.h"

namespace thriftattn {

void SpmPieces::add(std::string_view text, int32_t id, float score) {
  if (text.empty()) return;
  pieces_.emplace(text, Piece{id, score});
  longest_ = std::max(longest_, text.size());
}

bool SpmPieces::has_all_bytes() const {
  return std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end();
}

void SpmPieces::encode(std::string_view text, std::vector<int32_t>& ids) const {
  constexpr uint32_t kEnd = std::numeric_limits<uint32_t>::max();
  struct Symbol {
    uint32_t begin, bytes;  // bytes == 0: merged into the one before
    uint32_t previous, next;
  };
  struct Candidate {
    float score;
    uint32_t left, right;  // symbols
    uint32_t bytes;        // of the piece they form; another value now means the candidate is stale
    bool operator<(const Candidate& o) const {  // std heaps are max heaps
      return score != o.score ? score < o.score : left > o.left;
    }
  };

  std::vector<Symbol> symbols;
  symbols.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const size_t n = std::max<size_t>(1, utf8_char_bytes(text, at));
    const auto i = static_cast<uint32_t>(symbols.size());
    symbols.push_back(
        {static_cast<uint32_t>(at), static_cast<uint32_t>(n), i == 0 ? kEnd : i - 1, i + 1});
    at += n;
  }
  if (symbols.empty()) return;
  symbols.back().next = kEnd;

  std::vector<Candidate> heap;
  const auto candidate = [&](uint32_t left, uint32_t right) {
    if (left == kEnd || right == kEnd) return false;
    const uint32_t bytes = symbols[left].bytes + symbols[right].bytes;
    if (bytes > longest_) return false;
    const auto it = pieces_.find(text.substr(symbols[left].begin, bytes));
    if (it == pieces_.end()) return false;
    heap.push_back({it->second.score, left, right, bytes});
    return true;
  };
  for (uint32_t i = 0; i + 1 < symbols.size(); ++i) candidate(i, i + 1);
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    const Candidate c = heap.front();
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    Symbol &left = symbols[c.left], &right = symbols[c.right];
    if (left.bytes == 0 || right.bytes == 0 || left.bytes + right.bytes != c.bytes) continue;
    left.bytes = c.bytes;
    right.bytes = 0;
    left.next = right.next;
    if (left.next != kEnd) symbols[left.next].previous = c.left;
    if (candidate(left.previous, c.left)) std::push_heap(heap.begin(), heap.end());
    if (candidate(c.left, left.next)) std::push_heap(heap.begin(), heap.end());
  }

  for (uint32_t i = 0; i != kEnd; i = symbols[i].next) {
    const std::string_view piece = text.substr(symbols[i].begin, symbols[i].bytes);
    if (const auto it = pieces_.find(piece); it != pieces_.end()) {
      ids.push_back(it->second.id);
      continue;
    }
    // One character, or one byte that is not UTF-8: bytes, or the unknown token without them.
    const bool as_bytes = std::all_of(piece.begin(), piece.end(), [&](char b) {
      return byte_ids_[static_cast<unsigned char>(b)] >= 0;
    });
    if (as_bytes) {
      for (const char b : piece) ids.push_back(byte_ids_[static_cast<unsigned char>(b)]);
    } else if (unknown_id_ >= 0) {
      ids.push_back(unknown_id_);
    }
  }
}

}  // namespace thriftattn
