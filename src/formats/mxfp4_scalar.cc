// The scalar truth of MXFP4: OCP MX v1.0 section 6.3 with E2M1 elements.
#include <algorithm>
#include <cmath>

#include "base/float_convert.h"
#include "formats/mxfp4.h"
#include "formats/plane_codec.h"

namespace thriftattn {

void mxfp4_encode_page_scalar(const float* x, int64_t rows, int64_t dim, uint8_t* codes,
                              uint8_t* scales) {
  check_plane_dim(Format::mxfp4, dim);
  for (int64_t g = 0; g < rows * dim / kMxfp4Group; ++g) {
    const float* v = x + g * kMxfp4Group;
    float amax = 0.0f;
    for (int64_t i = 0; i < kMxfp4Group; ++i) amax = std::max(amax, std::fabs(v[i]));
    scales[g] = mxfp4_scale(amax);
    const float scale = e8m0_to_f32(scales[g]);
    for (int64_t i = 0; i < kMxfp4Group; i += 2) {
      codes[(g * kMxfp4Group + i) / 2] =
          static_cast<uint8_t>(f32_to_e2m1(v[i] / scale) | f32_to_e2m1(v[i + 1] / scale) << 4);
    }
  }
}

void mxfp4_decode_page_scalar(const uint8_t* codes, const uint8_t* scales, int64_t rows,
                              int64_t dim, float* out) {
  check_plane_dim(Format::mxfp4, dim);
  for (int64_t i = 0; i < rows * dim; ++i) {
    const uint8_t code = i % 2 == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
    out[i] = e2m1_to_f32(code) * e8m0_to_f32(scales[i / kMxfp4Group]);
  }
}

}  // namespace thriftattn
