// MXFP4 and INT3 planes: golden groups, the scale rules at their edges, error bounds on both
// sides, and every SIMD target byte-equal to the scalar truth. (NVFP4 has nvfp4_test.cc.)
#include "formats/plane_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/float_convert.h"
#include "formats/bit_pack.h"
#include "formats/int3.h"
#include "formats/mxfp4.h"
#include "test_util.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using test::for_each_target;
using Bytes = std::vector<uint8_t>;

constexpr Format kNew[] = {Format::mxfp4, Format::int3};

struct Plane {
  Bytes codes, scales;
  float page_scale = 1.0f;
};

Plane make_plane(const PlaneShape& s) {
  return {Bytes(static_cast<size_t>(plane_codes_bytes(s.format, s.dim, s.rows)), 0xa5),
          Bytes(static_cast<size_t>(plane_scales_bytes(s.format, s.dim, s.rows)), 0xa5), 1.0f};
}

Plane encode(const PlaneShape& s, const std::vector<float>& x) {
  Plane p = make_plane(s);
  p.page_scale = encode_plane(s, x.data(), p.codes.data(), p.scales.data());
  return p;
}

Plane encode_scalar(const PlaneShape& s, const std::vector<float>& x) {
  Plane p = make_plane(s);
  if (s.format == Format::mxfp4) {
    mxfp4_encode_page_scalar(x.data(), s.rows, s.dim, p.codes.data(), p.scales.data());
  } else {
    p.page_scale =
        int3_encode_page_scalar(x.data(), s.rows, s.dim, p.codes.data(), p.scales.data());
  }
  return p;
}

std::vector<float> decode(const PlaneShape& s, const Plane& p) {
  std::vector<float> y(static_cast<size_t>(s.rows * s.dim));
  decode_plane(s, p.codes.data(), p.scales.data(), p.page_scale, y.data());
  return y;
}

std::vector<float> decode_scalar(const PlaneShape& s, const Plane& p) {
  std::vector<float> y(static_cast<size_t>(s.rows * s.dim));
  if (s.format == Format::mxfp4) {
    mxfp4_decode_page_scalar(p.codes.data(), p.scales.data(), s.rows, s.dim, y.data());
  } else {
    int3_decode_page_scalar(p.codes.data(), p.scales.data(), p.page_scale, s.rows, s.dim, y.data());
  }
  return y;
}

// Which NaN a product gives is the machine's choice.
void hide_nans(std::vector<float>& x) {
  for (float& v : x) {
    if (std::isnan(v)) v = 12345.0f;
  }
}

TEST(BitPack, EveryCodeAtEveryPlace) {
  for (int place = 0; place < 8; ++place) {
    for (uint32_t code = 0; code < 8; ++code) {
      const uint32_t word = code << 3 * place;
      const uint64_t bytes = uint64_t{code} << 8 * place;
      EXPECT_EQ(spread_3bit(word), bytes);
      EXPECT_EQ(gather_3bit(bytes), word);
    }
  }
  for (int place = 0; place < 4; ++place) {
    for (uint32_t code = 0; code < 64; ++code) {
      const uint32_t word = code << 6 * place, bytes = code << 8 * place;
      EXPECT_EQ(spread_6bit(word), bytes);
      EXPECT_EQ(gather_6bit(bytes), word);
    }
  }
  uint8_t stored[3];
  store_u24(0x123456, stored);
  EXPECT_EQ(stored[0], 0x56);
  EXPECT_EQ(stored[2], 0x12);
  EXPECT_EQ(load_u24(stored), 0x123456u);
}

TEST(PlaneCodec, SizesAndRefusals) {
  EXPECT_EQ(plane_codes_bytes(Format::nvfp4, 128), 4096);
  EXPECT_EQ(plane_scales_bytes(Format::nvfp4, 128), 512);
  EXPECT_EQ(plane_codes_bytes(Format::nvfp4x2, 128), 4096);  // one plane
  EXPECT_EQ(plane_codes_bytes(Format::mxfp4, 128), 4096);
  EXPECT_EQ(plane_scales_bytes(Format::mxfp4, 128), 256);
  EXPECT_EQ(plane_codes_bytes(Format::int3, 128), 3072);
  EXPECT_EQ(plane_scales_bytes(Format::int3, 128), 256);
  std::vector<float> x(48);
  Bytes codes(24), scales(3);
  for (const Format f : kNew) {
    try {
      encode_plane({.format = f, .rows = 1, .dim = 48}, x.data(), codes.data(), scales.data());
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("multiple of 32, got 48"), std::string::npos);
    }
  }
  EXPECT_THROW(encode_plane({.format = Format::q8_0, .rows = 1, .dim = 32}, x.data(), codes.data(),
                            scales.data()),
               Error);
}

// ------------------------------------------------------------------ MXFP4

// amax 7: floor(log2 7) = 2, so the scale is 2^0 and 7 saturates to 6. Every tie, both signs of
// zero; element 2i in the low nibble.
TEST(Mxfp4, GoldenGroup) {
  std::vector<float> x = {7.0f, -7.0f, 0.25f, -0.75f, 1.25f, 1.75f, 2.5f, 3.5f,
                          5.0f, -5.0f, 0.0f,  -0.0f,  0.3f,  -0.3f, 6.0f, 4.0f};
  x.resize(32, 0.0f);
  for_each_target([&] {
    const PlaneShape s{.format = Format::mxfp4, .rows = 1, .dim = 32};
    const Plane p = encode(s, x);
    EXPECT_EQ(p.scales, (Bytes{127}));
    Bytes want(16, 0);
    const uint8_t head[] = {0xf7, 0xa0, 0x42, 0x64, 0xe6, 0x80, 0x91, 0x67};
    std::copy(std::begin(head), std::end(head), want.begin());
    EXPECT_EQ(p.codes, want);
    const std::vector<float> y = decode(s, p);
    EXPECT_EQ(y[0], 6.0f);
    EXPECT_EQ(y[3], -1.0f);
    EXPECT_EQ(y[7], 4.0f);
    EXPECT_TRUE(std::signbit(y[11]));
  });
}

// OCP MX v1.0, section 6.3: the scale is a function of the exponent of amax alone.
TEST(Mxfp4, ScaleIsTheExponentOfTheLargestLessTwo) {
  for (int e = -122; e < 127; ++e) {
    const uint8_t want = static_cast<uint8_t>(e - 2 + 127);
    EXPECT_EQ(mxfp4_scale(std::ldexp(1.0f, e)), want) << e;
    EXPECT_EQ(mxfp4_scale(std::nextafter(std::ldexp(1.0f, e + 1), 0.0f)), want) << e;
    EXPECT_EQ(e8m0_to_f32(want), std::ldexp(1.0f, e - 2));
  }
  for (const float tiny : {0.0f, 1e-45f, 0x1p-126f, 0x1p-124f, 0x1p-123f}) {
    EXPECT_EQ(mxfp4_scale(tiny), 2);  // 2^-125: what is decoded is zero or normal
  }
}

TEST(Mxfp4, GroupsHaveTheirOwnScales) {
  std::vector<float> x(96, 0.0f);
  for (int i = 0; i < 32; ++i) {
    x[static_cast<size_t>(i)] = 1.5f;
    x[static_cast<size_t>(32 + i)] = -3072.0f;
  }
  for_each_target([&] {
    const PlaneShape s{.format = Format::mxfp4, .rows = 1, .dim = 96};
    const Plane p = encode(s, x);
    EXPECT_EQ(p.scales, (Bytes{125, 136, 2}));
    EXPECT_EQ(p.codes[0], 0x77);
    EXPECT_EQ(p.codes[16], 0xff);
    EXPECT_EQ(p.codes[32], 0x00);
    EXPECT_TRUE(test::same_bits(decode(s, p), x));
  });
}

// ------------------------------------------------------------------ INT3

// amax 1568 = 3.5 * 448: page_scale 1, decode_scale 448. The grid's midpoints go outwards, zero
// keeps its sign, what is beyond 3.5 clips; eight codes in three bytes, code i from bit 3 i.
TEST(Int3, GoldenGroup) {
  std::vector<float> x(32);
  const float steps[8] = {3.5f, -3.5f, 0.0f, -0.0f, 1.0f, -2.0f, 2.999f, 0.999f};
  for (size_t i = 0; i < 8; ++i) x[i] = 448.0f * steps[i];
  for (size_t i = 8; i < 32; ++i) x[i] = 448.0f * kInt3Values[i % 8];  // on the grid
  for_each_target([&] {
    const PlaneShape s{.format = Format::int3, .rows = 1, .dim = 32};
    const Plane p = encode(s, x);
    EXPECT_EQ(p.page_scale, 1.0f);
    EXPECT_EQ(p.scales, (Bytes{0x7e}));
    // 3, 7, 0, 4, 1, 6, 2, 0 from bit 0 up.
    const uint32_t word = 3 | 7 << 3 | 0 << 6 | 4 << 9 | 1 << 12 | 6 << 15 | 2 << 18 | 0 << 21;
    EXPECT_EQ(load_u24(&p.codes[0]), word);
    for (size_t w = 1; w < 4; ++w) EXPECT_EQ(load_u24(&p.codes[3 * w]), 0xfac688u);  // 76543210
    EXPECT_EQ(p.codes[0], 0x3b);
    EXPECT_EQ(p.codes[1], 0x18);
    EXPECT_EQ(p.codes[2], 0x0b);
    const float want[8] = {3.5f, -3.5f, 0.5f, -0.5f, 1.5f, -2.5f, 2.5f, 0.5f};
    const std::vector<float> y = decode(s, p);
    for (size_t i = 0; i < 8; ++i) EXPECT_EQ(y[i], 448.0f * want[i]);
    for (size_t i = 8; i < 32; ++i) EXPECT_EQ(y[i], x[i]);
  });
}

TEST(Int3, EveryCodeIsAFixedPoint) {
  for (const float sign : {1.0f, -1.0f}) {
    for (int c = 0; c < 4; ++c) {
      std::vector<float> x(32, sign * 448.0f * kInt3Values[static_cast<size_t>(c)]);
      x[31] = 1568.0f;
      for_each_target([&] {
        const PlaneShape s{.format = Format::int3, .rows = 1, .dim = 32};
        const std::vector<float> y = decode(s, encode(s, x));
        for (size_t i = 0; i < 32; ++i) EXPECT_EQ(y[i], x[i]);
      });
    }
  }
}

// Each group below fits one share of amax / 3.5 exactly, but for its one larger element: the
// search finds that share. The first sets page_scale to 1, the last is zero.
TEST(Int3, ScaleSearchFindsEachShare) {
  const int64_t groups = 6;
  std::vector<float> x(static_cast<size_t>(groups * 32), 0.0f);
  x[0] = 1568.0f;
  for (int64_t g = 1; g < groups - 1; ++g) {
    // scale 32, 28.8 -> 28, 25.6 -> 26, 22.4 -> 22 in E4M3
    const float scale[] = {32.0f, 28.0f, 26.0f, 22.0f};
    for (int64_t i = 0; i < 32; ++i) {
      const float value = kInt3Values[static_cast<size_t>(i % 8)] * scale[g - 1];
      x[static_cast<size_t>(g * 32 + i)] = value;
    }
    x[static_cast<size_t>(g * 32)] = 3.5f * 32.0f;  // amax is the same in all
  }
  for_each_target([&] {
    const PlaneShape s{.format = Format::int3, .rows = 1, .dim = groups * 32};
    const Plane p = encode(s, x);
    EXPECT_EQ(p.page_scale, 1.0f);
    const Bytes want = {f32_to_e4m3(32), f32_to_e4m3(28), f32_to_e4m3(26), f32_to_e4m3(22), 0};
    EXPECT_EQ(Bytes(p.scales.begin() + 1, p.scales.end()), want);
    for (size_t i = 5 * 12; i < 6 * 12; ++i) EXPECT_EQ(p.codes[i], 0);
    const std::vector<float> y = decode(s, p);
    for (size_t i = 5 * 32; i < 6 * 32; ++i) EXPECT_EQ(y[i], 0.0f);
  });
}

// No share that was not taken has a smaller error, and all of them are taken at times.
TEST(Int3, SearchTakesTheSmallestError) {
  const PlaneShape s{.format = Format::int3, .rows = 64, .dim = 128};
  const std::vector<float> x = test::gaussian(64 * 128, 77);
  const Plane p = encode_scalar(s, x);
  int taken[4] = {};
  for (size_t g = 0; g < p.scales.size(); ++g) {
    double amax = 0.0;
    std::vector<double> t(32);
    for (size_t i = 0; i < 32; ++i) {
      t[i] = x[g * 32 + i] / p.page_scale;
      amax = std::max(amax, std::fabs(t[i]));
    }
    const auto error_of = [&](uint8_t scale) {
      double e = 0.0;
      for (const double v : t) {
        double least = 1e30;
        for (const float c : kInt3Values) {
          const double d = v - c * static_cast<double>(e4m3_to_f32(scale));
          least = std::min(least, d * d);
        }
        e += least;
      }
      return e;
    };
    bool found = false;
    for (size_t i = 0; i < 4; ++i) {
      const uint8_t code = f32_to_e4m3(static_cast<float>(amax / 3.5) * kInt3Shares[i]);
      ASSERT_LE(error_of(p.scales[g]), error_of(code) * 1.00001);
      if (!found && code == p.scales[g]) {
        ++taken[i];
        found = true;
      }
    }
    ASSERT_TRUE(found);
  }
  for (const int n : taken) EXPECT_GT(n, 10);  // of 256
}

TEST(Int3, ZeroAndTinyPages) {
  for (const float v : {0.0f, -0.0f, 1e-40f, -1e-35f}) {
    const PlaneShape s{.format = Format::int3, .rows = 64, .dim = 64};
    const Plane p = encode(s, std::vector<float>(64 * 64, v));
    EXPECT_EQ(p.page_scale, 1.0f);
    for (const uint8_t b : p.scales) ASSERT_EQ(b, 0);
    for (const uint8_t b : p.codes) ASSERT_EQ(b, 0);
    for (const float y : decode(s, p)) ASSERT_EQ(y, 0.0f);
  }
  const PlaneShape one{.format = Format::int3, .rows = 1, .dim = 32};
  const Plane p = encode(one, std::vector<float>(32, 1568 * 0x1p-126f));
  EXPECT_EQ(p.page_scale, 0x1p-126f);
  EXPECT_EQ(p.codes[0] & 7, 3);
}

// Groups whose first two candidates have the same error in exact arithmetic: with scales 32 and 28,
// x and 30 - x swap their errors, and so do 112 and 98; the other two are worse. So the rounding of
// the sum decides, that is its order.
TEST(Int3, ErrorIsSummedByAdjacentPairs) {
  const int64_t groups = 512;
  std::mt19937 rng(17);
  std::vector<float> t(static_cast<size_t>(groups * 32), 0.0f);
  for (size_t i = 0; i < 32; ++i) t[i] = 448.0f * kInt3Values[i % 8];  // page_scale 1
  for (size_t g = 1; g < groups; ++g) {
    float* group = &t[g * 32];
    group[0] = 112.0f;
    group[1] = 98.0f;
    for (size_t i = 2; i < 32; i += 2) {
      const float x = 10.0f + static_cast<float>(rng() % 0xa0000) * 0x1p-16f;
      group[i] = x;
      group[i + 1] = 30.0f - x;
    }
    std::shuffle(group, group + 32, rng);
  }
  const auto error_of = [](const float* group, float scale) {
    float e[32];
    for (int i = 0; i < 32; ++i) {
      const float step = std::min(std::trunc(group[i] / scale), 3.0f) + 0.5f;
      const float diff = group[i] - step * scale;
      e[i] = diff * diff;
    }
    const auto eight = [&](const float* q) {
      return ((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]));
    };
    return (eight(e) + eight(e + 8)) + (eight(e + 16) + eight(e + 24));
  };
  Bytes want = {f32_to_e4m3(448.0f)};
  int seconds = 0;
  for (size_t g = 1; g < groups; ++g) {
    const bool second = error_of(&t[g * 32], 28.0f) < error_of(&t[g * 32], 32.0f);
    want.push_back(f32_to_e4m3(second ? 28.0f : 32.0f));
    seconds += second;
  }
  EXPECT_GT(seconds, 30);  // the order decides often
  EXPECT_LT(seconds, 400);
  const PlaneShape s{.format = Format::int3, .rows = groups, .dim = 32};
  EXPECT_EQ(encode_scalar(s, t).scales, want);
  for_each_target([&] { EXPECT_EQ(encode(s, t).scales, want); });
}

// ------------------------------------------------------------------ both

// Relative RMS on a unit Gaussian, dim 128, both sides.
TEST(PlaneCodec, ErrorBoundsOnGaussian) {
  struct Bound {
    Format format;
    double low, high;
  };
  for (const Bound& b : {Bound{Format::nvfp4, 0.0866, 0.0886}, Bound{Format::mxfp4, 0.10, 0.14},
                         Bound{Format::int3, 0.17, 0.22}}) {
    const PlaneShape s{.format = b.format, .dim = 128};
    double error = 0.0;
    for (uint32_t page = 0; page < 8; ++page) {
      const std::vector<float> x = test::gaussian(64 * 128, 40 + page);
      error += test::relative_rms(x, decode(s, encode(s, x))) / 8;
    }
    EXPECT_GE(error, b.low) << format_info(b.format).name;
    EXPECT_LE(error, b.high) << format_info(b.format).name;
  }
}

TEST(PlaneCodec, RangeMaxIsStoredAsFinite) {
  for (const Format f : kNew) {
    std::vector<float> x = test::gaussian(64 * 64, 3);
    x[100] = -format_info(f).range_max;
    const PlaneShape s{.format = f, .dim = 64};
    const std::vector<float> y = decode(s, encode(s, x));
    for (const float v : y) ASSERT_TRUE(std::isfinite(v));
    EXPECT_NEAR(y[100] / x[100], 1.0f, 0.3f) << format_info(f).name;
  }
}

TEST(PlaneCodec, SimdEncodesTheSameBytes) {
  for (const Format f : kNew) {
    for (const int64_t dim : {32, 64, 96, 128, 192, 256}) {
      for (const int64_t rows : {1, 3, 64}) {
        const PlaneShape s{.format = f, .rows = rows, .dim = dim};
        for (const test::Data& data : test::hostile_data(rows * dim, 200)) {
          const Plane want = encode_scalar(s, data.x);
          for_each_target([&] {
            const Plane got = encode(s, data.x);
            EXPECT_EQ(got.page_scale, want.page_scale) << data.name;
            EXPECT_EQ(got.scales, want.scales) << data.name << " " << rows << " x " << dim;
            EXPECT_EQ(got.codes, want.codes) << data.name << " " << rows << " x " << dim;
          });
        }
      }
    }
  }
}

// Every byte of codes under every scale, NaN scales included, and random page scales.
TEST(PlaneCodec, SimdDecodesTheSameBits) {
  for (const Format f : kNew) {
    for (const int64_t dim : {32, 96, 128}) {
      const PlaneShape s{.format = f, .rows = 2 * 256 * 32 / dim, .dim = dim};
      Plane p = make_plane(s);
      for (size_t i = 0; i < p.codes.size(); ++i) p.codes[i] = static_cast<uint8_t>(i * 5 + i / 7);
      for (size_t i = 0; i < p.scales.size(); ++i) p.scales[i] = static_cast<uint8_t>(i);
      if (f == Format::int3) p.page_scale = 0.0123f;
      std::vector<float> want = decode_scalar(s, p);
      hide_nans(want);
      for_each_target([&] {
        std::vector<float> got = decode(s, p);
        hide_nans(got);
        EXPECT_TRUE(test::same_bits(got, want)) << format_info(f).name << " " << dim;
      });
    }
  }
}

TEST(PlaneCodec, UnalignedBuffers) {
  for (const Format f : kNew) {
    const PlaneShape s{.format = f, .rows = 3, .dim = 96};
    const std::vector<float> x = test::gaussian(3 * 96 + 1, 9);
    const std::vector<float> dense(x.begin() + 1, x.end());
    const Plane want = encode_scalar(s, dense);
    for_each_target([&] {
      Bytes codes(want.codes.size() + 2, 0x5a), scales(want.scales.size() + 2, 0x5a);
      encode_plane(s, x.data() + 1, codes.data() + 1, scales.data() + 1);
      EXPECT_EQ(Bytes(codes.begin() + 1, codes.end() - 1), want.codes);
      EXPECT_EQ(Bytes(scales.begin() + 1, scales.end() - 1), want.scales);
      EXPECT_EQ(codes.front() + codes.back() + scales.front() + scales.back(), 4 * 0x5a);
      std::vector<float> y(3 * 96 + 2, -7.0f);
      decode_plane(s, codes.data() + 1, scales.data() + 1, want.page_scale, y.data() + 1);
      EXPECT_TRUE(test::same_bits({y.begin() + 1, y.end() - 1}, decode_scalar(s, want)));
      EXPECT_EQ(y.front(), -7.0f);
      EXPECT_EQ(y.back(), -7.0f);
    });
  }
}

}  // namespace
}  // namespace thriftattn
