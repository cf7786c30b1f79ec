// Scalar conversions: every code, every midpoint between neighbours, and golden bytes.
#include "base/float_convert.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace thriftattn {
namespace {

// For the codes 0..last of nonnegative, increasing values: each value maps to its code, the
// midpoint of two neighbours to the even code, and its two FP32 neighbours to the near one.
template <class Encode, class Decode>
void check_rounding(Encode encode, Decode decode, uint32_t last, uint32_t sign_bit) {
  for (uint32_t code = 0; code <= last; ++code) {
    const float value = decode(code);
    ASSERT_EQ(encode(value), code) << value;
    ASSERT_EQ(encode(-value), code | sign_bit) << value;
    ASSERT_EQ(decode(code | sign_bit), -value);
    ASSERT_TRUE(std::signbit(decode(code | sign_bit)));
    if (code == last) break;
    const float next = decode(code + 1);
    ASSERT_LT(value, next);
    const double exact = (static_cast<double>(value) + next) / 2;
    const float middle = static_cast<float>(exact);
    ASSERT_EQ(static_cast<double>(middle), exact);
    const uint32_t even = code % 2 == 0 ? code : code + 1;
    ASSERT_EQ(encode(middle), even) << middle;
    ASSERT_EQ(encode(-middle), even | sign_bit) << middle;
    ASSERT_EQ(encode(std::nextafter(middle, 0.0f)), code) << middle;
    ASSERT_EQ(encode(std::nextafter(middle, std::numeric_limits<float>::max())), code + 1)
        << middle;
  }
}

TEST(FloatConvert, Bf16EveryCode) {
  check_rounding([](float x) { return uint32_t{f32_to_bf16(x)}; },
                 [](uint32_t c) { return bf16_to_f32(static_cast<uint16_t>(c)); }, 0x7f7f, 0x8000);
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(f32_to_bf16(inf), 0x7f80);
  EXPECT_EQ(f32_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  for (uint32_t c = 0x7f81; c <= 0x7fff; ++c) {
    EXPECT_TRUE(std::isnan(bf16_to_f32(static_cast<uint16_t>(c))));
  }
  // A NaN whose payload is in the lower half must not become infinity.
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(FloatConvert, Bf16Golden) {
  EXPECT_EQ(f32_to_bf16(1.0f), 0x3f80);
  EXPECT_EQ(f32_to_bf16(-2.5f), 0xc020);
  EXPECT_EQ(f32_to_bf16(3.14159265f), 0x4049);
  EXPECT_EQ(f32_to_bf16(1.0f + 0x1p-8f), 0x3f80);                     // tie to even, down
  EXPECT_EQ(f32_to_bf16(1.0f + 3 * 0x1p-8f), 0x3f82);                 // tie to even, up
  EXPECT_EQ(f32_to_bf16(std::bit_cast<float>(0x00018000u)), 0x0002);  // subnormal tie
}

TEST(FloatConvert, Fp16EveryCode) {
  check_rounding([](float x) { return uint32_t{f32_to_fp16(x)}; },
                 [](uint32_t c) { return fp16_to_f32(static_cast<uint16_t>(c)); }, 0x7bff, 0x8000);
  for (uint32_t c = 0; c <= 0x7bff; ++c) {  // the definition: 2^(e-15) (1 + m/1024)
    const uint32_t e = c >> 10, m = c & 0x3ff;
    const double value =
        e == 0 ? std::ldexp(m, -24) : std::ldexp(1024.0 + m, static_cast<int>(e) - 25);
    ASSERT_EQ(fp16_to_f32(static_cast<uint16_t>(c)), value);
  }
  EXPECT_TRUE(std::isinf(fp16_to_f32(0x7c00)));
  for (uint32_t c = 0x7c01; c <= 0x7fff; ++c) {
    EXPECT_TRUE(std::isnan(fp16_to_f32(static_cast<uint16_t>(c))));
    EXPECT_EQ(f32_to_fp16(fp16_to_f32(static_cast<uint16_t>(c))), c | 0x200);
  }
}

TEST(FloatConvert, Fp16Golden) {
  EXPECT_EQ(f32_to_fp16(1.0f), 0x3c00);
  EXPECT_EQ(f32_to_fp16(0.1f), 0x2e66);
  EXPECT_EQ(f32_to_fp16(65504.0f), 0x7bff);
  EXPECT_EQ(f32_to_fp16(std::nextafter(65520.0f, 0.0f)), 0x7bff);
  EXPECT_EQ(f32_to_fp16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_fp16(1e10f), 0x7c00);
  EXPECT_EQ(f32_to_fp16(0x1p-14f), 0x0400);
  EXPECT_EQ(f32_to_fp16(0x1p-24f), 0x0001);
  EXPECT_EQ(f32_to_fp16(0x1p-25f), 0x0000);      // tie
  EXPECT_EQ(f32_to_fp16(3 * 0x1p-25f), 0x0002);  // tie
  EXPECT_EQ(f32_to_fp16(-0.0f), 0x8000);
  EXPECT_EQ(f32_to_fp16(-1e-40f), 0x8000);
}

TEST(FloatConvert, E4m3EveryCode) {
  check_rounding([](float x) { return uint32_t{f32_to_e4m3(x)}; },
                 [](uint32_t c) { return e4m3_to_f32(static_cast<uint8_t>(c)); }, 0x7e, 0x80);
  for (uint32_t c = 0; c <= 0x7e; ++c) {  // the definition: 2^(e-7) (1 + m/8)
    const uint32_t e = c >> 3, m = c & 7;
    const double value = e == 0 ? std::ldexp(m, -9) : std::ldexp(8.0 + m, static_cast<int>(e) - 10);
    ASSERT_EQ(e4m3_to_f32(static_cast<uint8_t>(c)), value);
    ASSERT_EQ(kE4m3Values[c], value);
  }
  EXPECT_TRUE(std::isnan(e4m3_to_f32(0x7f)));
  EXPECT_TRUE(std::isnan(e4m3_to_f32(0xff)));
  EXPECT_EQ(f32_to_e4m3(std::numeric_limits<float>::quiet_NaN()) & 0x7f, 0x7f);
}

TEST(FloatConvert, E4m3Golden) {
  EXPECT_EQ(f32_to_e4m3(1.0f), 0x38);
  EXPECT_EQ(f32_to_e4m3(-0.5f), 0xb0);
  EXPECT_EQ(f32_to_e4m3(240.0f), 0x77);
  EXPECT_EQ(f32_to_e4m3(448.0f), 0x7e);
  EXPECT_EQ(f32_to_e4m3(464.0f), 0x7e);
  EXPECT_EQ(f32_to_e4m3(465.0f), 0x7e);
  EXPECT_EQ(f32_to_e4m3(std::numeric_limits<float>::infinity()), 0x7e);
  EXPECT_EQ(f32_to_e4m3(-1e30f), 0xfe);
  EXPECT_EQ(f32_to_e4m3(0x1p-6f), 0x08);
  EXPECT_EQ(f32_to_e4m3(0x1p-9f), 0x01);
  EXPECT_EQ(f32_to_e4m3(0x1p-10f), 0x00);       // tie
  EXPECT_EQ(f32_to_e4m3(3 * 0x1p-10f), 0x02);   // tie
  EXPECT_EQ(f32_to_e4m3(15 * 0x1p-10f), 0x08);  // tie, subnormal to normal
  EXPECT_EQ(f32_to_e4m3(1.0625f), 0x38);        // tie
  EXPECT_EQ(f32_to_e4m3(1.1875f), 0x3a);        // tie
}

// The definition: 2^(e - bias) (1 + m / 2^M), 2^(1 - bias) m / 2^M where e is 0.
template <class Float>
void check_small_float(int exponent_bits, int mantissa_bits, float largest) {
  check_rounding([](float x) { return uint32_t{Float::encode(x)}; },
                 [](uint32_t c) { return Float::decode(c); }, Float::kLast, Float::kSign);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  for (uint32_t c = 0; c <= Float::kLast; ++c) {
    const int e = static_cast<int>(c >> mantissa_bits);
    const double m = c & ((1u << mantissa_bits) - 1);
    const double one = std::ldexp(1.0, mantissa_bits);
    const double value = e == 0 ? std::ldexp(m, 1 - bias - mantissa_bits)
                                : std::ldexp(one + m, e - bias - mantissa_bits);
    ASSERT_EQ(Float::decode(c), value) << c;
  }
  EXPECT_EQ(Float::kMax, largest);
  EXPECT_EQ(Float::encode(2 * largest), Float::kLast);
  EXPECT_EQ(Float::encode(-std::numeric_limits<float>::infinity()), Float::kSign | Float::kLast);
  EXPECT_EQ(Float::encode(-0.0f), Float::kSign);
  EXPECT_EQ(Float::encode(1e-40f), 0);
}

TEST(FloatConvert, Fp8AndFp6EveryCode) {
  check_small_float<E4m3>(4, 3, 448.0f);
  check_small_float<E5m2>(5, 2, 57344.0f);
  check_small_float<E3m2>(3, 2, 28.0f);
  check_small_float<E2m3>(2, 3, 7.5f);
}

// E5M2 is the upper half of FP16, its infinity and NaN included.
TEST(FloatConvert, E5m2IsHalfOfFp16) {
  for (uint32_t c = 0; c < 256; ++c) {
    const float half = fp16_to_f32(static_cast<uint16_t>(c << 8));
    const float value = E5m2::decode(c);
    if (std::isnan(half)) {
      EXPECT_TRUE(std::isnan(value)) << c;
    } else {
      EXPECT_EQ(value, half) << c;
    }
  }
  EXPECT_EQ(E5m2::encode(std::numeric_limits<float>::quiet_NaN()) & 0x7f, 0x7f);
}

TEST(FloatConvert, Fp8AndFp6Golden) {
  EXPECT_EQ(E5m2::encode(1.0f), 0x3c);
  EXPECT_EQ(E5m2::encode(-1.75f), 0xbf);
  EXPECT_EQ(E5m2::encode(1.125f), 0x3c);  // tie
  EXPECT_EQ(E5m2::encode(0x1p-16f), 0x01);
  EXPECT_EQ(E5m2::encode(61440.0f), 0x7b);  // would round to infinity: saturates
  EXPECT_EQ(E3m2::encode(1.0f), 0x0c);
  EXPECT_EQ(E3m2::encode(-28.0f), 0x3f);
  EXPECT_EQ(E3m2::encode(0.0625f), 0x01);
  EXPECT_EQ(E3m2::encode(0.03125f), 0x00);  // tie
  EXPECT_EQ(E3m2::encode(0.21875f), 0x04);  // tie, subnormal to normal
  EXPECT_EQ(E2m3::encode(1.0f), 0x08);
  EXPECT_EQ(E2m3::encode(7.5f), 0x1f);
  EXPECT_EQ(E2m3::encode(-0.125f), 0x21);
  EXPECT_EQ(E2m3::encode(0.9375f), 0x08);  // tie, subnormal to normal
  EXPECT_EQ(E2m3::encode(std::numeric_limits<float>::quiet_NaN()) & 0x1f, 0x1f);
}

TEST(FloatConvert, E8m0EveryCode) {
  for (int c = 0; c < 255; ++c) {
    EXPECT_EQ(e8m0_to_f32(static_cast<uint8_t>(c)), std::ldexp(1.0f, c - 127));
    EXPECT_EQ(kE8m0Values[static_cast<size_t>(c)], std::ldexp(1.0f, c - 127));
  }
  EXPECT_TRUE(std::isnan(e8m0_to_f32(255)));
}

TEST(FloatConvert, E2m1EveryCode) {
  check_rounding([](float x) { return uint32_t{f32_to_e2m1(x)}; },
                 [](uint32_t c) { return e2m1_to_f32(static_cast<uint8_t>(c)); }, 7, 8);
  const float values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  for (uint8_t c = 0; c < 8; ++c) EXPECT_EQ(e2m1_to_f32(c), values[c]);
  EXPECT_EQ(f32_to_e2m1(7.0f), 7);
  EXPECT_EQ(f32_to_e2m1(-1e30f), 15);
  EXPECT_EQ(f32_to_e2m1(std::numeric_limits<float>::infinity()), 7);
}

TEST(FloatConvert, RandomAgainstSearch) {
  std::mt19937 rng(1);
  for (int i = 0; i < 20000; ++i) {
    const float x =
        std::ldexp(static_cast<float>(rng() % 65536), static_cast<int>(rng() % 30) - 30);
    double best = 1e30;
    for (int c = 0; c <= 0x7e; ++c) {
      best =
          std::min(best, std::fabs(static_cast<double>(e4m3_to_f32(static_cast<uint8_t>(c))) - x));
    }
    ASSERT_EQ(std::fabs(static_cast<double>(e4m3_to_f32(f32_to_e4m3(x))) - x), best) << x;
  }
}

}  // namespace
}  // namespace thriftattn
