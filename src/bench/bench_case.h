// One cache under one policy, filled with synthetic data, and the operation that is timed on it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "bench/bench.h"
#include "bench/synthetic.h"
#include "thriftattn/attention.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn::bench {

struct CaseSpec {
  BenchOp op = BenchOp::decode;
  int64_t ctx = 0, queries = 1, batch = 1;
  LayerShape shape;
  LayerPolicy policy;
  double promoted = 0, skipped = 0;  // of the data, drawn for `data_policy`
  LayerPolicy data_policy;
  int64_t working_set = 0;
};

// The only layer of a policy, and whether its caches are BF16.
LayerPolicy policy_of(const Policy& policy);
bool is_bf16(const LayerPolicy& policy);
// The case of an entry under `policy`, on data drawn for that.
CaseSpec case_of(const BenchSpec& spec, const LayerPolicy& policy, const BenchEntry& entry);

// Batches of sequences that a case rotates through, so that none is in the caches when its turn
// comes, and the bytes that they hold.
int64_t rotation_of(const CaseSpec& spec);
int64_t bytes_of(const CaseSpec& spec);

// The data of a case: of append, its context's.
SyntheticSpec data_spec(const CaseSpec& spec);
// Pages of a sequence, those that append adds included.
int64_t pages_of(const CaseSpec& spec);

class BenchCase {
 public:
  using Progress = std::function<void(int64_t done, int64_t total)>;

  // Fills every sequence through append(); to be called, like all the rest, in the arena.
  BenchCase(const CaseSpec& spec, const Progress& progress);

  // Milliseconds of one batch: of the mean one where several make a sample.
  double sample();
  // What the queries of the counted batches read and found. Empty for append.
  const AttendStats& stats() const { return stats_; }
  // Bytes that one query reads (all KV heads, the whole batch); for append, of the input.
  double bytes_read() const;
  double elements_appended() const;  // of one batch

 private:
  void fill(const Progress& progress);
  double run_batch(AttendStats* stats);  // milliseconds; the next of the rotation
  void attend_one(SequenceId sequence, AttendStats* stats);

  CaseSpec spec_;
  SyntheticData data_;
  KvCache cache_;
  std::vector<SequenceId> sequences_;  // [rotation][batch]
  bool checked_ = false;               // whether the fractions found are those of the data
  int64_t rotation_ = 1, counted_ = 1, next_ = 0, batches_of_sample_ = 1;
  std::vector<float> k_, v_, q_, out_;
  AttendStats stats_;
};

}  // namespace thriftattn::bench
