// KL divergence and its company (kl_metrics.h).
#include "engine/kl_metrics.h"

#include <fmt/format.h>
#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "thriftattn/error.h"

namespace thriftattn {
namespace {

struct RowSum {
  double max;
  double log_sum;
  int32_t top;
};

[[noreturn]] void fail_row(int64_t row, const char* what) {
  throw Error(ErrorCode::non_finite,
              fmt::format("the logits of row {} of a scored block {}: the model's weights or "
                          "activations overflowed; check the model file",
                          row, what));
}

RowSum sum_row(const float* x, int64_t n, int64_t row) {
  // A NaN never compares greater, so it is looked for by the sum below.
  int64_t top = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (x[i] > x[top] || x[top] != x[top]) top = i;
  }
  const double max = x[top];
  if (std::isnan(max) || max == std::numeric_limits<double>::infinity()) {
    fail_row(row, "hold NaN or Inf");
  }
  if (max == -std::numeric_limits<double>::infinity()) fail_row(row, "are all -Inf");
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(x[i] - max);
  if (std::isnan(sum)) fail_row(row, "hold NaN");
  return {max, std::log(sum), static_cast<int32_t>(top)};
}

template <typename Body>
void for_rows(int64_t rows, const Body& body) {
  tbb::parallel_for(tbb::blocked_range<int64_t>(0, rows, 1),
                    [&](const tbb::blocked_range<int64_t>& range) {
                      for (int64_t r = range.begin(); r < range.end(); ++r) body(r);
                    });
}

void check_shape(size_t logits, int64_t rows, int64_t vocab) {
  if (vocab <= 0 || logits != static_cast<size_t>(rows * vocab)) {
    throw Error(
        ErrorCode::invalid_argument,
        fmt::format("{} logits are not {} rows of {}: pass whole rows", logits, rows, vocab));
  }
}

}  // namespace

void ReferenceBlock::set(std::span<const float> logits, std::span<const int32_t> targets,
                         int64_t vocab) {
  const auto rows = static_cast<int64_t>(targets.size());
  check_shape(logits.size(), rows, vocab);
  for (const int32_t target : targets) {
    if (target < 0 || target >= vocab) {
      throw Error(ErrorCode::invalid_argument,
                  fmt::format("token {} is outside the vocabulary of {}: tokenize the text with "
                              "the model's own tokenizer",
                              target, vocab));
    }
  }
  vocab_ = vocab;
  logits_ = logits;
  rows_.resize(static_cast<size_t>(rows));
  probabilities_.resize(static_cast<size_t>(rows * vocab));
  for_rows(rows, [&](int64_t r) {
    const float* x = logits.data() + r * vocab;
    const RowSum sum = sum_row(x, vocab, r);
    rows_[static_cast<size_t>(r)] = {sum.max, sum.log_sum, sum.top,
                                     targets[static_cast<size_t>(r)]};
    double* p = probabilities_.data() + r * vocab;
    for (int64_t i = 0; i < vocab; ++i) p[i] = std::exp((x[i] - sum.max) - sum.log_sum);
  });
}

void ReferenceBlock::compare(std::span<const float> logits, std::span<PositionMetrics> out) const {
  check_shape(logits.size(), rows(), vocab_);
  if (out.size() != rows_.size()) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("room for {} results where the block has {} rows: pass one for each "
                            "row",
                            out.size(), rows_.size()));
  }
  for_rows(rows(), [&](int64_t r) {
    const Row& ref = rows_[static_cast<size_t>(r)];
    const float* x = logits.data() + r * vocab_;
    const float* x_ref = logits_.data() + r * vocab_;
    const double* p = probabilities_.data() + r * vocab_;
    const RowSum own = sum_row(x, vocab_, r);
    double kl = 0;
    // Both log-probabilities by the same steps, so that equal logits cancel exactly. A token that
    // the reference rules out adds nothing, whatever the policy says of it.
    for (int64_t i = 0; i < vocab_; ++i) {
      if (p[i] <= 0) continue;
      kl += p[i] * (((x_ref[i] - ref.max) - ref.log_sum) - ((x[i] - own.max) - own.log_sum));
    }
    PositionMetrics& m = out[static_cast<size_t>(r)];
    m.kl = std::max(kl, 0.0);  // rounding may leave -1e-17
    m.nll = own.log_sum - (x[ref.target] - own.max);
    m.nll_ref = ref.log_sum - (x_ref[ref.target] - ref.max);
    m.same_top1 = own.top == ref.top;
  });
}

void MetricsCollector::add(std::span<const PositionMetrics> metrics) {
  for (const PositionMetrics& m : metrics) {
    kl_.push_back(m.kl);
    nll_ += m.nll;
    delta_nll_ += m.nll - m.nll_ref;
    same_top1_ += m.same_top1;
  }
}

MetricsSummary MetricsCollector::summary() const {
  if (kl_.empty()) {
    throw Error(ErrorCode::invalid_argument,
                "no position was scored: evaluate a context of at least 4 tokens");
  }
  const auto n = static_cast<double>(kl_.size());
  MetricsSummary s;
  s.positions = static_cast<int64_t>(kl_.size());
  for (const double kl : kl_) s.kl_mean += kl;
  s.kl_mean /= n;
  s.kl_p99 = quantile(kl_, 0.99);
  s.kl_p999 = quantile(kl_, 0.999);
  s.delta_nll = delta_nll_ / n;
  s.perplexity = std::exp(nll_ / n);
  s.top1_agreement = static_cast<double>(same_top1_) / n;
  return s;
}

double quantile(std::vector<double> values, double q) {
  if (values.empty() || !(q >= 0.0 && q <= 1.0)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("quantile {} of {} values: needs a value and a fraction from 0 to 1", q,
                            values.size()));
  }
  const double rank = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<size_t>(rank);
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(low), values.end());
  const double at_low = values[low];
  const double fraction = rank - static_cast<double>(low);
  if (fraction == 0) return at_low;  // also keeps 0 * Inf out
  const double at_high =
      *std::min_element(values.begin() + static_cast<ptrdiff_t>(low) + 1, values.end());
  return at_low + fraction * (at_high - at_low);
}

}  // namespace thriftattn
