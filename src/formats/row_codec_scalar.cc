// The scalar truth of the plain formats: straight loops that read like docs/formats.md.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/float_convert.h"
#include "formats/format_info.h"
#include "formats/row_codec.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

void store_u16(uint8_t* out, uint16_t value) { std::memcpy(out, &value, sizeof(value)); }

uint16_t load_u16(const uint8_t* in) {
  uint16_t value;
  std::memcpy(&value, in, sizeof(value));
  return value;
}

float amax_of(const float* x, int64_t n) {
  float amax = 0.0f;
  for (int64_t i = 0; i < n; ++i) amax = std::max(amax, std::fabs(x[i]));
  return amax;
}

void encode_fp8(const float* x, int64_t dim, uint8_t* out) {
  const float scale = usable_scale(amax_of(x, dim) / kE4m3Max);
  std::memcpy(out, &scale, sizeof(scale));
  for (int64_t i = 0; i < dim; ++i) out[4 + i] = f32_to_e4m3(x[i] / scale);
}

void encode_q8_0(const float* x, uint8_t* out) {
  const float d = amax_of(x, kGgmlBlock) / 127.0f;
  const float inverse = ggml_inverse(d);
  store_u16(out, f32_to_fp16(d));
  for (int64_t i = 0; i < kGgmlBlock; ++i) {
    out[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::round(x[i] * inverse)));
  }
}

void encode_q4_0(const float* x, uint8_t* out) {
  float amax = 0.0f;
  float signed_max = 0.0f;
  for (int64_t i = 0; i < kGgmlBlock; ++i) {
    if (amax < std::fabs(x[i])) {  // the first of equal magnitudes gives the sign
      amax = std::fabs(x[i]);
      signed_max = x[i];
    }
  }
  const float d = signed_max / -8.0f;
  const float inverse = ggml_inverse(d);
  store_u16(out, f32_to_fp16(d));
  const auto quantize = [&](float v) {
    const float scaled = v * inverse;
    return std::min(15, static_cast<int>(scaled + 8.5f));
  };
  for (int64_t i = 0; i < kGgmlBlock / 2; ++i) {
    out[2 + i] = static_cast<uint8_t>(quantize(x[i]) | quantize(x[i + kGgmlBlock / 2]) << 4);
  }
}

void encode_row(Format format, const float* x, int64_t dim, uint8_t* out) {
  switch (format) {
    case Format::f32:
      std::memcpy(out, x, static_cast<size_t>(dim) * sizeof(float));
      return;
    case Format::bf16:
      for (int64_t i = 0; i < dim; ++i) store_u16(out + 2 * i, f32_to_bf16(x[i]));
      return;
    case Format::fp16:
      for (int64_t i = 0; i < dim; ++i) store_u16(out + 2 * i, f32_to_fp16(x[i]));
      return;
    case Format::fp8_e4m3:
      encode_fp8(x, dim, out);
      return;
    case Format::q8_0:
      for (int64_t b = 0; b < dim / kGgmlBlock; ++b) {
        encode_q8_0(x + b * kGgmlBlock, out + b * kQ8BlockBytes);
      }
      return;
    case Format::q4_0:
      for (int64_t b = 0; b < dim / kGgmlBlock; ++b) {
        encode_q4_0(x + b * kGgmlBlock, out + b * kQ4BlockBytes);
      }
      return;
    case Format::nvfp4:
    case Format::nvfp4x2:
      return;  // row_bytes() has thrown
  }
}

void decode_row(Format format, const uint8_t* in, int64_t dim, float* out) {
  switch (format) {
    case Format::f32:
      std::memcpy(out, in, static_cast<size_t>(dim) * sizeof(float));
      return;
    case Format::bf16:
      for (int64_t i = 0; i < dim; ++i) out[i] = bf16_to_f32(load_u16(in + 2 * i));
      return;
    case Format::fp16:
      for (int64_t i = 0; i < dim; ++i) out[i] = fp16_to_f32(load_u16(in + 2 * i));
      return;
    case Format::fp8_e4m3: {
      float scale;
      std::memcpy(&scale, in, sizeof(scale));
      for (int64_t i = 0; i < dim; ++i) out[i] = e4m3_to_f32(in[4 + i]) * scale;
      return;
    }
    case Format::q8_0:
      for (int64_t i = 0; i < dim; ++i) {
        const uint8_t* block = in + i / kGgmlBlock * kQ8BlockBytes;
        const int8_t code = static_cast<int8_t>(block[2 + i % kGgmlBlock]);
        out[i] = static_cast<float>(code) * fp16_to_f32(load_u16(block));
      }
      return;
    case Format::q4_0:
      for (int64_t i = 0; i < dim; ++i) {
        const uint8_t* block = in + i / kGgmlBlock * kQ4BlockBytes;
        const int64_t j = i % kGgmlBlock;
        const int code = j < 16 ? block[2 + j] & 15 : block[2 + j - 16] >> 4;
        out[i] = static_cast<float>(code - 8) * fp16_to_f32(load_u16(block));
      }
      return;
    case Format::nvfp4:
    case Format::nvfp4x2:
      return;
  }
}

}  // namespace

int64_t row_bytes(Format format, int64_t dim) {
  const FormatInfo& info = format_info(format);
  if (is_layered(format)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} is encoded by page, not by row; use nvfp4_encode_page", info.name));
  }
  if (dim <= 0 || dim % info.dim_multiple != 0) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} needs a head_dim that is a multiple of {}, got {}; use another "
                            "format for this model",
                            info.name, info.dim_multiple, dim));
  }
  const int64_t groups = info.group == 0 ? 0 : info.group == kGroupRow ? 1 : dim / info.group;
  return (dim * info.bits_per_code + groups * info.scale_bits) / 8;
}

void encode_rows_scalar(Format format, const float* x, int64_t rows, int64_t dim, int64_t x_stride,
                        uint8_t* out, int64_t out_stride) {
  row_bytes(format, dim);  // throws for what has no rows
  for (int64_t r = 0; r < rows; ++r)
    encode_row(format, x + r * x_stride, dim, out + r * out_stride);
}

void decode_rows_scalar(Format format, const uint8_t* in, int64_t in_stride, int64_t rows,
                        int64_t dim, float* out, int64_t out_stride) {
  row_bytes(format, dim);
  for (int64_t r = 0; r < rows; ++r) {
    decode_row(format, in + r * in_stride, dim, out + r * out_stride);
  }
}

}  // namespace thriftattn
