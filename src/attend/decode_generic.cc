// Decode kernels in FP32 for every target of Highway (decode_kernels.h). Vectors of at most eight
// lanes: one holds the even or the odd elements of a scale group of 16, in the order in which
// nibbles come out of the bytes; the queries are packed in that order, so nothing is interleaved.
//
// Accumulators of a block: [row][dim] in the order of the codes, then [row][dim] in natural order
// (BF16 and FP32 rows, means).
#include <algorithm>
#include <cmath>
#include <limits>

#include "attend/decode_kernels.h"
#include "attend/softmax_state.h"
#include "base/float_convert.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attend/decode_generic.cc"
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::CappedTag<float, 8>;
using V = hn::Vec<F>;

constexpr int64_t kRows = kRowBlock;
constexpr int64_t kGroup = kNvfp4Group;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(F()));
constexpr int kHalf = static_cast<int>(8 / kLanes);  // vectors of the evens, or odds, of a group

// Twice the E2M1 values: small integers, exact in INT8.
alignas(16) constexpr int8_t kDoubled[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                             0, -1, -2, -3, -4, -6, -8, -12};

// The 16 codes of a group as floats times `scale`: evens in x[0 .. kHalf), odds behind them.
struct Group {
  V x[2 * kHalf];

  HWY_INLINE Group(const uint8_t* codes, V scale) {
    const F d;
#if HWY_TARGET == HWY_SCALAR
    for (int i = 0; i < 8; ++i) {
      x[i] = hn::Mul(hn::Set(d, static_cast<float>(kDoubled[codes[i] & 15])), scale);
      x[8 + i] = hn::Mul(hn::Set(d, static_cast<float>(kDoubled[codes[i] >> 4])), scale);
    }
#else
    const hn::FixedTag<uint8_t, 16> d8;
    const hn::FixedTag<int8_t, 16> di8;
    const hn::RebindToSigned<F> d32;
    const auto bytes = hn::ZeroExtendVector(d8, hn::LoadU(hn::FixedTag<uint8_t, 8>(), codes));
    const auto table = hn::BitCast(d8, hn::Load(di8, kDoubled));
    const auto low = hn::TableLookupBytes(table, hn::And(bytes, hn::Set(d8, uint8_t{15})));
    const auto high = hn::TableLookupBytes(table, hn::ShiftRight<4>(bytes));
#if HWY_MAX_BYTES >= 32
    const hn::FixedTag<int8_t, 8> di8_half;
    x[0] = hn::Mul(
        hn::ConvertTo(d, hn::PromoteTo(d32, hn::LowerHalf(di8_half, hn::BitCast(di8, low)))),
        scale);
    x[1] = hn::Mul(
        hn::ConvertTo(d, hn::PromoteTo(d32, hn::LowerHalf(di8_half, hn::BitCast(di8, high)))),
        scale);
#else
    const hn::Rebind<int8_t, F> part;
    alignas(16) int8_t values[2][16];
    hn::Store(hn::BitCast(di8, low), di8, values[0]);
    hn::Store(hn::BitCast(di8, high), di8, values[1]);
    for (int i = 0; i < 2 * kHalf; ++i) {
      const int8_t* at = values[i / kHalf] + i % kHalf * kLanes;
      x[i] = hn::Mul(hn::ConvertTo(d, hn::PromoteTo(d32, hn::LoadU(part, at))), scale);
    }
#endif
#endif
  }
};

// Value of an E4M3 scale times half, for the doubled codes.
HWY_INLINE V GroupScale(const uint8_t* scales, int64_t group) {
  return hn::Set(F(), 0.5f * kE4m3Values[scales[group]]);
}

int64_t QueryBytes(int64_t dim) { return 2 * kRows * dim * static_cast<int64_t>(sizeof(float)); }

// Where element d lies among the codes' order.
constexpr int64_t CodeOrder(int64_t d) { return d / kGroup * kGroup + d % 2 * 8 + d % kGroup / 2; }

void PackQueries(const float* const* rows, int64_t dim, std::byte* packed) {
  auto* out = reinterpret_cast<float*>(packed);
  std::fill_n(out, 2 * kRows * dim, 0.0f);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t d = 0; rows[r] != nullptr && d < dim; ++d) {
      out[r * dim + CodeOrder(d)] = rows[r][d];
      out[(kRows + r) * dim + d] = rows[r][d];
    }
  }
}

void ScoreNvfp4(const Nvfp4ConstPlane& k, int64_t dim, const std::byte* q, int64_t blocks,
                const float* offset, float* s, bool accumulate, const NextRows& next) {
  const F d;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* query = reinterpret_cast<const float*>(q + b * QueryBytes(dim));
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if (b == 0) next.fetch(t, 1);
      V acc[kRows][2];
      for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = hn::Zero(d);
      for (int64_t g = 0; g < dim / kGroup; ++g) {
        const Group x(k.codes + t * (dim / 2) + g * 8,
                      GroupScale(k.scales + t * (dim / kGroup), g));
        for (int i = 0; i < 2 * kHalf; ++i) {
          for (int r = 0; r < kRows; ++r) {
            const V qv = hn::LoadU(d, query + r * dim + g * kGroup + i * kLanes);
            acc[r][i & 1] = hn::MulAdd(x.x[i], qv, acc[r][i & 1]);
          }
        }
      }
      for (int64_t r = 0; r < kRows; ++r) {
        float* out = s + b * kBlockScores + score_index(t, r);
        const float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(acc[r][0], acc[r][1])));
        *out = (accumulate ? *out : offset[b * kRows + r]) + sum * k.page_scale;
      }
    }
  }
}

HWY_INLINE V Widen(const uint16_t* p) {
  const hn::Rebind<uint16_t, F> d16;
  const hn::RebindToUnsigned<F> d32;
  return hn::BitCast(F(), hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, p))));
}

HWY_INLINE V Widen(const float* p) { return hn::LoadU(F(), p); }

// Rows in natural order, BF16 or FP32.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride, tokens;
};

HWY_INLINE Rows<float> RowsOf(const ExpandedRows& rows, int64_t dim) {
  return {reinterpret_cast<const float*>(rows.values), dim, rows.tokens};
}

// dim is a multiple of 16, so of the lanes too.
template <typename T>
HWY_INLINE void ScoreRows(const Rows<T>& k, int64_t dim, const std::byte* q, int64_t blocks,
                          const float* offset, float* s, const NextRows& next) {
  const F d;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* query = reinterpret_cast<const float*>(q + b * QueryBytes(dim)) + kRows * dim;
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if (b == 0) next.fetch(t, 1);
      V acc[kRows][2];
      for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = hn::Zero(d);
      for (int64_t i = 0; t < k.tokens && i < dim; i += 2 * kLanes) {
        for (int j = 0; j < 2; ++j) {
          const V x = Widen(k.data + t * k.stride + i + j * kLanes);
          for (int r = 0; r < kRows; ++r) {
            acc[r][j] = hn::MulAdd(x, hn::LoadU(d, query + r * dim + i + j * kLanes), acc[r][j]);
          }
        }
      }
      for (int64_t r = 0; r < kRows; ++r) {
        s[b * kBlockScores + score_index(t, r)] =
            offset[b * kRows + r] + hn::GetLane(hn::SumOfLanes(d, hn::Add(acc[r][0], acc[r][1])));
      }
    }
  }
}

void ScoreBf16(const Bf16Rows& k, int64_t dim, const std::byte* q, int64_t blocks,
               const float* offset, float* s, const NextRows& next) {
  ScoreRows<uint16_t>({k.data, k.stride, k.tokens}, dim, q, blocks, offset, s, next);
}

void ScoreExpanded(const ExpandedRows& k, int64_t dim, const std::byte* q, int64_t blocks,
                   const float* offset, float* s, const NextRows& next) {
  ScoreRows(RowsOf(k, dim), dim, q, blocks, offset, s, next);
}

void DotBf16(const uint16_t* v, int64_t dim, const float* rows, float* out) {
  const F d;
  for (int64_t r = 0; r < kRows; ++r) {
    V acc = hn::Zero(d);
    for (int64_t i = 0; i < dim; i += kLanes) {
      acc = hn::MulAdd(Widen(v + i), hn::LoadU(d, rows + r * dim + i), acc);
    }
    out[r] = hn::GetLane(hn::SumOfLanes(d, acc));
  }
}

// exp(s - ref) where s > -inf, else 0.
HWY_INLINE V ExpDifference(V s, V ref) {
  const F d;
  const V e = hn::Exp(d, hn::Max(hn::Sub(s, ref), hn::Set(d, -200.0f)));
  return hn::IfThenElseZero(hn::Gt(s, hn::Set(d, -3.0e38f)), e);
}

// A pair of tokens is eight floats: [row][token]. The state of the rows is kept in that shape.
struct PairLanes {
  V x[kHalf];
};

void PageSoftmax(float* s, float softcap, const BlockMask* mask, float* m, float* l) {
  const F d;
  if (softcap > 0) {
    const V cap = hn::Set(d, softcap), inverse = hn::Set(d, 1.0f / softcap);
    for (int64_t i = 0; i < kBlockScores; i += kLanes) {
      hn::StoreU(hn::Mul(cap, hn::Tanh(d, hn::Mul(hn::LoadU(d, s + i), inverse))), d, s + i);
    }
  }
  if (mask != nullptr) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t t = 0; t < kPageTokens; ++t) {
        if (t < mask->first[r] || t >= mask->end[r]) s[score_index(t, r)] = kNegInf;
      }
    }
  }
  PairLanes top;
  for (int i = 0; i < kHalf; ++i) top.x[i] = hn::LoadU(d, s + i * kLanes);
  for (int64_t at = 8; at < kBlockScores; at += 8) {
    for (int i = 0; i < kHalf; ++i) {
      top.x[i] = hn::Max(top.x[i], hn::LoadU(d, s + at + i * kLanes));
    }
  }
  float lanes[8], ref[8];
  for (int i = 0; i < kHalf; ++i) hn::StoreU(top.x[i], d, lanes + i * kLanes);
  for (int64_t r = 0; r < kRows; ++r) {
    m[r] = std::max(lanes[2 * r], lanes[2 * r + 1]);
    ref[2 * r] = ref[2 * r + 1] = std::max(m[r], -3.0e38f);
  }
  PairLanes sum;
  for (int i = 0; i < kHalf; ++i) sum.x[i] = hn::Zero(d);
  for (int64_t at = 0; at < kBlockScores; at += 8) {
    for (int i = 0; i < kHalf; ++i) {
      float* p = s + at + i * kLanes;
      const V e = ExpDifference(hn::LoadU(d, p), hn::LoadU(d, ref + i * kLanes));
      hn::StoreU(e, d, p);
      sum.x[i] = hn::Add(sum.x[i], e);
    }
  }
  for (int i = 0; i < kHalf; ++i) hn::StoreU(sum.x[i], d, lanes + i * kLanes);
  for (int64_t r = 0; r < kRows; ++r) l[r] = lanes[2 * r] + lanes[2 * r + 1];
}

// Weights are kept in FP32.
constexpr int64_t kWeightsBytes = kBlockScores * static_cast<int64_t>(sizeof(float));

void StoreWeights(const float* s, uint32_t rows, std::byte* p) {
  auto* out = reinterpret_cast<float*>(p);
  for (int64_t r = 0; r < kRows; ++r) {
    if ((rows >> r & 1) == 0) continue;
    for (int64_t t = 0; t < kPageTokens; ++t) out[score_index(t, r)] = s[score_index(t, r)];
  }
}

void MergePages(const float* m, const float* l, int64_t pages, float* total_m, float* total_l) {
  float top[kRows];
  for (int64_t r = 0; r < kRows; ++r) top[r] = total_m[r];
  for (int64_t i = 0; i < pages * kRows; ++i) top[i % kRows] = std::max(top[i % kRows], m[i]);
  const hn::CappedTag<float, 4> d;
  for (int64_t r = 0; r < kRows; r += static_cast<int64_t>(hn::Lanes(d))) {
    const auto ref = hn::Max(hn::LoadU(d, top + r), hn::Set(d, -3.0e38f));
    const auto weight = [&](const float* at) HWY_ATTR {
      const auto s = hn::LoadU(d, at);
      const auto e = hn::Exp(d, hn::Max(hn::Sub(s, ref), hn::Set(d, -200.0f)));
      return hn::IfThenElseZero(hn::Gt(s, hn::Set(d, -3.0e38f)), e);
    };
    auto sum = hn::Mul(hn::LoadU(d, total_l + r), weight(total_m + r));
    for (int64_t j = 0; j < pages; ++j) {
      sum = hn::MulAdd(hn::LoadU(d, l + j * kRows + r), weight(m + j * kRows + r), sum);
    }
    hn::StoreU(sum, d, total_l + r);
  }
  for (int64_t r = 0; r < kRows; ++r) total_m[r] = top[r];
}

void PageMasses(const float* m, const float* l, int64_t pages, const float* lse, float* mass,
                float* factor) {
  const hn::CappedTag<float, 4> d;
  for (int64_t r = 0; r < kRows; r += static_cast<int64_t>(hn::Lanes(d))) {
    const auto ref = hn::LoadU(d, lse + r);
    const auto lowest = hn::Set(d, -3.0e38f);
    for (int64_t j = 0; j < pages; ++j) {
      const int64_t at = j * kRows + r;
      const auto top = hn::LoadU(d, m + at);
      // A finite stand-in keeps -inf - -inf out; both cases are zeroed below.
      const auto x = hn::Sub(hn::Max(top, lowest), hn::Max(ref, lowest));
      auto e = hn::Exp(d, hn::Max(x, hn::Set(d, -200.0f)));
      e = hn::IfThenElseZero(hn::And(hn::Gt(top, lowest), hn::Gt(ref, lowest)), e);
      hn::StoreU(e, d, factor + at);
      hn::StoreU(hn::Mul(e, hn::LoadU(d, l + at)), d, mass + at);
    }
  }
}

int64_t AccumulatorFloats(int64_t dim) { return 2 * kRows * dim; }

void WeighNvfp4(const Nvfp4ConstPlane& v, int64_t dim, const std::byte* p, const float* factor,
                float* acc, const NextRows& next) {
  const F d;
  const auto* weights = reinterpret_cast<const float*>(p);
  float scaled[kRows][kPageTokens];
  for (int64_t r = 0; r < kRows; ++r) {
    const float f = factor[r] * v.page_scale;
    for (int64_t t = 0; t < kPageTokens; ++t) scaled[r][t] = weights[score_index(t, r)] * f;
  }
  for (int64_t g = 0; g < dim / kGroup; ++g) {
    V sum[kRows][2 * kHalf];
    for (int64_t r = 0; r < kRows; ++r) {
      for (int i = 0; i < 2 * kHalf; ++i) {
        sum[r][i] = hn::LoadU(d, acc + r * dim + g * kGroup + i * kLanes);
      }
    }
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if (g == 0) next.fetch(t, 1);
      const Group x(v.codes + t * (dim / 2) + g * 8, GroupScale(v.scales + t * (dim / kGroup), g));
      for (int64_t r = 0; r < kRows; ++r) {
        const V w = hn::Set(d, scaled[r][t]);
        for (int i = 0; i < 2 * kHalf; ++i) sum[r][i] = hn::MulAdd(x.x[i], w, sum[r][i]);
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int i = 0; i < 2 * kHalf; ++i) {
        hn::StoreU(sum[r][i], d, acc + r * dim + g * kGroup + i * kLanes);
      }
    }
  }
}

template <typename T>
HWY_INLINE void WeighRows(const Rows<T>& v, int64_t dim, const std::byte* p, const float* factor,
                          float* acc, const NextRows& next) {
  const F d;
  const auto* weights = reinterpret_cast<const float*>(p);
  float* out = acc + kRows * dim;
  float scaled[kRows][kPageTokens];
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t t = 0; t < kPageTokens; ++t) {
      scaled[r][t] = weights[score_index(t, r)] * factor[r];
    }
  }
  for (int64_t i = 0; i < dim; i += 2 * kLanes) {
    V sum[kRows][2];
    for (int64_t r = 0; r < kRows; ++r) {
      for (int j = 0; j < 2; ++j) sum[r][j] = hn::LoadU(d, out + r * dim + i + j * kLanes);
    }
    for (int64_t t = 0; t < v.tokens; ++t) {
      if (i == 0) next.fetch(t, 1);
      const V x[2] = {Widen(v.data + t * v.stride + i), Widen(v.data + t * v.stride + i + kLanes)};
      for (int64_t r = 0; r < kRows; ++r) {
        const V w = hn::Set(d, scaled[r][t]);
        for (int j = 0; j < 2; ++j) sum[r][j] = hn::MulAdd(x[j], w, sum[r][j]);
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int j = 0; j < 2; ++j) hn::StoreU(sum[r][j], d, out + r * dim + i + j * kLanes);
    }
  }
}

void WeighBf16(const Bf16Rows& v, int64_t dim, const std::byte* p, const float* factor, float* acc,
               const NextRows& next) {
  WeighRows<uint16_t>({v.data, v.stride, v.tokens}, dim, p, factor, acc, next);
}

void WeighExpanded(const ExpandedRows& v, int64_t dim, const std::byte* p, const float* factor,
                   float* acc, const NextRows& next) {
  WeighRows(RowsOf(v, dim), dim, p, factor, acc, next);
}

void AddMean(const uint16_t* mean, int64_t dim, const float* weight, float* acc) {
  const F d;
  for (int64_t r = 0; r < kRows; ++r) {
    const V w = hn::Set(d, weight[r]);
    float* out = acc + (kRows + r) * dim;
    for (int64_t i = 0; i < dim; i += kLanes) {
      hn::StoreU(hn::MulAdd(Widen(mean + i), w, hn::LoadU(d, out + i)), d, out + i);
    }
  }
}

void AddRow(const float* acc, int64_t dim, int64_t row, float* out) {
  for (int64_t i = 0; i < dim; ++i) {
    out[i] += acc[row * dim + CodeOrder(i)] + acc[(kRows + row) * dim + i];
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace

const DecodeKernels* KernelTable() {
  static constexpr DecodeKernels kKernels = {
      .name = "FP32",
      .query_bytes = QueryBytes,
      .pack_queries = PackQueries,
      .score_nvfp4 = ScoreNvfp4,
      .score_bf16 = ScoreBf16,
      .expand = expand_rows_f32,
      .score_expanded = ScoreExpanded,
      .dot_bf16 = DotBf16,
      .page_softmax = PageSoftmax,
      .weights_bytes = kWeightsBytes,
      .store_weights = StoreWeights,
      .merge_pages = MergePages,
      .page_masses = PageMasses,
      .accumulator_floats = AccumulatorFloats,
      .weigh_nvfp4 = WeighNvfp4,
      .weigh_bf16 = WeighBf16,
      .weigh_expanded = WeighExpanded,
      .add_mean = AddMean,
      .add_row = AddRow,
  };
  return &kKernels;
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(KernelTable);

const DecodeKernels* decode_kernels_f32() { return HWY_DYNAMIC_DISPATCH(KernelTable)(); }

}  // namespace thriftattn
#endif  // HWY_ONCE
