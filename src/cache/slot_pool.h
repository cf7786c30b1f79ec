// Reference-counted slots of one fixed size, each its own allocation, so that what is freed is
// really returned and usage() can be taken from here. Ids are small integers: they go into
// block tables.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace thriftattn {

// The bytes that all pools and open pages of one cache hold, against an optional limit.
class ByteBudget {
 public:
  explicit ByteBudget(int64_t max_bytes) : max_bytes_(max_bytes) {}

  // Throws Error(out_of_memory) with asked, held and limit; nothing is changed then.
  void charge(int64_t bytes, const char* what);
  void refund(int64_t bytes) { held_ -= bytes; }
  int64_t held() const { return held_; }

 private:
  int64_t max_bytes_;
  int64_t held_ = 0;
};

class SlotPool {
 public:
  static constexpr int64_t kAlignment = 64;

  // `name` is for error messages. With `poison`, freed slots are filled with NaN patterns.
  SlotPool(std::string name, int64_t slot_bytes, ByteBudget* budget, bool poison);

  int32_t acquire();  // reference count 1; content is zero
  void add_ref(int32_t id);
  void release(int32_t id);
  int32_t refs(int32_t id) const { return slots_[static_cast<size_t>(id)].refs; }

  uint8_t* data(int32_t id) { return slots_[static_cast<size_t>(id)].memory.get(); }
  const uint8_t* data(int32_t id) const { return slots_[static_cast<size_t>(id)].memory.get(); }

  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t used() const { return used_; }

 private:
  struct FreeAligned {
    void operator()(uint8_t* p) const;
  };
  struct Slot {
    std::unique_ptr<uint8_t[], FreeAligned> memory;
    int32_t refs = 0;
  };

  std::string name_;
  int64_t slot_bytes_;
  ByteBudget* budget_;
  bool poison_;
  int64_t used_ = 0;
  std::vector<Slot> slots_;
  std::vector<int32_t> free_ids_;
};

}  // namespace thriftattn
