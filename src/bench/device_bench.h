// `thriftattn bench --device cuda`: the rows of the CPU bench, measured on a GPU. Each time is the
// median of replays of a CUDA graph between events; one cache at a time lies in its memory.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/bench.h"
#include "bench/device_case.h"
#include "bench/device_kernels.h"

namespace thriftattn::bench {

// What a row has beyond the keys of the CPU bench; 0 where it has no meaning.
struct DeviceRow {
  BenchRow row;
  double prepare_ms = 0, walk_ms = 0, merge_ms = 0;  // of decode, up to 16 queries, if asked for
  DeviceCase::Moved moved;                           // of append
  int64_t rotation = 0, workspace_bytes = 0;
};

struct DeviceBenchOptions {
  int rounds = 15;     // replays of every graph
  bool parts = false;  // whether the kernels of a decode step are timed apart
  bool twins = true;   // whether what promotion adds and skipping saves is timed
  // What is being done, and how much of it.
  std::function<void(const std::string&, int64_t done, int64_t total)> progress;
};

// Throws Error for what a device bench cannot run, whatever the device; needs none.
void check_device_spec(const BenchSpec& spec);

class DeviceBench {
 public:
  // Throws Error, naming what is missing, without CUDA in the build or without a device.
  explicit DeviceBench(const DeviceBenchOptions& options);

  // One row per entry, in order.
  std::vector<DeviceRow> run(const BenchSpec& spec);
  // The operation under the first policy, `times` times: for a profiler.
  void run_plain(const BenchSpec& spec, int times);

  // "NVIDIA H100 ..., sm_90, driver 13.0; copy ... GB/s".
  std::string machine() const;
  const DevicePeaks& peaks() const { return peaks_; }

 private:
  struct Measured;
  Measured measure(const CaseSpec& spec, const std::string& label, bool parts);

  DeviceBenchOptions options_;
  cuda::DeviceInfo info_;
  DeviceClock clock_;
  DevicePeaks peaks_;
};

}  // namespace thriftattn::bench
