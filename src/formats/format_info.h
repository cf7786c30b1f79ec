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
inline constexpr int kPageFormatVersion = 2;

// FormatInfo::group of a format with one scale for a whole row (a token and head).
inline constexpr int64_t kGroupRow = -1;

struct FormatInfo {
  Format format = Format::f32;
  std::string_view name;
  std::array<std::string_view, 4> aliases{};  // other accepted names; empty = unused
  std::string_view words;                     // what explain() and `thriftattn formats` call it
  int bits_per_code = 0;
  int64_t group = 0;         // elements that share a scale; 0 = no scale; kGroupRow
  int64_t dim_multiple = 1;  // head_dim must be a multiple of it
  int scale_bits = 0;        // bits of one group's scale, in one plane
  int planes = 1;            // 2: base and residual
  bool rotate_v = false;     // with `rotate`, V is rotated too, not K alone
  // Largest and smallest magnitude above zero that a code stands for, before its scale.
  float code_max = 0.0f, code_min = 0.0f;
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
inline constexpr std::array<FormatInfo, 13> kFormats = {{
    {.format = Format::f32,
     .name = "f32",
     .aliases = {"fp32", "float32"},
     .words = "FP32",
     .bits_per_code = 32,
     .code_max = 0x1.fffffep127f,
     .code_min = 0x1p-149f,
     .range_max = 0x1.fffffep127f,
     .scale_format = "none",
     .rounding = "exact",
     .byte_map = "row: D x FP32"},
    {.format = Format::bf16,
     .name = "bf16",
     .aliases = {"bfloat16"},
     .words = "BF16",
     .bits_per_code = 16,
     .code_max = 0x1.fep127f,
     .code_min = 0x1p-133f,
     .range_max = 0x1.fep127f,
     .scale_format = "none",
     .rounding = "nearest even",
     .byte_map = "row: D x BF16"},
    {.format = Format::fp16,
     .name = "fp16",
     .aliases = {"f16", "float16"},
     .words = "FP16",
     .bits_per_code = 16,
     .code_max = 65504.0f,
     .code_min = 0x1p-24f,
     .range_max = 65504.0f,
     .scale_format = "none",
     .rounding = "nearest even",
     .byte_map = "row: D x FP16"},
    {.format = Format::fp8_e4m3,
     .name = "fp8_e4m3",
     .aliases = {"fp8", "e4m3"},
     .words = "FP8 E4M3 with one FP32 scale per token and head",
     .bits_per_code = 8,
     .group = kGroupRow,
     .scale_bits = 32,
     .code_max = 448.0f,
     .code_min = 0x1p-9f,
     .range_max = kScaledRangeMax,
     .scale_format = "FP32 per token and head: amax / 448",
     .rounding = "nearest even of x / scale, saturating",
     .byte_map = "row: 4 bytes FP32 scale, D x E4M3"},
    {.format = Format::fp8_e5m2,
     .name = "fp8_e5m2",
     .aliases = {"e5m2"},
     .words = "FP8 E5M2 with one FP32 scale per token and head",
     .bits_per_code = 8,
     .group = kGroupRow,
     .scale_bits = 32,
     .code_max = 57344.0f,
     .code_min = 0x1p-16f,
     .range_max = kScaledRangeMax,
     .scale_format = "FP32 per token and head: amax / 57344",
     .rounding = "nearest even of x / scale, saturating",
     .byte_map = "row: 4 bytes FP32 scale, D x E5M2"},
    {.format = Format::fp6_e3m2,
     .name = "fp6_e3m2",
     .aliases = {"e3m2"},
     .words = "FP6 E3M2 with one FP32 scale per token and head",
     .bits_per_code = 6,
     .group = kGroupRow,
     .dim_multiple = 4,
     .scale_bits = 32,
     .code_max = 28.0f,
     .code_min = 0x1p-4f,
     .range_max = kScaledRangeMax,
     .scale_format = "FP32 per token and head: amax / 28",
     .rounding = "nearest even of x / scale, saturating",
     .byte_map = "row: 4 bytes FP32 scale, D/4 x 3 bytes: 24 bits, code i from bit 6 i"},
    {.format = Format::fp6_e2m3,
     .name = "fp6_e2m3",
     .aliases = {"e2m3"},
     .words = "FP6 E2M3 with one FP32 scale per token and head",
     .bits_per_code = 6,
     .group = kGroupRow,
     .dim_multiple = 4,
     .scale_bits = 32,
     .code_max = 7.5f,
     .code_min = 0x1p-3f,
     .range_max = kScaledRangeMax,
     .scale_format = "FP32 per token and head: amax / 7.5",
     .rounding = "nearest even of x / scale, saturating",
     .byte_map = "row: 4 bytes FP32 scale, D/4 x 3 bytes: 24 bits, code i from bit 6 i"},
    {.format = Format::q8_0,
     .name = "q8_0",
     .aliases = {"int8"},
     .words = "Q8_0 (ggml's block of 32)",
     .bits_per_code = 8,
     .group = 32,
     .dim_multiple = 32,
     .scale_bits = 16,
     .code_max = 127.0f,
     .code_min = 1.0f,
     .range_max = 127.0f * 65504.0f,
     .scale_format = "FP16 per block: amax / 127",
     .rounding = "ggml: roundf(x * (1 / d)), half away from zero",
     .byte_map = "block of 32: 2 bytes FP16 d, 32 x int8"},
    {.format = Format::q4_0,
     .name = "q4_0",
     .aliases = {"int4"},
     .words = "Q4_0 (ggml's block of 32)",
     .bits_per_code = 4,
     .group = 32,
     .dim_multiple = 32,
     .scale_bits = 16,
     .code_max = 8.0f,
     .code_min = 1.0f,
     .range_max = 8.0f * 65504.0f,
     .scale_format = "FP16 per block: signed amax / -8",
     .rounding = "ggml: min(15, trunc(x * (1 / d) + 8.5))",
     .byte_map = "block of 32: 2 bytes FP16 d, 16 bytes: element i low, i + 16 high nibble"},
    {.format = Format::nvfp4,
     .name = "nvfp4",
     .words = "NVFP4",
     .bits_per_code = 4,
     .group = 16,
     .dim_multiple = 16,
     .scale_bits = 8,
     .code_max = 6.0f,
     .code_min = 0.5f,
     .range_max = kScaledRangeMax,
     .scale_format = "E4M3 per 16 elements x FP32 per page",
     .rounding = "nearest even, scale by search (amax / 6, amax / 4)",
     .byte_map = "plane: 64 x D/2 bytes (element 2i low nibble), 64 x D/16 E4M3"},
    {.format = Format::nvfp4x2,
     .name = "nvfp4x2",
     .words = "NVFP4 base and residual, both always read (9 bits)",
     .bits_per_code = 4,
     .group = 16,
     .dim_multiple = 16,
     .scale_bits = 8,
     .planes = 2,
     .code_max = 6.0f,
     .code_min = 0.5f,
     .range_max = kScaledRangeMax,
     .scale_format = "E4M3 per 16 elements x FP32 per page, in each plane",
     .rounding = "as nvfp4; the second plane holds x - decode(first)",
     .byte_map = "two nvfp4 planes: base, residual"},
    {.format = Format::mxfp4,
     .name = "mxfp4",
     .words = "MXFP4",
     .bits_per_code = 4,
     .group = 32,
     .dim_multiple = 32,
     .scale_bits = 8,
     .code_max = 6.0f,
     .code_min = 0.5f,
     .range_max = kScaledRangeMax,
     .scale_format = "E8M0 per 32 elements: 2^(floor(log2 amax) - 2)",
     .rounding = "nearest even, saturating (OCP MX v1.0, section 6.3)",
     .byte_map = "plane: 64 x D/2 bytes (element 2i low nibble), 64 x D/32 E8M0"},
    {.format = Format::int3,
     .name = "int3",
     .words = "INT3",
     .bits_per_code = 3,
     .group = 32,
     .dim_multiple = 32,
     .scale_bits = 8,
     .rotate_v = true,
     .code_max = 3.5f,
     .code_min = 0.5f,
     .range_max = kScaledRangeMax,
     .scale_format = "E4M3 per 32 elements x FP32 per page",
     .rounding = "nearest of +-0.5 .. +-3.5, scale by search (1, .9, .8, .7 of amax / 3.5)",
     .byte_map = "plane: 64 x D/8 x 3 bytes (24 bits, code i from bit 3 i), 64 x D/32 E4M3"},
}};

constexpr const FormatInfo& format_info(Format format) {
  return kFormats[static_cast<size_t>(format)];
}

// The format of a layered page's base plane; its residual plane is NVFP4 whatever the base is.
constexpr Format base_format(Format format) {
  return format == Format::nvfp4x2 ? Format::nvfp4 : format;
}

}  // namespace thriftattn
