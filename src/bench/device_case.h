// One cache on the device under one policy, filled with synthetic data through append(), and the
// operation that is timed on it.
//
// Batches of sequences rotate through several times the L2; their pages lie interleaved, as a
// server's would. Appending never reads further back than the page before its step: of such a case
// only that page of the context is stored.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "bench/bench_case.h"
#include "bench/device_kernels.h"
#include "bench/synthetic.h"
#include "thriftattn/attention.h"
#include "thriftattn/cuda.h"

namespace thriftattn::bench {

class DeviceCase {
 public:
  using Progress = std::function<void(int64_t done, int64_t total)>;

  // Throws Error(out_of_memory) before anything is allocated.
  DeviceCase(const CaseSpec& spec, DeviceClock& clock, const Progress& progress);

  // Milliseconds of one batch, `rounds` times.
  std::vector<double> time(int rounds);
  // The same of one part of a decode step: for the walk, of prepare and walk together.
  std::vector<double> time_part(DecodePart part, int rounds);
  // The operation `times` times on the first batch, without a graph: for a profiler.
  void run(int times);

  // What the queries of one batch read and found, by the kernels' own decisions.
  const AttendStats& stats() const { return stats_; }
  // Bytes that one query reads (all KV heads, the whole batch); of append, all that it moves.
  double bytes() const;
  // Bytes of append: K and V as they come, open pages, and pages with their residuals.
  struct Moved {
    double input = 0, open = 0, pages = 0;
  };
  Moved moved() const;
  int64_t rotation() const { return rotation_; }
  int64_t workspace_bytes() const { return workspace_.bytes(); }

 private:
  cuda::LayerMemory memory() const;
  cuda::BatchTables tables(int64_t sequence) const;
  void lay_out();
  void fill(const Progress& progress);
  void append_rows(const cuda::AttendPlan& plan, int64_t sequence, int64_t first, int64_t n);
  void make_queries();
  void count();
  void launch(int64_t batch, cuda::Stream stream);
  cuda::AttendCall attend_call(int64_t batch) const;
  cuda::AppendCall append_call(int64_t batch) const;

  CaseSpec spec_;
  DeviceClock& clock_;
  cuda::SlotSizes sizes_;
  int64_t pages_ = 0;       // of a sequence
  int64_t first_page_ = 0;  // stored
  int64_t open_pages_ = 0, rotation_ = 1;
  bool checked_ = false;
  cuda::AttendPlan plan_;
  SyntheticData data_;
  cuda::DeviceMemory pool_, open_, residual_pool_, workspace_, status_;
  cuda::DeviceMemory lengths_, blocks_, residual_table_, open_table_;
  cuda::DeviceMemory means_, k_, v_, q_, out_;
  cuda::DeviceMemory step_lengths_, step_offsets_;  // of the step that fills
  AttendStats stats_;
};

}  // namespace thriftattn::bench
