// The scalar truth of NVFP4: the order of operations written here is the format.
#include <algorithm>
#include <array>
#include <cmath>

#include "base/float_convert.h"
#include "formats/nvfp4.h"
#include "formats/plane_codec.h"

namespace thriftattn {
namespace {

struct Candidate {
  std::array<uint8_t, kNvfp4Group> codes{};
  uint8_t scale = 0;
  float error = 0.0f;
};

// Quantises a block t to one decode_scale; the error is summed as a tree of adjacent pairs.
Candidate quantize_block(const float* t, uint8_t scale_code) {
  Candidate c;
  c.scale = scale_code;
  const float scale = e4m3_to_f32(scale_code);
  std::array<float, kNvfp4Group> sum{};
  for (int64_t i = 0; i < kNvfp4Group; ++i) {
    // A zero scale has zero codes, without signs.
    c.codes[i] = scale == 0.0f ? 0 : f32_to_e2m1(t[i] / scale);
    const float diff = t[i] - e2m1_to_f32(c.codes[i]) * scale;
    sum[i] = diff * diff;
  }
  for (int64_t n = kNvfp4Group / 2; n >= 1; n /= 2) {
    for (int64_t i = 0; i < n; ++i) sum[i] = sum[2 * i] + sum[2 * i + 1];
  }
  c.error = sum[0];
  return c;
}

Candidate search_block(const float* t) {
  float amax = 0.0f;
  for (int64_t i = 0; i < kNvfp4Group; ++i) amax = std::max(amax, std::fabs(t[i]));
  const Candidate six = quantize_block(t, f32_to_e4m3(amax / 6.0f));
  const float target4 = amax / 4.0f;
  if (target4 > kScale4Limit) return six;
  const Candidate four = quantize_block(t, f32_to_e4m3(target4));
  return four.error < six.error ? four : six;  // a tie takes amax / 6
}

}  // namespace

void nvfp4_check_dim(int64_t dim) { check_plane_dim(Format::nvfp4, dim); }

float nvfp4_encode_page_scalar(const float* x, int64_t rows, int64_t dim, uint8_t* codes,
                               uint8_t* scales) {
  nvfp4_check_dim(dim);
  float amax = 0.0f;
  for (int64_t i = 0; i < rows * dim; ++i) amax = std::max(amax, std::fabs(x[i]));
  const float page_scale = usable_scale(amax / kNvfp4Max);
  for (int64_t block = 0; block < rows * dim / kNvfp4Group; ++block) {
    std::array<float, kNvfp4Group> t;
    for (int64_t i = 0; i < kNvfp4Group; ++i) t[i] = x[block * kNvfp4Group + i] / page_scale;
    const Candidate best = search_block(t.data());
    scales[block] = best.scale;
    for (int64_t i = 0; i < kNvfp4Group / 2; ++i) {
      codes[block * kNvfp4Group / 2 + i] =
          static_cast<uint8_t>(best.codes[2 * i] | best.codes[2 * i + 1] << 4);
    }
  }
  return page_scale;
}

void nvfp4_decode_page_scalar(const uint8_t* codes, const uint8_t* scales, float page_scale,
                              int64_t rows, int64_t dim, float* out) {
  nvfp4_check_dim(dim);
  for (int64_t i = 0; i < rows * dim; ++i) {
    const uint8_t code = i % 2 == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
    // code * decode_scale is exact in FP32.
    out[i] = e2m1_to_f32(code) * e4m3_to_f32(scales[i / kNvfp4Group]) * page_scale;
  }
}

}  // namespace thriftattn
