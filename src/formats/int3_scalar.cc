// The scalar truth of INT3: the order of operations written here is the format.
#include <algorithm>
#include <array>
#include <cmath>

#include "base/float_convert.h"
#include "formats/bit_pack.h"
#include "formats/int3.h"
#include "formats/plane_codec.h"
#include "formats/row_codec.h"

namespace thriftattn {
namespace {

struct Candidate {
  std::array<uint8_t, kInt3Group> codes{};
  uint8_t scale = 0;
  float error = 0.0f;
};

// Quantises a group t to one decode_scale; the error is summed as a tree of adjacent pairs.
Candidate quantize_group(const float* t, uint8_t scale_code) {
  Candidate c;
  c.scale = scale_code;
  const float scale = e4m3_to_f32(scale_code);
  std::array<float, kInt3Group> sum{};
  for (int64_t i = 0; i < kInt3Group; ++i) {
    if (scale != 0.0f) {  // a zero scale has zero codes, without signs
      // The grid's midpoints are the whole numbers: truncation is the nearest, ties outwards.
      const int step = static_cast<int>(std::min(std::fabs(t[i]) / scale, 3.0f));
      c.codes[i] = static_cast<uint8_t>(step | (std::signbit(t[i]) ? 4 : 0));
    }
    const float diff = t[i] - kInt3Values[c.codes[i]] * scale;
    sum[i] = diff * diff;
  }
  for (int64_t n = kInt3Group / 2; n >= 1; n /= 2) {
    for (int64_t i = 0; i < n; ++i) sum[i] = sum[2 * i] + sum[2 * i + 1];
  }
  c.error = sum[0];
  return c;
}

Candidate search_group(const float* t) {
  float amax = 0.0f;
  for (int64_t i = 0; i < kInt3Group; ++i) amax = std::max(amax, std::fabs(t[i]));
  const float whole = amax / kInt3CodeMax;
  Candidate best = quantize_group(t, f32_to_e4m3(whole * kInt3Shares[0]));
  for (size_t s = 1; s < kInt3Shares.size(); ++s) {
    const Candidate next = quantize_group(t, f32_to_e4m3(whole * kInt3Shares[s]));
    if (next.error < best.error) best = next;
  }
  return best;
}

}  // namespace

float int3_encode_page_scalar(const float* x, int64_t rows, int64_t dim, uint8_t* codes,
                              uint8_t* scales) {
  check_plane_dim(Format::int3, dim);
  float amax = 0.0f;
  for (int64_t i = 0; i < rows * dim; ++i) amax = std::max(amax, std::fabs(x[i]));
  const float page_scale = usable_scale(amax / kInt3Max);
  for (int64_t g = 0; g < rows * dim / kInt3Group; ++g) {
    std::array<float, kInt3Group> t;
    for (int64_t i = 0; i < kInt3Group; ++i) t[i] = x[g * kInt3Group + i] / page_scale;
    const Candidate best = search_group(t.data());
    scales[g] = best.scale;
    for (int64_t w = 0; w < kInt3Group / 8; ++w) {
      uint32_t word = 0;
      for (int64_t i = 0; i < 8; ++i) word |= uint32_t{best.codes[w * 8 + i]} << 3 * i;
      store_u24(word, codes + g * kInt3GroupBytes + w * 3);
    }
  }
  return page_scale;
}

void int3_decode_page_scalar(const uint8_t* codes, const uint8_t* scales, float page_scale,
                             int64_t rows, int64_t dim, float* out) {
  check_plane_dim(Format::int3, dim);
  for (int64_t i = 0; i < rows * dim; ++i) {
    const uint32_t code = load_u24(codes + i / 8 * 3) >> 3 * (i % 8) & 7u;
    // code * decode_scale is exact in FP32.
    out[i] = kInt3Values[code] * e4m3_to_f32(scales[i / kInt3Group]) * page_scale;
  }
}

}  // namespace thriftattn
