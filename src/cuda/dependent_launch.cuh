// Kernels that start while the one before them in the stream still runs (sm_90 and later), and wait
// inside for its results; elsewhere the stream's order does it.
#pragma once

#include <cuda_runtime.h>

#include "cuda/checks.h"

namespace thriftattn::cuda {

// Until here a kernel may read nothing that the kernel before it writes.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared = 0;
};

// For kernels that call wait_for_previous_kernel().
template <class Args>
void launch_after_previous(void (*kernel)(Args), const LaunchShape& shape, const Args& args,
                           cudaStream_t stream, const char* name) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int device = 0, major = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), name);
  if (major < 9) config.numAttrs = 0;
  check(cudaLaunchKernelEx(&config, kernel, args), name);
}

}  // namespace thriftattn::cuda
