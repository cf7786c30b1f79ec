// What this processor can do: which SIMD targets of Highway it has, and what the kernels that are
// written for one instruction set ask for.
#pragma once

#include <string>
#include <vector>

namespace thriftattn {

// AVX-512 with BF16 dot products and all that the kernels use beside them.
inline bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// Byte permutes beside it.
inline bool cpu_has_avx512_vbmi() {
#if defined(__x86_64__)
  static const bool has = cpu_has_avx512_bf16() && __builtin_cpu_supports("avx512vbmi");
  return has;
#else
  return false;
#endif
}

// AVX-512 with byte dot products.
inline bool cpu_has_avx512_vnni() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni");
  return has;
#else
  return false;
#endif
}

struct SimdTargets {
  std::string chosen;                  // what kernels run with
  std::vector<std::string> available;  // built in and supported by the machine, best first
};

SimdTargets simd_targets();

}  // namespace thriftattn
