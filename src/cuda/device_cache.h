// A KvCache whose pages lie on a device. Bookkeeping is the CPU's own (steps, sharing, residency,
// accounting); what differs is where slots live and who fills them:
//
//   auto cache = make_device_cache(config, stream);
//   cache->begin_step(seq, n);
//   cache->impl().make_room(impl.sequence(seq));   // slots of the whole step, every layer
//   DeviceTables tables(cache, ...) -> upload;     // ids for the kernels
//   append() / attend() of thriftattn/cuda.h per layer, on `stream`
//   cache->commit(seq);                            // or rollback(seq)
//
// Slots of a pool lie at base + id * slot_bytes in address space that is reserved once and backed
// with memory on demand, so pointers in captured graphs stay valid while a pool grows.
#pragma once

#include <memory>
#include <vector>

#include "cache/kv_cache_impl.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {

class DeviceTables;

// What belongs to a cache on the device beside its pools. Reached through KvCache::Impl::device.
class DeviceCacheState : public CacheDevice {
 public:
  DeviceCacheState(size_t layers, Stream stream);
  std::unique_ptr<SlotMemory> make_memory(const SlotMemoryOptions& options) override;
  // Copies the equalisers of the stores, and checks that kernels serve them.
  void finish(const KvCache::Impl& impl);

  // Tells caches apart, also one that takes the address of another.
  int64_t serial() const { return serial_; }
  const float* equalizer(size_t store) const { return equalizers_[store].as<float>(); }

 private:
  Stream stream_;
  int64_t serial_ = 0;
  int64_t reserve_ = 0;
  std::vector<DeviceMemory> equalizers_;  // of each store, empty where it has none
};
DeviceCacheState& device_state(const KvCache& cache);

// On the current device; all copies go through `stream`, which must outlive the cache. Throws
// Error(unsupported) for a layer and policy that no kernel serves.
std::unique_ptr<KvCache> make_device_cache(KvCacheConfig config, Stream stream);

// Whether exact_f32.h serves this part of a layer, in place of AttendPlan.
bool is_exact(const LayerPolicy& policy);

// Where the slots and the equaliser of a store lie.
LayerMemory layer_memory(const KvCache& cache, size_t store);
// Device memory behind the pools of a cache: at least what usage() counts, since a pool grows by
// 2 MiB at a time.
int64_t mapped_bytes(const KvCache& cache);

// The ids of one sequence in every store, in the order in which kernels read them, so that one copy
// moves them: [store] {length, 2 step offsets, pages, residuals, open}.
class DeviceTables {
 public:
  // Rows for `max_pages` pages and steps that touch `open_pages`.
  DeviceTables(const KvCache& cache, int64_t max_pages, int64_t open_pages);

  int64_t bytes() const { return static_cast<int64_t>(ids_.size() * sizeof(int32_t)); }
  // Of the open step of `sequence`.
  void fill(const KvCache& cache, SequenceId sequence);
  const std::vector<int32_t>& ids() const { return ids_; }
  // The same tables where a copy of ids() starts.
  BatchTables tables(size_t store, const int32_t* copy) const;

 private:
  struct Offsets {
    size_t pages = 0, residuals = 0, open = 0;
  };
  int64_t open_pages_;
  std::vector<Offsets> offsets_;
  std::vector<int32_t> ids_;
};

}  // namespace thriftattn::cuda
