// A KvCache on a device: its pools, and the tables that kernels read (device_cache.h).
#include "cuda/device_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "thriftattn/error.h"
#ifdef THRIFTATTN_WITH_CUDA
#include "cuda/device_pool.h"
#endif

namespace thriftattn::cuda {

bool is_exact(const LayerPolicy& policy) {
  return policy.k_format == Format::f32 && policy.v_format == Format::f32;
}

#ifdef THRIFTATTN_WITH_CUDA
namespace {

const DevicePool& device_pool(const SlotPool& pool) {
  return static_cast<const DevicePool&>(*pool.memory());
}

}  // namespace

DeviceCacheState::DeviceCacheState(size_t layers, Stream stream) : stream_(stream) {
  static std::atomic<int64_t> next{1};
  serial_ = next++;
  // Address space costs next to nothing. No layer of many holds most of the memory; where some have
  // a window the others may hold more than their share.
  const int64_t total = device_info().memory_total;
  reserve_ = std::min(total, 8 * (total / static_cast<int64_t>(std::max<size_t>(layers, 1))));
}

std::unique_ptr<SlotMemory> DeviceCacheState::make_memory(const SlotMemoryOptions& options) {
  return std::make_unique<DevicePool>(options, options.slot_bytes > 0 ? reserve_ : 0, stream_);
}

void DeviceCacheState::finish(const KvCache::Impl& impl) {
  for (const LayerStore& store : impl.layers) {
    DeviceMemory copy;
    if (!store.equalizer.empty()) {
      const auto bytes = static_cast<int64_t>(store.equalizer.size() * sizeof(float));
      copy = DeviceMemory(bytes);
      copy_to_device(copy.data(), store.equalizer.data(), bytes, stream_);
    }
    equalizers_.push_back(std::move(copy));
    if (is_exact(store.policy)) continue;
    const SlotSizes sizes = slot_sizes(store.shape, store.policy);
    const int64_t open = store.open ? store.open->slot_bytes() : 0;
    if (sizes.page == store.pages.slot_bytes() &&
        sizes.residual == store.residuals.slot_bytes() && sizes.open == open) {
      continue;
    }
    throw Error(ErrorCode::unsupported,
                fmt::format("CUDA: slots of {}, {} and {} bytes in layer {}, the kernels have {}, {} "
                            "and {}; this head_dim needs padding that they lack",
                            store.pages.slot_bytes(), store.residuals.slot_bytes(), open,
                            store.layer, sizes.page, sizes.residual, sizes.open));
  }
  synchronize(stream_);
}

std::unique_ptr<KvCache> make_device_cache(KvCacheConfig config, Stream stream) {
  auto state = std::make_shared<DeviceCacheState>(config.layers.size(), stream);
  auto impl = std::make_unique<KvCache::Impl>(std::move(config), state);
  state->finish(*impl);
  return std::make_unique<KvCache>(std::move(impl));
}

DeviceCacheState& device_state(const KvCache& cache) {
  auto* state = dynamic_cast<DeviceCacheState*>(cache.impl().device.get());
  if (state == nullptr) {
    throw Error(ErrorCode::invalid_argument,
                "this cache is in CPU memory; make it with make_device_cache()");
  }
  return *state;
}

LayerMemory layer_memory(const KvCache& cache, size_t index) {
  const LayerStore& store = cache.impl().layers[index];
  return {.pages = device_pool(store.pages).base(),
          .residuals = device_pool(store.residuals).base(),
          .open = store.open ? device_pool(*store.open).base() : nullptr,
          .equalizer = device_state(cache).equalizer(index)};
}

int64_t mapped_bytes(const KvCache& cache) {
  int64_t bytes = 0;
  for (const LayerStore& store : cache.impl().layers) {
    bytes += device_pool(store.pages).mapped() + device_pool(store.residuals).mapped();
    if (store.open) bytes += device_pool(*store.open).mapped();
  }
  return bytes;
}
#else
std::unique_ptr<KvCache> make_device_cache(KvCacheConfig, Stream) {
  (void)device_info();  // says what is missing
  return nullptr;
}
LayerMemory layer_memory(const KvCache&, size_t) { return {}; }
int64_t mapped_bytes(const KvCache&) { return 0; }
#endif

DeviceTables::DeviceTables(const KvCache& cache, int64_t max_pages, int64_t open_pages)
    : open_pages_(open_pages) {
  constexpr size_t kLine = 32;  // tables start on cache lines
  size_t at = kLine;            // length and step offsets, which all stores share
  const auto take = [&](int64_t count) {
    const size_t start = at;
    at += (static_cast<size_t>(count) + kLine - 1) / kLine * kLine;
    return start;
  };
  for (const LayerStore& store : cache.impl().layers) {
    Offsets o;
    o.pages = take(max_pages);
    o.residuals = take(store.layout.any_layered() ? max_pages * store.layout.kv_heads : 0);
    o.open = take(store.layout.any_layered() ? open_pages : 0);
    offsets_.push_back(o);
  }
  ids_.resize(at);
}

void DeviceTables::fill(const KvCache& cache, SequenceId id) {
  const KvCache::Impl& impl = cache.impl();
  const Sequence& seq = impl.sequence(id);
  std::fill(ids_.begin(), ids_.end(), kNoPage);
  ids_[0] = static_cast<int32_t>(seq.length + seq.step_tokens);
  ids_[1] = 0;
  ids_[2] = static_cast<int32_t>(seq.step_tokens);
  for (size_t s = 0; s < impl.layers.size(); ++s) {
    const LayerSequence& state = seq.layers[s];
    std::copy(state.pages.begin(), state.pages.end(),
              ids_.begin() + static_cast<std::ptrdiff_t>(offsets_[s].pages));
    if (!impl.layers[s].layout.any_layered()) continue;
    std::copy(state.residuals.begin(), state.residuals.end(),
              ids_.begin() + static_cast<std::ptrdiff_t>(offsets_[s].residuals));
    for (size_t i = 0; i < state.open.size(); ++i) {
      const int64_t page = state.first_open + static_cast<int64_t>(i);
      ids_[offsets_[s].open + static_cast<size_t>(page % open_pages_)] = state.open[i].slot;
    }
  }
}

BatchTables DeviceTables::tables(size_t store, const int32_t* copy) const {
  const Offsets& o = offsets_[store];
  return {.lengths = copy,
          .block_table = copy + o.pages,
          .residual_table = copy + o.residuals,
          .open_table = copy + o.open,
          .step_offsets = copy + 1};
}

}  // namespace thriftattn::cuda
