// NVFP4 planes of a page: E2M1 codes, one E4M3 decode_scale per 16 elements along head_dim and
// one FP32 page_scale; value = code * decode_scale * page_scale. The exact order of operations
// is part of the format (docs/formats.md). The _scalar functions are the truth; the others run
// the best SIMD target of this machine and give the same bytes and bits.
#pragma once

#include <cstdint>

#include "base/float_convert.h"
#include "formats/row_codec.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn {

inline constexpr int64_t kNvfp4Group = 16;

// page_scale maps the page's amax to this: the largest code times the largest decode_scale.
inline constexpr float kNvfp4Max = kE2m1Max * kE4m3Max;  // 2688

// Bytes of one plane of `rows` tokens.
constexpr int64_t nvfp4_codes_bytes(int64_t dim, int64_t rows = kPageTokens) {
  return rows * (dim / 2);
}
constexpr int64_t nvfp4_scales_bytes(int64_t dim, int64_t rows = kPageTokens) {
  return rows * (dim / kNvfp4Group);
}

// codes [rows][dim / 2], element 2i in the low nibble; scales [rows][dim / 16].
struct Nvfp4Plane {
  uint8_t* codes = nullptr;
  uint8_t* scales = nullptr;
  float page_scale = 1.0f;
};

struct Nvfp4ConstPlane {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  float page_scale = 1.0f;

  Nvfp4ConstPlane() = default;
  Nvfp4ConstPlane(const uint8_t* codes_, const uint8_t* scales_, float page_scale_)
      : codes(codes_), scales(scales_), page_scale(page_scale_) {}
  Nvfp4ConstPlane(const Nvfp4Plane& p)  // NOLINT: adding const is implicit, as for pointers
      : codes(p.codes), scales(p.scales), page_scale(p.page_scale) {}
};

// x is dense [rows][dim], finite; dim is a multiple of 16 (throws Error otherwise). Returns the
// page_scale. No alignment is needed.
float nvfp4_encode_page(const float* x, int64_t rows, int64_t dim, uint8_t* codes, uint8_t* scales);
void nvfp4_decode_page(const uint8_t* codes, const uint8_t* scales, float page_scale, int64_t rows,
                       int64_t dim, float* out);

float nvfp4_encode_page_scalar(const float* x, int64_t rows, int64_t dim, uint8_t* codes,
                               uint8_t* scales);
void nvfp4_decode_page_scalar(const uint8_t* codes, const uint8_t* scales, float page_scale,
                              int64_t rows, int64_t dim, float* out);

// The candidate amax / 4 is dropped where its scale, rounded to E4M3 without saturation, would
// exceed 448: beyond 464, the midpoint of 448 and 480, whose tie goes to 448.
inline constexpr float kScale4Limit = 464.0f;

// Throws Error for a dim that has no NVFP4 plane.
void nvfp4_check_dim(int64_t dim);

}  // namespace thriftattn
