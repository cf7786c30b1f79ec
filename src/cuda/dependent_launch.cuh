// Launches. Kernels may start while the one before them in the stream still runs (sm_90 and later),
// and wait inside for its results; elsewhere the stream's order does it. tests/emulator has a file of
// the same name, where the CPU runs them.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/checks.h"
#include "cuda/ptx.cuh"

namespace thriftattn::cuda {

struct LaunchShape {
  dim3 grid, block;
  size_t shared = 0;
};

// Threads of a block by the launch bounds of the device's code; `host` is what the host's code takes
// them for.
template <class Args>
int launch_bounds_of(void (*kernel)(Args), [[maybe_unused]] int host, const char* name) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  return attributes.maxThreadsPerBlock;
}

// Before launches that ask for more shared memory than every kernel gets.
template <class... Args>
void allow_shared(void (*kernel)(Args...), int bytes, const char* name) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
}

// After all that the stream has before it.
template <class... Args>
void launch_kernel(void (*kernel)(Args...), const LaunchShape& shape, cudaStream_t stream,
                   const char* name, const std::type_identity_t<Args>&... args) {
  kernel<<<shape.grid, shape.block, shape.shared, stream>>>(args...);
  check_launch(name);
}

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
