// Buffers on 64-byte lines, uninitialised: what the AVX-512 kernels load and store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace thriftattn {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
template <typename T>
using AlignedBuffer = std::unique_ptr<T[], AlignedDelete>;
using AlignedFloats = AlignedBuffer<float>;
using AlignedWords = AlignedBuffer<uint32_t>;

template <typename T>
AlignedBuffer<T> aligned_buffer(int64_t n) {
  return AlignedBuffer<T>(
      static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), std::align_val_t{64})));
}

}  // namespace thriftattn
