// Plain formats: golden bytes, ggml's own loops, error bounds on both sides, and every SIMD
// target byte-equal to the scalar truth.
#include "formats/row_codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/float_convert.h"
#include "formats/format_info.h"
#include "test_util.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using test::for_each_target;
using Bytes = std::vector<uint8_t>;

constexpr Format kPlain[] = {Format::f32,      Format::bf16,     Format::fp16,
                             Format::fp8_e4m3, Format::fp8_e5m2, Format::fp6_e3m2,
                             Format::fp6_e2m3, Format::q8_0,     Format::q4_0};

bool has_row_scale(Format f) { return format_info(f).group == kGroupRow; }

Bytes encode_scalar(Format f, const std::vector<float>& x) {
  Bytes out(static_cast<size_t>(row_bytes(f, static_cast<int64_t>(x.size()))));
  const int64_t dim = static_cast<int64_t>(x.size());
  encode_rows_scalar(f, x.data(), 1, dim, dim, out.data(), static_cast<int64_t>(out.size()));
  return out;
}

std::vector<float> decode_scalar(Format f, const Bytes& in, int64_t dim) {
  std::vector<float> out(static_cast<size_t>(dim));
  decode_rows_scalar(f, in.data(), 0, 1, dim, out.data(), 0);
  return out;
}

TEST(RowCodec, RowBytes) {
  EXPECT_EQ(row_bytes(Format::f32, 128), 512);
  EXPECT_EQ(row_bytes(Format::bf16, 128), 256);
  EXPECT_EQ(row_bytes(Format::fp16, 80), 160);
  EXPECT_EQ(row_bytes(Format::fp8_e4m3, 128), 132);
  EXPECT_EQ(row_bytes(Format::fp8_e5m2, 128), 132);
  EXPECT_EQ(row_bytes(Format::fp6_e3m2, 128), 100);
  EXPECT_EQ(row_bytes(Format::fp6_e2m3, 80), 64);
  EXPECT_EQ(row_bytes(Format::q8_0, 128), 136);
  EXPECT_EQ(row_bytes(Format::q4_0, 128), 72);
  EXPECT_THROW(row_bytes(Format::q8_0, 80), Error);
  EXPECT_THROW(row_bytes(Format::q4_0, 16), Error);
  EXPECT_THROW(row_bytes(Format::bf16, 0), Error);
  EXPECT_THROW(row_bytes(Format::nvfp4, 128), Error);
  EXPECT_THROW(row_bytes(Format::nvfp4x2, 128), Error);
  EXPECT_THROW(row_bytes(Format::mxfp4, 128), Error);
  EXPECT_THROW(row_bytes(Format::int3, 128), Error);
  EXPECT_THROW(row_bytes(Format::fp6_e3m2, 6), Error);
  try {
    row_bytes(Format::q8_0, 80);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::invalid_argument);
    EXPECT_NE(std::string(e.what()).find("multiple of 32, got 80"), std::string::npos);
  }
}

TEST(RowCodec, GoldenFp8) {
  // amax 896 = 2 * 448: scale 2.0, then one E4M3 a byte.
  const Bytes got = encode_scalar(Format::fp8_e4m3, {896.0f, 2.0f, -1.0f, 0.0f, 2.125f, -896.0f});
  EXPECT_EQ(got, (Bytes{0x00, 0x00, 0x00, 0x40, 0x7e, 0x38, 0xb0, 0x00, 0x38, 0xfe}));
}

// amax is twice the largest code: scale 2.0. FP6 has code i from bit 6 i of 24.
TEST(RowCodec, GoldenE5m2AndFp6) {
  EXPECT_EQ(encode_scalar(Format::fp8_e5m2, {114688.0f, 2.0f, -1.0f, 0.0f, 2.25f}),
            (Bytes{0x00, 0x00, 0x00, 0x40, 0x7b, 0x3c, 0xb8, 0x00, 0x3c}));
  // 0x1f, 0x0c, 0x28, 0x20 -> 0x1f | 0x0c << 6 | 0x28 << 12 | 0x20 << 18 = 0x82831f
  EXPECT_EQ(encode_scalar(Format::fp6_e3m2, {56.0f, 2.0f, -1.0f, -0.0f, -56.0f, 0, 0, 0}),
            (Bytes{0x00, 0x00, 0x00, 0x40, 0x1f, 0x83, 0x82, 0x3f, 0x00, 0x00}));
  // 0x1f, 0x08, 0x24, 0x01 -> 0x06421f
  EXPECT_EQ(encode_scalar(Format::fp6_e2m3, {15.0f, 2.0f, -1.0f, 0.25f}),
            (Bytes{0x00, 0x00, 0x00, 0x40, 0x1f, 0x42, 0x06}));
}

TEST(RowCodec, ZeroAndSubnormalRowsHaveScaleOne) {
  for (const float v : {0.0f, -0.0f, 1e-40f, 5e-38f}) {
    for (const Format f : kPlain) {
      if (!has_row_scale(f)) continue;
      const Bytes got = encode_scalar(f, {v, v, v, v});
      EXPECT_EQ(Bytes(got.begin(), got.begin() + 4), (Bytes{0x00, 0x00, 0x80, 0x3f}));
      for (const float y : decode_scalar(f, got, 4)) EXPECT_EQ(y, 0.0f);
    }
  }
  // The smallest row that keeps a scale of its own.
  const Bytes got = encode_scalar(Format::fp8_e4m3, {448 * 0x1p-126f});
  EXPECT_EQ(got, (Bytes{0x00, 0x00, 0x80, 0x00, 0x7e}));
}

TEST(RowCodec, GoldenQ8_0) {
  std::vector<float> x(32, 0.0f);
  x[0] = 127.0f;
  x[1] = -127.0f;
  x[2] = 0.5f;  // roundf: half away from zero
  x[3] = -0.5f;
  x[4] = 2.5f;
  x[5] = -2.5f;
  x[6] = 0.49999997f;
  x[31] = -1.0f;
  Bytes want(34, 0);
  const uint8_t head[] = {0x00, 0x3c, 0x7f, 0x81, 0x01, 0xff, 0x03, 0xfd, 0x00};
  std::memcpy(want.data(), head, sizeof(head));
  want[33] = 0xff;
  EXPECT_EQ(encode_scalar(Format::q8_0, x), want);
}

TEST(RowCodec, GoldenQ4_0) {
  std::vector<float> x(32, 0.0f);
  x[0] = -8.0f;  // signed amax: d = 1
  x[1] = 7.0f;
  x[2] = 7.75f;  // 16.25 -> 15
  x[3] = 0.5f;   // 9.0 -> 9
  x[4] = -0.5f;  // 8.0 -> 8
  x[5] = -7.5f;  // 1.0 -> 1
  x[16] = 1.0f;
  x[17] = -2.0f;
  x[31] = 3.0f;
  Bytes want(18, 0x88);
  const uint8_t head[] = {0x00, 0x3c, 0x90, 0x6f, 0x8f, 0x89, 0x88, 0x81};
  std::memcpy(want.data(), head, sizeof(head));
  want[17] = 0xb8;
  EXPECT_EQ(encode_scalar(Format::q4_0, x), want);
  // A positive extreme: d = -1, and the extreme itself takes code 0.
  std::vector<float> y(32, 0.0f);
  y[3] = 8.0f;
  y[4] = -8.0f;  // the first of equal magnitudes decides: +8 / -1 = -8 -> 0, -8 / -1 -> 15
  const Bytes got = encode_scalar(Format::q4_0, y);
  EXPECT_EQ(got[0], 0x00);
  EXPECT_EQ(got[1], 0xbc);
  EXPECT_EQ(got[2 + 3], 0x80);
  EXPECT_EQ(got[2 + 4], 0x8f);
}

// ggml's quantize_row_q8_0_ref and quantize_row_q4_0_ref, as written there.
void ggml_q8_0(const float* x, uint8_t* out) {
  float amax = 0.0f;
  for (int j = 0; j < 32; j++) amax = std::max(amax, std::fabs(x[j]));
  const float d = amax / ((1 << 7) - 1);
  const float id = d ? 1.0f / d : 0.0f;
  const uint16_t h = f32_to_fp16(d);
  std::memcpy(out, &h, 2);
  for (int j = 0; j < 32; ++j) {
    const float x0 = x[j] * id;
    out[2 + j] = static_cast<uint8_t>(static_cast<int8_t>(roundf(x0)));
  }
}

void ggml_q4_0(const float* x, uint8_t* out) {
  float amax = 0.0f;
  float max = 0.0f;
  for (int j = 0; j < 32; j++) {
    const float v = x[j];
    if (amax < fabsf(v)) {
      amax = fabsf(v);
      max = v;
    }
  }
  const float d = max / -8;
  const float id = d ? 1.0f / d : 0.0f;
  const uint16_t h = f32_to_fp16(d);
  std::memcpy(out, &h, 2);
  for (int j = 0; j < 16; ++j) {
    const float x0 = x[0 + j] * id;
    const float x1 = x[16 + j] * id;
    const uint8_t xi0 = std::min<int8_t>(15, static_cast<int8_t>(x0 + 8.5f));
    const uint8_t xi1 = std::min<int8_t>(15, static_cast<int8_t>(x1 + 8.5f));
    out[2 + j] = xi0;
    out[2 + j] |= static_cast<uint8_t>(xi1 << 4);
  }
}

TEST(RowCodec, GgmlLoopsGiveTheSameBytes) {
  for (const test::Data& data : test::hostile_data(32 * 64, 7)) {
    if (data.name == "subnormal" || data.name == "bits") continue;  // undefined casts in ggml
    Bytes want8(34 * 64), want4(18 * 64);
    for (int b = 0; b < 64; ++b) {
      ggml_q8_0(&data.x[b * 32], &want8[b * 34]);
      ggml_q4_0(&data.x[b * 32], &want4[b * 18]);
    }
    EXPECT_EQ(encode_scalar(Format::q8_0, data.x), want8) << data.name;
    EXPECT_EQ(encode_scalar(Format::q4_0, data.x), want4) << data.name;
  }
}

TEST(RowCodec, GgmlSubnormalBlocksDecodeToZero) {
  std::vector<float> x(32, 1e-40f);
  x[3] = -1.3e-40f;
  for (const Format f : {Format::q8_0, Format::q4_0}) {
    for (const float v : decode_scalar(f, encode_scalar(f, x), 32)) EXPECT_EQ(v, 0.0f);
  }
}

// Relative RMS error on a unit Gaussian, dim 128. Both sides: "too good" means that the test or
// the format is not what it says.
TEST(RowCodec, ErrorBoundsOnGaussian) {
  struct Bound {
    Format format;
    double low, high;
  };
  const Bound bounds[] = {{Format::f32, 0.0, 0.0},
                          {Format::bf16, 0.00163, 0.00170},
                          {Format::fp16, 0.000204, 0.000213},
                          {Format::fp8_e4m3, 0.0254, 0.0262},
                          {Format::fp8_e5m2, 0.0508, 0.0524},
                          {Format::fp6_e3m2, 0.0508, 0.0540},
                          {Format::fp6_e2m3, 0.0250, 0.0340},
                          {Format::q8_0, 0.00530, 0.00546},
                          {Format::q4_0, 0.0850, 0.0874}};
  const int64_t rows = 512, dim = 128;
  const std::vector<float> x = test::gaussian(rows * dim, 11);
  for (const Bound& b : bounds) {
    const int64_t bytes = row_bytes(b.format, dim);
    Bytes code(static_cast<size_t>(rows * bytes));
    std::vector<float> y(x.size());
    encode_rows(b.format, x.data(), rows, dim, dim, code.data(), bytes);
    decode_rows(b.format, code.data(), bytes, rows, dim, y.data(), dim);
    const double error = test::relative_rms(x, y);
    EXPECT_GE(error, b.low) << format_info(b.format).name;
    EXPECT_LE(error, b.high) << format_info(b.format).name;
  }
}

// Strided, unaligned rows with guard bytes between them.
TEST(RowCodec, SimdEncodesTheSameBytes) {
  const int64_t rows = 5;
  for (const int64_t dim : {1, 7, 32, 64, 80, 96, 128, 192, 256}) {
    const int64_t x_stride = dim + 3;
    for (const test::Data& data : test::hostile_data(rows * x_stride + 1, 100)) {
      for (const Format f : kPlain) {
        if (dim % format_info(f).dim_multiple != 0) continue;
        const int64_t out_stride = row_bytes(f, dim) + 5;
        const size_t size = static_cast<size_t>(rows * out_stride + 1);
        Bytes want(size, 0xa5);
        encode_rows_scalar(f, data.x.data() + 1, rows, dim, x_stride, want.data() + 1, out_stride);
        for_each_target([&] {
          Bytes got(size, 0xa5);
          encode_rows(f, data.x.data() + 1, rows, dim, x_stride, got.data() + 1, out_stride);
          EXPECT_EQ(got, want) << format_info(f).name << " " << data.name << " dim " << dim;
        });
      }
    }
  }
}

TEST(RowCodec, SimdDecodesTheSameBits) {
  const int64_t rows = 4;
  std::mt19937 rng(5);
  for (const int64_t dim : {1, 7, 32, 64, 80, 96, 128, 192, 256}) {
    for (const Format f : kPlain) {
      if (f == Format::f32 || dim % format_info(f).dim_multiple != 0) continue;
      const int64_t in_stride = row_bytes(f, dim) + 3;
      const int64_t out_stride = dim + 2;
      Bytes in(static_cast<size_t>(rows * in_stride + 1));
      for (uint8_t& b : in) b = static_cast<uint8_t>(rng());
      for (int64_t r = 0; r < rows && has_row_scale(f); ++r) {  // scales are never NaN
        const float scale = 0.37f * static_cast<float>(r + 1);
        std::memcpy(&in[static_cast<size_t>(1 + r * in_stride)], &scale, sizeof(scale));
      }
      std::vector<float> want(static_cast<size_t>(rows * out_stride), -7.0f);
      decode_rows_scalar(f, in.data() + 1, in_stride, rows, dim, want.data(), out_stride);
      for (float& v : want) {
        if (std::isnan(v)) v = 12345.0f;  // NaN x scale: which NaN is the machine's choice
      }
      for_each_target([&] {
        std::vector<float> got(want.size(), -7.0f);
        decode_rows(f, in.data() + 1, in_stride, rows, dim, got.data(), out_stride);
        for (float& v : got) {
          if (std::isnan(v)) v = 12345.0f;
        }
        EXPECT_TRUE(test::same_bits(got, want)) << format_info(f).name << " dim " << dim;
      });
    }
  }
}

// Every code of the element-wise formats, through the SIMD decoders.
TEST(RowCodec, SimdDecodesEveryCode) {
  Bytes codes(2 * 65536);
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t h = static_cast<uint16_t>(i);
    std::memcpy(&codes[2 * i], &h, 2);
  }
  Bytes fp8(4 + 256);
  const float one = 1.0f;
  std::memcpy(fp8.data(), &one, 4);
  for (int i = 0; i < 256; ++i) fp8[4 + i] = static_cast<uint8_t>(i);
  for_each_target([&] {
    std::vector<float> got(65536), want(65536);
    decode_rows(Format::fp16, codes.data(), 0, 1, 65536, got.data(), 0);
    for (uint32_t i = 0; i < 65536; ++i) want[i] = fp16_to_f32(static_cast<uint16_t>(i));
    EXPECT_TRUE(test::same_bits(got, want));
    decode_rows(Format::bf16, codes.data(), 0, 1, 65536, got.data(), 0);
    for (uint32_t i = 0; i < 65536; ++i) want[i] = bf16_to_f32(static_cast<uint16_t>(i));
    EXPECT_TRUE(test::same_bits(got, want));
    got.resize(256);
    want.resize(256);
    decode_rows(Format::fp8_e4m3, fp8.data(), 0, 1, 256, got.data(), 0);
    for (uint32_t i = 0; i < 256; ++i) want[i] = e4m3_to_f32(static_cast<uint8_t>(i));
    EXPECT_TRUE(test::same_bits(got, want));
    decode_rows(Format::fp8_e5m2, fp8.data(), 0, 1, 256, got.data(), 0);
    for (uint32_t i = 0; i < 256; ++i) want[i] = E5m2::decode(i);
    EXPECT_TRUE(test::same_bits(got, want));
    for (const Format f : {Format::fp6_e3m2, Format::fp6_e2m3}) {
      Bytes fp6(4 + 48);  // every code of 6 bits, in order
      std::memcpy(fp6.data(), &one, 4);
      for (size_t bit = 0; bit < 384; ++bit) {
        if (bit / 6 >> bit % 6 & 1) fp6[4 + bit / 8] |= static_cast<uint8_t>(1u << bit % 8);
      }
      got.resize(64);
      want.resize(64);
      decode_rows(f, fp6.data(), 0, 1, 64, got.data(), 0);
      for (uint32_t i = 0; i < 64; ++i) {
        want[i] = f == Format::fp6_e3m2 ? E3m2::decode(i) : E2m3::decode(i);
      }
      EXPECT_TRUE(test::same_bits(got, want));
    }
  });
}

// Every FP16 and E4M3 midpoint and its neighbours, through the SIMD encoders.
TEST(RowCodec, SimdRoundsEveryTie) {
  std::vector<float> x;
  for (uint32_t c = 0; c < 0x7bff; ++c) {
    const float middle =
        (fp16_to_f32(static_cast<uint16_t>(c)) + fp16_to_f32(static_cast<uint16_t>(c + 1))) / 2;
    for (const float v : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)}) {
      x.push_back(v);
      x.push_back(-v);
    }
  }
  const std::vector<float> special = {65504.0f, 65519.0f, 65520.0f, 65535.0f,
                                      65536.0f, 1e30f,    0.0f,     -0.0f};
  x.insert(x.end(), special.begin(), special.end());
  std::vector<float> y;  // amax 448, so the row's scale is 1
  for (uint32_t c = 0; c < 0x7e; ++c) {
    const float middle =
        (e4m3_to_f32(static_cast<uint8_t>(c)) + e4m3_to_f32(static_cast<uint8_t>(c + 1))) / 2;
    for (const float v : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)}) {
      y.push_back(v);
      y.push_back(-v);
    }
  }
  y.push_back(448.0f);
  for_each_target([&] {
    Bytes got(2 * x.size());
    encode_rows(Format::fp16, x.data(), 1, static_cast<int64_t>(x.size()), 0, got.data(), 0);
    EXPECT_EQ(got, encode_scalar(Format::fp16, x));
    Bytes fp8(4 + y.size());
    encode_rows(Format::fp8_e4m3, y.data(), 1, static_cast<int64_t>(y.size()), 0, fp8.data(), 0);
    for (size_t i = 0; i < y.size(); ++i) ASSERT_EQ(fp8[4 + i], f32_to_e4m3(y[i])) << y[i];
  });
}

// Every midpoint of a small float, its two neighbours and the values themselves, in rows whose
// scale is 1.
template <class Float>
void check_ties(Format f) {
  std::vector<float> x;
  for (uint32_t c = 0; c < Float::kLast; ++c) {
    const float middle = (Float::decode(c) + Float::decode(c + 1)) / 2;
    for (const float v :
         {Float::decode(c), middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)}) {
      x.push_back(v);
      x.push_back(-v);
    }
  }
  x.resize((x.size() / 4 + 1) * 4, Float::kMax);
  x.back() = -Float::kMax;
  x.push_back(Float::kMax);
  x.resize((x.size() + 3) / 4 * 4, 0.0f);
  for_each_target([&] {
    Bytes got(static_cast<size_t>(row_bytes(f, static_cast<int64_t>(x.size()))));
    encode_rows(f, x.data(), 1, static_cast<int64_t>(x.size()), 0, got.data(), 0);
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t bit = 32 + i * Float::kBits;
      const uint32_t two = got[bit / 8] | (bit / 8 + 1 < got.size() ? got[bit / 8 + 1] << 8 : 0);
      const uint32_t code = two >> bit % 8 & ((1u << Float::kBits) - 1);
      ASSERT_EQ(code, Float::encode(x[i])) << format_info(f).name << " " << x[i];
    }
  });
}

TEST(RowCodec, SimdRoundsEveryTieOfSmallFloats) {
  check_ties<E4m3>(Format::fp8_e4m3);
  check_ties<E5m2>(Format::fp8_e5m2);
  check_ties<E3m2>(Format::fp6_e3m2);
  check_ties<E2m3>(Format::fp6_e2m3);
}

TEST(RowCodec, RangeMaxIsStoredAsFinite) {
  for (const Format f : kPlain) {
    std::vector<float> x(64, format_info(f).range_max);
    for (size_t i = 0; i < x.size(); i += 3) x[i] = -x[i];
    const std::vector<float> y = decode_scalar(f, encode_scalar(f, x), 64);
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT_TRUE(std::isfinite(y[i])) << format_info(f).name;
      EXPECT_NEAR(y[i] / x[i], 1.0f, 0.13f) << format_info(f).name;
    }
  }
}

}  // namespace
}  // namespace thriftattn
