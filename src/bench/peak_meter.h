// What the machine gives at most: read bandwidth and multiply-adds of all threads, measured beside
// every timing because both move between runs.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "bench/pinned_threads.h"

namespace thriftattn::bench {

// Bytes of the last-level cache; 32 MiB if the system does not say.
int64_t last_level_cache_bytes();

// The instruction set that Highway dispatches to.
std::string isa_name();

class PeakMeter {
 public:
  // `bytes` of buffer, which must be several times the last-level cache.
  PeakMeter(PinnedThreads& threads, int64_t bytes);
  ~PeakMeter();

  // One pass over the buffer: GB/s. It also leaves nothing else in the caches.
  double read_gb_s();
  // A few milliseconds each. BF16: dot products with FP32 accumulation; empty where the CPU has
  // no such instruction.
  double fp32_gflops();
  std::optional<double> bf16_gflops();

 private:
  struct Buffer;
  double timed_pass(int streams);

  PinnedThreads& threads_;
  std::unique_ptr<Buffer> buffer_;
  int streams_ = 1;
};

}  // namespace thriftattn::bench
