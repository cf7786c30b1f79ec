// The state behind KvCache, shared by its source files and read by attend().
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/scratch_pool.h"
#include "cache/sequence_state.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn {

// Where the tokens of one page go.
struct PageRoom {
  OpenPage* open = nullptr;  // of layered sides
  int32_t slot = kNoPage;    // of plain sides and full pages
  bool full = false;         // the page's residual ids are in the sequence's table
};

struct KvCache::Impl {
  // With a device its memory holds the pages, and append() and attend() of this cache are the
  // device's own (cuda/device_cache.h).
  explicit Impl(KvCacheConfig config, std::shared_ptr<CacheDevice> device = nullptr);

  KvCacheConfig config;
  std::shared_ptr<CacheDevice> device;
  ByteBudget budget;
  // One store a layer, in order; several for a layer whose KV heads have different policies.
  std::vector<LayerStore> layers;
  std::vector<size_t> first_store;  // of each layer, and one past the last store
  std::unordered_map<SequenceId, Sequence> sequences;
  SequenceId next_id = 1;
  int64_t reencoded_pages = 0;
  mutable ScratchPool scratch;  // of attend(), which may run beside itself

  void add_stores(size_t layer);
  // Indices into `layers` and into Sequence::layers.
  std::vector<size_t> stores_of(int64_t layer) const;

  Sequence& sequence(SequenceId id);
  const Sequence& sequence(SequenceId id) const;

  // Transforms, checks and stages tokens; seals pages that become full (append.cc).
  void append(Sequence& seq, int64_t layer, TensorView<const float> k, TensorView<const float> v);
  void stage(Sequence& seq, size_t store, TensorView<const float> k, TensorView<const float> v);
  // Acquires what the tokens begin .. end - 1, of one page, are stored in.
  PageRoom make_room(LayerStore& store, LayerSequence& seq, int64_t begin, int64_t end);
  // The same for the whole open step in every layer, which then counts as staged: what precedes
  // the kernels of a device.
  void make_room(Sequence& seq);
  // Makes `length` tokens the committed content and forgets every later one.
  void settle(Sequence& seq, int64_t length);
  // Frees what the policy no longer keeps once `length` tokens are committed.
  void release_behind(Sequence& seq, int64_t length);
  void truncate(Sequence& seq, int64_t length);
  void release_pages(LayerStore& store, LayerSequence& seq, int64_t first_page);
  // The slot of page `page`, exclusively owned: allocated, or copied when it is shared.
  int32_t writable_page(LayerStore& store, LayerSequence& seq, int64_t page);
  OpenPage& open_page(LayerStore& store, LayerSequence& seq, int64_t page);
  // Its form in CPU memory, empty but for the reference.
  OpenPage blank_page(const LayerStore& store, const LayerSequence& seq, int64_t page) const;
  // Between that form and the device's.
  void upload_open(LayerStore& store, const OpenPage& from, int32_t slot);
  OpenPage download_open(const LayerStore& store, const OpenPage& open) const;
  void copy_open(Sequence& seq);
  void reopen(LayerStore& store, LayerSequence& seq, int64_t page);
  void drop_open(LayerStore& store, LayerSequence& seq, int64_t first_kept, int64_t end_kept);
};

// What attention reads of one layer of one sequence, the open step's tokens included.
class LayerView {
 public:
  LayerView(const LayerStore& store, const LayerSequence& seq, int64_t committed)
      : store_(&store), seq_(&seq), committed_(committed) {}

  const LayerStore& store() const { return *store_; }
  int64_t length() const { return committed_ + seq_->staged; }
  int64_t committed() const { return committed_; }

  // The head's part of page `page`; empty when the page has no slot.
  PageHead head(int64_t page, int64_t kv_head) const {
    if (page >= static_cast<int64_t>(seq_->pages.size())) return {};
    const int32_t id = seq_->pages[static_cast<size_t>(page)];
    if (id == kNoPage) return {};
    return store_->layout.head(store_->pages.data(id), kv_head);
  }
  // Where a side of it starts. The page has a slot.
  const uint8_t* start(const SideLayout& side, int64_t page, int64_t kv_head) const {
    return store_->layout.start(side, head(page, kv_head));
  }
  const uint8_t* residual(int64_t page, int64_t kv_head) const {
    const size_t at = static_cast<size_t>(page * store_->layout.kv_heads + kv_head);
    if (at >= seq_->residuals.size() || seq_->residuals[at] == kNoPage) return nullptr;
    return store_->residuals.data(seq_->residuals[at]);
  }
  const OpenPage* open(int64_t page) const {
    const int64_t at = page - seq_->first_open;
    if (at < 0 || at >= static_cast<int64_t>(seq_->open.size())) return nullptr;
    return &seq_->open[static_cast<size_t>(at)];
  }

 private:
  const LayerStore* store_;
  const LayerSequence* seq_;
  int64_t committed_;
};

}  // namespace thriftattn
