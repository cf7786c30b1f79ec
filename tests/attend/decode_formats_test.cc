// Decode of every format of K with V in others: rows expanded exactly, and the BF16 and FP32 kernels
// on them against the FP64 reference over the values as stored.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attend/attend_test_util.h"
#include "attend/decode_kernels.h"
#include "attend/decode_tile.h"
#include "attend/expand_rows.h"
#include "base/aligned.h"
#include "base/cpu_info.h"
#include "base/float_convert.h"
#include "formats/format_info.h"
#include "formats/plane_codec.h"
#include "formats/row_codec.h"

namespace thriftattn {
namespace {

using namespace testing;

// As in decode_fast_test.cc: 2^-8 is the largest relative rounding of a weight; queries that are no
// BF16 numbers cost more.
constexpr double kBf16Weights = 3.9e-3;
constexpr double kBf16Queries = 2e-2;

constexpr int64_t kDims[] = {32, 48, 64, 80, 96, 128, 192, 256};

bool is_wide(Format f) { return f == Format::f32 || f == Format::fp16; }

// ---- expansion

// Rows of a format at exactly as many bytes as they have: a sanitizer sees every byte read too many.
struct Stored {
  std::vector<uint8_t> rows, scales;
  StoredRows view;
  std::vector<float> values;  // as the codec decodes them

  Stored(Format format, int64_t dim, int64_t tokens, uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> gauss;
    std::vector<float> x(static_cast<size_t>(kPageTokens * dim));
    for (float& v : x) v = std::exp(2.0f * gauss(rng)) * gauss(rng);
    const bool plane = is_layered(format);
    view = {.format = format, .tokens = plane ? kPageTokens : tokens};
    values.resize(static_cast<size_t>(view.tokens * dim));
    if (plane) {
      rows.resize(static_cast<size_t>(plane_codes_bytes(format, dim)));
      scales.resize(static_cast<size_t>(plane_scales_bytes(format, dim)));
      const PlaneShape shape{.format = format, .dim = dim};
      view.page_scale = encode_plane(shape, x.data(), rows.data(), scales.data());
      decode_plane(shape, rows.data(), scales.data(), view.page_scale, values.data());
      view.scales = scales.data();
      view.row_bytes = plane_codes_bytes(format, dim, 1);
      view.row_scales = plane_scales_bytes(format, dim, 1);
    } else {
      view.row_bytes = row_bytes(format, dim);
      rows.resize(static_cast<size_t>(view.row_bytes * tokens));
      encode_rows(format, x.data(), tokens, dim, dim, rows.data(), view.row_bytes);
      every_code(dim);
      decode_rows(format, rows.data(), view.row_bytes, tokens, dim, values.data(), dim);
    }
    view.rows = rows.data();
  }

  // Every code of 8 bits that an encoder writes, along the rows and each row shifted by one.
  void every_code(int64_t dim) {
    const bool e4m3 = view.format == Format::fp8_e4m3, q8 = view.format == Format::q8_0;
    if (!e4m3 && !q8 && view.format != Format::fp8_e5m2) return;
    for (int64_t t = 0; t < view.tokens; ++t) {
      for (int64_t d = 0; d < dim; ++d) {
        const int code = static_cast<int>((t * dim + d + t) % 256);
        if (q8 ? code == 0x80 : (code & 0x7f) > (e4m3 ? 0x7e : 0x7b)) continue;
        const int64_t at = q8 ? d / kGgmlBlock * kQ8BlockBytes + 2 + d % kGgmlBlock : 4 + d;
        rows[static_cast<size_t>(t * view.row_bytes + at)] = static_cast<uint8_t>(code);
      }
    }
  }
};

std::vector<Format> expanded_to_bf16() {
  std::vector<Format> formats;
  for (const FormatInfo& info : kFormats) {
    const bool own_kernels =
        base_format(info.format) == Format::nvfp4 || info.format == Format::bf16;
    if (!own_kernels && !is_wide(info.format)) formats.push_back(info.format);
  }
  return formats;
}

#if defined(__x86_64__)

// What the kernels make of an element: BF16 x scale of the row, or code x scale of 32 elements.
float element(const ExpandedRows& rows, int64_t dim, int64_t t, int64_t d) {
  const auto* values = reinterpret_cast<const uint16_t*>(rows.values);
  if (rows.form == ExpandedRows::Form::rows) {
    return bf16_to_f32(values[t * expanded_bf16_stride(dim) + d]) * rows.scale[t];
  }
  const int64_t chunks = (dim + 127) / 128, c = d / 128, i = d % 128;
  const float* scales = rows.group_scale + (t / 2 * chunks + c) * 16 + i / 32 * 4 + t % 2 * 2;
  EXPECT_EQ(scales[0], scales[1]);
  uint16_t value = values[((t * chunks + c) * 4 + i % 4) * 32 + i / 4];
  if (rows.form == ExpandedRows::Form::codes) {
    const int code = rows.codes[t * (dim / 2) + d / 2] >> 4 * (d % 2) & 15;
    EXPECT_EQ(rows.code_values[code], rows.code_values[code + 16]);
    value = rows.code_values[code];
  }
  return bf16_to_f32(value) * scales[0] * rows.page_scale;
}

TEST(ExpandRows, ForBf16IsTheCodecsValue) {
  if (!cpu_has_avx512_bf16()) GTEST_SKIP() << "no AVX-512 BF16 on this machine";
  auto out = std::make_unique<ExpandedRows>();
  for (const auto expand : {expand_rows_bf16, expand_rows_bf16_without_vbmi}) {
    for (const Format format : expanded_to_bf16()) {
      for (const int64_t dim : kDims) {
        if (dim % format_info(format).dim_multiple != 0) continue;
        for (const int64_t tokens : {1, 7, 64}) {
          const Stored in(format, dim, tokens, static_cast<uint32_t>(dim + tokens));
          std::memset(static_cast<void*>(out.get()), 0xff, sizeof(*out));  // NaN
          expand(in.view, dim, *out);
          ASSERT_EQ(out->tokens, in.view.tokens);
          for (int64_t t = 0; t < in.view.tokens; ++t) {
            for (int64_t d = 0; d < dim; ++d) {
              ASSERT_EQ(element(*out, dim, t, d), in.values[static_cast<size_t>(t * dim + d)])
                  << to_string(format) << " D " << dim << " token " << t << " element " << d;
            }
          }
          for (int64_t t = in.view.tokens; t < kPageTokens; ++t) {
            if (out->form == ExpandedRows::Form::rows) {
              ASSERT_EQ(out->scale[t], 0.0f);
            } else {
              for (int64_t d = 0; d < dim; ++d) ASSERT_EQ(element(*out, dim, t, d), 0.0f);
            }
          }
        }
      }
    }
  }
}

TEST(ExpandRows, ForBf16RefusesWhatItWouldTakeDigitsFrom) {
  auto out = std::make_unique<ExpandedRows>();
  for (const Format format : {Format::f32, Format::fp16, Format::bf16, Format::nvfp4}) {
    expect_refusal(ErrorCode::unsupported, "use expand_rows_f32",
                   [&] { expand_rows_bf16({.format = format}, 64, *out); });
  }
}

#endif

TEST(ExpandRows, F32IsTheCodecsValue) {
  auto out = std::make_unique<ExpandedRows>();
  for (const FormatInfo& info : kFormats) {
    for (const int64_t dim : kDims) {
      if (dim % info.dim_multiple != 0) continue;
      for (const int64_t tokens : {1, 9, 64}) {
        const Stored in(info.format, dim, tokens, static_cast<uint32_t>(dim));
        std::memset(static_cast<void*>(out.get()), 0xff, sizeof(*out));
        expand_rows_f32(in.view, dim, *out);
        ASSERT_EQ(std::memcmp(out->values, in.values.data(), in.values.size() * sizeof(float)), 0)
            << info.name << " D " << dim;
      }
    }
  }
}

// ---- attention

// In AttendMath::fast: BF16 kernels if this machine has them, and FP32's bound where they are not
// for this layer.
void expect_close(CaseOptions o, const std::string& what) {
  o.math = AttendMath::fast;
  const bool bf16 = decode_kernels_bf16() != nullptr && !is_wide(o.policy.k_format) &&
                    !is_wide(o.policy.v_format);
  expect_within(o, bf16 ? kBf16Queries : kTight, what);
  if (!bf16) return;
  o.bf16_queries = true;
  o.policy.rotate = o.equalizer = false;
  expect_within(o, kBf16Weights, what + ", BF16 queries");
}

bool has_dim(Format format, int64_t dim) { return dim % format_info(format).dim_multiple == 0; }

std::string name_of(Format k, Format v, int64_t length) {
  return std::string(to_string(k)) + " and " + std::string(to_string(v)) + " after " +
         std::to_string(length);
}

// Every format of either side beside some of the other: own kernels, row scales, group scales,
// planes that are rotated, FP32 kernels.
TEST(DecodeFormats, EveryPairMatchesReference) {
  for (const FormatInfo& one : kFormats) {
    for (const Format other : {Format::nvfp4, Format::bf16, Format::fp8_e4m3, Format::q8_0,
                               Format::int3, Format::f32}) {
      for (const auto& [k, v] : {std::pair{one.format, other}, {other, one.format}}) {
        for (const int64_t length : {0, 65, 190}) {
          CaseOptions o{.policy = mixed(k, v, layered_policy(0.1, 0.02)),
                        .length = length,
                        .seed = static_cast<uint32_t>(length + 3)};
          o.scramble = length > 100;
          expect_close(o, name_of(k, v, length));
        }
      }
    }
  }
}

TEST(DecodeFormats, EveryHeadDimAndGroupMatchesReference) {
  struct Shape {
    int64_t kv, q, dk, dv;
  };
  for (const FormatInfo& info : kFormats) {
    for (const Shape& s :
         {Shape{2, 2, 64, 80}, Shape{1, 4, 80, 96}, Shape{1, 6, 96, 128}, Shape{1, 8, 128, 192},
          Shape{1, 4, 192, 256}, Shape{1, 4, 256, 64}, Shape{1, 64, 128, 128}}) {
      if (!has_dim(info.format, s.dk) || !has_dim(info.format, s.dv)) continue;
      CaseOptions o{
          .shape = {.kv_heads = s.kv, .q_heads = s.q, .head_dim_k = s.dk, .head_dim_v = s.dv},
          .policy = mixed(info.format, info.format, layered_policy(0.1, 0.02)),
          .length = 140,
          .queries = s.q == 4 ? 5 : 1};
      o.equalizer = is_layered(info.format);
      o.scramble = true;
      expect_close(o, std::string(info.name) + " D " + std::to_string(s.dk) + "/" +
                          std::to_string(s.dv) + " heads " + std::to_string(s.q));
    }
  }
}

TEST(DecodeFormats, MatchesReferenceWithWindowSoftcapAndSinks) {
  for (const auto& [k, v] :
       {std::pair{Format::mxfp4, Format::int3}, {Format::int3, Format::mxfp4},
        {Format::fp8_e4m3, Format::q4_0}, {Format::q8_0, Format::int3}}) {
    for (const int64_t window : {0, 100}) {
      for (const float softcap : {0.0f, 4.0f}) {
        for (const LayerPolicy& policy : {layered_policy(0.1, 0.02), sealed_policy(64, 64)}) {
          CaseOptions o{.policy = mixed(k, v, policy), .length = 450, .queries = 5};
          o.shape.window = window;
          o.softcap = softcap;
          o.sink_logits = softcap > 0;
          expect_close(o, name_of(k, v, window));
        }
      }
    }
  }
}

// Means, promotion with NVFP4 residuals and skipping of bases that are expanded: partial, and the
// same pages as in FP32.
TEST(DecodeFormats, DecidesAsTheFp32PathDoes) {
  for (const auto& [k, v] : {std::pair{Format::mxfp4, Format::int3}, {Format::int3, Format::nvfp4},
                             {Format::nvfp4, Format::mxfp4}}) {
    CaseOptions o{.policy = mixed(k, v, layered_policy(0.1, 0.02)), .length = 1500, .queries = 12};
    o.q_gain = 4.0f;
    AttentionCase exact(o);
    o.math = AttendMath::fast;
    AttentionCase quick(o);
    AttendStats a, b;
    exact.attend(&a);
    quick.attend(&b);
    EXPECT_GT(b.promoted_fraction(), 0.05);
    EXPECT_GT(b.skipped_fraction(), 0.05);
    EXPECT_LT(b.skipped_fraction() + b.promoted_fraction(), 0.95);
    EXPECT_EQ(a.pages_visible, b.pages_visible);
    EXPECT_NEAR(a.promoted_fraction(), b.promoted_fraction(), 0.01);
    EXPECT_NEAR(a.skipped_fraction(), b.skipped_fraction(), 0.01);
    EXPECT_NEAR(a.bits_read, b.bits_read, 0.01 * a.bits_read);
    EXPECT_NEAR(a.sum_mass_4bit, b.sum_mass_4bit, 0.02 * a.sum_mass_4bit);
  }
}

// Without promotion: a page at the edge of it differs by more between base and base + residual than
// the bound.
TEST(DecodeFormats, MatchesReferenceAcrossSplits) {
  for (const auto& [k, v] : {std::pair{Format::mxfp4, Format::int3}, {Format::int3, Format::fp8_e5m2},
                             {Format::fp6_e3m2, Format::mxfp4}, {Format::fp16, Format::nvfp4}}) {
    CaseOptions o{.policy = mixed(k, v, layered_policy(1.0, 0.0005)),
                  .length = 64 * 36 + 9,
                  .queries = 3};
    o.q_gain = 3.0f;
    expect_close(o, name_of(k, v, o.length));
  }
}

// NaN in what lies behind the last token, where a longer sequence may have been, changes nothing.
TEST(DecodeFormats, RowsWithoutATokenAreNotRead) {
  constexpr int64_t kDim = 96, kTokens = 7;
  std::vector<float> query(kDim, 1.0f);
  const float* rows[kRowBlock] = {query.data(), query.data(), nullptr, nullptr};
  const float offset[kRowBlock] = {}, factor[kRowBlock] = {1, 1, 1, 1};
  for (const DecodeKernels* kernels : {decode_kernels_bf16(), decode_kernels_f32()}) {
    if (kernels == nullptr) continue;
    std::vector<float> results[2];
    for (const bool poison : {false, true}) {
      std::vector<uint16_t> values(kPageTokens * kDim, poison ? 0x7fc0 : 0);
      std::fill_n(values.begin(), kTokens * kDim, uint16_t{0x3f80});
      const Bf16Rows page{values.data(), kDim, kTokens};
      auto q = aligned_buffer<std::byte>(kernels->query_bytes(kDim));
      auto p = aligned_buffer<std::byte>(kernels->weights_bytes);
      auto acc = aligned_buffer<float>(kernels->accumulator_floats(kDim));
      std::fill_n(acc.get(), kernels->accumulator_floats(kDim), 0.0f);
      alignas(64) float s[kBlockScores];
      kernels->pack_queries(rows, kDim, q.get());
      kernels->score_bf16(page, kDim, q.get(), 1, offset, s, {});
      std::vector<float>& result = results[poison];
      result.assign(s, s + kBlockScores);
      for (int64_t t = 0; t < kPageTokens; ++t) {
        for (int64_t r = 0; r < kRowBlock; ++r) s[score_index(t, r)] = t < kTokens ? 1.0f : 0.0f;
      }
      kernels->store_weights(s, kAllRows, p.get());
      kernels->weigh_bf16(page, kDim, p.get(), factor, acc.get(), {});
      result.resize(kBlockScores + kDim);
      kernels->add_row(acc.get(), kDim, 1, &result[kBlockScores]);
    }
    EXPECT_EQ(results[true][score_index(0, 1)], kDim) << kernels->name;
    EXPECT_EQ(results[true][kBlockScores], kTokens) << kernels->name;
    EXPECT_TRUE(same_bits(results[false], results[true])) << kernels->name;
  }
}

// Only the mass rule: what a budget chooses stays with AttendTile, whose FP32 it keeps; every format
// under the mass rule has kernels of its own sums.
TEST(DecodeFormats, BudgetsStayWithTheTile) {
  for (const FormatInfo& info : kFormats) {
    CaseOptions o{.policy = mixed(info.format, info.format), .length = 330};
    if (is_layered(info.format)) {
      o.policy.rule = PromoteRule::budget;
      o.policy.budget = 0.3;
      EXPECT_TRUE(same_bits(AttentionCase(o).attend(), [&] {
        o.math = AttendMath::fast;
        return AttentionCase(o).attend();
      }())) << info.name;
      o.policy = mixed(info.format, info.format);
    }
    o.math = AttendMath::f32;
    const auto tile = AttentionCase(o).attend();
    o.math = AttendMath::fast;
    EXPECT_FALSE(same_bits(tile, AttentionCase(o).attend())) << info.name;
  }
}

}  // namespace
}  // namespace thriftattn
