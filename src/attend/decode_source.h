// Where the rows of one KV head lie, in the shape in which the decode kernels take them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attend/decode_kernels.h"
#include "attend/request.h"
#include "cache/kv_cache_impl.h"

namespace thriftattn {

class DecodeSource {
 public:
  // How the kernels read a side of a page.
  enum class Form : uint8_t { nvfp4, bf16, expanded };

  DecodeSource(const LayerView& view, int64_t kv_head)
      : view_(view), store_(view.store()), kv_head_(kv_head) {}

  // `sealed`: complete before the queries, or of a layer without planes.
  static Form form(const SideLayout& side, bool sealed);

  Bf16Rows bf16_rows(const SideLayout& side, int64_t page) const;  // plain BF16, or the open page
  // `page_scale` is that of the side's base plane: from meta(), or kept.
  StoredRows stored_rows(const SideLayout& side, int64_t page, float page_scale) const;
  Nvfp4ConstPlane base_plane(const SideLayout& side, int64_t page, float page_scale) const;
  Nvfp4ConstPlane residual_plane(const SideLayout& side, int64_t page) const;
  const PageMeta& meta(int64_t page) const;  // of a sealed layered page
  // What q' is dotted with besides the values of K; null for a plain side.
  const uint16_t* k_mean(int64_t page, bool sealed) const;
  const uint16_t* v_mean(int64_t page) const;  // of a sealed layered page
  bool has_residual(int64_t page) const { return view_.residual(page, kv_head_) != nullptr; }
  // Where the base rows lie, to be fetched.
  NextRows next_rows(const SideLayout& side, int64_t page) const;

 private:
  int64_t tokens(int64_t page) const {
    return std::min(kPageTokens, view_.length() - page * kPageTokens);
  }
  bool is_k(const SideLayout& side) const { return &side == &store_.layout.k; }

  const LayerView& view_;
  const LayerStore& store_;
  int64_t kv_head_;
};

}  // namespace thriftattn
