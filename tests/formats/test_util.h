// Shared by the tests of the formats layer: data of many shapes, and a loop over the SIMD targets
// of this machine.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "hwy/highway.h"
#include "hwy/targets.h"

namespace thriftattn::test {

// Runs `body` once for every SIMD target that was compiled and that this machine can run.
inline void for_each_target(const std::function<void()>& body) {
  std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  if ((HWY_TARGETS & HWY_EMU128) != 0 && (hwy::SupportedTargets() & HWY_EMU128) == 0) {
    targets.push_back(HWY_EMU128);
  }
  for (const int64_t target : targets) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

inline std::vector<float> gaussian(int64_t n, uint32_t seed, float sigma = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(rng);
  return x;
}

struct Data {
  std::string name;
  std::vector<float> x;
};

// Finite inputs that reach every branch of the codecs: n values of each kind.
inline std::vector<Data> hostile_data(int64_t n, uint32_t seed) {
  std::vector<Data> all;
  all.push_back({"gaussian", gaussian(n, seed)});
  all.push_back({"zero", std::vector<float>(static_cast<size_t>(n), 0.0f)});
  all.push_back({"constant", std::vector<float>(static_cast<size_t>(n), -3.25f)});
  all.push_back({"huge", gaussian(n, seed + 1, 1e37f)});
  all.push_back({"tiny", gaussian(n, seed + 2, 1e-36f)});
  all.push_back({"subnormal", gaussian(n, seed + 3, 1e-40f)});
  std::mt19937 rng(seed + 4);
  std::vector<float> grid(static_cast<size_t>(n));  // exact ties of E2M1, E4M3 and roundf
  for (float& v : grid) v = 0.125f * (static_cast<int>(rng() % 129) - 64);
  grid[0] = 2688.0f;
  all.push_back({"grid", grid});
  std::vector<float> wide(static_cast<size_t>(n));  // 40 binary orders inside one row
  for (float& v : wide) {
    v = std::ldexp(static_cast<float>(rng() % 2001) - 1000.0f, static_cast<int>(rng() % 40) - 30);
  }
  all.push_back({"wide", wide});
  std::vector<float> bits(static_cast<size_t>(n));  // any finite float below 2^120
  for (float& v : bits) {
    do {
      const uint32_t b = rng();
      std::memcpy(&v, &b, sizeof(v));
    } while (!(std::fabs(v) < 0x1p120f));
  }
  all.push_back({"bits", bits});
  std::vector<float> sparse(static_cast<size_t>(n), 0.0f);  // zero blocks beside others
  for (size_t i = 0; i < sparse.size(); i += 37) sparse[i] = i % 2 == 0 ? 1.0f : -0.0f;
  all.push_back({"sparse", sparse});
  return all;
}

inline double relative_rms(const std::vector<float>& x, const std::vector<float>& y) {
  double error = 0.0, energy = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    error += (static_cast<double>(x[i]) - y[i]) * (static_cast<double>(x[i]) - y[i]);
    energy += static_cast<double>(x[i]) * x[i];
  }
  return std::sqrt(error / energy);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace thriftattn::test
