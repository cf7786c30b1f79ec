// Lines of standard input (question_reader.h).
#include "cli/question_reader.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "thriftattn/error.h"

namespace thriftattn::cli {
namespace {

constexpr size_t kMaxLine = size_t{1} << 24;  // a device file must not fill the memory

}  // namespace

QuestionReader::QuestionReader(const InterruptHandler& interrupt)
    : interrupt_(interrupt), terminal_(isatty(STDIN_FILENO) != 0) {}

std::optional<std::string> QuestionReader::next() {
  std::string line;
  while (true) {
    if (terminal_) {
      std::fputs("> ", stderr);
      std::fflush(stderr);
    }
    if (!read_line(line)) {
      if (terminal_) std::fputs("\n", stderr);
      return std::nullopt;
    }
    line.erase(0, line.find_first_not_of(" \t\r"));  // npos: all of it
    line.erase(line.find_last_not_of(" \t\r") + 1);
    if (!line.empty()) return line;
  }
}

bool QuestionReader::read_line(std::string& line) {
  while (true) {
    const size_t end = held_.find('\n');
    if (end != std::string::npos || (ended_ && !held_.empty())) {
      line = held_.substr(0, end);
      held_.erase(0, end == std::string::npos ? end : end + 1);
      return true;
    }
    if (ended_ || !interrupt_.wait_readable(STDIN_FILENO)) return false;
    char buffer[4096];
    const ssize_t n = read(STDIN_FILENO, buffer, sizeof buffer);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n < 0) {
      throw Error(ErrorCode::io, fmt::format("cannot read the questions from standard input: {}; "
                                             "give them as lines of text",
                                             std::strerror(errno)));
    }
    ended_ = n == 0;
    held_.append(buffer, static_cast<size_t>(n));
    if (held_.size() > kMaxLine) {
      throw Error(ErrorCode::invalid_argument,
                  fmt::format("a question on standard input is longer than {} MiB: give a document "
                              "with -f",
                              kMaxLine >> 20));
    }
  }
}

}  // namespace thriftattn::cli
