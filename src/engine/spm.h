// SentencePiece-style BPE: merges neighbouring pieces of a whole text in the order of the scores of
// the pieces they form, then writes what is not in the vocabulary as bytes.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace thriftattn {

class SpmPieces {
 public:
  // `text` must outlive this object. The first of two equal texts stays.
  void add(std::string_view text, int32_t id, float score);
  void set_byte(uint8_t byte, int32_t id) { byte_ids_[byte] = id; }
  void set_unknown(int32_t id) { unknown_id_ = id; }
  bool has_all_bytes() const;

  // Appends the ids of `text`, in which spaces are already U+2581. O(n log n).
  void encode(std::string_view text, std::vector<int32_t>& ids) const;

 private:
  struct Piece {
    int32_t id;
    float score;
  };
  static constexpr std::array<int32_t, 256> no_bytes() {
    std::array<int32_t, 256> ids{};
    for (int32_t& id : ids) id = -1;
    return ids;
  }

  std::unordered_map<std::string_view, Piece> pieces_;
  size_t longest_ = 0;
  std::array<int32_t, 256> byte_ids_ = no_bytes();
  int32_t unknown_id_ = -1;
};

}  // namespace thriftattn
