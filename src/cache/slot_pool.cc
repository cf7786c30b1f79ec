// Reference-counted slots of one fixed size (slot_pool.h).
#include "cache/slot_pool.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <limits>

#include "thriftattn/error.h"

namespace thriftattn {

void ByteBudget::charge(int64_t bytes, const char* what) {
  if (max_bytes_ > 0 && bytes > max_bytes_ - held_) {
    throw Error(ErrorCode::out_of_memory,
                fmt::format("the KV cache is full: {} asks for {} bytes, {} of {} are held; raise "
                            "the limit, shorten the context or choose a policy that stores less",
                            what, bytes, held_, max_bytes_));
  }
  held_ += bytes;
}

void SlotPool::FreeAligned::operator()(uint8_t* p) const { std::free(p); }

SlotPool::SlotPool(std::string name, int64_t slot_bytes, ByteBudget* budget, bool poison)
    : name_(std::move(name)),
      slot_bytes_((slot_bytes + kAlignment - 1) / kAlignment * kAlignment),
      budget_(budget),
      poison_(poison) {}

int32_t SlotPool::acquire() {
  budget_->charge(slot_bytes_, name_.c_str());
  auto* memory = static_cast<uint8_t*>(
      std::aligned_alloc(static_cast<size_t>(kAlignment), static_cast<size_t>(slot_bytes_)));
  if (memory == nullptr) {
    budget_->refund(slot_bytes_);
    throw Error(ErrorCode::out_of_memory,
                fmt::format("no memory for {}: asked for {} bytes, {} are held by this cache; "
                            "shorten the context or choose a policy that stores less",
                            name_, slot_bytes_, budget_->held()));
  }
  std::memset(memory, 0, static_cast<size_t>(slot_bytes_));
  int32_t id;
  if (!free_ids_.empty()) {
    id = free_ids_.back();
    free_ids_.pop_back();
  } else {
    if (slots_.size() >= static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
      budget_->refund(slot_bytes_);
      std::free(memory);
      throw Error(ErrorCode::out_of_memory, name_ + ": more pages than a block table can name");
    }
    id = static_cast<int32_t>(slots_.size());
    slots_.emplace_back();
    free_ids_.reserve(slots_.capacity());  // so that release() never allocates
  }
  slots_[static_cast<size_t>(id)].memory.reset(memory);
  slots_[static_cast<size_t>(id)].refs = 1;
  ++used_;
  return id;
}

void SlotPool::add_ref(int32_t id) { ++slots_[static_cast<size_t>(id)].refs; }

void SlotPool::release(int32_t id) {
  Slot& slot = slots_[static_cast<size_t>(id)];
  if (--slot.refs > 0) return;
  // With poisoning the memory stays mapped and reads as NaN (0xFF bytes), so that a stale block
  // table is seen in results rather than as luck; without, it goes back to the system.
  if (poison_) {
    std::memset(slot.memory.get(), 0xFF, static_cast<size_t>(slot_bytes_));
  } else {
    slot.memory.reset();
  }
  budget_->refund(slot_bytes_);
  --used_;
  free_ids_.push_back(id);
}

}  // namespace thriftattn
