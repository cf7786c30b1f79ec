// Prefetching that stays: GCC 12 takes a function of nothing but __builtin_prefetch for one without
// effects, and drops the calls to it.
#pragma once

#include <cstdint>

namespace thriftattn {

// Fetches the line of `p` into the second-level cache. Any address will do.
inline void prefetch_l2(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
#endif
}

inline void prefetch_lines(const uint8_t* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) prefetch_l2(p + at);
}

}  // namespace thriftattn
