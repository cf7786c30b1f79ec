// How far one set of logits is from another at the same position: KL divergence, negative log
// likelihood and agreement of the first choice. FP64 throughout, from FP32 logits: a KL of 1e-8 is
// a figure that eval reports, and equal logits give exactly 0.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace thriftattn {

struct PositionMetrics {
  double kl = 0;       // KL(reference || policy) in nats, never below 0
  double nll = 0;      // -log p(target) under the policy
  double nll_ref = 0;  // the same under the reference
  bool same_top1 = false;
};

// The reference's side of a block of rows, worked out once and compared with every policy. Keeps a
// pointer to the logits: they must outlive the use. Rows are worked on in parallel.
class ReferenceBlock {
 public:
  // logits [rows][vocab], targets [rows] inside the vocabulary. Throws Error non_finite where a
  // row holds NaN or +Inf, or nothing finite; -Inf is a token that cannot come.
  void set(std::span<const float> logits, std::span<const int32_t> targets, int64_t vocab);

  // out[rows] for the policy's logits [rows][vocab] of the same positions.
  void compare(std::span<const float> logits, std::span<PositionMetrics> out) const;

  int64_t rows() const { return static_cast<int64_t>(rows_.size()); }

 private:
  struct Row {
    double max = 0;
    double log_sum = 0;  // log of the sum of exp(logit - max)
    int32_t top = 0;
    int32_t target = 0;
  };
  int64_t vocab_ = 0;
  std::span<const float> logits_;
  std::vector<Row> rows_;
  std::vector<double> probabilities_;  // [rows][vocab]
};

// What is reported of many positions.
struct MetricsSummary {
  int64_t positions = 0;
  double kl_mean = 0, kl_p99 = 0, kl_p999 = 0;
  double delta_nll = 0;  // mean of nll - nll_ref
  double perplexity = 0;
  double top1_agreement = 0;
};

class MetricsCollector {
 public:
  void add(std::span<const PositionMetrics> metrics);
  MetricsSummary summary() const;  // throws Error if nothing was added

 private:
  std::vector<double> kl_;
  double nll_ = 0, delta_nll_ = 0;
  int64_t same_top1_ = 0;
};

// The value below which a fraction q of the values lies, interpolated linearly between the two
// nearest ranks (as numpy.quantile does). Throws Error for no values or q outside [0, 1].
double quantile(std::vector<double> values, double q);

}  // namespace thriftattn
