// A large stretch of zeroed memory from the system, held by the page on demand: reserving costs
// address space alone.
#pragma once

#include <cstdint>

namespace thriftattn {

class MemoryRegion {
 public:
  // The size of a large page, on which regions start and which collapse() deals in.
  static constexpr int64_t kLargePage = int64_t{2} << 20;

  MemoryRegion() = default;
  // `bytes` is rounded up to large pages. Empty when the system has none.
  explicit MemoryRegion(int64_t bytes);
  ~MemoryRegion();
  MemoryRegion(MemoryRegion&& other) noexcept { swap(other); }
  MemoryRegion& operator=(MemoryRegion&& other) noexcept {
    swap(other);
    return *this;
  }

  explicit operator bool() const { return data_ != nullptr; }
  uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }

  // Asks for [offset, offset + kLargePage) as one large page: an eighth of the time of a cold read
  // is the walk through the page tables otherwise. The content stays; without effect where the
  // system cannot.
  void collapse(int64_t offset);
  // Gives the whole pages inside back to the system; what they held is lost.
  void release(uint8_t* begin, int64_t bytes);

 private:
  void swap(MemoryRegion& other) noexcept;

  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  uint8_t* mapping_ = nullptr;  // what munmap() needs
  int64_t mapped_ = 0;
};

}  // namespace thriftattn
