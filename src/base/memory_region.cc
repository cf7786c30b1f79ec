// A large stretch of zeroed memory from the system (memory_region.h).
#include "base/memory_region.h"

#include <sys/mman.h>
#include <unistd.h>

#include <utility>

namespace thriftattn {

MemoryRegion::MemoryRegion(int64_t bytes) {
  const int64_t size = (bytes + kLargePage - 1) / kLargePage * kLargePage;
  // The system aligns to its own page: ask for more, and start inside.
  const int64_t mapped = size + kLargePage;
  void* memory = mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return;
  mapping_ = static_cast<uint8_t*>(memory);
  mapped_ = mapped;
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(mapping_) %
                                               static_cast<uintptr_t>(kLargePage));
  data_ = mapping_ + (misaligned == 0 ? 0 : kLargePage - misaligned);
  size_ = size;
}

MemoryRegion::~MemoryRegion() {
  if (mapping_ != nullptr) munmap(mapping_, static_cast<size_t>(mapped_));
}

void MemoryRegion::swap(MemoryRegion& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
}

void MemoryRegion::collapse(int64_t offset) {
#if defined(MADV_HUGEPAGE)
#if !defined(MADV_COLLAPSE)
  constexpr int kCollapse = 25;  // Linux 6.1
#else
  constexpr int kCollapse = MADV_COLLAPSE;
#endif
  uint8_t* begin = data_ + offset;
  const auto bytes = static_cast<size_t>(kLargePage);
  if (madvise(begin, bytes, kCollapse) == 0) return;
  // An older system does it in its own time, if at all.
  (void)madvise(begin, bytes, MADV_HUGEPAGE);
#else
  (void)offset;
#endif
}

void MemoryRegion::release(uint8_t* begin, int64_t bytes) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last =
      (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace thriftattn
