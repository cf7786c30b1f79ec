// Finds the texts that end an answer, also where several tokens make one of them, and holds back
// what may still become one, so that nothing of a stop text is ever printed.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace thriftattn::cli {

class StopTexts {
 public:
  // Empty texts are left out: they would end every answer at once.
  explicit StopTexts(std::vector<std::string> texts);

  // Takes the next bytes of the answer; returns those that certainly belong to it. After a stop
  // text was found everything is dropped.
  std::string push(std::string_view bytes);
  // What was held back, once the answer has ended otherwise.
  std::string flush();
  // The stop text that was found; the one that begins first.
  const std::optional<std::string>& found() const { return found_; }

 private:
  std::vector<std::string> texts_;
  std::string held_;
  std::optional<std::string> found_;
};

}  // namespace thriftattn::cli
