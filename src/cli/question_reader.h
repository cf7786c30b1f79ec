// The questions of `run -i`: lines of standard input.
#pragma once

#include <optional>
#include <string>

#include "cli/interrupt.h"

namespace thriftattn::cli {

class QuestionReader {
 public:
  explicit QuestionReader(const InterruptHandler& interrupt);
  // The next line that is not blank, without spaces around it; nothing at the end of the input or
  // after Ctrl-C. On a terminal it asks with a prompt on stderr.
  std::optional<std::string> next();

 private:
  bool read_line(std::string& line);

  const InterruptHandler& interrupt_;
  bool terminal_;
  std::string held_;  // read, but not returned yet
  bool ended_ = false;
};

}  // namespace thriftattn::cli
