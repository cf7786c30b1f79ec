// src/cuda/dependent_launch.cuh on a CPU: each launch is run, or kept for a graph, by the emulator.
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

template <class Args>
int launch_bounds_of(void (*)(Args), int host, const char*) {
  return host;
}

template <class... Args>
void allow_shared(void (*)(Args...), int bytes, const char* name) {
  check(bytes <= emulator::kSharedBytes ? cudaSuccess : cudaErrorInvalidValue, name);
}

template <class... Args>
void launch_kernel(void (*kernel)(Args...), const LaunchShape& shape, cudaStream_t stream,
                   const char* name, const std::type_identity_t<Args>&... args) {
  emulator::launch(stream, {shape.grid, shape.block, shape.shared, name, [=] { kernel(args...); }});
  check_launch(name);
}

template <class Args>
void launch_after_previous(void (*kernel)(Args), const LaunchShape& shape, const Args& args,
                           cudaStream_t stream, const char* name) {
  launch_kernel(kernel, shape, stream, name, args);
}

}  // namespace thriftattn::cuda
