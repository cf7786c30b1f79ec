// Scalar conversions between FP32 and the storage floats: BF16, FP16, FP8 E4M3 and FP4 E2M1.
// They are the truth that every SIMD and GPU path is compared with, so all are exact, round to
// nearest even and are usable in constant expressions. The only assumption about the machine is
// IEEE FP32 in its default rounding mode; subnormal FP32 inputs may be flushed, since each of
// them rounds to zero in FP16, E4M3 and E2M1, and BF16 is converted with integers.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace thriftattn {

// NaN stays NaN (quiet); beyond the largest BF16 rounds to infinity.
constexpr uint16_t f32_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float bf16_to_f32(uint16_t b) {
  return std::bit_cast<float>(static_cast<uint32_t>(b) << 16);
}

// NaN stays NaN (quiet, its upper payload kept, as VCVTPS2PH does); from 65520 on: infinity.
constexpr uint16_t f32_to_fp16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65536
  if (a < 0x38800000u) {
    // Below 2^-14 the step is 2^-24, the ulp of 0.5: the addition rounds to it.
    const float f = std::bit_cast<float>(a) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(f) - 0x3f000000u));
  }
  a += 0xfffu + ((a >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((a >> 13) - (112u << 10)));
}

constexpr float fp16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t mag = h & 0x7fffu;
  if (mag >= 0x7c00u) {
    const uint32_t quiet = mag > 0x7c00u ? 0x00400000u : 0u;
    return std::bit_cast<float>(sign | 0x7f800000u | (mag << 13) | quiet);
  }
  if (mag >= 0x400u) return std::bit_cast<float>(sign | ((mag << 13) + (112u << 23)));
  const float f = static_cast<float>(mag) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(f));
}

inline constexpr float kE4m3Max = 448.0f;

// The FN variant (OCP FP8): no infinity, 0x7f and 0xff are NaN, saturation to 448.
constexpr uint8_t f32_to_e4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (a >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);  // >= 448
  if (a < 0x3c800000u) {
    // Below 2^-6 the step is 2^-9, the ulp of 2^14: the addition rounds to it.
    const float f = std::bit_cast<float>(a) + 0x1p14f;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(f) - 0x46800000u));
  }
  a += 0x7ffffu + ((a >> 20) & 1u);
  return static_cast<uint8_t>(sign | ((a >> 20) - (120u << 3)));
}

constexpr float e4m3_to_f32(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t mag = code & 0x7fu;
  if (mag == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (mag >= 8u) return std::bit_cast<float>(sign | ((mag << 20) + (120u << 23)));
  const float f = static_cast<float>(mag) * 0x1p-9f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(f));
}

// e4m3_to_f32 by table: what a decoder wants for one scale a block.
inline constexpr std::array<float, 256> kE4m3Values = [] {
  std::array<float, 256> values{};
  for (int i = 0; i < 256; ++i) values[i] = e4m3_to_f32(static_cast<uint8_t>(i));
  return values;
}();

inline constexpr float kE2m1Max = 6.0f;

inline constexpr std::array<float, 16> kE2m1Values = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                                      4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                                      -2.0f, -3.0f, -4.0f, -6.0f};

constexpr float e2m1_to_f32(uint8_t code) { return kE2m1Values[code & 15u]; }

// Ties go to the even code: .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
// Saturates to 6; the sign is kept on zero; NaN becomes 6 with its sign.
constexpr uint8_t f32_to_e2m1(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 28 & 8u;
  const float a = std::bit_cast<float>(bits & 0x7fffffffu);
  uint32_t code = 7u;
  if (a <= 0.25f) {
    code = 0u;
  } else if (a < 0.75f) {
    code = 1u;
  } else if (a <= 1.25f) {
    code = 2u;
  } else if (a < 1.75f) {
    code = 3u;
  } else if (a <= 2.5f) {
    code = 4u;
  } else if (a < 3.5f) {
    code = 5u;
  } else if (a <= 5.0f) {
    code = 6u;
  }
  return static_cast<uint8_t>(sign | code);
}

}  // namespace thriftattn
