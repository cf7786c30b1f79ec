// Encoding one KV head of a full page from its open form (page_codec.h).
#include "cache/page_codec.h"

#include <cmath>
#include <vector>

#include "base/float_convert.h"
#include "formats/k_transform.h"
#include "formats/nvfp4.h"
#include "formats/plane_codec.h"

namespace thriftattn {
namespace {

struct SideMeta {
  float* scale;
  float* res_scale;
  float* error;
  float* error_both;
};

// The order is part of the page's bytes: 16 FP64 sums, of the elements i mod 16, then a tree of
// adjacent pairs.
float rms_of(const std::vector<float>& x) {
  constexpr size_t kSums = 16;
  double sums[kSums] = {};
  for (size_t i = 0; i < x.size(); i += kSums) {
    for (size_t j = 0; j < kSums; ++j) sums[j] += static_cast<double>(x[i + j]) * x[i + j];
  }
  for (size_t step = 1; step < kSums; step *= 2) {
    for (size_t j = 0; j < kSums; j += 2 * step) sums[j] += sums[j + step];
  }
  return static_cast<float>(std::sqrt(sums[0] / static_cast<double>(x.size())));
}

// The common part of K and V: mean, base, residual. Leaves decode(base) in `decoded`.
void encode_side(const SideLayout& side, OpenSide open, bool center, uint8_t* head,
                 uint8_t* residual, SideMeta meta, std::vector<float>& decoded) {
  const int64_t dim = side.dim;
  const size_t n = static_cast<size_t>(kPageTokens * dim);
  std::vector<float> x(n), mean(static_cast<size_t>(dim), 0.0f);
  for (size_t i = 0; i < n; ++i) x[i] = bf16_to_f32(open.rows[i]);

  auto* stored_mean = reinterpret_cast<uint16_t*>(head + side.mean);
  if (center) {
    page_mean(x.data(), kPageTokens, dim, mean.data());
    for (int64_t d = 0; d < dim; ++d) {
      // The page mean is stored absolutely; codes hold x minus the mean *as stored*, so that
      // its rounding costs nothing.
      const float ref = open.reference ? bf16_to_f32(open.reference[d]) : 0.0f;
      stored_mean[d] = f32_to_bf16(ref + mean[static_cast<size_t>(d)]);
      mean[static_cast<size_t>(d)] = bf16_to_f32(stored_mean[d]) - ref;
    }
    for (int64_t t = 0; t < kPageTokens; ++t) {
      float* row = &x[static_cast<size_t>(t * dim)];
      for (int64_t d = 0; d < dim; ++d) row[d] -= mean[static_cast<size_t>(d)];
    }
  } else {
    for (int64_t d = 0; d < dim; ++d) stored_mean[d] = 0;
  }

  const PlaneShape shape{.format = side.format, .dim = dim};
  *meta.scale = encode_plane(shape, x.data(), head + side.codes, head + side.scales);
  decoded.resize(n);
  decode_plane(shape, head + side.codes, head + side.scales, *meta.scale, decoded.data());
  for (size_t i = 0; i < n; ++i) x[i] -= decoded[i];
  *meta.error = rms_of(x);
  *meta.res_scale = nvfp4_encode_page(x.data(), kPageTokens, dim, residual + side.res_codes,
                                      residual + side.res_scales);
  std::vector<float> again(n);
  nvfp4_decode_page(residual + side.res_codes, residual + side.res_scales, *meta.res_scale,
                    kPageTokens, dim, again.data());
  for (size_t i = 0; i < n; ++i) x[i] -= again[i];
  *meta.error_both = rms_of(x);
}

}  // namespace

const PageMeta& page_meta(const PageLayout& layout, PageHead head) {
  return *reinterpret_cast<const PageMeta*>((layout.k.layered ? head.k : head.v) + layout.meta);
}

PageMeta& page_meta(const PageLayout& layout, MutablePageHead head) {
  return *reinterpret_cast<PageMeta*>((layout.k.layered ? head.k : head.v) + layout.meta);
}

void encode_page_k(const PageLayout& layout, OpenSide open, bool center, MutablePageHead head,
                   uint8_t* residual) {
  PageMeta& meta = page_meta(layout, head);
  std::vector<float> decoded;
  encode_side(layout.k, open, center, head.k, residual,
              {&meta.k_scale, &meta.k_res_scale, &meta.k_error, &meta.k_error_both}, decoded);
  std::vector<float> mean(static_cast<size_t>(layout.k.dim));
  page_mean(decoded.data(), kPageTokens, layout.k.dim, mean.data());
  double norm2 = 0;
  for (float m : mean) norm2 += static_cast<double>(m) * m;
  // Rounded up: the bound of DESIGN section 6 needs e_j >= the norm.
  meta.k_mean_norm = std::nextafter(static_cast<float>(std::sqrt(norm2)), INFINITY);
}

void encode_page_v(const PageLayout& layout, OpenSide open, bool center, MutablePageHead head,
                   uint8_t* residual) {
  PageMeta& meta = page_meta(layout, head);
  std::vector<float> decoded;
  encode_side(layout.v, open, center, head.v, residual,
              {&meta.v_scale, &meta.v_res_scale, &meta.v_error, &meta.v_error_both}, decoded);
}

void decode_base(const PageLayout& layout, const SideLayout& side, PageHead head, float* out) {
  const PageMeta& meta = page_meta(layout, head);
  const float scale = &side == &layout.k ? meta.k_scale : meta.v_scale;
  const uint8_t* start = layout.start(side, head);
  decode_plane({.format = side.format, .dim = side.dim}, start + side.codes, start + side.scales,
               scale, out);
}

void decode_residual(const PageLayout& layout, const SideLayout& side, PageHead head,
                     const uint8_t* residual, float* out) {
  const PageMeta& meta = page_meta(layout, head);
  const float scale = &side == &layout.k ? meta.k_res_scale : meta.v_res_scale;
  nvfp4_decode_page(residual + side.res_codes, residual + side.res_scales, scale, kPageTokens,
                    side.dim, out);
}

}  // namespace thriftattn
