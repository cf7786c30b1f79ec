// What encloses code that is compiled for AVX-512 with BF16 dot products: only the functions between
// the two lines, not what headers define, which the linker may share with other files. Who calls
// them looks at cpu_has_avx512_bf16() first.
#pragma once

// clang-format off
#define THRIFTATTN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define THRIFTATTN_BEGIN_TARGET(targets) \
  THRIFTATTN_PRAGMA(clang attribute push(__attribute__((target(targets))), apply_to = function))
#define THRIFTATTN_END_TARGET THRIFTATTN_PRAGMA(clang attribute pop)
#else
#define THRIFTATTN_BEGIN_TARGET(targets) \
  THRIFTATTN_PRAGMA(GCC push_options) THRIFTATTN_PRAGMA(GCC target(targets))
#define THRIFTATTN_END_TARGET THRIFTATTN_PRAGMA(GCC pop_options)
#endif
// clang-format on

#define THRIFTATTN_AVX512_BF16 "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,bmi2,fma,f16c"
#define THRIFTATTN_AVX512_VBMI THRIFTATTN_AVX512_BF16 ",avx512vbmi"
