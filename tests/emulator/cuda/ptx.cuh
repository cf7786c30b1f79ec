// src/cuda/ptx.cuh on a CPU, as sm_90a, or as sm_80 with THRIFTATTN_EMULATE_SM80. What each function
// is for stands there.
#pragma once

#include "emulator/language.h"

#if __CUDA_ARCH__ >= 900
#define THRIFTATTN_SM90 1
#define THRIFTATTN_SM89 1
#endif

namespace thriftattn::cuda {

// ---- numbers

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }

namespace emulated {

inline float half_at(uint32_t x, int i) { return _cvtsh_ss(static_cast<uint16_t>(x >> 16 * i)); }
inline uint32_t halves(float low, float high) {
  return static_cast<uint32_t>(_cvtss_sh(low, _MM_FROUND_TO_NEAREST_INT)) |
         static_cast<uint32_t>(_cvtss_sh(high, _MM_FROUND_TO_NEAREST_INT)) << 16;
}
inline float bf16_at(uint32_t x, int i) { return __uint_as_float(x >> 16 * i << 16); }

}  // namespace emulated

inline uint32_t hmul2(uint32_t a, uint32_t b) {
  using namespace emulated;
  return halves(half_at(a, 0) * half_at(b, 0), half_at(a, 1) * half_at(b, 1));
}
// The sum in FP64 is exact but where its terms are 2^30 apart, so it is rounded once.
inline uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  using namespace emulated;
  const auto one = [&](int i) {
    return emulator::round_to_odd(static_cast<double>(half_at(a, i)) * half_at(b, i) + half_at(c, i));
  };
  return halves(one(0), one(1));
}
inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  using namespace emulated;
  const auto one = [&](int i) {  // 16 bits of mantissa: exact in FP32
    return uint32_t{f32_to_bf16(bf16_at(a, i) * bf16_at(b, i))};
  };
  return one(0) | one(1) << 16;
}
#ifdef THRIFTATTN_SM89
inline uint32_t convert_e4m3(float low, float high) {
  return f32_to_e4m3(low) | static_cast<uint32_t>(f32_to_e4m3(high)) << 8;
}
#endif

// ---- registers

inline int lane_in_register() { return emulator::here().lane; }
template <int kCount>
void registers_down() {}
template <int kCount>
void registers_up() {}

// ---- products of a warp

namespace emulated {

struct MmaOperands {
  uint32_t a[4], b[2];
};
template <float (*kNumber)(uint32_t, int)>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int op) {
  const auto all = emulator::meet(~0u, op, MmaOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = emulator::here().lane / 4, j = emulator::here().lane % 4;
  float left[2][16], right[2][16];
  for (int i = 0; i < 4; ++i) {
    const MmaOperands x = all[4 * g + i];
    const MmaOperands c[2] = {all[4 * (2 * j) + i], all[4 * (2 * j + 1) + i]};
    for (int e = 0; e < 2; ++e) {
      for (int half = 0; half < 2; ++half) {
        const int k = 8 * half + 2 * i + e;
        left[0][k] = kNumber(x.a[2 * half], e);
        left[1][k] = kNumber(x.a[2 * half + 1], e);
        right[0][k] = kNumber(c[0].b[half], e);
        right[1][k] = kNumber(c[1].b[half], e);
      }
    }
  }
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[column][k];
      d[2 * row + column] += sum;
    }
  }
}

}  // namespace emulated

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma<emulated::half_at>(d, a, b0, b1, 1);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma<emulated::bf16_at>(d, a, b0, b1, 2);
}
inline uint32_t transpose_8x8(uint32_t x) {
  const auto all = emulator::meet(~0u, 3, x);
  const int row = emulator::here().lane / 4, column = 2 * (emulator::here().lane % 4);
  const auto at = [&](int r, int c) { return all[4 * r + c / 2] >> 16 * (c % 2) & 0xffffu; };
  return at(column, row) | at(column + 1, row) << 16;
}

// ---- shared memory

#define THRIFTATTN_DYNAMIC_SHARED(type, name, alignment) \
  type* const name = reinterpret_cast<type*>(emulator::dynamic_shared())

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }
inline void load_matrices(uint32_t (&x)[4], uint32_t at) {
  const auto all = emulator::meet(~0u, 4, at);
  const int lane = emulator::here().lane;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&x[i], emulator::shared_pointer(all[8 * i + lane / 4]) + 4 * (lane % 4), 4);
  }
}
inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t at) {
  const auto all = emulator::meet(~0u, 5, at);
  const int row = emulator::here().lane / 4, column = 2 * (emulator::here().lane % 4);
  for (int i = 0; i < 4; ++i) {
    uint16_t two[2];
    for (int e = 0; e < 2; ++e) {
      std::memcpy(&two[e], emulator::shared_pointer(all[8 * i + column + e]) + 2 * row, 2);
    }
    std::memcpy(&x[i], two, 4);
  }
}
inline uint4 load_chunk(uint32_t at) {
  return *reinterpret_cast<const uint4*>(emulator::shared_pointer(at));
}
inline uint2 load_half_chunk(uint32_t at) {
  return *reinterpret_cast<const uint2*>(emulator::shared_pointer(at));
}
inline void store_chunk(uint32_t at, const uint4& x) {
  *reinterpret_cast<uint4*>(emulator::shared_pointer(at)) = x;
}

// ---- device memory

inline void prefetch_l2(const void*) {}
inline uint4 read_once(const uint4* from) { return *from; }
inline float read_once(const float* from) { return *from; }
inline float read_now(const float* from) { return *from; }
inline int32_t read_now(const int32_t* from) { return *from; }
inline uint16_t read_now(const uint16_t* from) { return *from; }
inline int32_t read_acquire(const int32_t* from) {
  if (*from == 0) emulator::yield();  // whoever polls waits for something else
  return *from;
}

// ---- barriers

inline void barrier_init(uint64_t* bar, int count) { emulator::barrier_init(bar, count); }
inline void barrier_arrive(uint64_t* bar) { emulator::barrier_arrive(bar); }
inline void barrier_wait(uint64_t* bar, uint32_t parity) { emulator::barrier_wait(bar, parity); }
inline void fence_barrier_init() {}
inline void named_barrier_sync(int id, int threads) { emulator::block_barrier(id, threads); }
inline void warpgroup_barrier_sync(int id) { emulator::block_barrier(id, 128); }

// ---- asynchronous copies into shared memory, a thread's own

template <int kBytes>
void copy_async(uint32_t to, const uint8_t* from, int bytes = kBytes) {
  emulator::copy_async(emulator::shared_pointer(to), from, bytes, kBytes - bytes);
}
inline void copy_async_16(uint32_t to, const uint8_t* from) { copy_async<16>(to, from); }
inline void copies_commit() { emulator::copies_commit(); }
inline void copies_wait(int groups) { emulator::copies_wait(groups < 1 || groups > 4 ? 4 : groups); }
inline void barrier_arrive_after_copies(uint64_t* bar) { emulator::arrive_after_copies(bar); }

// ---- bulk copies

#ifdef THRIFTATTN_SM90
inline void barrier_expect(uint64_t* bar, int bytes) { emulator::barrier_expect(bar, bytes); }
inline void barrier_arrive_expect(uint64_t* bar, int bytes) {
  emulator::barrier_expect(bar, bytes);
  emulator::barrier_arrive(bar);
}
inline void bulk_load(uint32_t to, const uint8_t* from, int bytes, uint64_t* bar) {
  emulator::bulk_load(emulator::shared_pointer(to), from, bytes, bar);
}
inline void bulk_load_once(uint32_t to, const uint8_t* from, int bytes, uint64_t* bar) {
  emulator::bulk_load(emulator::shared_pointer(to), from, bytes, bar);
}
inline void bulk_store(uint8_t* to, uint32_t from, int bytes) {
  emulator::bulk_store(to, emulator::shared_pointer(from), bytes);
}
inline void bulk_stores_read() { emulator::bulk_stores_done(); }
#endif
inline void fence_async_proxy() {}

// ---- kernels that overlap: here one runs after another

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace thriftattn::cuda
