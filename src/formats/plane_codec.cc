// Which codec a base plane goes through (plane_codec.h).
#include "formats/plane_codec.h"

#include <fmt/format.h>

#include "formats/int3.h"
#include "formats/mxfp4.h"
#include "formats/nvfp4.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

[[noreturn]] void no_plane(Format format) {
  throw Error(
      ErrorCode::invalid_argument,
      fmt::format("{} has no planes, only rows; use encode_rows", format_info(format).name));
}

}  // namespace

void check_plane_dim(Format format, int64_t dim) {
  const FormatInfo& info = format_info(format);
  if (dim > 0 && dim % info.dim_multiple == 0) return;
  throw Error(ErrorCode::invalid_argument,
              fmt::format("{} needs a head_dim that is a multiple of {}, got {}; use another "
                          "format for this model",
                          info.name, info.dim_multiple, dim));
}

float encode_plane(const PlaneShape& shape, const float* x, uint8_t* codes, uint8_t* scales) {
  switch (base_format(shape.format)) {
    case Format::nvfp4:
      return nvfp4_encode_page(x, shape.rows, shape.dim, codes, scales);
    case Format::mxfp4:
      mxfp4_encode_page(x, shape.rows, shape.dim, codes, scales);
      return 1.0f;
    case Format::int3:
      return int3_encode_page(x, shape.rows, shape.dim, codes, scales);
    default:
      no_plane(shape.format);
  }
}

void decode_plane(const PlaneShape& shape, const uint8_t* codes, const uint8_t* scales,
                  float page_scale, float* out) {
  switch (base_format(shape.format)) {
    case Format::nvfp4:
      return nvfp4_decode_page(codes, scales, page_scale, shape.rows, shape.dim, out);
    case Format::mxfp4:
      return mxfp4_decode_page(codes, scales, shape.rows, shape.dim, out);
    case Format::int3:
      return int3_decode_page(codes, scales, page_scale, shape.rows, shape.dim, out);
    default:
      no_plane(shape.format);
  }
}

}  // namespace thriftattn
