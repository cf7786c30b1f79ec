// What this processor can do, for the kernels that are written for one instruction set.
#pragma once

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

}  // namespace thriftattn
