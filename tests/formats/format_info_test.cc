// The table of facts agrees with itself, with the codecs' sizes and with the promised bits.
#include "formats/format_info.h"

#include <gtest/gtest.h>

#include <set>

#include "formats/nvfp4.h"
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
  }
  EXPECT_EQ(format_info(Format::nvfp4x2).name, "nvfp4x2");
  EXPECT_EQ(kPageFormatVersion, 1);
}

TEST(FormatInfo, BitsPerElement) {
  EXPECT_EQ(format_info(Format::f32).bits_per_element(128), 32.0);
  EXPECT_EQ(format_info(Format::bf16).bits_per_element(128), 16.0);
  EXPECT_EQ(format_info(Format::fp16).bits_per_element(128), 16.0);
  EXPECT_EQ(format_info(Format::fp8_e4m3).bits_per_element(128), 8.25);
  EXPECT_EQ(format_info(Format::fp8_e4m3).bits_per_element(64), 8.5);
  EXPECT_EQ(format_info(Format::q8_0).bits_per_element(128), 8.5);
  EXPECT_EQ(format_info(Format::q4_0).bits_per_element(128), 4.5);
  EXPECT_EQ(format_info(Format::nvfp4).bits_per_element(128), 4.5);
  EXPECT_EQ(format_info(Format::nvfp4x2).bits_per_element(128), 9.0);
}

TEST(FormatInfo, BitsAreTheBytesThatAreStored) {
  for (const FormatInfo& info : kFormats) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      const int64_t bytes = is_layered(info.format)
                                ? info.planes * (nvfp4_codes_bytes(dim) + nvfp4_scales_bytes(dim))
                                : kPageTokens * row_bytes(info.format, dim);
      EXPECT_EQ(info.bits_per_element(dim) * static_cast<double>(dim * kPageTokens), 8.0 * bytes)
          << info.name << " " << dim;
    }
  }
}

}  // namespace
}  // namespace thriftattn
