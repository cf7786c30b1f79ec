// Host memory that a device copies from and to without waiting. For sources that know CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "cuda/checks.h"

namespace thriftattn::device {

class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(int64_t bytes) : bytes_(bytes) {
    cuda::check(cudaMallocHost(&data_, static_cast<size_t>(bytes)), "cudaMallocHost");
  }
  ~PinnedBuffer() {
    if (data_ != nullptr) (void)cudaFreeHost(data_);
  }
  PinnedBuffer(PinnedBuffer&& other) noexcept { swap(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  // At least `bytes`; what it held is lost when it grows.
  void reserve(int64_t bytes) {
    if (bytes > bytes_) *this = PinnedBuffer(bytes);
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(PinnedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace thriftattn::device
