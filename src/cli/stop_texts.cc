// Stop texts (stop_texts.h).
#include "cli/stop_texts.h"

#include <algorithm>
#include <utility>

namespace thriftattn::cli {

StopTexts::StopTexts(std::vector<std::string> texts) : texts_(std::move(texts)) {
  std::erase_if(texts_, [](const std::string& text) { return text.empty(); });
}

std::string StopTexts::push(std::string_view bytes) {
  if (found_) return {};
  held_ += bytes;
  size_t first = std::string::npos;
  size_t open = 0;  // the longest end of held_ that is the beginning of a stop text
  for (const std::string& text : texts_) {
    if (const size_t at = held_.find(text); at < first) {
      first = at;
      found_ = text;
    }
    for (size_t n = std::min(text.size() - 1, held_.size()); n > open; --n) {
      if (std::string_view(held_).ends_with(std::string_view(text).substr(0, n))) open = n;
    }
  }
  const size_t sure = found_ ? first : held_.size() - open;
  std::string out = held_.substr(0, sure);
  held_.erase(0, found_ ? std::string::npos : sure);
  return out;
}

std::string StopTexts::flush() { return std::exchange(held_, {}); }

}  // namespace thriftattn::cli
