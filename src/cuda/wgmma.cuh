// Products of a warpgroup (wgmma), in PTX; tests/emulator has a file of the same name that does them on
// a CPU. 64 rows of a warpgroup: those of warp w are 16 w ..., its lanes hold them as mma's.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(THRIFTATTN_NO_WGMMA)
#define THRIFTATTN_WGMMA 1
#endif

#ifdef THRIFTATTN_WGMMA
namespace thriftattn::cuda {

// The descriptor of a panel with the 128-byte swizzle, and the one `bytes` behind it; groups of 8
// rows follow each other, and a product never needs a second step in the other direction. Addresses
// stay below 2^18, so that the upper half is a constant.
struct PanelDescriptor {
  uint32_t low;

  // Opaque, so that the descriptors behind it are sums made where they are used, not registers kept
  // (or spilled) across pages.
  __device__ explicit PanelDescriptor(uint32_t at) : low((1024u >> 4) << 16 | at >> 4) {
    asm volatile("" : "+r"(low));
  }
  __device__ uint64_t behind(int bytes) const {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStep = uint64_t{1024 >> 4} << 32;
    return kSwizzle128 | kStep | (low + (static_cast<uint32_t>(bytes) >> 4));
  }
};

#define THRIFTATTN_EIGHT(d, n)                                                   \
  "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), \
      "+f"(d[n + 1][1]), "+f"(d[n + 1][2]), "+f"(d[n + 1][3])

// d (64 rows of the warpgroup x 64) = or += A (64 x 16, of shared memory) * B (64 x 16)^T.
__device__ inline void wgmma_shared(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}"
      : THRIFTATTN_EIGHT(d, 0), THRIFTATTN_EIGHT(d, 2), THRIFTATTN_EIGHT(d, 4),
        THRIFTATTN_EIGHT(d, 6)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// d += A (64 x 16, fragments) * B (16 x 64, rows of shared memory).
__device__ inline void wgmma_fragment(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
      : THRIFTATTN_EIGHT(d, 0), THRIFTATTN_EIGHT(d, 2), THRIFTATTN_EIGHT(d, 4),
        THRIFTATTN_EIGHT(d, 6)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// d (64 rows of the warpgroup x 64) = or += A (64 x 16, fragments) * B (64 x 16)^T.
__device__ inline void wgmma_held(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
      : THRIFTATTN_EIGHT(d, 0), THRIFTATTN_EIGHT(d, 2), THRIFTATTN_EIGHT(d, 4),
        THRIFTATTN_EIGHT(d, 6)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}
#undef THRIFTATTN_EIGHT

// Registers of a product are neither read nor written between issue and wait.
__device__ inline void hold(float (&d)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
  }
}
__device__ inline void hold(uint32_t (&p)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("" : "+r"(p[i][0]), "+r"(p[i][1]), "+r"(p[i][2]), "+r"(p[i][3])::"memory");
  }
}

// Products are issued between wgmma_fence() and wgmma_commit(), which ends a group; all but the last
// N groups are done after wgmma_wait<N>().
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

}  // namespace thriftattn::cuda
#endif
