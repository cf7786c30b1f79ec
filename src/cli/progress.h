// Progress on stderr: one line that is written over on a terminal, plain lines now and then
// elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace thriftattn::cli {

class Progress {
 public:
  Progress();
  ~Progress();  // clears the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `done` of `total` units of what `label` names. A new label starts a new measurement.
  void update(const std::string& label, int64_t done, int64_t total);
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  bool terminal_ = false;
  bool drawn_ = false;
  std::string label_;
  Clock::time_point started_{}, printed_{};
  int64_t first_done_ = 0;
};

}  // namespace thriftattn::cli
