// SIMD kernels of gemv.h. Types of one element a block (FP32, BF16, FP16): a tile of 4 x 1 or 2 x 4
// (rows of W x rows of x) accumulators keeps enough independent chains in flight. Quantised types:
// one row of W at a time in four chains (expand-inl.h), summed straight from the registers for one
// or two rows of x; for more, each run of 256 elements is expanded once to L1.
#include "engine/gemv.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/gemv.cc"
#include "base/float_convert.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After the two above.
#include "engine/expand-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {

// ------------------------------------------------------------------ FP32, BF16, FP16

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

HWY_INLINE V LoadWeights(F d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE V LoadWeights(F d, const Brain* p) {
  const hn::Rebind<uint16_t, F> d16;
  const hn::RebindToUnsigned<F> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}
HWY_INLINE V LoadWeights(F d, const Half* p) {
  const hn::Rebind<hwy::float16_t, F> d16;
  const hn::RebindToUnsigned<decltype(d16)> du16;
  const auto bits = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p));
  return hn::PromoteTo(d, hn::BitCast(d16, bits));
}
HWY_INLINE float Scalar(float w) { return w; }
HWY_INLINE float Scalar(Brain w) { return bf16_to_f32(w.bits); }
HWY_INLINE float Scalar(Half w) { return fp16_to_f32(w.bits); }

template <int R, int M, typename W>
HWY_INLINE void Tile(const W* HWY_RESTRICT w, int64_t k, const float* HWY_RESTRICT x, float* y,
                     int64_t y_stride) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V acc[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) acc[r][m] = hn::Zero(d);
  }
  int64_t i = 0;
  for (; i + lanes <= k; i += lanes) {
    V xv[M];
    for (int m = 0; m < M; ++m) xv[m] = hn::LoadU(d, x + m * k + i);
    for (int r = 0; r < R; ++r) {
      const V wv = LoadWeights(d, w + r * k + i);
      for (int m = 0; m < M; ++m) acc[r][m] = hn::MulAdd(wv, xv[m], acc[r][m]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float sum = hn::GetLane(hn::SumOfLanes(d, acc[r][m]));
      for (int64_t j = i; j < k; ++j) sum += Scalar(w[r * k + j]) * x[m * k + j];
      y[m * y_stride + r] = sum;
    }
  }
}

template <int R, typename W>
HWY_INLINE void Rows(const W* HWY_RESTRICT w, const GemvArgs& a, int64_t m0, int64_t n0) {
  float* y = a.y + m0 * a.y_stride + n0;
  const float* x = a.x + m0 * a.k;
  switch (std::min<int64_t>(a.m - m0, 4)) {
    case 1:
      return Tile<R, 1>(w, a.k, x, y, a.y_stride);
    case 2:
      return Tile<R, 2>(w, a.k, x, y, a.y_stride);
    case 3:
      return Tile<R, 3>(w, a.k, x, y, a.y_stride);
    default:
      return Tile<R, 4>(w, a.k, x, y, a.y_stride);
  }
}

template <typename W>
HWY_INLINE void GemvPlain(const GemvArgs& a) {
  const W* w = reinterpret_cast<const W*>(a.w);
  int64_t n = 0;
  for (; a.m == 1 && n + 4 <= a.n; n += 4) Tile<4, 1>(w + n * a.k, a.k, a.x, a.y + n, a.y_stride);
  for (; n + 2 <= a.n; n += 2) {
    for (int64_t m = 0; m < a.m; m += 4) Rows<2>(w + n * a.k, a, m, n);
  }
  if (n < a.n) {
    for (int64_t m = 0; m < a.m; m += 4) Rows<1>(w + n * a.k, a, m, n);
  }
}

// ------------------------------------------------------------------ quantised types

HWY_INLINE float Total(V a, V b, V c, V e) {
  const F d;
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

// Multiplies M rows of x with the values as they come.
template <int M>
class DotSink {
 public:
  HWY_INLINE DotSink(const float* x, int64_t k) : x_(x), k_(k) {
    for (int c = 0; c < kChains; ++c) {
      for (int m = 0; m < M; ++m) acc_[c][m] = hn::Zero(F());
    }
  }
  template <int kChain>
  HWY_INLINE void Add(int64_t at, V w) {
    const F d;
    for (int m = 0; m < M; ++m) {
      acc_[kChain][m] = hn::MulAdd(w, hn::LoadU(d, x_ + m * k_ + at), acc_[kChain][m]);
    }
  }
  HWY_INLINE void Store(float* y, int64_t stride) const {
    for (int m = 0; m < M; ++m) {
      y[m * stride] = Total(acc_[0][m], acc_[1][m], acc_[2][m], acc_[3][m]);
    }
  }

 private:
  const float* x_;
  int64_t k_;
  V acc_[kChains][M];
};

class FloatSink {
 public:
  HWY_INLINE explicit FloatSink(float* out) : out_(out) {}
  template <int kChain>
  HWY_INLINE void Add(int64_t at, V w) {
    hn::StoreU(w, F(), out_ + at);
  }

 private:
  float* out_;
};

HWY_INLINE void StoreBf16(V value, uint16_t* to) {
  const hn::RebindToUnsigned<F> d32;
  const hn::RebindToSigned<F> di32;
  const hn::Rebind<uint16_t, F> d16;
  const auto bits = hn::BitCast(d32, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1u));
  const auto half = hn::Set(d32, 0x7fffu);
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, half), odd));
  // At most 0xffff, and DemoteTo saturates from signed 32-bit.
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, rounded)), d16, to);
}

class Bf16Sink {
 public:
  HWY_INLINE explicit Bf16Sink(uint16_t* out) : out_(out) {}
  template <int kChain>
  HWY_INLINE void Add(int64_t at, V w) {
    StoreBf16(w, out_ + at);
  }

 private:
  uint16_t* out_;
};

template <class B, int M>
HWY_INLINE void DotRow(const uint8_t* row, const GemvArgs& a, int64_t m, float* y) {
  DotSink<M> sink(a.x + m * a.k, a.k);
  ExpandRun<B>(row, 0, a.k, sink);
  sink.Store(y + m * a.y_stride, a.y_stride);
}

// The sums of DotSink, in memory, over a run of expanded values. M rows of x share its loads.
template <int M>
HWY_INLINE void AddRun(const float* values, const float* x, int64_t k, int64_t count, V* acc) {
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V sum[kChains][M];
  for (int c = 0; c < kChains; ++c) {
    for (int m = 0; m < M; ++m) sum[c][m] = acc[m * kChains + c];
  }
  const auto unit = [&](int64_t at, V* chain) HWY_ATTR {
    for (int64_t i = at; i < at + kUnit; i += lanes) {
      const V w = hn::Load(d, values + i);
      for (int m = 0; m < M; ++m) {
        chain[m] = hn::MulAdd(w, hn::LoadU(d, x + m * k + i), chain[m]);
      }
    }
  };
  int64_t i = 0;
  for (; i + kChains * kUnit <= count; i += kChains * kUnit) {
    unit(i, sum[0]);
    unit(i + kUnit, sum[1]);
    unit(i + 2 * kUnit, sum[2]);
    unit(i + 3 * kUnit, sum[3]);
  }
  if (i < count) {  // a block of 32
    unit(i, sum[0]);
    unit(i + kUnit, sum[1]);
  }
  for (int c = 0; c < kChains; ++c) {
    for (int m = 0; m < M; ++m) acc[m * kChains + c] = sum[c][m];
  }
}

template <class B>
HWY_INLINE void DotRowInRuns(const uint8_t* row, const GemvArgs& a, float* y) {
  constexpr int64_t kRun = 256;
  HWY_ALIGN float values[kRun];
  V acc[kGemvRows * kChains];
  for (V& v : acc) v = hn::Zero(F());
  for (int64_t i = 0; i < a.k; i += kRun) {
    const int64_t count = std::min(kRun, a.k - i);
    FloatSink sink(values);
    ExpandRun<B>(row + i / B::kElements * B::kBytes, 0, count, sink);
    int64_t m = 0;
    for (; m + 2 <= a.m; m += 2) {
      AddRun<2>(values, a.x + m * a.k + i, a.k, count, acc + m * kChains);
    }
    if (m < a.m) AddRun<1>(values, a.x + m * a.k + i, a.k, count, acc + m * kChains);
  }
  for (int64_t m = 0; m < a.m; ++m) {
    const V* sums = acc + m * kChains;
    y[m * a.y_stride] = Total(sums[0], sums[1], sums[2], sums[3]);
  }
}

template <class B>
HWY_INLINE void GemvBlocks(const GemvArgs& a) {
  const int64_t row_bytes = a.k / B::kElements * B::kBytes;
  for (int64_t n = 0; n < a.n; ++n) {
    const uint8_t* row = a.w + n * row_bytes;
    if (a.m == 1) {
      DotRow<B, 1>(row, a, 0, a.y + n);
    } else if (a.m == 2) {
      DotRow<B, 2>(row, a, 0, a.y + n);
    } else {
      DotRowInRuns<B>(row, a, a.y + n);
    }
  }
}

// ------------------------------------------------------------------ by type

void Gemv(const GemvArgs& args) {
  switch (args.type) {
    case GgmlType::f32:
      return GemvPlain<float>(args);
    case GgmlType::bf16:
      return GemvPlain<Brain>(args);
    case GgmlType::f16:
      return GemvPlain<Half>(args);
    case GgmlType::q4_0:
      return GemvBlocks<BlocksQ4_0>(args);
    case GgmlType::q5_0:
      return GemvBlocks<BlocksQ5_0>(args);
    case GgmlType::q8_0:
      return GemvBlocks<BlocksQ8_0>(args);
    case GgmlType::q4_k:
      return GemvBlocks<BlocksQ4K>(args);
    case GgmlType::q5_k:
      return GemvBlocks<BlocksQ5K>(args);
    case GgmlType::q6_k:
      return GemvBlocks<BlocksQ6K>(args);
  }
}

HWY_INLINE void StoreOne(float value, float* to) { *to = value; }
HWY_INLINE void StoreOne(float value, uint16_t* to) { *to = f32_to_bf16(value); }

template <class W, class Sink, class T>
HWY_INLINE void ExpandPlain(const uint8_t* in, int64_t count, T* to) {
  const W* w = reinterpret_cast<const W*>(in);
  const F d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  Sink sink(to);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sink.template Add<0>(i, LoadWeights(d, w + i));
  for (; i < count; ++i) StoreOne(Scalar(w[i]), to + i);
}

template <class B, class Sink, class T>
HWY_INLINE void ExpandBlocks(const uint8_t* in, int64_t count, T* to) {
  Sink sink(to);
  ExpandRun<B>(in, 0, count, sink);
}

template <class Sink, class T>
HWY_INLINE void ExpandAny(GgmlType type, const uint8_t* in, int64_t count, T* to) {
  switch (type) {
    case GgmlType::f32:
      return ExpandPlain<float, Sink>(in, count, to);
    case GgmlType::bf16:
      return ExpandPlain<Brain, Sink>(in, count, to);
    case GgmlType::f16:
      return ExpandPlain<Half, Sink>(in, count, to);
    case GgmlType::q4_0:
      return ExpandBlocks<BlocksQ4_0, Sink>(in, count, to);
    case GgmlType::q5_0:
      return ExpandBlocks<BlocksQ5_0, Sink>(in, count, to);
    case GgmlType::q8_0:
      return ExpandBlocks<BlocksQ8_0, Sink>(in, count, to);
    case GgmlType::q4_k:
      return ExpandBlocks<BlocksQ4K, Sink>(in, count, to);
    case GgmlType::q5_k:
      return ExpandBlocks<BlocksQ5K, Sink>(in, count, to);
    case GgmlType::q6_k:
      return ExpandBlocks<BlocksQ6K, Sink>(in, count, to);
  }
}

void ExpandF32(GgmlType type, const uint8_t* in, int64_t count, float* to) {
  ExpandAny<FloatSink>(type, in, count, to);
}
void ExpandBf16(GgmlType type, const uint8_t* in, int64_t count, uint16_t* to) {
  ExpandAny<Bf16Sink>(type, in, count, to);
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(Gemv);
HWY_EXPORT(ExpandF32);
HWY_EXPORT(ExpandBf16);

void gemv(const GemvArgs& args) { HWY_DYNAMIC_DISPATCH(Gemv)(args); }
void expand(GgmlType type, const uint8_t* blocks, int64_t count, float* to) {
  HWY_DYNAMIC_DISPATCH(ExpandF32)(type, blocks, count, to);
}
void expand(GgmlType type, const uint8_t* blocks, int64_t count, uint16_t* to) {
  HWY_DYNAMIC_DISPATCH(ExpandBf16)(type, blocks, count, to);
}
void widen_bf16(const uint16_t* from, int64_t count, float* to) {
  expand(GgmlType::bf16, reinterpret_cast<const uint8_t*>(from), count, to);
}
void narrow_bf16(const float* from, int64_t count, uint16_t* to) {
  expand(GgmlType::f32, reinterpret_cast<const uint8_t*>(from), count, to);
}

}  // namespace thriftattn
#endif  // HWY_ONCE
