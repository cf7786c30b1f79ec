// What CUDA C++ has and C++ has not, for kernels that are compiled as C++ (emulator.h): included before
// anything else.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/float_convert.h"
#include "emulator/emulator.h"

#undef __shared__
#undef __noinline__
#undef __launch_bounds__
#define __shared__ static
#define __noinline__
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif

// Behind CUDA's own headers, which would take it for a device compiler's.
#ifdef THRIFTATTN_EMULATE_SM80
#define __CUDA_ARCH__ 800
#else
#define __CUDA_ARCH__ 900
#endif

#define threadIdx (::thriftattn::emulator::here().index)
#define blockIdx (::thriftattn::emulator::here().block_index)
#define blockDim (::thriftattn::emulator::here().block_dim)
#define gridDim (::thriftattn::emulator::here().grid_dim)

using std::max;
using std::min;

namespace thriftattn::emulator {

enum WarpOps : int {  // from 1 on: ptx.cuh
  kShuffle = 16, kVote, kReduce, kSync
};

template <class T, class F>
T reduce(uint32_t mask, T x, const F& f) {
  const auto all = meet(mask, kReduce, x);
  T result = x;
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    result = first ? all[lane] : f(result, all[lane]);
    first = false;
  }
  return result;
}

}  // namespace thriftattn::emulator

// ---- lanes of a warp

inline void __syncwarp(uint32_t mask = ~0u) {
  const int nothing = 0;
  thriftattn::emulator::meet(mask, thriftattn::emulator::kSync, &nothing, sizeof nothing, true);
}
template <class T>
T __shfl_sync(uint32_t mask, T x, int from, int width = 32) {
  const int first = thriftattn::emulator::here().lane & -width;
  return thriftattn::emulator::meet(mask, thriftattn::emulator::kShuffle,
                                    x)[first + (from & (width - 1))];
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int with) {
  return thriftattn::emulator::meet(mask, thriftattn::emulator::kShuffle,
                                    x)[thriftattn::emulator::here().lane ^ with];
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, int by) {
  const int lane = thriftattn::emulator::here().lane;
  return thriftattn::emulator::meet(mask, thriftattn::emulator::kShuffle,
                                    x)[lane >= by ? lane - by : lane];
}
template <class T>
T __shfl_down_sync(uint32_t mask, T x, int by) {
  const int lane = thriftattn::emulator::here().lane;
  return thriftattn::emulator::meet(mask, thriftattn::emulator::kShuffle,
                                    x)[lane + by < 32 ? lane + by : lane];
}
inline uint32_t __ballot_sync(uint32_t mask, bool x) {
  const auto all = thriftattn::emulator::meet(mask, thriftattn::emulator::kVote, x);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && all[lane]) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) == mask; }
template <class T>
T __reduce_add_sync(uint32_t mask, T x) {
  return thriftattn::emulator::reduce(mask, x, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(uint32_t mask, T x) {
  return thriftattn::emulator::reduce(mask, x, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(uint32_t mask, T x) {
  return thriftattn::emulator::reduce(mask, x, [](T a, T b) { return a < b ? a : b; });
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t x) {
  return thriftattn::emulator::reduce(mask, x, [](uint32_t a, uint32_t b) { return a | b; });
}

// ---- threads of a block

inline void __syncthreads() { thriftattn::emulator::block_barrier(0, -1); }
inline int __syncthreads_or(int x) { return thriftattn::emulator::block_barrier(0, -1, x != 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- atomics: one thread runs at a time; no races (races.h)

#define THRIFTATTN_ATOMIC __attribute__((noinline, no_sanitize("thread")))
template <class T>
THRIFTATTN_ATOMIC T atomicAdd(T* at, std::type_identity_t<T> x) {
  const T before = *at;
  *at = before + x;
  return before;
}
template <class T>
THRIFTATTN_ATOMIC T atomicMin(T* at, std::type_identity_t<T> x) {
  const T before = *at;
  *at = std::min(before, x);
  return before;
}
template <class T>
THRIFTATTN_ATOMIC T atomicMax(T* at, std::type_identity_t<T> x) {
  const T before = *at;
  *at = std::max(before, x);
  return before;
}

// ---- integers and bits

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int32_t __float_as_int(float x) { return std::bit_cast<int32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int32_t x) { return std::bit_cast<float>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (by & 31));
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> 4 * i & 0xfu;
    auto byte = static_cast<uint32_t>(bytes >> 8 * (s & 7)) & 0xffu;
    if (s & 8) byte = byte & 0x80u ? 0xffu : 0;  // its sign, in every bit
    result |= byte << 8 * i;
  }
  return result;
}
inline uint32_t __vmaxu4(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 8) result |= std::max(a >> i & 0xffu, b >> i & 0xffu) << i;
  return result;
}

// ---- numbers

inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
// Towards infinity: the product is exact in FP64.
inline float __fmul_ru(float a, float b) {
  const double exact = static_cast<double>(a) * b;
  const auto x = static_cast<float>(exact);
  return static_cast<double>(x) < exact ? std::nextafterf(x, INFINITY) : x;
}

namespace thriftattn::emulator {

// FP64 to FP32 so that rounding that to FP16 rounds the FP64 number once.
inline float round_to_odd(double x) {
  auto y = static_cast<float>(x);
  if (static_cast<double>(y) == x || !std::isfinite(y)) return y;
  if (std::fabs(static_cast<double>(y)) > std::fabs(x)) y = std::nextafterf(y, 0.0f);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(y) | 1u);
}

}  // namespace thriftattn::emulator
