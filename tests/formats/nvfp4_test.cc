// NVFP4: golden blocks, the scale search at its edges, error bounds on both sides, and every
// SIMD target byte-equal to the scalar truth.
#include "formats/nvfp4.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "formats/format_info.h"
#include "test_util.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using test::for_each_target;
using Bytes = std::vector<uint8_t>;

struct Page {
  Bytes codes, scales;
  float page_scale = 0.0f;
};

Page make_page(int64_t rows, int64_t dim) {
  return {Bytes(static_cast<size_t>(nvfp4_codes_bytes(dim, rows)), 0xa5),
          Bytes(static_cast<size_t>(nvfp4_scales_bytes(dim, rows)), 0xa5), 0.0f};
}

Page encode_scalar(const std::vector<float>& x, int64_t rows, int64_t dim) {
  Page p = make_page(rows, dim);
  p.page_scale = nvfp4_encode_page_scalar(x.data(), rows, dim, p.codes.data(), p.scales.data());
  return p;
}

Page encode(const std::vector<float>& x, int64_t rows, int64_t dim) {
  Page p = make_page(rows, dim);
  p.page_scale = nvfp4_encode_page(x.data(), rows, dim, p.codes.data(), p.scales.data());
  return p;
}

std::vector<float> decode(const Page& p, int64_t rows, int64_t dim) {
  std::vector<float> y(static_cast<size_t>(rows * dim));
  nvfp4_decode_page(p.codes.data(), p.scales.data(), p.page_scale, rows, dim, y.data());
  return y;
}

TEST(Nvfp4, Sizes) {
  EXPECT_EQ(nvfp4_codes_bytes(128), 4096);
  EXPECT_EQ(nvfp4_scales_bytes(128), 512);
  std::vector<float> x(24);
  Bytes codes(12), scales(2);
  EXPECT_THROW(nvfp4_encode_page(x.data(), 1, 24, codes.data(), scales.data()), Error);
  EXPECT_THROW(nvfp4_decode_page(codes.data(), scales.data(), 1.0f, 1, 8, x.data()), Error);
}

// amax 2688 = 6 * 448: page_scale 1, decode_scale 448 (amax / 4 = 672 is dropped). Every tie and
// both signs of zero; element 2i in the low nibble.
TEST(Nvfp4, GoldenBlock) {
  const std::vector<float> x = {2688.0f, -2688.0f, 224.0f, 0.0f,    -0.0f,   112.0f,
                                336.0f,  560.0f,   784.0f, 1120.0f, 1568.0f, 2240.0f,
                                -112.0f, 1344.0f,  672.0f, 100.0f};
  for_each_target([&] {
    const Page p = encode(x, 1, 16);
    EXPECT_EQ(p.page_scale, 1.0f);
    EXPECT_EQ(p.scales, (Bytes{0x7e}));
    EXPECT_EQ(p.codes, (Bytes{0xf7, 0x01, 0x08, 0x22, 0x44, 0x66, 0x58, 0x03}));
    const std::vector<float> want = {2688.0f, -2688.0f, 224.0f, 0.0f,   -0.0f,   0.0f,
                                     448.0f,  448.0f,   896.0f, 896.0f, 1792.0f, 1792.0f,
                                     -0.0f,   1344.0f,  672.0f, 0.0f};
    EXPECT_TRUE(test::same_bits(decode(p, 1, 16), want));
  });
}

// The second block fits amax / 4 exactly (scale 2.0 = 0x40); with amax / 6 it would not. The
// third fits both exactly: a tie takes amax / 6 (2.0, not 3.0 = 0x44). The fourth is zero.
TEST(Nvfp4, GoldenScaleSearch) {
  std::vector<float> x(64, 0.0f);
  x[0] = 2688.0f;
  const float second[16] = {8, 6, 4, 2, 1, 3, 0, -8, -6, -4, -2, -1, -3, 0, 8, 8};
  for (int i = 0; i < 16; ++i) x[16 + i] = second[i];
  x[32] = 12.0f;
  x[33] = -6.0f;
  x[50] = -0.0f;
  for_each_target([&] {
    const Page p = encode(x, 2, 32);
    EXPECT_EQ(p.page_scale, 1.0f);
    EXPECT_EQ(p.scales, (Bytes{0x7e, 0x40, 0x40, 0x00}));
    Bytes want(32, 0);
    want[0] = 0x07;
    const uint8_t codes2[8] = {0x56, 0x24, 0x31, 0xe0, 0xcd, 0x9a, 0x0b, 0x66};
    for (int i = 0; i < 8; ++i) want[8 + i] = codes2[i];
    want[16] = 0xd7;  // a zero scale has no signs: the -0 at 50 leaves no bit
    EXPECT_EQ(p.codes, want);
  });
}

// amax / 4 is dropped where its scale as rounded would exceed 448, that is beyond 464.
TEST(Nvfp4, ScaleEdge448) {
  for (const float edge : {1856.0f, 1857.0f}) {
    std::vector<float> x(32, 0.0f);
    x[0] = 2688.0f;
    for (int i = 16; i < 32; ++i) x[static_cast<size_t>(i)] = i % 2 == 0 ? 1792.0f : -1344.0f;
    x[16] = edge;  // all others are exact with scale 448
    for_each_target([&] {
      const Page p = encode(x, 1, 32);
      EXPECT_EQ(p.scales, (Bytes{0x7e, uint8_t(edge == 1856.0f ? 0x7e : 0x7a)})) << edge;
    });
  }
}

TEST(Nvfp4, ZeroAndTinyPages) {
  for (const float v : {0.0f, -0.0f, 1e-40f, -2e-35f}) {
    const std::vector<float> x(64 * 64, v);
    const Page p = encode(x, 64, 64);
    EXPECT_EQ(p.page_scale, 1.0f);
    for (const uint8_t s : p.scales) ASSERT_EQ(s, 0);
    for (const uint8_t c : p.codes) ASSERT_EQ(c, 0);
    for (const float y : decode(p, 64, 64)) ASSERT_EQ(y, 0.0f);
  }
  // The smallest page with a page_scale of its own.
  const Page p = encode(std::vector<float>(16, 2688 * 0x1p-126f), 1, 16);
  EXPECT_EQ(p.page_scale, 0x1p-126f);
  EXPECT_EQ(p.codes[0], 0x77);
}

TEST(Nvfp4, RangeMaxIsStoredAsFinite) {
  std::vector<float> x = test::gaussian(64 * 64, 3);
  x[100] = format_info(Format::nvfp4).range_max;
  const std::vector<float> y = decode(encode(x, 64, 64), 64, 64);
  for (const float v : y) ASSERT_TRUE(std::isfinite(v));
  EXPECT_NEAR(y[100] / x[100], 1.0f, 1e-6f);
}

// A scale that rounded down may clip its largest element to 6; in units of the page the loss is
// at most 1/17 of the element for a normal scale.
TEST(Nvfp4, ClippingIsBounded) {
  const std::vector<float> x = test::gaussian(64 * 128, 21);
  const Page p = encode(x, 64, 128);
  const std::vector<float> y = decode(p, 64, 128);
  int clipped = 0;
  for (size_t b = 0; b < p.scales.size(); ++b) {
    const float step = e4m3_to_f32(p.scales[b]) * p.page_scale;
    for (size_t i = b * 16; i < b * 16 + 16; ++i) {
      if (std::fabs(x[i]) > 6.0f * step) {
        ++clipped;
        ASSERT_LE(std::fabs(x[i]), 6.0f * step * (1.0f + 1.0f / 16)) << i;
      }
      ASSERT_LE(std::fabs(x[i] - y[i]), std::max(step, std::fabs(x[i]) / 16)) << i;
    }
  }
  EXPECT_GT(clipped, 130);
  EXPECT_LT(clipped, 250);
}

// Relative RMS on a unit Gaussian, dim 128, both sides, for one plane and for two.
TEST(Nvfp4, ErrorBoundsOnGaussian) {
  const int64_t rows = 64, dim = 128;
  double error1 = 0.0, error2 = 0.0;
  const int pages = 8;
  for (int page = 0; page < pages; ++page) {
    const std::vector<float> x = test::gaussian(rows * dim, 40 + static_cast<uint32_t>(page));
    std::vector<float> y = decode(encode(x, rows, dim), rows, dim);
    error1 += test::relative_rms(x, y) / pages;
    std::vector<float> residual(x.size());
    for (size_t i = 0; i < x.size(); ++i) residual[i] = x[i] - y[i];
    const std::vector<float> z = decode(encode(residual, rows, dim), rows, dim);
    for (size_t i = 0; i < x.size(); ++i) y[i] += z[i];
    error2 += test::relative_rms(x, y) / pages;
  }
  EXPECT_GE(error1, 0.0866);
  EXPECT_LE(error1, 0.0886);
  EXPECT_GE(error2, 0.00735);
  EXPECT_LE(error2, 0.00760);
}

// The search never does worse than either candidate alone (in its own units).
TEST(Nvfp4, SearchTakesTheSmallerError) {
  const std::vector<float> x = test::gaussian(64 * 64, 77);
  const Page p = encode_scalar(x, 64, 64);
  int took4 = 0;
  for (size_t b = 0; b < p.scales.size(); ++b) {
    double amax = 0.0;
    std::vector<double> t(16);
    for (size_t i = 0; i < 16; ++i) {
      t[i] = x[b * 16 + i] / p.page_scale;
      amax = std::max(amax, std::fabs(t[i]));
    }
    const auto error_of = [&](uint8_t scale) {
      double e = 0.0;
      const double s = e4m3_to_f32(scale);
      for (const double v : t) {
        const double d = v - e2m1_to_f32(f32_to_e2m1(static_cast<float>(v / s))) * s;
        e += d * d;
      }
      return e;
    };
    const uint8_t six = f32_to_e4m3(static_cast<float>(amax / 6));
    const uint8_t four = f32_to_e4m3(static_cast<float>(amax / 4));
    const double chosen = error_of(p.scales[b]);
    ASSERT_LE(chosen, error_of(six) * 1.00001);
    if (amax / 4 <= 464) {
      ASSERT_LE(chosen, error_of(four) * 1.00001);
    }
    if (p.scales[b] != six) {
      ++took4;
      ASSERT_EQ(p.scales[b], four);
    }
  }
  EXPECT_GT(took4, 75);  // of 256 blocks
  EXPECT_LT(took4, 125);
}

// Blocks whose two candidates have the same error in exact arithmetic: with scales 2 and 3,
// 1 + x and 1.5 - x swap their errors. So the rounding of the sum decides, that is its order.
TEST(Nvfp4, ErrorIsSummedByAdjacentPairs) {
  const int64_t blocks = 512;
  std::mt19937 rng(17);
  std::vector<float> t(static_cast<size_t>(blocks * 16), 0.0f);
  t[0] = 2688.0f;  // page_scale 1
  for (size_t b = 1; b < blocks; ++b) {
    float* block = &t[b * 16];
    block[0] = 12.0f;  // decode_scale 2 or 3
    for (size_t i = 2; i < 16; i += 2) {
      const float x = static_cast<float>(rng() % 0x40000) * 0x1p-20f;
      block[i] = 1.0f + x;
      block[i + 1] = 1.5f - x;
    }
    std::shuffle(block, block + 16, rng);
  }
  const auto error_of = [](const float* block, float scale) {
    float e[16];
    for (int i = 0; i < 16; ++i) {
      const float diff = block[i] - e2m1_to_f32(f32_to_e2m1(block[i] / scale)) * scale;
      e[i] = diff * diff;
    }
    const float low = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    const float high = ((e[8] + e[9]) + (e[10] + e[11])) + ((e[12] + e[13]) + (e[14] + e[15]));
    return low + high;
  };
  Bytes want = {0x7e};
  int fours = 0;
  for (size_t b = 1; b < blocks; ++b) {
    const bool four = error_of(&t[b * 16], 3.0f) < error_of(&t[b * 16], 2.0f);
    want.push_back(four ? 0x44 : 0x40);
    fours += four;
  }
  EXPECT_GT(fours, 30);  // the order decides often
  EXPECT_LT(fours, 200);
  EXPECT_EQ(encode_scalar(t, blocks, 16).scales, want);
  for_each_target([&] { EXPECT_EQ(encode(t, blocks, 16).scales, want); });
}

TEST(Nvfp4, SimdEncodesTheSameBytes) {
  for (const int64_t dim : {16, 64, 80, 96, 128, 192, 256, 272}) {
    for (const int64_t rows : {1, 3, 64}) {
      for (const test::Data& data : test::hostile_data(rows * dim, 200)) {
        const Page want = encode_scalar(data.x, rows, dim);
        for_each_target([&] {
          const Page got = encode(data.x, rows, dim);
          EXPECT_EQ(got.page_scale, want.page_scale) << data.name;
          EXPECT_EQ(got.scales, want.scales) << data.name << " " << rows << " x " << dim;
          EXPECT_EQ(got.codes, want.codes) << data.name << " " << rows << " x " << dim;
        });
      }
    }
  }
}

// Values on a coarse grid: many ties of codes and of the candidates' errors.
TEST(Nvfp4, SimdEncodesTheSameBytesOnManyPages) {
  for (uint32_t seed = 0; seed < 40; ++seed) {
    std::vector<float> x = test::gaussian(64 * 128, seed);
    for (float& v : x) v = std::round(v * 8.0f) / 8.0f;
    const Page want = encode_scalar(x, 64, 128);
    for_each_target([&] {
      const Page got = encode(x, 64, 128);
      EXPECT_EQ(got.scales, want.scales);
      EXPECT_EQ(got.codes, want.codes);
    });
  }
}

// Every byte of codes under every scale, NaN scales included.
TEST(Nvfp4, SimdDecodesTheSameBits) {
  for (const int64_t dim : {16, 48, 64, 80, 128}) {
    const int64_t rows = 256 * 16 / dim * 16;
    Page p = make_page(rows, dim);
    for (size_t i = 0; i < p.codes.size(); ++i) p.codes[i] = static_cast<uint8_t>(i + i / 8);
    for (size_t i = 0; i < p.scales.size(); ++i) p.scales[i] = static_cast<uint8_t>(i);
    p.page_scale = 0.0123f;
    std::vector<float> want(static_cast<size_t>(rows * dim));
    nvfp4_decode_page_scalar(p.codes.data(), p.scales.data(), p.page_scale, rows, dim, want.data());
    for (float& v : want) {
      if (std::isnan(v)) v = 12345.0f;  // which NaN is the machine's choice
    }
    for_each_target([&] {
      std::vector<float> got = decode(p, rows, dim);
      for (float& v : got) {
        if (std::isnan(v)) v = 12345.0f;
      }
      EXPECT_TRUE(test::same_bits(got, want)) << dim;
    });
  }
}

// value = (code * decode_scale) * page_scale: another order rounds differently somewhere.
TEST(Nvfp4, DecodeOrderIsCodeTimesScaleFirst) {
  Page p = make_page(1, 16);
  int differs = 0;
  for (int s = 1; s < 0x7f; ++s) {
    p.scales[0] = static_cast<uint8_t>(s);
    for (size_t i = 0; i < 8; ++i) p.codes[i] = static_cast<uint8_t>(0x10 * (2 * i + 1) + 2 * i);
    p.page_scale = 0.1f;
    const std::vector<float> y = decode(p, 1, 16);
    for (uint8_t c = 0; c < 16; ++c) {
      ASSERT_EQ(y[c], (e2m1_to_f32(c) * e4m3_to_f32(p.scales[0])) * 0.1f);
      differs += y[c] != e2m1_to_f32(c) * (e4m3_to_f32(p.scales[0]) * 0.1f);
    }
  }
  EXPECT_GT(differs, 0);
}

TEST(Nvfp4, UnalignedBuffers) {
  const std::vector<float> x = test::gaussian(3 * 80 + 1, 9);
  const std::vector<float> dense(x.begin() + 1, x.end());
  const Page want = encode_scalar(dense, 3, 80);
  for_each_target([&] {
    Bytes codes(want.codes.size() + 2, 0x5a), scales(want.scales.size() + 2, 0x5a);
    nvfp4_encode_page(x.data() + 1, 3, 80, codes.data() + 1, scales.data() + 1);
    EXPECT_EQ(Bytes(codes.begin() + 1, codes.end() - 1), want.codes);
    EXPECT_EQ(Bytes(scales.begin() + 1, scales.end() - 1), want.scales);
    EXPECT_EQ(codes.front() + codes.back() + scales.front() + scales.back(), 4 * 0x5a);
    std::vector<float> y(3 * 80 + 2, -7.0f);
    nvfp4_decode_page(codes.data() + 1, scales.data() + 1, want.page_scale, 3, 80, y.data() + 1);
    EXPECT_TRUE(test::same_bits({y.begin() + 1, y.end() - 1}, decode(want, 3, 80)));
    EXPECT_EQ(y.front(), -7.0f);
    EXPECT_EQ(y.back(), -7.0f);
  });
}

}  // namespace
}  // namespace thriftattn
