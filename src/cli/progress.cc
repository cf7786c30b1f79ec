// Progress on stderr (progress.h).
#include "cli/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

namespace thriftattn::cli {
namespace {

constexpr double kTerminalSeconds = 0.1;  // between two drawings
constexpr double kPlainSeconds = 10;      // between two lines

double seconds(std::chrono::steady_clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

}  // namespace

Progress::Progress() : terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() { clear(); }

void Progress::clear() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

void Progress::update(const std::string& label, int64_t done, int64_t total) {
  const auto now = Clock::now();
  if (label != label_) {
    label_ = label;
    started_ = printed_ = now;
    // The first call comes after the first piece: its time is not known, so it does not count.
    first_done_ = done;
    if (!terminal_) return;
  } else if (seconds(now - printed_) < (terminal_ ? kTerminalSeconds : kPlainSeconds)) {
    return;
  }
  printed_ = now;
  const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1;
  std::string line = fmt::format("{}: {} of {} tokens, {:.0f} %", label, done, total, 100 * share);
  if (done > first_done_ && done < total) {
    const double rate = static_cast<double>(done - first_done_) / seconds(now - started_);
    line += fmt::format(", about {:.0f} s left", static_cast<double>(total - done) / rate);
  }
  if (terminal_) {
    std::fprintf(stderr, "\r%s\033[K", line.c_str());
    drawn_ = true;
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

}  // namespace thriftattn::cli
