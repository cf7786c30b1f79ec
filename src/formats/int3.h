// INT3 planes of a page: 3-bit codes on a grid without zero (+-0.5, +-1.5, +-2.5, +-3.5), one E4M3
// decode_scale per 32 elements along head_dim and one FP32 page_scale; value = code *
// decode_scale * page_scale. The order of operations is part of the format (docs/formats.md). The
// _scalar functions are the truth; the others run the best SIMD target of this machine and give
// the same bytes and bits.
#pragma once

#include <array>
#include <cstdint>

#include "base/float_convert.h"

namespace thriftattn {

// 32, not 16: with 16 the scales alone would put `max-savings` beyond 4.25 bits.
inline constexpr int64_t kInt3Group = 32;
inline constexpr int64_t kInt3GroupBytes = kInt3Group / 8 * 3;

inline constexpr float kInt3CodeMax = 3.5f;
inline constexpr float kInt3Max = kInt3CodeMax * kE4m3Max;  // 1568: what page_scale maps amax to

// Code: magnitude - 0.5 in bits 0 and 1, sign in bit 2.
inline constexpr std::array<float, 8> kInt3Values = {0.5f,  1.5f,  2.5f,  3.5f,
                                                     -0.5f, -1.5f, -2.5f, -3.5f};

// Shares of amax / 3.5 that the scale search tries, in this order; a tie takes the earlier. Less
// than all clips the largest elements and gives the others a finer grid.
inline constexpr std::array<float, 4> kInt3Shares = {1.0f, 0.9f, 0.8f, 0.7f};

// x is dense [rows][dim], finite; codes [rows][dim / 8][3 bytes] (formats/bit_pack.h); scales
// [rows][dim / 32]. dim is a multiple of 32 (check_plane_dim). Returns the page_scale.
float int3_encode_page(const float* x, int64_t rows, int64_t dim, uint8_t* codes, uint8_t* scales);
void int3_decode_page(const uint8_t* codes, const uint8_t* scales, float page_scale, int64_t rows,
                      int64_t dim, float* out);

float int3_encode_page_scalar(const float* x, int64_t rows, int64_t dim, uint8_t* codes,
                              uint8_t* scales);
void int3_decode_page_scalar(const uint8_t* codes, const uint8_t* scales, float page_scale,
                             int64_t rows, int64_t dim, float* out);

}  // namespace thriftattn
