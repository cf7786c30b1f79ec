// Reference-counted slots of one fixed size. What is freed is really returned, so that usage() can
// be taken from here. Ids are small integers: they go into block tables.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/memory_region.h"
#include "cache/slot_memory.h"

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

// The address sanitizer sees an overrun between allocations, not inside one: no regions for it.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSlotRegions = false;
#elif defined(__has_feature)
inline constexpr bool kSlotRegions = !__has_feature(address_sanitizer);
#else
inline constexpr bool kSlotRegions = true;
#endif

// Where slots lie.
enum class SlotPlacement : uint8_t {
  // Side by side in large regions, in the order in which they are acquired: what is read in that
  // order streams, and large pages make it cheap to find.
  region,
  // Each its own allocation: for slots that come and go.
  single,
};

struct SlotPoolOptions {
  std::string name;  // for error messages
  int64_t slot_bytes = 0;
  SlotPlacement placement = SlotPlacement::single;
  bool poison = false;  // fill freed slots with NaN patterns, and keep them
};

class SlotPool {
 public:
  static constexpr int64_t kAlignment = 64;

  // With `memory` the slots lie there, wherever `options` would place them, and data() is null.
  SlotPool(SlotPoolOptions options, ByteBudget* budget,
           std::unique_ptr<SlotMemory> memory = nullptr);

  int32_t acquire();  // reference count 1; content is zero (with `memory`: what it gives)
  void add_ref(int32_t id);
  void release(int32_t id);
  int32_t refs(int32_t id) const { return slots_[static_cast<size_t>(id)].refs; }

  uint8_t* data(int32_t id) { return slots_[static_cast<size_t>(id)].data; }
  const uint8_t* data(int32_t id) const { return slots_[static_cast<size_t>(id)].data; }

  // What works wherever the slots lie.
  void copy(int32_t from, int32_t to);
  void write(int32_t id, const uint8_t* from);
  // The slot's bytes: its own, or a copy in `buffer`.
  const uint8_t* read(int32_t id, std::vector<uint8_t>& buffer) const;
  SlotMemory* memory() const { return memory_.get(); }  // null: the CPU's

  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t used() const { return used_; }

 private:
  struct FreeAligned {
    void operator()(uint8_t* p) const;
  };
  using Allocation = std::unique_ptr<uint8_t[], FreeAligned>;
  struct Slot {
    uint8_t* data = nullptr;
    int32_t region = -1;  // in a region: its place there is the slot's for ever
    int32_t refs = 0;
    Allocation allocation;  // its own, if it has one
  };

  // A zeroed place for `slot`; false if the system has none.
  bool place(Slot& slot);
  bool place_in_region(Slot& slot);

  std::string name_;
  int64_t slot_bytes_;
  SlotPlacement placement_;
  bool poison_;
  ByteBudget* budget_;
  std::unique_ptr<SlotMemory> memory_;
  int64_t used_ = 0;
  std::vector<Slot> slots_;
  std::vector<int32_t> free_ids_;
  std::vector<MemoryRegion> regions_;
  int64_t carved_ = 0;     // bytes of the last region that are slots
  int64_t collapsed_ = 0;  // bytes of it that are asked for as large pages
};

}  // namespace thriftattn
