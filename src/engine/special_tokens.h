// Finds the tokens that stand in text as themselves, such as <|im_end|>, by leftmost longest match.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace thriftattn {

class SpecialTokens {
 public:
  // The texts must outlive this object. Call build() after the last.
  void add(std::string_view text, int32_t id);
  void build();

  struct Match {
    size_t at;
    size_t bytes;
    int32_t id;
  };
  // The first match at or after `from`; bytes == 0 and at == text.size() if there is none.
  Match find(std::string_view text, size_t from) const;

 private:
  // Sorted by text. Those that begin with byte b are [first_[b], first_[b + 1]).
  std::vector<std::pair<std::string_view, int32_t>> tokens_;
  std::array<uint32_t, 257> first_{};
};

}  // namespace thriftattn
