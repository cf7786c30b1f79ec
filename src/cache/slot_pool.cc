// Reference-counted slots of one fixed size (slot_pool.h).
#include "cache/slot_pool.h"

#include <fmt/format.h>

#include <algorithm>
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

namespace {

// Regions grow with the pool, from this many slots up to this many bytes.
constexpr int64_t kFirstSlots = 16;
constexpr int64_t kMaxRegion = int64_t{64} << 20;

}  // namespace

SlotPool::SlotPool(SlotPoolOptions options, ByteBudget* budget,
                   std::unique_ptr<SlotMemory> memory)
    : name_(std::move(options.name)),
      slot_bytes_((options.slot_bytes + kAlignment - 1) / kAlignment * kAlignment),
      placement_(kSlotRegions ? options.placement : SlotPlacement::single),
      poison_(options.poison),
      budget_(budget),
      memory_(std::move(memory)) {}

bool SlotPool::place_in_region(Slot& slot) {
  if (regions_.empty() || carved_ + slot_bytes_ > regions_.back().size()) {
    const int64_t wanted =
        regions_.empty() ? kFirstSlots * slot_bytes_
                         : std::max(slot_bytes_, std::min(2 * regions_.back().size(), kMaxRegion));
    MemoryRegion region(wanted);
    if (!region) return false;
    regions_.push_back(std::move(region));
    carved_ = collapsed_ = 0;
  }
  slot.region = static_cast<int32_t>(regions_.size()) - 1;
  slot.data = regions_.back().data() + carved_;
  carved_ += slot_bytes_;
  // Large pages for what is in use from end to end, and never for more.
  while (collapsed_ + MemoryRegion::kLargePage <= carved_ - slot_bytes_) {
    regions_.back().collapse(collapsed_);
    collapsed_ += MemoryRegion::kLargePage;
  }
  return true;
}

bool SlotPool::place(Slot& slot) {
  if (placement_ == SlotPlacement::region) {
    if (slot.data == nullptr) return place_in_region(slot);  // as the system gives it: zeros
  } else if (slot.allocation == nullptr) {
    slot.allocation.reset(static_cast<uint8_t*>(
        std::aligned_alloc(static_cast<size_t>(kAlignment), static_cast<size_t>(slot_bytes_))));
    if (slot.allocation == nullptr) return false;
    slot.data = slot.allocation.get();
  }
  std::memset(slot.data, 0, static_cast<size_t>(slot_bytes_));
  return true;
}

int32_t SlotPool::acquire() {
  budget_->charge(slot_bytes_, name_.c_str());
  const bool fresh = free_ids_.empty();
  if (fresh && slots_.size() >= static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    budget_->refund(slot_bytes_);
    throw Error(ErrorCode::out_of_memory, name_ + ": more pages than a block table can name");
  }
  if (fresh) {
    slots_.emplace_back();
    free_ids_.reserve(slots_.capacity());  // so that release() never allocates
  }
  const int32_t id = fresh ? static_cast<int32_t>(slots_.size()) - 1 : free_ids_.back();
  Slot& slot = slots_[static_cast<size_t>(id)];
  if (memory_ != nullptr) {
    try {
      memory_->place(id);
    } catch (...) {
      if (fresh) slots_.pop_back();
      budget_->refund(slot_bytes_);
      throw;
    }
  } else if (!place(slot)) {
    if (fresh) slots_.pop_back();
    budget_->refund(slot_bytes_);
    throw Error(ErrorCode::out_of_memory,
                fmt::format("no memory for {}: asked for {} bytes, {} are held by this cache; "
                            "shorten the context or choose a policy that stores less",
                            name_, slot_bytes_, budget_->held()));
  }
  if (!fresh) free_ids_.pop_back();
  slot.refs = 1;
  ++used_;
  return id;
}

void SlotPool::add_ref(int32_t id) { ++slots_[static_cast<size_t>(id)].refs; }

void SlotPool::release(int32_t id) {
  Slot& slot = slots_[static_cast<size_t>(id)];
  if (--slot.refs > 0) return;
  // With poisoning the memory stays mapped and reads as NaN (0xFF bytes), so that a stale block
  // table is seen in results rather than as luck; without, it goes back to the system.
  if (memory_ != nullptr) {
    memory_->free(id);
  } else if (poison_) {
    std::memset(slot.data, 0xFF, static_cast<size_t>(slot_bytes_));
  } else if (slot.allocation != nullptr) {
    slot.allocation.reset();
    slot.data = nullptr;
  } else {
    regions_[static_cast<size_t>(slot.region)].release(slot.data, slot_bytes_);
  }
  budget_->refund(slot_bytes_);
  --used_;
  free_ids_.push_back(id);
}

void SlotPool::copy(int32_t from, int32_t to) {
  if (memory_ != nullptr) return memory_->copy(from, to);
  std::memcpy(data(to), data(from), static_cast<size_t>(slot_bytes_));
}

void SlotPool::write(int32_t id, const uint8_t* from) {
  if (memory_ != nullptr) return memory_->write(id, from);
  std::memcpy(data(id), from, static_cast<size_t>(slot_bytes_));
}

const uint8_t* SlotPool::read(int32_t id, std::vector<uint8_t>& buffer) const {
  if (memory_ == nullptr) return data(id);
  buffer.resize(static_cast<size_t>(slot_bytes_));
  memory_->read(id, buffer.data());
  return buffer.data();
}

}  // namespace thriftattn
