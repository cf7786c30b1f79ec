// Every instruction that is written in PTX, but wgmma (wgmma.cuh): what the kernels ask of the
// machine and the language has no word for. tests/emulator has a file of the same name that does
// it on a CPU.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define THRIFTATTN_SM90 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define THRIFTATTN_SM89 1
#endif

namespace thriftattn::cuda {

// ---- numbers

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ inline uint32_t hmul2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ inline uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t d;  // a sum with -0: the product alone is an instruction of sm_90
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
}
#ifdef THRIFTATTN_SM89
// E4M3 codes of two values, saturating: low in bits 0 to 7, high in 8 to 15.
__device__ __forceinline__ uint32_t convert_e4m3(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
#endif

// ---- registers

// Read so that it stays in a register instead of being read again in every loop.
__device__ inline int lane_in_register() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
// Of each thread of the warpgroup: given back, and asked for.
template <int kCount>
__device__ inline void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- products of a warp

// D += A (16 x 16, rows) * B (16 x 8, columns), FP16 or BF16 in, FP32 sums.
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The transpose of an 8 x 8 matrix of 16-bit numbers that lies across the warp.
__device__ inline uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---- shared memory

// The shared memory that a launch asks for, as an array of `type`.
#define THRIFTATTN_DYNAMIC_SHARED(type, name, alignment) \
  extern __shared__ __align__(alignment) type name[]

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
__device__ inline uint4 load_chunk(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
__device__ inline uint2 load_half_chunk(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}
__device__ inline void store_chunk(uint32_t at, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

// ---- device memory

__device__ inline void prefetch_l2(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}
// What createpolicy gives for L2::evict_first, of all of it: for bytes that nobody reads again
// soon, so that what else the L2 holds, code among it, stays there.
inline constexpr uint64_t kEvictFirst = 0x12f0000000000000;
__device__ inline uint4 read_once(const uint4* from) {
  uint4 x;
  asm("ld.global.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from), "l"(kEvictFirst));
  return x;
}
__device__ inline float read_once(const float* from) {
  float x;
  asm("ld.global.L2::cache_hint.f32 %0, [%1], %2;" : "=f"(x) : "l"(from), "l"(kEvictFirst));
  return x;
}
// Reads here, not where the number is used: the compiler moves loads behind divisions and waits for
// one after another.
__device__ inline float read_now(const float* from) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}
__device__ inline int32_t read_now(const int32_t* from) {
  int32_t x;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
}
__device__ inline uint16_t read_now(const uint16_t* from) {
  uint16_t x;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(from));
  return x;
}
// What other blocks wrote before they released it is seen afterwards.
__device__ inline int32_t read_acquire(const int32_t* from) {
  int32_t x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

// ---- barriers

// A barrier of `count` arrivals.
__device__ inline void barrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
}
// One arrival, by one lane; what it wrote before is seen by those who wait.
__device__ inline void barrier_arrive(uint64_t* bar) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(bar))
               : "memory");
}
// Lanes see what a completed copy wrote.
__device__ inline void barrier_wait(uint64_t* bar, uint32_t parity) {
  const uint32_t at = shared_address(bar);
  uint32_t done = 0;
  while (!done) {
#ifdef THRIFTATTN_SM90
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
#else
    // test_wait.parity needs sm_90's sibling; phases are followed through the parity all the same.
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
#endif
  }
}
// Barriers are initialised for the copy engine too.
__device__ inline void fence_barrier_init() {
#ifdef THRIFTATTN_SM90
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Of `threads` threads of the block, whole warps; barrier 0 is the block's.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Of a warpgroup.
__device__ inline void warpgroup_barrier_sync(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// ---- asynchronous copies into shared memory, a thread's own

// kBytes at `to`, of which only the first `bytes` are read from `from`; the rest are zeros.
template <int kBytes>
__device__ inline void copy_async(uint32_t to, const uint8_t* from, int bytes = kBytes) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}
__device__ inline void copy_async_16(uint32_t to, const uint8_t* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until fewer than `groups` of the thread's groups are on their way; 1 to 4.
__device__ inline void copies_wait(int groups) {
  switch (groups) {
    case 1:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
}
// Arrives once the thread's copies so far have.
__device__ inline void barrier_arrive_after_copies(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar))
               : "memory");
}

// ---- bulk copies

#ifdef THRIFTATTN_SM90
// The barrier's phase waits for `bytes` more; with an arrival, too.
__device__ inline void barrier_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
__device__ inline void barrier_arrive_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
// One lane's copy of `bytes` (a multiple of 16, aligned so): into shared memory, to be expected
// by the barrier; of bytes that nobody reads again soon; and out of it, in a group of its own.
__device__ inline void bulk_load(uint32_t to, const uint8_t* from, int bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}
__device__ inline void bulk_load_once(uint32_t to, const uint8_t* from, int bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(shared_address(bar)), "l"(kEvictFirst)
      : "memory");
}
__device__ inline void bulk_store(uint8_t* to, uint32_t from, int bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}
// Until the lane's bulk stores have read what they store.
__device__ inline void bulk_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
#endif

// Ordinary stores into shared memory come before later bulk copies into the same place, and are
// seen by the tensor cores' own reads.
__device__ inline void fence_async_proxy() {
#ifdef THRIFTATTN_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- kernels that overlap

// Until here a kernel may read nothing that the kernel before it writes.
__device__ inline void wait_for_previous_kernel() {
#ifdef THRIFTATTN_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#ifdef THRIFTATTN_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace thriftattn::cuda
