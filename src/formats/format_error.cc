// The error of a storage format on given data (format_error.h).
#include "formats/format_error.h"

#include <fmt/format.h>

#include <cmath>
#include <vector>

#include "formats/nvfp4.h"
#include "formats/plane_codec.h"
#include "formats/row_codec.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

void through_plane(const PlaneShape& shape, const float* x, float* y) {
  std::vector<uint8_t> codes(static_cast<size_t>(plane_codes_bytes(shape.format, shape.dim)));
  std::vector<uint8_t> scales(static_cast<size_t>(plane_scales_bytes(shape.format, shape.dim)));
  const float page_scale = encode_plane(shape, x, codes.data(), scales.data());
  decode_plane(shape, codes.data(), scales.data(), page_scale, y);
}

void through_rows(Format format, const float* x, int64_t dim, float* y) {
  const int64_t bytes = row_bytes(format, dim);
  std::vector<uint8_t> rows(static_cast<size_t>(kPageTokens * bytes));
  encode_rows(format, x, kPageTokens, dim, dim, rows.data(), bytes);
  decode_rows(format, rows.data(), bytes, kPageTokens, dim, y, dim);
}

}  // namespace

double relative_rms_error(Format format, std::span<const float> x, int64_t dim) {
  const auto n = static_cast<int64_t>(x.size());
  if (dim < 1 || n == 0 || n % (kPageTokens * dim) != 0) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} numbers are no whole pages of {} rows of {}", n, kPageTokens, dim));
  }
  std::vector<float> y(static_cast<size_t>(kPageTokens * dim)), rest(y), second(y);
  double error = 0, energy = 0;
  for (int64_t at = 0; at < n; at += kPageTokens * dim) {
    const float* page = x.data() + at;
    if (is_layered(format)) {
      through_plane({.format = format, .dim = dim}, page, y.data());
    } else {
      through_rows(format, page, dim, y.data());
    }
    for (size_t i = 0; i < y.size(); ++i) rest[i] = page[i] - y[i];
    if (format_info(format).planes == 2) {
      through_plane({.format = Format::nvfp4, .dim = dim}, rest.data(), second.data());
      for (size_t i = 0; i < y.size(); ++i) rest[i] -= second[i];
    }
    for (size_t i = 0; i < y.size(); ++i) {
      error += static_cast<double>(rest[i]) * rest[i];
      energy += static_cast<double>(page[i]) * page[i];
    }
  }
  return energy > 0 ? std::sqrt(error / energy) : 0.0;
}

}  // namespace thriftattn
