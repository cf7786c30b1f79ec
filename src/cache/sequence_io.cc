// Saving and loading a sequence (sequence_io.h).
#include "cache/sequence_io.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "cache/kv_cache_impl.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

static_assert(std::endian::native == std::endian::little, "the record is little-endian");

// The head of a layer's record; its arrays follow in the order of transfer().
struct LayerHead {
  uint64_t slot_bytes = 0;
  uint64_t residual_bytes = 0;
  uint64_t pages = 0;       // entries of the block table
  uint64_t open_bytes = 0;  // of the open page; 0 = there is none
  int64_t reopened_page = -1;
};
static_assert(sizeof(LayerHead) == 40, "no padding: the struct is what is stored");

[[noreturn]] void refuse(size_t layer, const std::string& what) {
  throw Error(ErrorCode::corrupt,
              fmt::format("the saved sequence does not fit the cache: layer {} {}", layer, what));
}

// Calls move(data, bytes) for each array of an open page.
template <typename Open, typename Move>
void transfer(Open& open, const Move& move) {
  for (auto* part : {&open.k, &open.v, &open.k_reference}) {
    if (!part->empty()) move(part->data(), part->size() * sizeof(uint16_t));
  }
}

// Rows of tokens that are not there: on a device what the slot held before, elsewhere of rejected
// drafts. What is saved depends on the sequence alone.
void clear_rows(OpenPage& open, const PageLayout& layout, int64_t from) {
  const auto clear = [&](std::vector<uint16_t>& part, int64_t dim) {
    if (part.empty()) return;
    for (int64_t h = 0; h < layout.kv_heads; ++h) {
      std::fill(part.begin() + (h * kPageTokens + from) * dim,
                part.begin() + (h + 1) * kPageTokens * dim, uint16_t{0});
    }
  };
  clear(open.k, layout.k.dim);
  clear(open.v, layout.v.dim);
}
bool rows_are_clear(const OpenPage& open, const PageLayout& layout, int64_t from) {
  OpenPage cleared = open;
  clear_rows(cleared, layout, from);
  return cleared.k == open.k && cleared.v == open.v;
}

std::vector<uint8_t> held(const std::vector<int32_t>& ids) {
  std::vector<uint8_t> flags(ids.size());
  std::transform(ids.begin(), ids.end(), flags.begin(),
                 [](int32_t id) { return static_cast<uint8_t>(id != kNoPage); });
  return flags;
}

// Reads the records of all layers into `seq`, which owns what has been acquired so far also when
// this throws.
class Loader {
 public:
  Loader(KvCache::Impl& impl, Sequence& seq, int64_t length, const ByteSource& source)
      : impl_(impl),
        seq_(seq),
        source_(source),
        length_(length),
        full_(length / kPageTokens),
        partial_(length % kPageTokens != 0) {}

  void layer(size_t index);

 private:
  void check(size_t index, const LayerHead& head) const;
  std::vector<uint8_t> flags(size_t index, size_t count, const char* what) const;
  void check_pages(size_t index, const std::vector<uint8_t>& pages) const;
  void check_residuals(size_t index, const std::vector<uint8_t>& pages,
                       const std::vector<uint8_t>& residuals) const;

  KvCache::Impl& impl_;
  Sequence& seq_;
  const ByteSource& source_;
  int64_t length_;
  int64_t full_;
  bool partial_;
};

void Loader::check(size_t index, const LayerHead& head) const {
  const LayerStore& store = impl_.layers[index];
  const auto expect = [&](const char* what, uint64_t have, int64_t want) {
    if (have == static_cast<uint64_t>(want)) return;
    refuse(index, fmt::format("has {} = {}, required: {}", what, have, want));
  };
  expect("page bytes", head.slot_bytes, store.pages.slot_bytes());
  expect("residual bytes", head.residual_bytes, store.residuals.slot_bytes());
  expect("pages", head.pages, full_ + (partial_ && store.layout.any_plain() ? 1 : 0));
  const bool open = partial_ && store.layout.any_layered();
  expect("open page bytes", head.open_bytes, open ? open_page_bytes(store.layout) : 0);
  if (head.reopened_page != -1 && !(open && head.reopened_page == full_)) {
    refuse(index, fmt::format("says that page {} was opened again", head.reopened_page));
  }
}

std::vector<uint8_t> Loader::flags(size_t index, size_t count, const char* what) const {
  std::vector<uint8_t> all(count);
  if (count > 0) source_(all.data(), all.size());
  if (std::any_of(all.begin(), all.end(), [](uint8_t flag) { return flag > 1; })) {
    refuse(index, fmt::format("has a {} that is neither held nor free", what));
  }
  return all;
}

// Every page that the next query can see is held; the last full one is the next one's reference.
void Loader::check_pages(size_t index, const std::vector<uint8_t>& pages) const {
  const int64_t window = impl_.layers[index].shape.window;
  const int64_t visible = window > 0 ? std::max<int64_t>(0, length_ + 1 - window) / kPageTokens : 0;
  const int64_t first = std::min(visible, std::max<int64_t>(0, full_ - 1));
  const auto missing = std::find(pages.begin() + first, pages.end(), uint8_t{0});
  if (missing != pages.end()) {
    refuse(index, fmt::format("lacks page {}", missing - pages.begin()));
  }
}

// A residual belongs to a full page that is held; a policy that drops none has all of them.
void Loader::check_residuals(size_t index, const std::vector<uint8_t>& pages,
                             const std::vector<uint8_t>& residuals) const {
  const LayerStore& store = impl_.layers[index];
  const bool layered = store.layout.any_layered();
  const bool keeps_all = layered && store.policy.residency != Residency::dropped;
  for (size_t i = 0; i < residuals.size(); ++i) {
    const size_t page = i / static_cast<size_t>(store.layout.kv_heads);
    const bool can = layered && static_cast<int64_t>(page) < full_ && pages[page] != 0;
    if (residuals[i] != 0 ? !can : can && keeps_all) {
      refuse(index, fmt::format("{} a residual of page {}", residuals[i] ? "has" : "lacks", page));
    }
  }
}

void Loader::layer(size_t index) {
  LayerStore& store = impl_.layers[index];
  LayerSequence& state = seq_.layers[index];
  LayerHead head;
  source_(&head, sizeof head);
  check(index, head);
  const auto pages = flags(index, head.pages, "page");
  check_pages(index, pages);
  const auto residuals =
      flags(index, head.pages * static_cast<size_t>(store.layout.kv_heads), "residual");
  check_residuals(index, pages, residuals);

  const auto fill = [&](SlotPool& pool, const std::vector<uint8_t>& flags,
                        std::vector<int32_t>& ids) {
    ids.assign(flags.size(), kNoPage);
    for (size_t i = 0; i < flags.size(); ++i) {
      if (flags[i] == 0) continue;
      ids[i] = pool.acquire();
      if (uint8_t* to = pool.data(ids[i])) {
        source_(to, static_cast<size_t>(pool.slot_bytes()));
        continue;
      }
      std::vector<uint8_t> bytes(static_cast<size_t>(pool.slot_bytes()));
      source_(bytes.data(), bytes.size());
      pool.write(ids[i], bytes.data());
    }
  };
  fill(store.pages, pages, state.pages);
  fill(store.residuals, residuals, state.residuals);
  if (head.open_bytes > 0) {
    OpenPage& open = impl_.open_page(store, state, full_);
    OpenPage read = store.open ? impl_.blank_page(store, state, full_) : OpenPage{};
    OpenPage& page = store.open ? read : open;
    transfer(page, source_);
    if (!rows_are_clear(page, store.layout, length_ - full_ * kPageTokens)) {
      refuse(index, "has numbers in rows of the open page that no token holds");
    }
    if (store.open) impl_.upload_open(store, read, open.slot);
  }
  state.reopened_page = head.reopened_page;
}

}  // namespace

void save_sequence(const KvCache& cache, SequenceId id, const ByteSink& sink) {
  const KvCache::Impl& impl = cache.impl();
  const Sequence& seq = impl.sequence(id);
  if (seq.step_tokens > 0) {
    throw Error(ErrorCode::invalid_argument,
                "save_sequence: a step is open; commit or roll it back first");
  }
  for (size_t l = 0; l < impl.layers.size(); ++l) {
    const LayerStore& store = impl.layers[l];
    const LayerSequence& state = seq.layers[l];
    const LayerHead head = {
        .slot_bytes = static_cast<uint64_t>(store.pages.slot_bytes()),
        .residual_bytes = static_cast<uint64_t>(store.residuals.slot_bytes()),
        .pages = state.pages.size(),
        .open_bytes =
            static_cast<uint64_t>(state.open.empty() ? 0 : open_page_bytes(store.layout)),
        .reopened_page = state.reopened_page};
    sink(&head, sizeof head);
    for (const auto* ids : {&state.pages, &state.residuals}) {
      const std::vector<uint8_t> flags = held(*ids);
      if (!flags.empty()) sink(flags.data(), flags.size());
    }
    const auto write = [&](const SlotPool& pool, const std::vector<int32_t>& ids) {
      for (const int32_t slot : ids) {
        if (slot == kNoPage) continue;
        std::vector<uint8_t> copy;
        sink(pool.read(slot, copy), static_cast<size_t>(pool.slot_bytes()));
      }
    };
    write(store.pages, state.pages);
    write(store.residuals, state.residuals);
    if (state.open.empty()) continue;
    const OpenPage& front = state.open.front();
    OpenPage copy = store.open ? impl.download_open(store, front) : front;
    clear_rows(copy, store.layout, seq.length - state.first_open * kPageTokens);
    transfer(copy, sink);
  }
}

SequenceId load_sequence(KvCache& cache, int64_t length, const ByteSource& source) {
  if (length < 0) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("load_sequence: length {} is negative", length));
  }
  KvCache::Impl& impl = cache.impl();
  const SequenceId id = cache.create();
  Sequence& seq = impl.sequence(id);
  try {
    Loader loader(impl, seq, length, source);
    for (size_t l = 0; l < impl.layers.size(); ++l) loader.layer(l);
  } catch (...) {
    cache.free(id);
    throw;
  }
  seq.length = length;
  return id;
}

}  // namespace thriftattn
