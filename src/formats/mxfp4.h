// MXFP4 planes of a page (OCP MX v1.0): E2M1 codes and one E8M0 scale, a power of two, per 32
// elements along head_dim; value = code * scale. No page scale. The order of operations is part of
// the format (docs/formats.md). The _scalar functions are the truth; the others run the best SIMD
// target of this machine and give the same bytes and bits.
#pragma once

#include <bit>
#include <cstdint>

namespace thriftattn {

inline constexpr int64_t kMxfp4Group = 32;

// The E8M0 scale of a group: 2^(floor(log2 amax) - 2), 2 being the exponent of E2M1's largest
// value. Groups below 2^-123 take 2^-125, so that no reader meets a subnormal number.
constexpr uint8_t mxfp4_scale(float amax) {
  const uint32_t exponent = std::bit_cast<uint32_t>(amax) >> 23;
  return static_cast<uint8_t>(exponent < 4 ? 2 : exponent - 2);
}

// x is dense [rows][dim], finite; codes [rows][dim / 2], element 2i in the low nibble; scales
// [rows][dim / 32]. dim is a multiple of 32 (check_plane_dim). No alignment is needed.
void mxfp4_encode_page(const float* x, int64_t rows, int64_t dim, uint8_t* codes, uint8_t* scales);
void mxfp4_decode_page(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t dim,
                       float* out);

void mxfp4_encode_page_scalar(const float* x, int64_t rows, int64_t dim, uint8_t* codes,
                              uint8_t* scales);
void mxfp4_decode_page_scalar(const uint8_t* codes, const uint8_t* scales, int64_t rows,
                              int64_t dim, float* out);

}  // namespace thriftattn
