// Memory of slots that the CPU does not address: a device's. A SlotPool keeps ids, counts and
// limits; where it has one of these, what a slot holds is moved by it alone.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace thriftattn {

// Slot `id` has one place for as long as it is held. The calls are ordered among themselves and with
// what else the owner has queued on the device.
class SlotMemory {
 public:
  virtual ~SlotMemory() = default;
  // A place for slot `id`. Throws Error(out_of_memory); nothing is changed then.
  virtual void place(int32_t id) = 0;
  virtual void free(int32_t id) noexcept = 0;
  virtual void copy(int32_t from, int32_t to) = 0;
  // Wait for the device.
  virtual void read(int32_t id, void* to) const = 0;
  virtual void write(int32_t id, const void* from) = 0;
};

struct SlotMemoryOptions {
  std::string name;  // for error messages
  int64_t slot_bytes = 0;
  bool zeroed = false;  // place() clears the slot
  bool poison = false;  // freed slots are filled with NaN patterns
};

// Gives the pools of a cache their memory.
class CacheDevice {
 public:
  virtual ~CacheDevice() = default;
  virtual std::unique_ptr<SlotMemory> make_memory(const SlotMemoryOptions& options) = 0;
};

}  // namespace thriftattn
