// A random attention problem over a KvCache, fed in steps, with the inputs kept for the second
// reference (exact math on the unquantised values).
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "thriftattn/attention.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn::testing {

struct CaseOptions {
  LayerShape shape{.kv_heads = 2, .q_heads = 8, .head_dim_k = 64, .head_dim_v = 64};
  LayerPolicy policy;
  int64_t length = 700;   // tokens committed before the queries' step
  int64_t queries = 1;    // tokens of the last step
  float q_gain = 2.5f;    // larger = attention more concentrated
  float k_offset = 0.0f;  // a constant added to every K: what a K bias does
  int64_t k_period = 0;   // K of token t is that of token t % k_period; 0 = none
  float v_spread = 0.0f;  // V of page p is times 2^(v_spread * (p % 4 - 1))
  float softcap = 0.0f;
  bool sink_logits = false;
  bool equalizer = false;
  bool scramble = false;  // other sequences come and go, so that block tables are shuffled
  AttendMode mode = AttendMode::decode;
  AttendMath math = AttendMath::f32;
  // Queries that are BF16 numbers, and a softmax scale that is a power of two: what BF16 arithmetic
  // takes without rounding.
  bool bf16_queries = false;
  bool causal = true;
  uint32_t seed = 1;
};

class AttentionCase {
 public:
  explicit AttentionCase(const CaseOptions& options);

  KvCache& cache() { return cache_; }
  SequenceId sequence() const { return sequence_; }
  int64_t total() const { return options_.length + options_.queries; }

  // out [queries][q_heads][head_dim_v], the step still open.
  std::vector<float> attend(AttendStats* stats = nullptr, std::vector<float>* lse = nullptr);
  std::vector<float> attend_reference(std::vector<float>* lse = nullptr);
  // FP64 attention on the values as given, no cache.
  std::vector<float> exact() const;

  TensorView<const float> k_view(int64_t first, int64_t n) const;
  TensorView<const float> v_view(int64_t first, int64_t n) const;
  TensorView<const float> q_view() const;
  AttendRequest request(std::vector<float>& out) const;

 private:
  float softmax_scale() const;
  void feed(SequenceId seq, int64_t first, int64_t n, bool commit);

  CaseOptions options_;
  std::vector<float> k_, v_, q_, sinks_;
  KvCache cache_;
  SequenceId sequence_ = 0;
};

// The rows [first, first + n) of a request: q, out and lse.
AttendRequest rows_of(const AttendRequest& r, int64_t first, int64_t n);

// max over rows of ||a - b|| / ||b||; NaN anywhere gives infinity.
double row_error(const std::vector<float>& a, const std::vector<float>& b, int64_t row);

// Layer policies as the presets resolve them.
LayerPolicy plain_policy(Format format);
LayerPolicy layered_policy(double promote, double skip);
LayerPolicy sealed_policy(int64_t sinks, int64_t recent);

}  // namespace thriftattn::testing
