// NVFP4 of a page on the best SIMD target. The encoder works a row at a time: t and the block
// maxima, the two candidate scales of all blocks at once, then both candidates of each block;
// it follows nvfp4_scalar.cc operation by operation, so the bytes are the same.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/nvfp4.cc"
// clang-format off: foreach_target.h comes before what it includes again for each target.
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// clang-format on
#include <limits>

#include "formats/codec_simd-inl.h"
#include "formats/nvfp4.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn {
namespace HWY_NAMESPACE {
namespace {

#if HWY_TARGET != HWY_SCALAR

// One vector never spans two scale blocks.
using DF = hn::CappedTag<float, 16>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(DF()));

constexpr int64_t kChunk = 256;  // columns encoded at a time
constexpr int64_t kChunkBlocks = kChunk / kNvfp4Group;

struct ChunkBuffers {
  alignas(64) float t[kChunk];
  // Per block, padded to whole vectors.
  alignas(64) float amax[kChunkBlocks + 16];
  alignas(64) float scale6[kChunkBlocks + 16];
  alignas(64) float scale4[kChunkBlocks + 16];
  alignas(64) uint32_t code6[kChunkBlocks + 16];
  alignas(64) uint32_t code4[kChunkBlocks + 16];
  alignas(64) uint8_t doubled[kChunk];
};

// Quantises a block with `scale`: the grid values (of |t|) go to `values`; returns the error.
HWY_INLINE float QuantizeBlock(const float* HWY_RESTRICT t, float scale,
                               float* HWY_RESTRICT values) {
  const DF d;
  // A zero scale has zero codes: |t| / infinity.
  const auto divisor = hn::Set(d, scale == 0.0f ? std::numeric_limits<float>::infinity() : scale);
  const auto multiplier = hn::Set(d, scale);
  alignas(64) float quads[16];
  for (int64_t i = 0; i < kNvfp4Group; i += kLanes) {
    const auto a = hn::Abs(hn::Load(d, t + i));
    const auto v = RoundE2m1(d, a, divisor);
    hn::Store(v, d, values + i);
    const auto diff = hn::Sub(a, hn::Mul(v, multiplier));
    auto sum = hn::Mul(diff, diff);
    sum = hn::Add(sum, hn::Shuffle2301(sum));  // adjacent pairs
    sum = hn::Add(sum, hn::Shuffle1032(sum));  // pairs of pairs
    hn::Store(sum, d, quads + i);
  }
  return (quads[0] + quads[4]) + (quads[8] + quads[12]);
}

// Both scales of every block of the chunk.
HWY_INLINE void CandidateScales(ChunkBuffers& buf, int64_t blocks) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  for (int64_t b = blocks; b < blocks + kLanes; ++b) buf.amax[b] = 0.0f;
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const auto amax = hn::LoadU(d, buf.amax + b);
    const auto code6 = EncodeE4m3(d, hn::Div(amax, hn::Set(d, 6.0f)));
    const auto code4 = EncodeE4m3(d, hn::Div(amax, hn::Set(d, 4.0f)));
    hn::StoreU(code6, du, buf.code6 + b);
    hn::StoreU(code4, du, buf.code4 + b);
    hn::StoreU(DecodeE4m3(d, code6), d, buf.scale6 + b);
    hn::StoreU(DecodeE4m3(d, code4), d, buf.scale4 + b);
  }
}

HWY_INLINE uint8_t EncodeBlock(ChunkBuffers& buf, int64_t b) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  const float* t = buf.t + b * kNvfp4Group;
  alignas(64) float values[2][kNvfp4Group];
  const float error6 = QuantizeBlock(t, buf.scale6[b], values[0]);
  bool take4 = false;
  if (buf.amax[b] / 4.0f <= kScale4Limit) {
    take4 = QuantizeBlock(t, buf.scale4[b], values[1]) < error6;
  }
  const float* v = values[take4 ? 1 : 0];
  const uint8_t scale = static_cast<uint8_t>(take4 ? buf.code4[b] : buf.code6[b]);
  // A zero scale has no signs either.
  const auto sign_bit = hn::Set(du, scale == 0 ? 0u : 0x80000000u);
  for (int64_t i = 0; i < kNvfp4Group; i += kLanes) {
    StoreDoubled(d, hn::Load(d, v + i), hn::Load(d, t + i), sign_bit,
                 buf.doubled + b * kNvfp4Group + i);
  }
  return scale;
}

void EncodeChunk(const float* HWY_RESTRICT x, int64_t n, float page_scale, ChunkBuffers& buf,
                 uint8_t* HWY_RESTRICT codes, uint8_t* HWY_RESTRICT scales) {
  const DF d;
  const auto divisor = hn::Set(d, page_scale);
  const int64_t blocks = n / kNvfp4Group;
  for (int64_t b = 0; b < blocks; ++b) {
    auto amax = hn::Zero(d);
    for (int64_t i = b * kNvfp4Group; i < (b + 1) * kNvfp4Group; i += kLanes) {
      const auto t = hn::Div(hn::LoadU(d, x + i), divisor);
      hn::Store(t, d, buf.t + i);
      amax = hn::Max(amax, hn::Abs(t));
    }
    buf.amax[b] = hn::GetLane(hn::MaxOfLanes(d, amax));
  }
  CandidateScales(buf, blocks);
  for (int64_t b = 0; b < blocks; ++b) scales[b] = EncodeBlock(buf, b);
  PackE2m1(buf.doubled, n, codes);
}

#endif  // HWY_TARGET != HWY_SCALAR

float EncodePage(const float* x, int64_t rows, int64_t dim, uint8_t* codes, uint8_t* scales) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kFixedVectors) {
    // Blocks are dense over the page, so rows need not be told apart.
    const int64_t n = rows * dim;
    const float page_scale = usable_scale(AmaxOfVectors(DF(), x, n) / kNvfp4Max);
    ChunkBuffers buf;
    for (int64_t i = 0; i < n; i += kChunk) {
      EncodeChunk(x + i, HWY_MIN(kChunk, n - i), page_scale, buf, codes + i / 2,
                  scales + i / kNvfp4Group);
    }
    return page_scale;
  }
#endif
  return nvfp4_encode_page_scalar(x, rows, dim, codes, scales);
}

void DecodePage(const uint8_t* codes, const uint8_t* scales, float page_scale, int64_t rows,
                int64_t dim, float* out) {
  DecodeNvfp4Rows(hn::CappedTag<float, 16>(), codes, scales, page_scale, rows, dim, out);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thriftattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thriftattn {

HWY_EXPORT(EncodePage);
HWY_EXPORT(DecodePage);

float nvfp4_encode_page(const float* x, int64_t rows, int64_t dim, uint8_t* codes,
                        uint8_t* scales) {
  nvfp4_check_dim(dim);
  return HWY_DYNAMIC_DISPATCH(EncodePage)(x, rows, dim, codes, scales);
}

void nvfp4_decode_page(const uint8_t* codes, const uint8_t* scales, float page_scale, int64_t rows,
                       int64_t dim, float* out) {
  nvfp4_check_dim(dim);
  HWY_DYNAMIC_DISPATCH(DecodePage)(codes, scales, page_scale, rows, dim, out);
}

}  // namespace thriftattn
#endif  // HWY_ONCE
