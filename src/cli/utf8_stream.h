// Holds back the bytes of a character until it is whole, so that a terminal never sees half of it.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

namespace thriftattn::cli {

class Utf8Stream {
 public:
  // What can be printed now: everything but a character that the next bytes may complete. Bytes
  // that can never become UTF-8 are passed on as they are.
  std::string push(std::string_view bytes) {
    held_ += bytes;
    const size_t keep = incomplete_tail(held_);
    std::string out = held_.substr(0, held_.size() - keep);
    held_.erase(0, held_.size() - keep);
    return out;
  }
  // The rest, at the end of the text.
  std::string flush() { return std::exchange(held_, {}); }

 private:
  static size_t incomplete_tail(std::string_view text) {
    for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
      const auto lead = static_cast<unsigned char>(text[text.size() - back]);
      if (lead >= 0x80 && lead < 0xC0) continue;  // a continuation byte: look further back
      const size_t needs = lead >= 0xF0 && lead <= 0xF4 ? 4 : lead >= 0xE0 ? 3 : 2;
      return lead >= 0xC2 && lead <= 0xF4 && back < needs ? back : 0;
    }
    return 0;
  }

  std::string held_;
};

}  // namespace thriftattn::cli
