// Turning CUDA's error codes into Errors, at the call that failed. For sources that know CUDA.
#pragma once

#include <cuda_runtime.h>

namespace thriftattn::cuda {

// Throws Error(unsupported) naming what was done, the code and the remedy.
void check(cudaError_t code, const char* what);
// The launch just made.
void check_launch(const char* kernel);

}  // namespace thriftattn::cuda
