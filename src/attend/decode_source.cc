// Rows and planes of a page (decode_source.h).
#include "attend/decode_source.h"

#include <algorithm>

#include "cache/page_codec.h"
#include "formats/format_info.h"
#include "formats/plane_codec.h"

namespace thriftattn {
namespace {

int64_t row_codes(const SideLayout& side) { return plane_codes_bytes(side.format, side.dim, 1); }
int64_t row_scales(const SideLayout& side) { return plane_scales_bytes(side.format, side.dim, 1); }

}  // namespace

DecodeSource::Form DecodeSource::form(const SideLayout& side, bool sealed) {
  if (side.layered) {
    if (!sealed) return Form::bf16;
    return base_format(side.format) == Format::nvfp4 ? Form::nvfp4 : Form::expanded;
  }
  return side.format == Format::bf16 ? Form::bf16 : Form::expanded;
}

Bf16Rows DecodeSource::bf16_rows(const SideLayout& side, int64_t page) const {
  if (!side.layered) {
    const uint8_t* start = view_.start(side, page, kv_head_);
    return {.data = reinterpret_cast<const uint16_t*>(start + side.rows),
            .stride = side.row_bytes / 2,
            .tokens = tokens(page)};
  }
  const OpenPage& open = *view_.open(page);
  const std::vector<uint16_t>& rows = is_k(side) ? open.k : open.v;
  return {.data = &rows[static_cast<size_t>(kv_head_ * side.dim * kPageTokens)],
          .stride = side.dim,
          .tokens = tokens(page)};
}

StoredRows DecodeSource::stored_rows(const SideLayout& side, int64_t page,
                                     float page_scale) const {
  if (!side.layered) {
    return {.format = side.format,
            .rows = view_.start(side, page, kv_head_) + side.rows,
            .row_bytes = side.row_bytes,
            .tokens = tokens(page)};
  }
  const Nvfp4ConstPlane plane = base_plane(side, page, page_scale);
  return {.format = side.format,
          .rows = plane.codes,
          .row_bytes = row_codes(side),
          .scales = plane.scales,
          .row_scales = row_scales(side),
          .page_scale = plane.page_scale,
          .tokens = kPageTokens};
}

Nvfp4ConstPlane DecodeSource::base_plane(const SideLayout& side, int64_t page,
                                         float page_scale) const {
  const uint8_t* start = view_.start(side, page, kv_head_);
  return {start + side.codes, start + side.scales, page_scale};
}

Nvfp4ConstPlane DecodeSource::residual_plane(const SideLayout& side, int64_t page) const {
  const PageMeta& meta = this->meta(page);
  const uint8_t* residual = view_.residual(page, kv_head_);
  return {residual + side.res_codes, residual + side.res_scales,
          is_k(side) ? meta.k_res_scale : meta.v_res_scale};
}

const PageMeta& DecodeSource::meta(int64_t page) const {
  return page_meta(store_.layout, view_.head(page, kv_head_));
}

const uint16_t* DecodeSource::k_mean(int64_t page, bool sealed) const {
  const SideLayout& side = store_.layout.k;
  if (!side.layered) return nullptr;
  if (!sealed) {
    return &view_.open(page)->k_reference[static_cast<size_t>(kv_head_ * side.dim)];
  }
  return reinterpret_cast<const uint16_t*>(view_.start(side, page, kv_head_) + side.mean);
}

const uint16_t* DecodeSource::v_mean(int64_t page) const {
  const SideLayout& side = store_.layout.v;
  return reinterpret_cast<const uint16_t*>(view_.start(side, page, kv_head_) + side.mean);
}

NextRows DecodeSource::next_rows(const SideLayout& side, int64_t page) const {
  const PageHead head = view_.head(page, kv_head_);
  const uint8_t* start = store_.layout.start(side, head);
  if (!side.layered) return {.rows = start + side.rows, .row_bytes = side.row_bytes};
  return {.rows = start + side.codes,
          .row_bytes = row_codes(side),
          .scales = start + side.scales,
          .scale_bytes = row_scales(side) * kPageTokens,
          .mean = start + side.mean,
          .mean_bytes = 2 * side.dim,
          .meta = &page_meta(store_.layout, head)};
}

}  // namespace thriftattn
