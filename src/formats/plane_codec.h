// The base planes of layered pages, one interface for nvfp4, mxfp4 and int3: what the cache and
// the measurements use. A plane is codes [rows][dim * bits / 8], scales [rows][dim / group] and a
// page_scale (1 where the format has none).
#pragma once

#include <cstdint>

#include "formats/format_info.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn {

// Bytes of the base plane of a layered format with `rows` tokens.
constexpr int64_t plane_codes_bytes(Format format, int64_t dim, int64_t rows = kPageTokens) {
  return rows * dim * format_info(format).bits_per_code / 8;
}
constexpr int64_t plane_scales_bytes(Format format, int64_t dim, int64_t rows = kPageTokens) {
  return rows * dim / format_info(format).group * format_info(format).scale_bits / 8;
}

// Throws Error for a dim that has no plane of this format.
void check_plane_dim(Format format, int64_t dim);

struct PlaneShape {
  Format format = Format::nvfp4;  // layered; nvfp4x2 means its base plane
  int64_t rows = kPageTokens;
  int64_t dim = 0;
};

// x is dense [rows][dim], finite. Returns the page_scale. No alignment is needed.
float encode_plane(const PlaneShape& shape, const float* x, uint8_t* codes, uint8_t* scales);
void decode_plane(const PlaneShape& shape, const uint8_t* codes, const uint8_t* scales,
                  float page_scale, float* out);

}  // namespace thriftattn
