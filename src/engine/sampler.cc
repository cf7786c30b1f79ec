// Greedy and top-p sampling.
#include "engine/sampler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "thriftattn/error.h"

namespace thriftattn {

int32_t argmax(std::span<const float> logits) {
  int32_t best = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) {
      throw Error(ErrorCode::non_finite,
                  fmt::format("the logit of token {} is NaN; the model's weights or the policy "
                              "are at fault, try --policy exact",
                              i));
    }
    if (best < 0 || logits[i] > logits[static_cast<size_t>(best)]) best = static_cast<int32_t>(i);
  }
  if (best < 0 || !std::isfinite(logits[static_cast<size_t>(best)])) {
    throw Error(ErrorCode::non_finite,
                fmt::format("the largest of {} logits is not finite; the model's weights or the "
                            "policy are at fault, try --policy exact",
                            logits.size()));
  }
  return best;
}

Sampler::Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {
  if (!(options.temperature >= 0.0f) || !std::isfinite(options.temperature)) {
    throw Error(
        ErrorCode::invalid_argument,
        fmt::format("temperature is {}, required: 0 (greedy) or more", options.temperature));
  }
  if (!(options.top_p > 0.0f && options.top_p <= 1.0f)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("top-p is {}, required: above 0, at most 1", options.top_p));
  }
}

int32_t Sampler::sample(std::span<const float> logits) {
  const int32_t best = argmax(logits);
  if (options_.temperature == 0.0f) return best;

  // Probabilities relative to the largest; what underflows to 0 can never be drawn.
  const double top = logits[static_cast<size_t>(best)];
  double sum = 0.0;
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto weight = static_cast<float>(std::exp((logits[i] - top) / options_.temperature));
    if (weight <= 0.0f) continue;
    candidates_.emplace_back(weight, static_cast<int32_t>(i));
    sum += weight;
  }
  if (options_.top_p < 1.0f) {
    std::sort(candidates_.begin(), candidates_.end(), [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    const double wanted = sum * options_.top_p;
    size_t kept = 0;
    for (sum = 0.0; kept < candidates_.size() && sum < wanted; ++kept) {
      sum += candidates_[kept].first;
    }
    candidates_.resize(kept);
  }
  const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;  // [0, 1)
  double left = uniform * sum;
  for (const auto& [weight, token] : candidates_) {
    left -= weight;
    if (left < 0.0) return token;
  }
  return candidates_.back().second;
}

}  // namespace thriftattn
