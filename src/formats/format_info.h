// One struct of facts per storage format: the single place that says how many bits a code has,
// what shares a scale, how values round and how the bytes lie. Codecs, the cache's sizes, the
// command line and the tests read it; docs/formats.md tells the same story in words.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "thriftattn/policy.h"

namespace thriftattn {

// Stored bytes change only together with this number.
inline constexpr int kPageFormatVersion = 1;

// FormatInfo::group of a format with one scale for a whole row (a token and head).
inline constexpr int64_t kGroupRow = -1;

struct FormatInfo {
  Format format = Format::f32;
  std::string_view name;
  std::array<std::string_view, 4> aliases{};  // other accepted names; empty = unused
  int bits_per_code = 0;
  int64_t group = 0;         // elements that share a scale; 0 = no scale; kGroupRow
  int64_t dim_multiple = 1;  // head_dim must be a multiple of it
  int scale_bits = 0;        // bits of one group's scale, in one plane
  int planes = 1;            // 2: base and residual
  // |x| up to this is stored as a finite value; the caller must reject what is beyond.
  float range_max = 0.0f;
  std::string_view scale_format;
  std::string_view rounding;
  std::string_view byte_map;

  // Stored bits per element, without page summaries.
  constexpr double bits_per_element(int64_t head_dim) const {
    const double codes = bits_per_code;
    const int64_t shared = group == kGroupRow ? head_dim : group;
    const double scales = shared > 0 ? static_cast<double>(scale_bits) / shared : 0.0;
    return planes * (codes + scales);
  }
};

// A dynamic FP32 scale leaves the exponent range of FP32 itself; one bit of headroom keeps the
// rounding of scale and product finite.
inline constexpr float kScaledRangeMax = 0x1p127f;

// In the order of enum Format.
inline constexpr std::array<FormatInfo, 8> kFormats = {{
    {.format = Format::f32,
     .name = "f32",
     .aliases = {"fp32", "float32"},
     .bits_per_code = 32,
     .range_max = 0x1.fffffep127f,
     .scale_format = "none",
     .rounding = "exact",
     .byte_map = "row: D x FP32"},
    {.format = Format::bf16,
     .name = "bf16",
     .aliases = {"bfloat16"},
     .bits_per_code = 16,
     .range_max = 0x1.fep127f,
     .scale_format = "none",
     .rounding = "nearest even",
     .byte_map = "row: D x BF16"},
    {.format = Format::fp16,
     .name = "fp16",
     .aliases = {"f16", "float16"},
     .bits_per_code = 16,
     .range_max = 65504.0f,
     .scale_format = "none",
     .rounding = "nearest even",
     .byte_map = "row: D x FP16"},
    {.format = Format::fp8_e4m3,
     .name = "fp8_e4m3",
     .aliases = {"fp8", "e4m3"},
     .bits_per_code = 8,
     .group = kGroupRow,
     .scale_bits = 32,
     .range_max = kScaledRangeMax,
     .scale_format = "FP32 per token and head: amax / 448",
     .rounding = "nearest even of x / scale, saturating",
     .byte_map = "row: 4 bytes FP32 scale, D x E4M3"},
    {.format = Format::q8_0,
     .name = "q8_0",
     .aliases = {"int8"},
     .bits_per_code = 8,
     .group = 32,
     .dim_multiple = 32,
     .scale_bits = 16,
     .range_max = 127.0f * 65504.0f,
     .scale_format = "FP16 per block: amax / 127",
     .rounding = "ggml: roundf(x * (1 / d)), half away from zero",
     .byte_map = "block of 32: 2 bytes FP16 d, 32 x int8"},
    {.format = Format::q4_0,
     .name = "q4_0",
     .aliases = {"int4"},
     .bits_per_code = 4,
     .group = 32,
     .dim_multiple = 32,
     .scale_bits = 16,
     .range_max = 8.0f * 65504.0f,
     .scale_format = "FP16 per block: signed amax / -8",
     .rounding = "ggml: min(15, trunc(x * (1 / d) + 8.5))",
     .byte_map = "block of 32: 2 bytes FP16 d, 16 bytes: element i low, i + 16 high nibble"},
    {.format = Format::nvfp4,
     .name = "nvfp4",
     .bits_per_code = 4,
     .group = 16,
     .dim_multiple = 16,
     .scale_bits = 8,
     .range_max = kScaledRangeMax,
     .scale_format = "E4M3 per 16 elements x FP32 per page",
     .rounding = "nearest even, scale by search (amax / 6, amax / 4)",
     .byte_map = "plane: 64 x D/2 bytes (element 2i low nibble), 64 x D/16 E4M3"},
    {.format = Format::nvfp4x2,
     .name = "nvfp4x2",
     .bits_per_code = 4,
     .group = 16,
     .dim_multiple = 16,
     .scale_bits = 8,
     .planes = 2,
     .range_max = kScaledRangeMax,
     .scale_format = "E4M3 per 16 elements x FP32 per page, in each plane",
     .rounding = "as nvfp4; the second plane holds x - decode(first)",
     .byte_map = "two nvfp4 planes: base, residual"},
}};

constexpr const FormatInfo& format_info(Format format) {
  return kFormats[static_cast<size_t>(format)];
}

}  // namespace thriftattn
