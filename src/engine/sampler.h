// Chooses the next token from logits: greedy, or temperature and top-p with a seed. The
// random numbers are drawn from std::mt19937_64 by our own code, because the standard's
// distributions differ between libraries.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace thriftattn {

struct SamplerOptions {
  float temperature = 0.0f;  // 0 = greedy
  float top_p = 1.0f;        // in (0, 1]: the smallest set of tokens with at least this mass
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);  // Error if a value is out of range
  // Error if a logit is NaN or none is finite. Ties go to the lower id.
  int32_t sample(std::span<const float> logits);

 private:
  SamplerOptions options_;
  std::mt19937_64 random_;
  std::vector<std::pair<float, int32_t>> candidates_;
};

int32_t argmax(std::span<const float> logits);

}  // namespace thriftattn
