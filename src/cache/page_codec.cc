// Encoding one KV head of a full page from its open form (page_codec.h).
#include "cache/page_codec.h"

#include <array>
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

// The order is part of the page's bytes (docs/formats.md), and one in which a SIMD loop and a GPU's
// threads sum equally well: four FP64 sums, of the elements i mod 4. Each is made of the 16 columns
// of two neighbouring rows, element by element; these come together as a tree of adjacent pairs.
double sum_of_squares(const float* x, int64_t rows, int64_t dim) {
  constexpr int64_t kColumns = 16;
  double part[kPageTokens / 2 * kMaxHeadDim / kColumns][4];
  size_t parts = 0;
  const auto four = [](const float* at, int j) {
    const double a = at[j], b = at[j + 4], c = at[j + 8], d = at[j + 12];
    return std::array{a * a, b * b, c * c, d * d};
  };
  for (int64_t row = 0; row < rows; row += 2) {
    for (int64_t d = 0; d < dim; d += kColumns) {
      const float* at = x + row * dim + d;
      double sum[4];
      for (int j = 0; j < 4; ++j) {
        const auto e = four(at, j);
        sum[j] = ((e[0] + e[1]) + e[2]) + e[3];
      }
      for (int j = 0; j < 4 && row + 1 < rows; ++j) {
        const auto e = four(at + dim, j);
        sum[j] = (((sum[j] + e[0]) + e[1]) + e[2]) + e[3];
      }
      for (int j = 0; j < 4; ++j) part[parts][j] = sum[j];
      ++parts;
    }
  }
  for (; parts > 1; parts = (parts + 1) / 2) {
    for (size_t i = 0; i < parts / 2; ++i) {
      for (int j = 0; j < 4; ++j) part[i][j] = part[2 * i][j] + part[2 * i + 1][j];
    }
    for (int j = 0; j < 4 && parts % 2 == 1; ++j) part[parts / 2][j] = part[parts - 1][j];
  }
  return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

float rms_of(const std::vector<float>& x, int64_t dim) {
  return static_cast<float>(
      std::sqrt(sum_of_squares(x.data(), kPageTokens, dim) / static_cast<double>(x.size())));
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
  *meta.error = rms_of(x, dim);
  *meta.res_scale = nvfp4_encode_page(x.data(), kPageTokens, dim, residual + side.res_codes,
                                      residual + side.res_scales);
  std::vector<float> again(n);
  nvfp4_decode_page(residual + side.res_codes, residual + side.res_scales, *meta.res_scale,
                    kPageTokens, dim, again.data());
  for (size_t i = 0; i < n; ++i) x[i] -= again[i];
  *meta.error_both = rms_of(x, dim);
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
  const double norm2 = sum_of_squares(mean.data(), 1, layout.k.dim);
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
