// Scalar conversions between FP32 and the storage floats: BF16, FP16, FP8, FP6, FP4 E2M1 and the
// scale E8M0.
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

// A float of at most 8 bits: sign, exponent (bias 2^(e-1) - 1), mantissa, subnormals; codes are
// ordered like their values. Conversion saturates to `Last`, the code of the largest finite value.
// What lies above it, if anything, is NaN - after an infinity in E5M2.
template <int ExponentBits, int MantissaBits, uint32_t Last>
struct SmallFloat {
  static constexpr int kMantissaBits = MantissaBits;
  static constexpr int kBits = 1 + ExponentBits + MantissaBits;
  static constexpr int kBias = (1 << (ExponentBits - 1)) - 1;
  static constexpr uint32_t kSign = 1u << (kBits - 1);
  static constexpr uint32_t kLast = Last;
  static constexpr bool kHasNan = Last < kSign - 1;
  static constexpr bool kHasInf = Last + 2 < kSign;
  // FP32's exponent field of this format's exponent 0, in front of the mantissa.
  static constexpr uint32_t kRebias = 127u - kBias;
  static constexpr float kMinNormal = std::bit_cast<float>((kRebias + 1) << 23);
  static constexpr float kStep = std::bit_cast<float>((kRebias + 1 - MantissaBits) << 23);
  // Its ulp is kStep: adding it to a number below kMinNormal rounds to a multiple of kStep.
  static constexpr float kRounder = std::bit_cast<float>((kRebias + 24 - MantissaBits) << 23);

  static constexpr float decode(uint32_t code) {
    const uint32_t sign = (code & kSign) != 0 ? 0x80000000u : 0u;
    const uint32_t mag = code & (kSign - 1);
    uint32_t bits = (mag << (23 - MantissaBits)) + (kRebias << 23);
    if (mag < 1u << MantissaBits) bits = std::bit_cast<uint32_t>(static_cast<float>(mag) * kStep);
    if (mag > Last) bits = kHasInf && mag == Last + 1 ? 0x7f800000u : 0x7fc00000u;
    return std::bit_cast<float>(sign | bits);
  }
  static constexpr float kMax = decode(Last);

  // Without a NaN in the format, NaN becomes the largest value.
  static constexpr uint8_t encode(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 31) * kSign;
    uint32_t a = bits & 0x7fffffffu;
    if (a > 0x7f800000u && kHasNan) return static_cast<uint8_t>(sign | (kSign - 1));
    if (a >= std::bit_cast<uint32_t>(kMax)) return static_cast<uint8_t>(sign | Last);
    if (a < std::bit_cast<uint32_t>(kMinNormal)) {
      const float f = std::bit_cast<float>(a) + kRounder;
      const uint32_t code = std::bit_cast<uint32_t>(f) - std::bit_cast<uint32_t>(kRounder);
      return static_cast<uint8_t>(sign | code);
    }
    a += (1u << (22 - MantissaBits)) - 1u + ((a >> (23 - MantissaBits)) & 1u);
    return static_cast<uint8_t>(sign | ((a >> (23 - MantissaBits)) - (kRebias << MantissaBits)));
  }
};

using E4m3 = SmallFloat<4, 3, 0x7e>;  // the FN variant (OCP FP8): no infinity, 0x7f is NaN
using E5m2 = SmallFloat<5, 2, 0x7b>;  // IEEE-like: 0x7c is infinity, above it NaN
using E3m2 = SmallFloat<3, 2, 0x1f>;  // FP6 has neither
using E2m3 = SmallFloat<2, 3, 0x1f>;

inline constexpr float kE4m3Max = E4m3::kMax;
constexpr uint8_t f32_to_e4m3(float x) { return E4m3::encode(x); }
constexpr float e4m3_to_f32(uint8_t code) { return E4m3::decode(code); }

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

// E8M0, the scale of OCP MX: 2^(code - 127), 255 is NaN. Code 0 is a subnormal FP32, which no
// encoder here writes.
constexpr float e8m0_to_f32(uint8_t code) {
  if (code == 0xff) return std::bit_cast<float>(0x7fc00000u);
  if (code == 0) return 0x1p-127f;
  return std::bit_cast<float>(static_cast<uint32_t>(code) << 23);
}

inline constexpr std::array<float, 256> kE8m0Values = [] {
  std::array<float, 256> values{};
  for (int i = 0; i < 256; ++i) values[i] = e8m0_to_f32(static_cast<uint8_t>(i));
  return values;
}();

}  // namespace thriftattn
