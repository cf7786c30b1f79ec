// Timing attention and appending over synthetic caches, policies interleaved, with the machine's
// peak measured beside each timing. Only the public API is timed.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bench/peak_meter.h"
#include "bench/pinned_threads.h"
#include "thriftattn/policy.h"

namespace thriftattn::bench {

enum class BenchOp : uint8_t {
  decode,   // queries see the whole context, each by the decode rule
  prefill,  // a chunk of queries at the end of the context
  append,   // a chunk of tokens is appended behind the context
};

std::string_view to_string(BenchOp op);

// One policy of a run, with the fractions of pages that its data should promote and skip.
struct BenchEntry {
  Policy policy;
  double promoted = 0;
  double skipped = 0;
};

struct BenchSpec {
  BenchOp op = BenchOp::decode;
  int64_t ctx = 0;      // tokens of a sequence; for decode and prefill with the queries' own
  int64_t queries = 1;  // append: tokens appended
  int64_t batch = 1;
  int64_t q_heads = 32, kv_heads = 8, head_dim = 128;
  std::vector<BenchEntry> entries;
};

// Throws Error for what no policy of the run can do.
void check_spec(const BenchSpec& spec);

struct BenchRow {
  // What the JSON has, with the same names; empty = null there.
  std::string op, backend = "cpu", policy;
  int64_t ctx = 0, queries = 0, batch = 0, q_heads = 0, kv_heads = 0, head_dim = 0;
  std::optional<int> threads;  // of the CPU
  double ms_min = 0, ms_median = 0;
  double bytes_read = 0, gb_s = 0, peak_gb_s = 0;
  std::optional<double> fraction_of_peak, gflops;
  double ms_bf16 = 0, speedup_vs_bf16 = 0;
  std::optional<double> byte_ratio_ceiling, promoted_fraction, skipped_fraction, promote_ms;
  // Tables only.
  std::optional<double> skip_saves_ms, elements_per_s, peak_gflops;
};

struct BenchOptions {
  int threads = 0;           // 0 = one on every core
  int rounds = 15;           // samples of every policy
  int64_t working_set = 0;   // bytes of the bandwidth buffer; caches rotate through half; 0 = auto
  int64_t memory_limit = 0;  // bytes that all caches of a run may hold; 0 = none
  // What is being done, and how much of it.
  std::function<void(const std::string&, int64_t done, int64_t total)> progress;
};

class Bench {
 public:
  explicit Bench(const BenchOptions& options);

  // One row per entry, in order. Throws Error for what cannot be run; out_of_memory before
  // anything is allocated.
  std::vector<BenchRow> run(const BenchSpec& spec);

  // "2 threads on cores 0, 1; AVX3_ZEN4; ...": with the peaks measured so far.
  std::string machine() const;

 private:
  BenchOptions options_;
  PinnedThreads threads_;
  PeakMeter meter_;
  double read_gb_s_ = 0, fp32_gflops_ = 0, bf16_gflops_ = 0;
};

}  // namespace thriftattn::bench
