// Sequences of the mixed-precision KV cache: life cycle, steps, residency, accounting.
#include "thriftattn/kv_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/float_convert.h"
#include "cache/kv_cache_impl.h"
#include "cache/page_codec.h"
#include "formats/format_info.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

// Values that resolve() never gives, but a hand-made policy may.
void check_layer_policy(const LayerPolicy& p, int64_t layer) {
  const auto refuse = [&](const char* name, auto value, const char* accepted) {
    fail(fmt::format("the policy of layer {} has {} = {}; accepted is {}", layer, name, value,
                     accepted));
  };
  for (const Format format : {p.k_format, p.v_format}) {
    if (static_cast<size_t>(format) >= kFormats.size()) {
      refuse("a format", static_cast<int>(format), "a value of enum Format");
    }
  }
  if (!(p.promote >= 0 && p.promote <= 1)) refuse("promote", p.promote, "0 to 1");
  if (!(p.skip >= 0 && p.skip <= 1)) refuse("skip", p.skip, "0 to 1");
  if (!(p.max_promoted >= 0 && p.max_promoted <= 1)) refuse("max", p.max_promoted, "0 to 1");
  if (!(p.budget >= 0 && p.budget <= 1)) refuse("budget", p.budget, "0 to 1");
  constexpr int64_t kMaxTokens = int64_t{1} << 40;
  for (const auto& [name, value] : {std::pair{"sinks", p.sinks}, {"recent", p.recent},
                                    {"pages", p.budget_pages}}) {
    if (value < 0 || value > kMaxTokens) refuse(name, value, "0 to 2^40");
  }
  if (!p.heads.empty()) {
    fail(fmt::format("the policy of one KV head of layer {} has policies of heads itself", layer));
  }
}

void check_equalizer(const Equalizer& eq, const std::vector<LayerShape>& layers) {
  if (eq.layers.empty()) return;
  if (eq.layers.size() != layers.size()) {
    fail(fmt::format("the equaliser has {} layers, the cache {}", eq.layers.size(), layers.size()));
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& s = eq.layers[l];
    const int64_t want = layers[l].kv_heads * layers[l].head_dim_k;
    if (s.empty()) continue;
    if (static_cast<int64_t>(s.size()) != want) {
      fail(fmt::format("the equaliser of layer {} has {} numbers, the layer needs {}", l, s.size(),
                       want));
    }
    for (float x : s) {
      if (!(std::isfinite(x) && x > 0)) {
        fail(fmt::format("the equaliser of layer {} holds {}; only positive numbers equalise", l,
                         x));
      }
    }
  }
}

}  // namespace

KvCache::Impl::Impl(KvCacheConfig c, std::shared_ptr<CacheDevice> d)
    : config(std::move(c)), device(std::move(d)), budget(config.max_bytes) {
  if (config.layers.empty()) fail("a cache needs at least one layer");
  if (config.policy.size() != config.layers.size()) {
    fail(fmt::format("{} layers, but {} layer policies; use resolve() with the model's layers",
                     config.layers.size(), config.policy.size()));
  }
  for (const LayerShape& shape : config.layers) check_layer_shape(shape);
  check_equalizer(config.equalizer, config.layers);
  if (config.max_bytes < 0) {
    fail(fmt::format("max_bytes = {}; it is a number of bytes, or 0 for no limit", config.max_bytes));
  }
  for (size_t l = 0; l < config.layers.size(); ++l) {
    first_store.push_back(layers.size());
    add_stores(l);
  }
  first_store.push_back(layers.size());
}

void KvCache::Impl::add_stores(size_t l) {
  const LayerShape& shape = config.layers[l];
  const LayerPolicy& policy = config.policy[l];
  if (!policy.heads.empty() && static_cast<int64_t>(policy.heads.size()) != shape.kv_heads) {
    fail(fmt::format("layer {} has {} KV heads, its policy {}; use resolve() with the model's "
                     "kv_heads",
                     l, shape.kv_heads, policy.heads.size()));
  }
  check_layer_shape(shape);
  const auto groups = heads_by_policy(policy, shape.kv_heads);
  for (const std::vector<int64_t>& group : groups) {
    const LayerPolicy& own = policy.of_head(group.front());
    check_layer_policy(own, static_cast<int64_t>(l));
    const LayerShape part = shape_of_heads(shape, static_cast<int64_t>(group.size()));
    std::vector<int64_t> heads;
    if (groups.size() > 1) heads = group;
    const PageLayout layout = make_page_layout(part, own);
    std::vector<float> eq;
    if (!config.equalizer.layers.empty() && own.equalize && layout.k.layered) {
      const std::vector<float>& all = config.equalizer.layers[l];
      for (int64_t h = 0; h < part.kv_heads && !all.empty(); ++h) {
        const int64_t from = (heads.empty() ? h : heads[static_cast<size_t>(h)]) * shape.head_dim_k;
        eq.insert(eq.end(), all.begin() + from, all.begin() + from + shape.head_dim_k);
      }
    }
    const auto pool = [&](SlotPoolOptions options, bool zeroed) {
      options.poison = config.poison_free;
      std::unique_ptr<SlotMemory> memory;
      if (device != nullptr) {
        memory = device->make_memory({.name = options.name,
                                      .slot_bytes = options.slot_bytes,
                                      .zeroed = zeroed,
                                      .poison = options.poison});
      }
      return SlotPool(std::move(options), &budget, std::move(memory));
    };
    // On a device only plain rows need cleared slots: planes and open pages are written whole.
    layers.push_back({static_cast<int64_t>(l), part, own, layout, std::move(eq), std::move(heads),
                      pool({.name = "a KV page",
                            .slot_bytes = layout.slot_bytes,
                            .placement = SlotPlacement::region},
                           true),
                      pool({.name = "a residual plane",
                            .slot_bytes = layout.residual_bytes,
                            .placement = SlotPlacement::single},
                           false),
                      std::nullopt});
    if (device != nullptr && layout.any_layered()) {
      layers.back().open =
          pool({.name = "an open page", .slot_bytes = open_page_bytes(layout)}, false);
    }
    layers.back().policy.heads.clear();
  }
}

std::vector<size_t> KvCache::Impl::stores_of(int64_t layer) const {
  std::vector<size_t> stores;
  for (size_t s = first_store[static_cast<size_t>(layer)];
       s < first_store[static_cast<size_t>(layer) + 1]; ++s) {
    stores.push_back(s);
  }
  return stores;
}

Sequence& KvCache::Impl::sequence(SequenceId id) {
  const auto it = sequences.find(id);
  if (it == sequences.end()) fail(fmt::format("there is no sequence {}", id));
  return it->second;
}

const Sequence& KvCache::Impl::sequence(SequenceId id) const {
  return const_cast<Impl*>(this)->sequence(id);
}

OpenPage& KvCache::Impl::open_page(LayerStore& store, LayerSequence& seq, int64_t page) {
  if (seq.open.empty()) seq.first_open = page;
  const int64_t at = page - seq.first_open;
  if (at < static_cast<int64_t>(seq.open.size())) return seq.open[static_cast<size_t>(at)];

  OpenPage open;
  if (store.open) {
    open.slot = store.open->acquire();
  } else {
    open = blank_page(store, seq, page);
    budget.charge(open.bytes(), "an open page");
  }
  seq.open.push_back(std::move(open));
  return seq.open.back();
}

OpenPage KvCache::Impl::blank_page(const LayerStore& store, const LayerSequence& seq,
                                   int64_t page) const {
  const PageLayout& layout = store.layout;
  OpenPage open;
  if (layout.k.layered) {
    open.k.assign(static_cast<size_t>(layout.kv_heads * kPageTokens * layout.k.dim), 0);
    open.k_reference.assign(static_cast<size_t>(layout.kv_heads * layout.k.dim), 0);
    if (page > 0) {
      std::vector<uint8_t> copy;
      const uint8_t* previous = store.pages.read(seq.pages[static_cast<size_t>(page - 1)], copy);
      for (int64_t h = 0; h < layout.kv_heads; ++h) {
        const auto* mean =
            reinterpret_cast<const uint16_t*>(layout.head(previous, h).k + layout.k.mean);
        std::copy_n(mean, layout.k.dim, &open.k_reference[static_cast<size_t>(h * layout.k.dim)]);
      }
    }
  }
  if (layout.v.layered) {
    open.v.assign(static_cast<size_t>(layout.kv_heads * kPageTokens * layout.v.dim), 0);
  }
  return open;
}

void KvCache::Impl::upload_open(LayerStore& store, const OpenPage& from, int32_t slot) {
  std::vector<uint8_t> bytes(static_cast<size_t>(store.open->slot_bytes()), 0);
  uint8_t* to = bytes.data();
  for (const auto* part : {&from.k, &from.v, &from.k_reference}) {
    to = std::copy_n(reinterpret_cast<const uint8_t*>(part->data()),
                     part->size() * sizeof(uint16_t), to);
  }
  store.open->write(slot, bytes.data());
}

OpenPage KvCache::Impl::download_open(const LayerStore& store, const OpenPage& open) const {
  const PageLayout& layout = store.layout;
  std::vector<uint8_t> copy;
  const auto* from = reinterpret_cast<const uint16_t*>(store.open->read(open.slot, copy));
  OpenPage out;
  const auto take = [&](std::vector<uint16_t>& part, int64_t elements) {
    part.assign(from, from + elements);
    from += elements;
  };
  if (layout.k.layered) take(out.k, layout.kv_heads * kPageTokens * layout.k.dim);
  if (layout.v.layered) take(out.v, layout.kv_heads * kPageTokens * layout.v.dim);
  if (layout.k.layered) take(out.k_reference, layout.kv_heads * layout.k.dim);
  return out;
}

// Keeps the open pages in [first_kept, end_kept).
void KvCache::Impl::drop_open(LayerStore& store, LayerSequence& seq, int64_t first_kept,
                              int64_t end_kept) {
  std::vector<OpenPage> kept;
  int64_t first = seq.first_open;
  for (size_t i = 0; i < seq.open.size(); ++i) {
    const int64_t page = seq.first_open + static_cast<int64_t>(i);
    if (page >= first_kept && page < end_kept) {
      if (kept.empty()) first = page;
      kept.push_back(std::move(seq.open[i]));
    } else {
      if (seq.open[i].slot != kNoPage) store.open->release(seq.open[i].slot);
      budget.refund(seq.open[i].bytes());
    }
  }
  seq.open = std::move(kept);
  seq.first_open = first;
}

void KvCache::Impl::release_pages(LayerStore& store, LayerSequence& seq, int64_t first_page) {
  for (size_t j = static_cast<size_t>(first_page); j < seq.pages.size(); ++j) {
    if (seq.pages[j] != kNoPage) store.pages.release(seq.pages[j]);
  }
  const size_t first_residual = static_cast<size_t>(first_page * store.layout.kv_heads);
  for (size_t i = first_residual; i < seq.residuals.size(); ++i) {
    if (seq.residuals[i] != kNoPage) store.residuals.release(seq.residuals[i]);
  }
  if (static_cast<size_t>(first_page) < seq.pages.size()) {
    seq.pages.resize(static_cast<size_t>(first_page));
    seq.residuals.resize(first_residual);
  }
}

void KvCache::Impl::settle(Sequence& seq, int64_t length) {
  const int64_t full_pages = length / kPageTokens;
  const bool partial = length % kPageTokens != 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    LayerStore& store = layers[l];
    LayerSequence& state = seq.layers[l];
    // A page that is only partly committed keeps its slot for the plain sides' rows; its planes
    // and residual, if the step had sealed it, are not part of the content.
    const int64_t kept = full_pages + (partial && store.layout.any_plain() ? 1 : 0);
    if (kept > full_pages && static_cast<int64_t>(state.pages.size()) > full_pages) {
      for (int64_t h = 0; h < store.layout.kv_heads; ++h) {
        int32_t& id = state.residuals[static_cast<size_t>(full_pages * store.layout.kv_heads + h)];
        if (id != kNoPage) store.residuals.release(std::exchange(id, kNoPage));
      }
    }
    release_pages(store, state, kept);
    drop_open(store, state, full_pages, full_pages + (partial ? 1 : 0));
    state.staged = 0;
    if (state.reopened_page >= 0 && (state.reopened_page != full_pages || !partial)) {
      state.reopened_page = -1;
    }
  }
  seq.length = length;
  seq.step_tokens = 0;
}

void KvCache::Impl::release_behind(Sequence& seq, int64_t length) {
  // The next query is token `length`: it sees length + 1 tokens.
  for (size_t l = 0; l < layers.size(); ++l) {
    LayerStore& store = layers[l];
    LayerSequence& state = seq.layers[l];
    const int64_t full_pages = length / kPageTokens;
    const int64_t heads = store.layout.kv_heads;
    if (store.layout.any_layered() && store.policy.residency == Residency::dropped) {
      for (int64_t& j = state.residual_floor;
           j < full_pages && (j + 1) * kPageTokens <= length + 1 - store.policy.recent; ++j) {
        if (j * kPageTokens < store.policy.sinks) continue;
        for (int64_t h = 0; h < heads; ++h) {
          int32_t& id = state.residuals[static_cast<size_t>(j * heads + h)];
          if (id != kNoPage) store.residuals.release(std::exchange(id, kNoPage));
        }
      }
    }
    if (store.shape.window > 0) {
      // The last full page stays: its mean is the next open page's reference. One page of slack
      // keeps truncation inside the open page possible.
      for (int64_t& j = state.window_floor;
           j < full_pages - 1 && (j + 2) * kPageTokens <= length + 1 - store.shape.window; ++j) {
        int32_t& id = state.pages[static_cast<size_t>(j)];
        if (id != kNoPage) store.pages.release(std::exchange(id, kNoPage));
        for (int64_t h = 0; h < heads; ++h) {
          int32_t& res = state.residuals[static_cast<size_t>(j * heads + h)];
          if (res != kNoPage) store.residuals.release(std::exchange(res, kNoPage));
        }
      }
    }
  }
}

// A sealed page's best planes go back into the open form.
void KvCache::Impl::reopen(LayerStore& store, LayerSequence& state, int64_t page) {
  const PageLayout& layout = store.layout;
  drop_open(store, state, 0, 0);
  OpenPage blank;
  OpenPage& held = open_page(store, state, page);
  if (store.open) blank = blank_page(store, state, page);
  OpenPage& open = store.open ? blank : held;
  std::vector<uint8_t> slot_copy, residual_copy;
  const uint8_t* slot = store.pages.read(state.pages[static_cast<size_t>(page)], slot_copy);
  for (int64_t h = 0; h < layout.kv_heads; ++h) {
    const PageHead head = layout.head(slot, h);
    const int32_t res = state.residuals[static_cast<size_t>(page * layout.kv_heads + h)];
    const uint8_t* residual = res == kNoPage ? nullptr : store.residuals.read(res, residual_copy);
    const auto decode = [&](const SideLayout& side, const uint16_t* reference, uint16_t* out) {
      std::vector<float> x(static_cast<size_t>(kPageTokens * side.dim)), r(x.size(), 0.0f);
      decode_base(layout, side, head, x.data());
      if (residual) decode_residual(layout, side, head, residual, r.data());
      const auto* mean =
          reinterpret_cast<const uint16_t*>(layout.start(side, head) + side.mean);
      for (size_t i = 0; i < x.size(); ++i) {
        const size_t d = i % static_cast<size_t>(side.dim);
        const float ref = reference ? bf16_to_f32(reference[d]) : 0.0f;
        out[i] = f32_to_bf16(x[i] + r[i] + (bf16_to_f32(mean[d]) - ref));
      }
    };
    const size_t k_at = static_cast<size_t>(h * layout.k.dim);
    if (layout.k.layered) decode(layout.k, &open.k_reference[k_at], &open.k[k_at * kPageTokens]);
    if (layout.v.layered) {
      decode(layout.v, nullptr, &open.v[static_cast<size_t>(h * kPageTokens * layout.v.dim)]);
    }
  }
  if (store.open) upload_open(store, open, held.slot);
  state.reopened_page = page;
}

void KvCache::Impl::truncate(Sequence& seq, int64_t length) {
  const int64_t page = length / kPageTokens;
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t window = layers[l].shape.window;
    const int64_t first = window > 0 ? std::max<int64_t>(0, length + 1 - window) / kPageTokens : 0;
    const int64_t needed_from = std::min(first, std::max<int64_t>(0, page - 1));
    const auto& pages = seq.layers[l].pages;
    for (int64_t j = needed_from; j < std::min<int64_t>(page + 1, pages.size()); ++j) {
      if (pages[static_cast<size_t>(j)] == kNoPage) {
        throw Error(ErrorCode::unsupported,
                    fmt::format("truncate to {}: layer {} has a sliding window of {} and page {} "
                                "behind it is freed; fork the sequence before it goes on instead",
                                length, layers[l].layer, window, j));
      }
    }
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    LayerStore& store = layers[l];
    LayerSequence& state = seq.layers[l];
    const PageLayout& layout = store.layout;
    const bool is_open = !state.open.empty() && page >= state.first_open;
    if (length % kPageTokens != 0 && layout.any_layered() && !is_open) {
      reopen(store, state, page);
    }
    state.residual_floor = std::min(state.residual_floor, page);
    state.window_floor = std::min(state.window_floor, page);
  }
  settle(seq, length);
}

KvCache::KvCache(KvCacheConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
KvCache::KvCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KvCache::~KvCache() = default;
KvCache::KvCache(KvCache&&) noexcept = default;
KvCache& KvCache::operator=(KvCache&&) noexcept = default;

const KvCacheConfig& KvCache::config() const { return impl_->config; }

// Gives the open pages slots of their own, with the same content. On an Error none is held.
void KvCache::Impl::copy_open(Sequence& seq) {
  std::vector<std::pair<SlotPool*, int32_t>> held;
  try {
    for (size_t l = 0; l < layers.size(); ++l) {
      for (OpenPage& open : seq.layers[l].open) {
        const int32_t slot = layers[l].open->acquire();
        held.emplace_back(&*layers[l].open, slot);
        layers[l].open->copy(open.slot, slot);
        open.slot = slot;
      }
    }
  } catch (...) {
    for (const auto& [pool, slot] : held) pool->release(slot);
    throw;
  }
}

SequenceId KvCache::create() {
  Sequence seq;
  seq.layers.resize(impl_->layers.size());
  const SequenceId id = impl_->next_id++;
  impl_->sequences.emplace(id, std::move(seq));
  return id;
}

SequenceId KvCache::fork(SequenceId source) {
  const Sequence& from = impl_->sequence(source);
  if (from.step_tokens > 0) fail("fork: a step is open; commit or roll it back first");
  int64_t open_bytes = 0;
  for (const LayerSequence& layer : from.layers) {
    for (const OpenPage& open : layer.open) open_bytes += open.bytes();
  }
  impl_->budget.charge(open_bytes, "the open pages of a fork");
  Sequence copy = from;
  if (impl_->device != nullptr) impl_->copy_open(copy);
  for (size_t l = 0; l < impl_->layers.size(); ++l) {
    for (int32_t id : copy.layers[l].pages) {
      if (id != kNoPage) impl_->layers[l].pages.add_ref(id);
    }
    for (int32_t id : copy.layers[l].residuals) {
      if (id != kNoPage) impl_->layers[l].residuals.add_ref(id);
    }
  }
  const SequenceId id = impl_->next_id++;
  impl_->sequences.emplace(id, std::move(copy));
  return id;
}

void KvCache::free(SequenceId id) {
  Sequence& seq = impl_->sequence(id);
  for (size_t l = 0; l < impl_->layers.size(); ++l) {
    impl_->release_pages(impl_->layers[l], seq.layers[l], 0);
    impl_->drop_open(impl_->layers[l], seq.layers[l], 0, 0);
  }
  impl_->sequences.erase(id);
}

void KvCache::truncate(SequenceId id, int64_t length) {
  Sequence& seq = impl_->sequence(id);
  if (seq.step_tokens > 0) fail("truncate: a step is open; commit or roll it back first");
  if (length < 0 || length > seq.length) {
    fail(fmt::format("truncate: length {} is not in 0..{}", length, seq.length));
  }
  if (length < seq.length) impl_->truncate(seq, length);
}

int64_t KvCache::length(SequenceId id) const { return impl_->sequence(id).length; }

void KvCache::begin_step(SequenceId id, int64_t tokens) {
  Sequence& seq = impl_->sequence(id);
  if (seq.step_tokens > 0) fail("begin_step: a step is already open; commit or roll it back first");
  constexpr int64_t kMaxTokens = int64_t{1} << 36;
  if (tokens < 1 || tokens > kMaxTokens - seq.length) {
    fail(fmt::format("begin_step: {} tokens after {}: a sequence holds 1 to {} tokens", tokens,
                     seq.length, kMaxTokens));
  }
  seq.step_tokens = tokens;
}

void KvCache::append(SequenceId id, int64_t layer, TensorView<const float> k,
                     TensorView<const float> v) {
  Sequence& seq = impl_->sequence(id);
  if (seq.step_tokens == 0) fail("append: no step is open; call begin_step first");
  const auto layers = static_cast<int64_t>(impl_->config.layers.size());
  if (layer < 0 || layer >= layers) {
    fail(fmt::format("append: layer {} is not in 0..{}", layer, layers - 1));
  }
  impl_->append(seq, layer, k, v);
}

void KvCache::commit(SequenceId id) { commit(id, impl_->sequence(id).step_tokens); }

void KvCache::commit(SequenceId id, int64_t n) {
  Sequence& seq = impl_->sequence(id);
  if (seq.step_tokens == 0) fail("commit: no step is open");
  if (n < 0 || n > seq.step_tokens) {
    fail(fmt::format("commit: {} of {} tokens", n, seq.step_tokens));
  }
  for (size_t l = 0; l < seq.layers.size(); ++l) {
    if (seq.layers[l].staged != seq.step_tokens) {
      fail(fmt::format("commit: layer {} was not appended in this step", impl_->layers[l].layer));
    }
  }
  impl_->settle(seq, seq.length + n);
  impl_->release_behind(seq, seq.length);
}

void KvCache::rollback(SequenceId id) {
  Sequence& seq = impl_->sequence(id);
  impl_->settle(seq, seq.length);
}

CacheUsage KvCache::usage() const {
  CacheUsage u;
  for (const LayerStore& store : impl_->layers) {
    const int64_t heads = store.pages.used() * store.layout.kv_heads;
    u.base_bytes += heads * store.layout.base_bytes;
    u.summary_bytes += heads * store.layout.summary_bytes;
    u.plain_bytes += heads * store.layout.plain_bytes;
    u.residual_bytes += store.residuals.used() * store.residuals.slot_bytes();
    u.pages += store.pages.used();
    u.residual_pages += store.residuals.used();
    if (store.open) u.open_bytes += store.open->used() * store.open->slot_bytes();
  }
  for (const auto& [id, seq] : impl_->sequences) {
    for (const LayerSequence& layer : seq.layers) {
      for (const OpenPage& open : layer.open) u.open_bytes += open.bytes();
      u.table_bytes +=
          static_cast<int64_t>((layer.pages.size() + layer.residuals.size()) * sizeof(int32_t));
    }
  }
  u.reencoded_pages = impl_->reencoded_pages;
  return u;
}

namespace {

// K and V elements that the sequences can still read, over layers and sequences.
int64_t elements_held(const KvCache::Impl& impl) {
  int64_t n = 0;
  for (const auto& [id, seq] : impl.sequences) {
    for (size_t l = 0; l < impl.layers.size(); ++l) {
      const LayerShape& shape = impl.layers[l].shape;
      int64_t freed = 0;
      for (int32_t page : seq.layers[l].pages) freed += page == kNoPage ? kPageTokens : 0;
      n += (seq.length - freed) * shape.kv_heads * (shape.head_dim_k + shape.head_dim_v);
    }
  }
  return n;
}

}  // namespace

int64_t KvCache::bf16_bytes() const { return 2 * elements_held(*impl_); }

double KvCache::bits_stored_per_element() const {
  const int64_t n = elements_held(*impl_);
  return n > 0 ? 8.0 * static_cast<double>(usage().total()) / static_cast<double>(n) : 0.0;
}

}  // namespace thriftattn
