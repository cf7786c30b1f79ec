// Large buffers that are needed again and again: taken from the system once, so that a decode step
// does not pay page faults for them (16 MB of scores at 131072 tokens: 10 ms). Thread-safe.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "base/aligned.h"

namespace thriftattn {

class ScratchPool {
 public:
  // Gives its buffer back when it ends. Uninitialised memory on a 64-byte line.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept { *this = std::move(other); }
    Lease& operator=(Lease&& other) noexcept {
      std::swap(pool_, other.pool_);
      std::swap(buffer_, other.buffer_);
      return *this;
    }
    ~Lease() {
      if (pool_ != nullptr) pool_->give_back(std::move(buffer_));
    }
    float* get() const { return buffer_.data.get(); }

   private:
    friend class ScratchPool;
    struct Buffer {
      AlignedFloats data;
      int64_t size = 0;
    };
    ScratchPool* pool_ = nullptr;
    Buffer buffer_;
  };

  // A buffer of at least n floats: the smallest free one that is large enough, else a new one.
  Lease take(int64_t n) {
    Lease lease;
    lease.pool_ = this;
    {
      const std::lock_guard lock(mutex_);
      size_t best = free_.size();
      for (size_t i = 0; i < free_.size(); ++i) {
        const bool fits = free_[i].size >= n;
        if (fits && (best == free_.size() || free_[i].size < free_[best].size)) best = i;
      }
      if (best < free_.size()) {
        std::swap(free_[best], free_.back());
        lease.buffer_ = std::move(free_.back());
        free_.pop_back();
        return lease;
      }
      // None is large enough: the smaller ones are of an earlier length, and are let go.
      free_.clear();
    }
    // Room to grow, so that a sequence that gets longer by a page a step is not new each time.
    const int64_t size = n + n / 8;
    lease.buffer_ = {aligned_buffer<float>(size), size};
    return lease;
  }

 private:
  void give_back(Lease::Buffer buffer) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(buffer));
  }

  std::mutex mutex_;
  std::vector<Lease::Buffer> free_;
};

}  // namespace thriftattn
