// SIMD kernels of the attention tile (tile_kernels.h).
#include "attend/tile_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attend/tile_kernels.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;
using V = hn::Vec<F>;

// MR rows x NV vectors of C in registers. Every element of C is one chain of MulAdd over k in
// order, whatever MR and NV are: so a row's result does not depend on its neighbours.
template <int MR, int NV>
HWY_INLINE void MicroKernel(const TileMatmul& t, int64_t m0, int64_t n0) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V acc[MR][NV];
  float* HWY_RESTRICT c = t.c + m0 * t.ldc + n0;
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = t.accumulate ? hn::LoadU(d, c + i * t.ldc + j * lanes) : hn::Zero(d);
    }
  }
  const float* HWY_RESTRICT a = t.a + m0 * t.a_row;
  const float* HWY_RESTRICT b = t.b + n0;
  for (int64_t k = 0; k < t.k; ++k) {
    V bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = hn::LoadU(d, b + j * lanes);
    for (int i = 0; i < MR; ++i) {
      const V av = hn::Set(d, a[i * t.a_row]);
      for (int j = 0; j < NV; ++j) acc[i][j] = hn::MulAdd(av, bv[j], acc[i][j]);
    }
    a += t.a_k;
    b += t.ldb;
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) hn::StoreU(acc[i][j], d, c + i * t.ldc + j * lanes);
  }
}

template <int NV>
HWY_INLINE void ColumnPanel(const TileMatmul& t, int64_t n0) {
  int64_t m = 0;
  for (; m + 6 <= t.m; m += 6) MicroKernel<6, NV>(t, m, n0);
  if (m + 4 <= t.m) {
    MicroKernel<4, NV>(t, m, n0);
    m += 4;
  }
  if (m + 2 <= t.m) {
    MicroKernel<2, NV>(t, m, n0);
    m += 2;
  }
  if (m < t.m) MicroKernel<1, NV>(t, m, n0);
}

void Matmul(const TileMatmul& t) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t n = 0;
  for (; n + 2 * lanes <= t.n; n += 2 * lanes) ColumnPanel<2>(t, n);
  if (n < t.n) ColumnPanel<1>(t, n);
}

int64_t TileLanes() { return static_cast<int64_t>(hn::Lanes(F())); }

void FillRows(const ScoreBlock& b, const float* offset) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t c = 0; c < b.cols; c += lanes) {
    const V off = hn::LoadU(d, offset + c);
    for (int64_t t = 0; t < b.tokens; ++t) hn::StoreU(off, d, b.s + t * b.cols + c);
  }
}

void Softcap(const ScoreBlock& b, float softcap) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V cap = hn::Set(d, softcap), inv = hn::Set(d, 1.0f / softcap);
  for (int64_t i = 0; i < b.tokens * b.cols; i += lanes) {
    hn::StoreU(hn::Mul(cap, hn::Tanh(d, hn::Mul(hn::LoadU(d, b.s + i), inv))), d, b.s + i);
  }
}

// exp(x) for x <= 0, where -inf gives 0 (Highway's Exp underflows to 0 below about -104).
HWY_INLINE V ExpNonPositive(F d, V x) {
  return hn::Exp(d, hn::Max(x, hn::Set(d, -200.0f)));
}

void PageState(const ScoreBlock& b, float* m, float* l) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  // A column that sees nothing but -inf has m = -inf; the finite stand-in keeps the differences
  // below from being inf - inf.
  const V lowest = hn::Set(d, -3.0e38f);
  for (int64_t c = 0; c < b.cols; c += lanes) {
    V top = hn::LoadU(d, b.s + c);
    for (int64_t t = 1; t < b.tokens; ++t) top = hn::Max(top, hn::LoadU(d, b.s + t * b.cols + c));
    const V ref = hn::Max(top, lowest);
    V sum = hn::Zero(d);
    for (int64_t t = 0; t < b.tokens; ++t) {
      const V s = hn::LoadU(d, b.s + t * b.cols + c);
      sum = hn::Add(sum, hn::IfThenElseZero(hn::Gt(s, lowest), ExpNonPositive(d, hn::Sub(s, ref))));
    }
    hn::StoreU(top, d, m + c);
    hn::StoreU(sum, d, l + c);
  }
}

void MaxUpdate(const ScoreBlock& b, float* m) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t c = 0; c < b.cols; c += lanes) {
    V top = hn::LoadU(d, m + c);
    for (int64_t t = 0; t < b.tokens; ++t) top = hn::Max(top, hn::LoadU(d, b.s + t * b.cols + c));
    hn::StoreU(top, d, m + c);
  }
}

void ExpSum(const ScoreBlock& b, const float* m, float* out_sum) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V lowest = hn::Set(d, -3.0e38f);
  for (int64_t c = 0; c < b.cols; c += lanes) {
    const V ref = hn::Max(hn::LoadU(d, m + c), lowest);
    V sum = hn::Zero(d);
    for (int64_t t = 0; t < b.tokens; ++t) {
      float* at = b.s + t * b.cols + c;
      const V s = hn::LoadU(d, at);
      const V p = hn::IfThenElseZero(hn::Gt(s, lowest), ExpNonPositive(d, hn::Sub(s, ref)));
      sum = hn::Add(sum, p);
      hn::StoreU(p, d, at);
    }
    hn::StoreU(sum, d, out_sum + c);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(Matmul);
HWY_EXPORT(TileLanes);
HWY_EXPORT(FillRows);
HWY_EXPORT(Softcap);
HWY_EXPORT(PageState);
HWY_EXPORT(MaxUpdate);
HWY_EXPORT(ExpSum);

void tile_matmul(const TileMatmul& args) { HWY_DYNAMIC_DISPATCH(Matmul)(args); }
int64_t tile_lanes() { return HWY_DYNAMIC_DISPATCH(TileLanes)(); }
void tile_fill_rows(const ScoreBlock& block, const float* offset) {
  HWY_DYNAMIC_DISPATCH(FillRows)(block, offset);
}
void tile_softcap(const ScoreBlock& block, float softcap) {
  HWY_DYNAMIC_DISPATCH(Softcap)(block, softcap);
}
void tile_page_state(const ScoreBlock& block, float* m, float* l) {
  HWY_DYNAMIC_DISPATCH(PageState)(block, m, l);
}
void tile_max_update(const ScoreBlock& block, float* m) {
  HWY_DYNAMIC_DISPATCH(MaxUpdate)(block, m);
}
void tile_exp_sum(const ScoreBlock& block, const float* m, float* sum) {
  HWY_DYNAMIC_DISPATCH(ExpSum)(block, m, sum);
}

}  // namespace thriftattn
#endif  // HWY_ONCE
