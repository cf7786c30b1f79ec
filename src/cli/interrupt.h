// Ctrl-C: the first is only noted, so that the command ends in order (summary, exit code 130); a
// second one ends the program at once.
#pragma once

namespace thriftattn::cli {

inline constexpr int kExitInterrupted = 130;  // 128 + SIGINT, what shells report

// Handles SIGINT for as long as it lives; one at a time.
class InterruptHandler {
 public:
  InterruptHandler();
  ~InterruptHandler();
  InterruptHandler(const InterruptHandler&) = delete;
  InterruptHandler& operator=(const InterruptHandler&) = delete;

  static bool interrupted();
  // Waits until there is something to read from the file descriptor (its end counts); false when
  // Ctrl-C came first, whichever thread the signal went to.
  bool wait_readable(int descriptor) const;
};

}  // namespace thriftattn::cli
