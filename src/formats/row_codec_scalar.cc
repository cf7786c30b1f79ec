// The scalar truth of the plain formats: straight loops that read like docs/formats.md.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/float_convert.h"
#include "formats/bit_pack.h"
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

// FP8: a code a byte. FP6: four codes in a 24-bit word, code i from bit 6 i.
template <class Float>
void encode_small_float(const float* x, int64_t dim, uint8_t* out) {
  const float scale = usable_scale(amax_of(x, dim) / Float::kMax);
  std::memcpy(out, &scale, sizeof(scale));
  if constexpr (Float::kBits == 8) {
    for (int64_t i = 0; i < dim; ++i) out[4 + i] = Float::encode(x[i] / scale);
  } else {
    for (int64_t w = 0; w < dim / 4; ++w) {
      uint32_t word = 0;
      for (int64_t i = 0; i < 4; ++i) {
        word |= uint32_t{Float::encode(x[4 * w + i] / scale)} << 6 * i;
      }
      store_u24(word, out + 4 + 3 * w);
    }
  }
}

template <class Float>
void decode_small_float(const uint8_t* in, int64_t dim, float* out) {
  float scale;
  std::memcpy(&scale, in, sizeof(scale));
  for (int64_t i = 0; i < dim; ++i) {
    const uint32_t code =
        Float::kBits == 8 ? in[4 + i] : load_u24(in + 4 + i / 4 * 3) >> 6 * (i % 4);
    out[i] = Float::decode(code & ((1u << Float::kBits) - 1)) * scale;
  }
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
      return encode_small_float<E4m3>(x, dim, out);
    case Format::fp8_e5m2:
      return encode_small_float<E5m2>(x, dim, out);
    case Format::fp6_e3m2:
      return encode_small_float<E3m2>(x, dim, out);
    case Format::fp6_e2m3:
      return encode_small_float<E2m3>(x, dim, out);
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
    case Format::mxfp4:
    case Format::int3:
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
    case Format::fp8_e4m3:
      return decode_small_float<E4m3>(in, dim, out);
    case Format::fp8_e5m2:
      return decode_small_float<E5m2>(in, dim, out);
    case Format::fp6_e3m2:
      return decode_small_float<E3m2>(in, dim, out);
    case Format::fp6_e2m3:
      return decode_small_float<E2m3>(in, dim, out);
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
    case Format::mxfp4:
    case Format::int3:
      return;
  }
}

}  // namespace

int64_t row_bytes(Format format, int64_t dim) {
  const FormatInfo& info = format_info(format);
  if (is_layered(format)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} is encoded by page, not by row; use encode_plane", info.name));
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
