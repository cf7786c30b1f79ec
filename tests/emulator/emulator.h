// Runs the CUDA kernels on a CPU, for tests where no GPU is: their sources are compiled as C++, with
// this folder's ptx.cuh, wgmma.cuh and dependent_launch.cuh in place of src/cuda's. It follows what a
// kernel computes, not how long it takes.
//
// Threads of a block are fibers, blocks run one after another, kernels at their launch. Warps take
// turns in an order that a seed decides (THRIFTATTN_EMULATOR_SEED), and an asynchronous copy is done
// when somebody waits for it: until then its place holds poison, so that who reads too early sees it.
// Device memory ends at a page that cannot be touched and starts as NaN. Lanes of a warp that meet
// in different instructions, and blocks that wait for ever, are errors with the kernel's name.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace thriftattn::emulator {

inline constexpr int kSharedBytes = 227 * 1024;  // of a block, as on sm_90

struct Warp;

// A copy, or an arrival at a barrier after the copies before it, that waits to be done.
struct Pending {
  uint8_t* to = nullptr;
  const uint8_t* from = nullptr;
  int bytes = 0, zeros = 0;  // zeros behind them
  uint64_t* bar = nullptr;
  enum Tells { kNothing, kBytes, kArrival } tells = kNothing;  // `bar`, at the end
};

// What the running thread is.
struct Thread {
  uint3 index{}, block_index{};
  dim3 block_dim, grid_dim;
  int lane = 0;
  Warp* warp = nullptr;
  std::vector<std::vector<Pending>> groups{1};  // cp.async: committed ones, and the open one
  std::vector<Pending> stores;                  // bulk stores
};
Thread& here();

// Lets others run.
void yield();
[[noreturn]] void fail(const char* what);

// ---- lanes that meet

// Each lane of `mask` gives `bytes` and gets those of all, 64 bytes apart, valid until the lane's next
// meeting but one. `op` tells instructions apart; `orders`: what lanes wrote before is seen after.
const uint8_t* meet(uint32_t mask, int op, const void* mine, size_t bytes, bool orders = false);
inline constexpr size_t kMeetStride = 64;

template <class T>
struct Met {
  const uint8_t* at;
  T operator[](int lane) const {
    T x;
    std::memcpy(&x, at + static_cast<size_t>(lane) * kMeetStride, sizeof x);
    return x;
  }
};
template <class T>
Met<T> meet(uint32_t mask, int op, const T& mine) {
  static_assert(sizeof(T) <= kMeetStride);
  return {meet(mask, op, &mine, sizeof mine)};
}

// Named barriers; threads < 0: all threads of the block that still run. Returns whether any gave `value`.
bool block_barrier(int id, int threads, bool value = false);

// Each thread of the warpgroup gives a pointer; the last one to come does `work` with all 128.
void warpgroup_meet(void* mine, const std::function<void(void* const*)>& work);

// ---- shared memory and its barriers

uint8_t* dynamic_shared();
uint32_t shared_address(const void* p);
uint8_t* shared_pointer(uint32_t address);

void barrier_init(uint64_t* bar, int count);
void barrier_arrive(uint64_t* bar);
void barrier_expect(uint64_t* bar, int bytes);
void barrier_wait(uint64_t* bar, uint32_t parity);

// ---- copies

void bulk_load(uint8_t* to, const uint8_t* from, int bytes, uint64_t* bar);
void bulk_store(uint8_t* to, const uint8_t* from, int bytes);
void bulk_stores_done();
void copy_async(uint8_t* to, const uint8_t* from, int bytes, int zeros);
void copies_commit();
void copies_wait(int groups);
void arrive_after_copies(uint64_t* bar);

// ---- launches

struct Launch {
  dim3 grid, block;
  size_t shared = 0;
  const char* name = "";
  std::function<void()> kernel;  // one thread of it
};
void run(const Launch& launch);
// Does it, or adds it to the graph that the stream captures (runtime.cc).
void launch(cudaStream_t stream, Launch launch);
void submit(cudaStream_t stream, std::function<void()> work);

}  // namespace thriftattn::emulator
