// Staging the tokens of a step in one layer: checks, K's transform, the open form, sealing.
#include <fmt/format.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "base/float_convert.h"
#include "base/tensor_check.h"
#include "cache/kv_cache_impl.h"
#include "cache/page_codec.h"
#include "formats/format_info.h"
#include "formats/k_transform.h"
#include "formats/row_codec.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

void check_values(const char* side, const LayerStore& store, int64_t first_token, Format format,
                  TensorView<const float> x) {
  const float limit = format_info(format).range_max;
  for (int64_t t = 0; t < x.tokens; ++t) {
    for (int64_t local = 0; local < store.shape.kv_heads; ++local) {
      const int64_t h = store.model_head(local);
      const float* row = x.row(t, h);
      // Magnitudes order as their bits do, with NaN above Inf: a maximum that vectorises.
      uint32_t bits = 0;
      for (int64_t d = 0; d < x.head_dim; ++d) {
        bits = std::max(bits, std::bit_cast<uint32_t>(row[d]) & 0x7fffffffu);
      }
      const float worst = std::bit_cast<float>(bits);
      if (worst <= limit) continue;
      throw Error(ErrorCode::non_finite,
                  fmt::format("{} of layer {}, KV head {}, token {} holds NaN, Inf or a value beyond "
                              "{}'s range (largest magnitude {}); the step was not stored: check "
                              "the model's weights",
                              side, store.layer, h, first_token + t, to_string(format), worst));
    }
  }
}

// One KV head of the tokens [t0, t1) of one page.
struct Segment {
  int64_t head;        // within the store
  int64_t model_head;  // within the layer: k and v
  int64_t page_token;  // position of the first token in its page
  int64_t step_token;  // position of the first token in the step
  int64_t tokens;
};

void stage_layered(const LayerStore& store, const Segment& s, TensorView<const float> k,
                   TensorView<const float> v, OpenPage& open) {
  if (store.layout.k.layered) {
    const int64_t dim = store.layout.k.dim;
    const float* eq = store.equalizer.empty() ? nullptr : &store.equalizer[s.head * dim];
    std::vector<float> x(static_cast<size_t>(s.tokens * dim));
    equalize_rotate_rows(k.row(s.step_token, s.model_head), k.token_stride, s.tokens, dim, eq, false,
                         store.layout.k.rotated, x.data(), dim);
    const uint16_t* ref = &open.k_reference[static_cast<size_t>(s.head * dim)];
    uint16_t* out = &open.k[static_cast<size_t>((s.head * kPageTokens + s.page_token) * dim)];
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t d = 0; d < dim; ++d) {
        out[t * dim + d] = f32_to_bf16(x[static_cast<size_t>(t * dim + d)] - bf16_to_f32(ref[d]));
      }
    }
  }
  if (store.layout.v.layered) {
    const int64_t dim = store.layout.v.dim;
    uint16_t* out = &open.v[static_cast<size_t>((s.head * kPageTokens + s.page_token) * dim)];
    std::vector<float> rotated(static_cast<size_t>(dim));
    for (int64_t t = 0; t < s.tokens; ++t) {
      const float* row = v.row(s.step_token + t, s.model_head);
      if (store.layout.v.rotated) {
        equalize_rotate_rows(row, dim, 1, dim, nullptr, false, true, rotated.data(), dim);
        row = rotated.data();
      }
      for (int64_t d = 0; d < dim; ++d) out[t * dim + d] = f32_to_bf16(row[d]);
    }
  }
}

void store_plain(const SideLayout& side, const Segment& s, TensorView<const float> x,
                 uint8_t* start) {
  encode_rows(side.format, x.row(s.step_token, s.model_head), s.tokens, side.dim, x.token_stride,
              start + side.rows + s.page_token * side.row_bytes, side.row_bytes);
}

void seal(const LayerStore& store, int64_t head, const OpenPage& open, uint8_t* slot,
          uint8_t* residual) {
  const PageLayout& layout = store.layout;
  const MutablePageHead planes = layout.head(slot, head);
  page_meta(layout, planes) = PageMeta{};
  if (layout.k.layered) {
    const size_t at = static_cast<size_t>(head * layout.k.dim);
    encode_page_k(layout, {&open.k[at * kPageTokens], &open.k_reference[at]}, store.policy.center,
                  planes, residual);
  }
  if (layout.v.layered) {
    const size_t at = static_cast<size_t>(head * layout.v.dim);
    encode_page_v(layout, {&open.v[at * kPageTokens], nullptr}, store.policy.center, planes,
                  residual);
  }
}

}  // namespace

int32_t KvCache::Impl::writable_page(LayerStore& store, LayerSequence& seq, int64_t page) {
  if (static_cast<int64_t>(seq.pages.size()) <= page) {
    seq.pages.resize(static_cast<size_t>(page + 1), kNoPage);
    seq.residuals.resize(static_cast<size_t>((page + 1) * store.layout.kv_heads), kNoPage);
  }
  int32_t& id = seq.pages[static_cast<size_t>(page)];
  if (id == kNoPage) {
    id = store.pages.acquire();
  } else if (store.pages.refs(id) > 1) {  // copy on write
    const int32_t copy = store.pages.acquire();
    store.pages.copy(id, copy);
    store.pages.release(id);
    id = copy;
  }
  return id;
}

PageRoom KvCache::Impl::make_room(LayerStore& store, LayerSequence& state, int64_t begin,
                                  int64_t end) {
  const PageLayout& layout = store.layout;
  const int64_t page = begin / kPageTokens;
  PageRoom room;
  room.full = end % kPageTokens == 0;
  if (layout.any_layered()) room.open = &open_page(store, state, page);
  if (layout.any_plain() || room.full) room.slot = writable_page(store, state, page);
  if (room.full && layout.any_layered()) {
    for (int64_t h = 0; h < layout.kv_heads; ++h) {
      state.residuals[static_cast<size_t>(page * layout.kv_heads + h)] = store.residuals.acquire();
    }
    if (page == state.reopened_page) {
      ++reencoded_pages;
      state.reopened_page = -1;
    }
  }
  return room;
}

void KvCache::Impl::make_room(Sequence& seq) {
  const int64_t end = seq.length + seq.step_tokens;
  for (size_t s = 0; s < layers.size(); ++s) {
    for (int64_t begin = seq.length; begin < end;) {
      const int64_t page_end = std::min((begin / kPageTokens + 1) * kPageTokens, end);
      make_room(layers[s], seq.layers[s], begin, page_end);
      begin = page_end;
    }
    seq.layers[s].staged = seq.step_tokens;
  }
}

void KvCache::Impl::append(Sequence& seq, int64_t layer, TensorView<const float> k,
                           TensorView<const float> v) {
  if (device != nullptr) {
    throw Error(ErrorCode::unsupported,
                "append: this cache is on a device, whose kernels append to it; make a cache "
                "without a device for tokens in CPU memory");
  }
  const LayerShape& shape = config.layers[static_cast<size_t>(layer)];
  const std::vector<size_t> stores = stores_of(layer);
  for (const size_t s : stores) {
    if (seq.layers[s].staged == 0) continue;
    throw Error(ErrorCode::invalid_argument,
                fmt::format("append: layer {} already has this step's tokens", layer));
  }
  check_view("append", named("k", k), {seq.step_tokens, shape.kv_heads, shape.head_dim_k});
  check_view("append", named("v", v), {seq.step_tokens, shape.kv_heads, shape.head_dim_v});
  for (const size_t s : stores) {
    check_values("K", layers[s], seq.length, layers[s].layout.k.format, k);
    check_values("V", layers[s], seq.length, layers[s].layout.v.format, v);
  }
  for (const size_t s : stores) stage(seq, s, k, v);
}

void KvCache::Impl::stage(Sequence& seq, size_t index, TensorView<const float> k,
                          TensorView<const float> v) {
  LayerStore& store = layers[index];
  LayerSequence& state = seq.layers[index];
  const PageLayout& layout = store.layout;
  const int64_t end = seq.length + seq.step_tokens;
  for (int64_t begin = seq.length; begin < end;) {
    const int64_t page = begin / kPageTokens;
    const int64_t page_end = std::min((page + 1) * kPageTokens, end);
    const PageRoom room = make_room(store, state, begin, page_end);
    uint8_t* slot = room.slot == kNoPage ? nullptr : store.pages.data(room.slot);
    const auto residual = [&](int64_t h) {
      return store.residuals.data(
          state.residuals[static_cast<size_t>(page * layout.kv_heads + h)]);
    };
    tbb::parallel_for(int64_t{0}, layout.kv_heads, [&](int64_t h) {
      const Segment s{h, store.model_head(h), begin % kPageTokens, begin - seq.length, page_end - begin};
      if (room.open) stage_layered(store, s, k, v, *room.open);
      if (!layout.k.layered) store_plain(layout.k, s, k, layout.head(slot, h).k);
      if (!layout.v.layered) store_plain(layout.v, s, v, layout.head(slot, h).v);
      if (room.open && room.full) seal(store, h, *room.open, slot, residual(h));
    });
    begin = page_end;
  }
  state.staged = seq.step_tokens;
}

}  // namespace thriftattn
