// Leftmost longest match by narrowing a range of the sorted texts byte by byte. A trie would be
// faster on texts full of matches, but takes many times the memory of the texts, which come from a
// file; most positions end at the table of first bytes anyway.
#include "engine/special_tokens.h"

#include <algorithm>

namespace thriftattn {

void SpecialTokens::add(std::string_view text, int32_t id) {
  if (!text.empty()) tokens_.emplace_back(text, id);
}

void SpecialTokens::build() {
  std::stable_sort(tokens_.begin(), tokens_.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  first_.fill(0);
  for (const auto& token : tokens_) ++first_[static_cast<unsigned char>(token.first[0]) + 1u];
  for (size_t b = 0; b < 256; ++b) first_[b + 1] += first_[b];
}

SpecialTokens::Match SpecialTokens::find(std::string_view text, size_t from) const {
  for (size_t at = from; at < text.size(); ++at) {
    const auto b = static_cast<unsigned char>(text[at]);
    auto low = tokens_.begin() + first_[b], high = tokens_.begin() + first_[b + 1u];
    Match best{at, 0, -1};
    for (size_t depth = 1; low != high; ++depth) {
      // All of [low, high) agree with the text on `depth` bytes; the shortest sorts first.
      if (low->first.size() == depth) best = {at, depth, low->second};
      while (low != high && low->first.size() == depth) ++low;
      if (at + depth == text.size()) break;
      const auto next = static_cast<unsigned char>(text[at + depth]);
      const auto byte = [&](const auto& token) {
        return static_cast<unsigned char>(token.first[depth]);
      };
      low = std::partition_point(low, high, [&](const auto& t) { return byte(t) < next; });
      high = std::partition_point(low, high, [&](const auto& t) { return byte(t) == next; });
    }
    if (best.bytes > 0) return best;
  }
  return {text.size(), 0, -1};
}

}  // namespace thriftattn
