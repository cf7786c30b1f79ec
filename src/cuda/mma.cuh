// Tensor core products, the asynchronous copies into shared memory and their barriers. On sm_90 and
// later one lane starts a bulk copy; before, the warp's lanes copy 16 bytes each (cp.async), and
// each lane is an arrival of the same barrier.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace thriftattn::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kBulkCopy = true;
#else
inline constexpr bool kBulkCopy = false;
#endif

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

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

// 2^e, of -126 <= e <= 127.
__device__ inline float power_of_two(int e) { return __uint_as_float((127 + e) << 23); }
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t hmul2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// A barrier of `count` arrivals.
__device__ inline void barrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
}
// For the copies of one stage.
__device__ inline void barrier_init(uint64_t* bar) { barrier_init(bar, kBulkCopy ? 1 : 32); }
// One arrival, by one lane; what it wrote before is seen by those who wait.
__device__ inline void barrier_arrive(uint64_t* bar) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(bar))
               : "memory");
}
// Where StageCopy::begin() is no arrival, each lane's own.
__device__ inline void barrier_arrive_each(uint64_t* bar) {
  if constexpr (!kBulkCopy) barrier_arrive(bar);
}
// Of `threads` threads of the block, whole warps.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Barriers are initialised for the copy engine too.
__device__ inline void fence_barrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Lanes see what a completed copy wrote.
__device__ inline void barrier_wait(uint64_t* bar, uint32_t parity) {
  const uint32_t at = shared_address(bar);
  uint32_t done = 0;
  while (!done) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
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

// The copies of one stage: begin(bytes), any number of copy(), end(). By the whole warp.
struct StageCopy {
  uint64_t* bar;
  int lane;

  // More bytes than those of begin(), before it.
  __device__ void expect(int bytes) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (lane == 0) {
      asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(
                       shared_address(bar)),
                   "r"(bytes)
                   : "memory");
    }
#else
    (void)bytes;
#endif
  }
  __device__ void begin(int bytes) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                       shared_address(bar)),
                   "r"(bytes)
                   : "memory");
    }
#else
    (void)bytes;
#endif
  }
  // `count` pieces of `bytes` (a multiple of 16), strides apart; 16-byte aligned.
  __device__ void copy(uint8_t* to, int to_stride, const uint8_t* from, int64_t from_stride,
                       int bytes, int count) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (lane < count) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
              "r"(shared_address(to + lane * to_stride)),
          "l"(from + lane * from_stride), "r"(bytes), "r"(shared_address(bar))
          : "memory");
    }
#else
    const int per = bytes / 16;
    for (int i = lane; i < per * count; i += 32) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       shared_address(to + i / per * to_stride + i % per * 16)),
                   "l"(from + i / per * from_stride + i % per * 16)
                   : "memory");
    }
#endif
  }
  // One piece, likewise.
  __device__ void copy_once(uint8_t* to, const uint8_t* from, int bytes) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (lane == 0) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
          "[%1], %2, [%3], %4;" ::"r"(shared_address(to)),
          "l"(from), "r"(bytes), "r"(shared_address(bar)), "l"(kEvictFirst)
          : "memory");
    }
#else
    copy(to, 0, from, 0, bytes, 1);
#endif
  }
  __device__ void end() const {
#if !(defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar))
                 : "memory");
#endif
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// One lane's bulk copy of `bytes` (a multiple of 16, aligned so): into shared memory, to be expected
// by the barrier, and out of it, in a group of its own.
__device__ inline void bulk_load(uint32_t to, const uint8_t* from, int bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(shared_address(bar))
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

// Writes by ordinary stores come before later bulk copies into the same place.
__device__ inline void fence_stores_before_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- expanding codes

// 8 E2M1 codes of a word to FP16 halves of value * 2^-14: `even` gets nibbles (0, 4) and (2, 6),
// `odd` nibbles (1, 5) and (3, 7). The exponent and mantissa bits of E2M1 are put where FP16 has
// the low bits of its exponent and the first of its mantissa, the sign on top: exact, zero and the
// subnormal 0.5 included. 11 instructions.
struct Expanded {
  uint32_t even_low, even_high, odd_low, odd_high;
};
__device__ inline Expanded expand_e2m1(uint32_t x) {
  const uint32_t even = (x << 1 & 0x0e0e0e0eu) | (x << 4 & 0x80808080u);
  const uint32_t odd = (x >> 3 & 0x0e0e0e0eu) | (x & 0x80808080u);
  return {__byte_perm(even, 0, 0x2404), even & 0xff00ff00u, __byte_perm(odd, 0, 0x2404),
          odd & 0xff00ff00u};
}

// An E4M3 scale (no sign) in both halves of a word, times 2^7; two scales likewise.
__device__ inline uint32_t scale_pair(uint32_t a, uint32_t b) {
  return hmul2((a | b << 16) << 7, 0x78007800u);  // times 2^15: the bits alone are value * 2^-8
}
__device__ inline uint32_t scale_both(uint32_t a) { return hmul2(a * 0x00800080u, 0x78007800u); }

// Bytes 0 and 2 of a word of E4M3 codes to FP16 halves of value * 2^-8.
__device__ inline uint32_t expand_e4m3(uint32_t x) {
  return ((x & 0x007f007fu) << 7) | ((x & 0x00800080u) << 8);
}

// Accumulators of products start from zeros.
template <int I, int N>
__device__ inline void clear(float (&x)[I][N][4]) {
#pragma unroll
  for (int i = 0; i < I; ++i) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][n][e] = 0;
    }
  }
}

}  // namespace thriftattn::cuda
