// The table of facts agrees with itself, with the codecs' sizes and with the promised bits.
#include "formats/format_info.h"

#include <gtest/gtest.h>

#include <set>

#include "base/float_convert.h"
#include "formats/int3.h"
#include "formats/plane_codec.h"
#include "formats/row_codec.h"

namespace thriftattn {
namespace {

TEST(FormatInfo, TableIsInTheOrderOfTheEnum) {
  std::set<std::string_view> names;
  for (size_t i = 0; i < kFormats.size(); ++i) {
    EXPECT_EQ(static_cast<size_t>(kFormats[i].format), i);
    EXPECT_TRUE(names.insert(kFormats[i].name).second) << kFormats[i].name;
    for (const std::string_view alias : kFormats[i].aliases) {
      if (alias.empty()) continue;
      EXPECT_TRUE(names.insert(alias).second) << alias;
    }
    EXPECT_FALSE(kFormats[i].byte_map.empty());
    EXPECT_FALSE(kFormats[i].rounding.empty());
    EXPECT_FALSE(kFormats[i].words.empty());
  }
  EXPECT_EQ(format_info(Format::nvfp4x2).name, "nvfp4x2");
  EXPECT_EQ(kPageFormatVersion, 2);
}

TEST(FormatInfo, BitsPerElement) {
  EXPECT_EQ(format_info(Format::f32).bits_per_element(128), 32.0);
  EXPECT_EQ(format_info(Format::bf16).bits_per_element(128), 16.0);
  EXPECT_EQ(format_info(Format::fp16).bits_per_element(128), 16.0);
  EXPECT_EQ(format_info(Format::fp8_e4m3).bits_per_element(128), 8.25);
  EXPECT_EQ(format_info(Format::fp8_e4m3).bits_per_element(64), 8.5);
  EXPECT_EQ(format_info(Format::fp8_e5m2).bits_per_element(128), 8.25);
  EXPECT_EQ(format_info(Format::fp6_e3m2).bits_per_element(128), 6.25);
  EXPECT_EQ(format_info(Format::fp6_e2m3).bits_per_element(64), 6.5);
  EXPECT_EQ(format_info(Format::mxfp4).bits_per_element(128), 4.25);
  EXPECT_EQ(format_info(Format::int3).bits_per_element(128), 3.25);
  EXPECT_EQ(format_info(Format::q8_0).bits_per_element(128), 8.5);
  EXPECT_EQ(format_info(Format::q4_0).bits_per_element(128), 4.5);
  EXPECT_EQ(format_info(Format::nvfp4).bits_per_element(128), 4.5);
  EXPECT_EQ(format_info(Format::nvfp4x2).bits_per_element(128), 9.0);
}

TEST(FormatInfo, BitsAreTheBytesThatAreStored) {
  for (const FormatInfo& info : kFormats) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      const int64_t bytes = is_layered(info.format)
                                ? info.planes * (plane_codes_bytes(info.format, dim) +
                                                 plane_scales_bytes(info.format, dim))
                                : kPageTokens * row_bytes(info.format, dim);
      EXPECT_EQ(info.bits_per_element(dim) * static_cast<double>(dim * kPageTokens), 8.0 * bytes)
          << info.name << " " << dim;
    }
  }
}

TEST(FormatInfo, CodeRangesAreThoseOfTheElements) {
  const auto check = [](Format f, float largest, float smallest) {
    EXPECT_EQ(format_info(f).code_max, largest) << format_info(f).name;
    EXPECT_EQ(format_info(f).code_min, smallest) << format_info(f).name;
  };
  check(Format::f32, 0x1.fffffep127f, std::bit_cast<float>(1u));
  check(Format::bf16, bf16_to_f32(0x7f7f), bf16_to_f32(1));
  check(Format::fp16, fp16_to_f32(0x7bff), fp16_to_f32(1));
  check(Format::fp8_e4m3, E4m3::kMax, E4m3::decode(1));
  check(Format::fp8_e5m2, E5m2::kMax, E5m2::decode(1));
  check(Format::fp6_e3m2, E3m2::kMax, E3m2::decode(1));
  check(Format::fp6_e2m3, E2m3::kMax, E2m3::decode(1));
  check(Format::q8_0, 127.0f, 1.0f);
  check(Format::q4_0, 8.0f, 1.0f);
  for (const Format f : {Format::nvfp4, Format::nvfp4x2, Format::mxfp4}) {
    check(f, kE2m1Max, e2m1_to_f32(1));
  }
  check(Format::int3, kInt3CodeMax, kInt3Values[0]);
}

}  // namespace
}  // namespace thriftattn
