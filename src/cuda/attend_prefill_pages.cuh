// The warpgroups of attend_prefill that fill tiles: K and V of page after page as FP16, whatever
// the page holds; one of K and one of V, or one of both. What a page holds travels by asynchronous
// copies to where its tile will be, several sides (K or V of a page) ahead, and is expanded in
// place: a thread copies exactly what its own chunks are made of, so that it waits for its own
// copies only.
//
// Of codes (and FP8 rows) a thread has 16 dims (one block, two chunks) of two tokens of a panel, 8
// apart; of BF16 rows one chunk of every fourth token. Either way the eight lanes that store
// together hit different banks. Facts and means of pages come kPageBatch pages at a time.
#pragma once

#include "base/float_convert.h"
#include "cuda/attend_args.cuh"
#include "cuda/attend_prefill_convert.cuh"
#include "cuda/attend_prefill_tile.cuh"
#include "cuda/plane_formats.cuh"

namespace thriftattn::cuda {

// Tiles of K a page has. Base and residual of layered K are one tile, rounded to FP16's 11 bits,
// and so are codes times scales of FP8 rows; beside FP32 queries they are two.
__device__ inline int prefill_k_tiles(const AttendArgs& a) {
  return a.two_terms != 0 && (a.g.k.layered() || a.g.k.kind == SideKind::fp8) ? 2 : 1;
}

// What a filling warpgroup fills.
inline constexpr int kFillKeys = 1, kFillValues = 2;

// What codes of a base plane are multiplied with beside their scales: an FP16 pair; of MXFP4 the
// power of two that is the tile's unit.
struct BaseFactor {
  uint32_t factor;
  int exponent;
};

template <int D, int kSides>
class PrefillPages {
 public:
  static constexpr bool kKeys = (kSides & kFillKeys) != 0, kValues = (kSides & kFillValues) != 0;
  struct Tiles {
    uint32_t q = 0, q_low = 0, k = 0, v = 0;  // shared addresses
    uint8_t* k_means = nullptr;
    uint8_t* v_means = nullptr;
  };

  __device__ PrefillPages(const AttendArgs& a, const TileView& v, int head, int64_t seq_head,
                          PrefillShared& shared, const Tiles& tiles)
      : a_(a),
        shared_(shared),
        tiles_(tiles),
        head_(head),
        length_(v.length),
        page_begin_(v.page_begin),
        items_(v.items) {
    facts_ =
        workspace_at<const PageFacts>(a, a.ws.facts) + seq_head * a.limits.max_pages + v.page_begin;
    const int lane = thread_ % 32;
    block_ = lane & 3;
    token_ = warp_ * 16 + (lane >> 2);
    low_ = token_ * 128 + (((2 * block_) ^ (token_ & 7)) << 4);
    high_ = token_ * 128 + (((2 * block_ + 1) ^ (token_ & 7)) << 4);
    row_token_ = warp_ * 16 + (lane >> 3);
    row_chunk_ = lane & 7;
  }

  // Fills the tiles of every item.
  __device__ void run(const TileView& v);

 private:
  static constexpr int kPanels = D / 64;
  static constexpr int kTogether = kPanels % 2 == 0 ? 2 : 1;  // panels expanded at a time
  static constexpr uint32_t kTile = prefill_tile_bytes(D);
  static constexpr uint32_t kPanel = 64 * 128;

  __device__ const PageFacts& facts(int item) const {
    return shared_.facts[kKeys ? 0 : 1][item / kPageBatch % 4][item % kPageBatch];
  }
  __device__ int held(int item) const { return min(kPage, length_ - (page_begin_ + item) * kPage); }
  __device__ bool planes(const SideGeometry& side, const PageFacts& f) const {
    return side.layered() && f.open < 0;
  }
  __device__ const uint8_t* side_at(const SideGeometry& side, const PageFacts& f) const {
    return a_.call.memory.pages + int64_t{f.slot} * a_.g.slot_bytes + side.start +
           int64_t{head_} * side.head_bytes;
  }
  __device__ const uint8_t* rows_at(const SideGeometry& side, const PageFacts& f,
                                    int open_offset) const {
    if (!side.layered()) return side_at(side, f) + side.rows;
    return a_.call.memory.open + int64_t{f.open} * a_.g.open_bytes + open_offset +
           int64_t{head_} * (kPage * 2 * D);
  }
  __device__ const uint8_t* residual_at(const SideGeometry& side, const PageFacts& f) const {
    return a_.call.memory.residuals + int64_t{f.residual} * a_.g.residual_bytes + side.res_codes;
  }
  __device__ void fetch_plain(const SideGeometry& side, const uint8_t* rows, int item,
                              uint32_t tile) const {
    if (side.kind == SideKind::fp8) {
      fetch_fp8(tile, rows, held(item));
    } else {
      fetch_rows(tile, rows, held(item));
    }
  }
  __device__ uint8_t* v_mean(int stage) const {
    return tiles_.v_means + (stage * 4 + warp_) * (2 * D);
  }

  __device__ void fetch_facts(int batch) const;
  __device__ void fetch_means(int batch) const;
  __device__ void fetch_blocks(uint32_t tile, const uint8_t* plane, int behind) const;
  template <class Format>
  __device__ void fetch_groups(uint32_t tile, const uint8_t* plane) const;
  __device__ void fetch_base(const SideGeometry& side, uint32_t tile, const uint8_t* plane) const;
  __device__ void fetch_rows(uint32_t tile, const uint8_t* rows, int tokens) const;
  __device__ void fetch_fp8(uint32_t tile, const uint8_t* rows, int tokens) const;
  __device__ void fetch_k(int item, int part, uint32_t tile) const;
  __device__ void fetch_v(int item, int stage) const;
  __device__ void fetch_next();

  __device__ void expand_mean(const PageFacts& f, int stage) const;
  template <bool kBoth, bool kMean>
  __device__ void expand_blocks(uint32_t tile, uint32_t factor, uint32_t residual,
                                uint32_t mean) const;
  template <class Format, bool kBoth, bool kMean>
  __device__ void expand_groups(uint32_t tile, const BaseFactor& base, uint32_t residual,
                                uint32_t mean) const;
  template <bool kMean>
  __device__ void expand_planes(const SideGeometry& side, uint32_t tile, bool both,
                                const BaseFactor& base, uint32_t residual, uint32_t mean) const;
  template <bool kScaled>
  __device__ void expand_rows(uint32_t tile, float up) const;
  template <bool kLeft>
  __device__ void expand_fp8(uint32_t tile, float up) const;
  __device__ void expand_plain(const SideGeometry& side, uint32_t tile, float up) const;
  __device__ void expand_k(uint32_t tile, const PageFacts& f, int part) const;
  __device__ void expand_v(uint32_t tile, const PageFacts& f, int stage) const;
  __device__ void begin_batch(int batch) const;
  __device__ void offsets(int batch) const;
  __device__ void write_decisions(const TileView& v, const PageFacts& f, int page) const;

  const AttendArgs& a_;
  PrefillShared& shared_;
  const Tiles tiles_;
  int head_, length_, page_begin_, items_;
  const PageFacts* facts_;
  const int thread_ = threadIdx.x % 128, warp_ = thread_ / 32;  // of the warpgroup
  int block_, token_, low_, high_;  // codes: the block, its first token, its two chunks in a panel
  int row_token_, row_chunk_;       // rows
  struct Ring {
    int stage = 0;
    uint32_t parity = 1;  // a stage that was never filled is empty
    __device__ void next(int stages) {
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  } next_k_, next_v_;
  // The next side to fetch: K's tiles of item 0, V of item 0, K's of item 1 ...
  int k_tiles_ = prefill_k_tiles(a_), next_item_ = 0, next_side_ = 0;
};

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_facts(int batch) const {
  const int item = batch * kPageBatch + thread_ / 2, half = thread_ % 2 * 16;
  if (thread_ >= 2 * kPageBatch || item >= items_) return;
  copy_async<16>(shared_address(&facts(item)) + half,
                 reinterpret_cast<const uint8_t*>(facts_ + item) + half);
}

// K's means, of open pages the reference that they were centred by.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_means(int batch) const {
  constexpr int kChunks = D / 8;
  const uint32_t to = shared_address(tiles_.k_means) + batch % 2 * (kPageBatch * 2 * D);
  for (int i = thread_; i < kPageBatch * kChunks; i += 128) {
    const int item = batch * kPageBatch + i / kChunks;
    if (item >= items_) return;
    const PageFacts& f = facts(item);
    const uint8_t* mean = f.open >= 0 ? a_.call.memory.open + int64_t{f.open} * a_.g.open_bytes +
                                            a_.g.open_reference + int64_t{head_} * (2 * D)
                                      : side_at(a_.g.k, f) + a_.g.k.mean;
    copy_async<16>(to + i * 16, mean + i % kChunks * 16);
  }
}

// Codes into the thread's lower chunk, 4 scales of which one is the thread's into the upper one.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_blocks(uint32_t tile, const uint8_t* plane,
                                                      int behind) const {
  const uint8_t* codes = plane + token_ * (D / 2) + block_ * 8;
  const uint8_t* scales = plane + 32 * D + token_ * (D / 16);
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = tile + p * kPanel + i * 1024;
      copy_async<8>(at + low_ + behind * 8, codes + i * 8 * (D / 2) + p * 32);
      copy_async<4>(at + high_ + behind * 4, scales + i * 8 * (D / 16) + p * 4);
    }
  }
}

// Tokens that are not there yet become zeros.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_rows(uint32_t tile, const uint8_t* rows,
                                                    int tokens) const {
  const uint8_t* from = rows + row_token_ * (2 * D) + row_chunk_ * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = row_token_ + 4 * i;
    const uint32_t at = tile + token * 128 + ((row_chunk_ ^ (token & 7)) << 4);
    const int bytes = token < tokens ? 16 : 0;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      copy_async<16>(at + p * kPanel, from + i * 4 * (2 * D) + p * 128, bytes);
    }
  }
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_fp8(uint32_t tile, const uint8_t* rows,
                                                   int tokens) const {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint8_t* row = rows + (token_ + 8 * i) * (D + 4);
    const int bytes = token_ + 8 * i < tokens ? 4 : 0;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const uint32_t at = tile + p * kPanel + i * 1024;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        copy_async<4>(at + low_ + 4 * w, row + 4 + p * 64 + block_ * 16 + 4 * w, bytes);
      }
      copy_async<4>(at + high_, row, bytes);
    }
  }
}

// Part 1 of two tiles is the residual by itself, or what FP16 left of FP8 rows.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_k(int item, int part, uint32_t tile) const {
  const SideGeometry& side = a_.g.k;
  const PageFacts& f = facts(item);
  if (planes(side, f)) {
    if (part == 0) fetch_base(side, tile, side_at(side, f) + side.codes);
    if (f.residual >= 0 && part == k_tiles_ - 1) {
      fetch_blocks(tile, residual_at(side, f), part == 0 ? 1 : 0);
    }
  } else if (part == 0 || side.kind == SideKind::fp8) {
    fetch_plain(side, rows_at(side, f, 0), item, tile);
  }
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_v(int item, int stage) const {
  const SideGeometry& side = a_.g.v;
  const PageFacts& f = facts(item);
  const uint32_t tile = tiles_.v + stage * kTile;
  if (!planes(side, f)) return fetch_plain(side, rows_at(side, f, a_.g.open_v), item, tile);
  fetch_base(side, tile, side_at(side, f) + side.codes);
  if (f.residual >= 0) fetch_blocks(tile, residual_at(side, f), 1);
  const int lane = thread_ % 32;
  if (lane < D / 8) {
    copy_async<16>(shared_address(v_mean(stage)) + lane * 16,
                   side_at(side, f) + side.mean + lane * 16);
  }
}

// One group of copies, of nothing behind the last item.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::fetch_next() {
  if (next_item_ < items_) {
    if (kKeys && (!kValues || next_side_ < k_tiles_)) {
      barrier_wait(&shared_.k_empty[next_k_.stage], next_k_.parity);
      fetch_k(next_item_, next_side_, tiles_.k + next_k_.stage * kTile);
      next_k_.next(a_.stages);
    } else {
      barrier_wait(&shared_.v_empty[next_v_.stage], next_v_.parity);
      fetch_v(next_item_, next_v_.stage);
      next_v_.next(a_.stages);
    }
    if (++next_side_ == (kKeys ? k_tiles_ : 0) + (kValues ? 1 : 0)) {
      next_side_ = 0;
      ++next_item_;
    }
  }
  copies_commit();
}

// V's mean, in units of the tile and in place: by the lanes that copied it, for their warp.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::expand_mean(const PageFacts& f, int stage) const {
  const int lane = thread_ % 32;
  if (!planes(a_.g.v, f) || lane >= D / 8) return;
  const uint32_t at = shared_address(v_mean(stage)) + lane * 16;
  store_chunk(at, chunk_of_bf16<true>(load_chunk(at), power_of_two(-f.v_exponent)));
}

// Values are code * scale * factor (+ those of the residual) + mean.
template <int D, int kSides>
template <bool kBoth, bool kMean>
__device__ void PrefillPages<D, kSides>::expand_blocks(uint32_t tile, uint32_t factor,
                                                       uint32_t residual, uint32_t mean) const {
#pragma unroll
  for (int first = 0; first < kPanels; first += kTogether) {
    uint4 codes[kTogether][2];  // words of the base, then of the residual
    uint2 scales[kTogether][2];
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t at = tile + (first + p) * kPanel + i * 1024;
        codes[p][i] = load_chunk(at + low_);
        scales[p][i] = load_half_chunk(at + high_);
      }
    }
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
      uint32_t m[8] = {};
      if constexpr (kMean) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 y = load_chunk(mean + (first + p) * 128 + block_ * 32 + h * 16);
          m[4 * h] = y.x, m[4 * h + 1] = y.y, m[4 * h + 2] = y.z, m[4 * h + 3] = y.w;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 x = codes[p][i];
        const uint32_t s = hmul2(scale_both(scales[p][i].x >> (8 * block_) & 255u), factor);
        const uint32_t s_res =
            kBoth ? hmul2(scale_both(scales[p][i].y >> (8 * block_) & 255u), residual) : 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Expanded e = expand_e2m1(h == 0 ? x.x : x.y);
          uint4 y = {hfma2(e.even_low, s, m[4 * h]), hfma2(e.even_high, s, m[4 * h + 1]),
                     hfma2(e.odd_low, s, m[4 * h + 2]), hfma2(e.odd_high, s, m[4 * h + 3])};
          if constexpr (kBoth) {
            const Expanded r = expand_e2m1(h == 0 ? x.z : x.w);
            y = {hfma2(r.even_low, s_res, y.x), hfma2(r.even_high, s_res, y.y),
                 hfma2(r.odd_low, s_res, y.z), hfma2(r.odd_high, s_res, y.w)};
          }
          store_chunk(tile + (first + p) * kPanel + i * 1024 + (h == 0 ? low_ : high_), y);
        }
      }
    }
  }
}

// A base plane, and where it is held the residual.
template <int D, int kSides>
template <bool kMean>
__device__ void PrefillPages<D, kSides>::expand_planes(const SideGeometry& side, uint32_t tile,
                                                       bool both, const BaseFactor& base,
                                                       uint32_t residual, uint32_t mean) const {
  const auto expand = [&]<bool kBoth>() {
    if (side.kind == SideKind::int3) {
      expand_groups<Int3Plane, kBoth, kMean>(tile, base, residual, mean);
    } else if (side.kind == SideKind::mxfp4) {
      expand_groups<Mxfp4Plane, kBoth, kMean>(tile, base, residual, mean);
    } else {
      expand_blocks<kBoth, kMean>(tile, base.factor, residual, mean);
    }
  };
  if (both) {
    expand.template operator()<true>();
  } else {
    expand.template operator()<false>();
  }
}

template <int D, int kSides>
template <bool kScaled>
__device__ void PrefillPages<D, kSides>::expand_rows(uint32_t tile, float up) const {
  // Rows 4 apart: chunks of every second one are swapped alike.
  const uint32_t even = tile + row_token_ * 128 + ((row_chunk_ ^ (row_token_ & 7)) << 4);
  const uint32_t odd = tile + (row_token_ + 4) * 128 + ((row_chunk_ ^ ((row_token_ + 4) & 7)) << 4);
#pragma unroll
  for (int first = 0; first < kPanels; first += kTogether) {
    uint4 x[kTogether][4];
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[p][i] = load_chunk((i % 2 == 0 ? even : odd) + i / 2 * 1024 + (first + p) * kPanel);
      }
    }
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_chunk((i % 2 == 0 ? even : odd) + i / 2 * 1024 + (first + p) * kPanel,
                    chunk_of_bf16<kScaled>(x[p][i], up));
      }
    }
  }
}

template <int D, int kSides>
template <bool kLeft>
__device__ void PrefillPages<D, kSides>::expand_fp8(uint32_t tile, float up) const {
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = tile + p * kPanel + i * 1024;
      const uint4 x = load_chunk(at + low_);
      const float scale = __uint_as_float(load_half_chunk(at + high_).x) * up * 256.0f;
      const uint32_t s = half_pair(scale, scale);
      const float left = scale - __half2float(__float2half_rn(scale));
      const uint32_t rest = half_pair(left, left);
      store_chunk(at + low_, chunk_of_fp8<kLeft>(x.x, x.y, s, rest));
      store_chunk(at + high_, chunk_of_fp8<kLeft>(x.z, x.w, s, rest));
    }
  }
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::expand_plain(const SideGeometry& side, uint32_t tile,
                                                      float up) const {
  if (side.kind == SideKind::fp8) {
    expand_fp8<false>(tile, up);
  } else if (up == 1.0f) {
    expand_rows<false>(tile, up);
  } else {
    expand_rows<true>(tile, up);
  }
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::expand_k(uint32_t tile, const PageFacts& f,
                                                  int part) const {
  constexpr uint32_t kOne = 0x3c003c00;
  const uint32_t ratio = half_pair(f.k_tile, f.k_tile);
  const bool in_planes = planes(a_.g.k, f);
  if (in_planes && part == 0) {
    const int exponent = (__float_as_int(f.k_factor) >> 23) - 127;  // of MXFP4's k_factor
    expand_planes<false>(a_.g.k, tile, k_tiles_ == 1 && f.residual >= 0, {kOne, exponent}, ratio,
                         0);
  } else if (in_planes && f.residual >= 0) {
    expand_blocks<false, false>(tile, ratio, 0, 0);
  } else if (part == 0) {
    expand_plain(a_.g.k, tile, f.k_tile);
  } else if (a_.g.k.kind == SideKind::fp8) {
    expand_fp8<true>(tile, f.k_tile);
  } else {
    for (uint32_t i = thread_; i < kTile / 16; i += 128) {
      store_chunk(tile + i * 16, make_uint4(0, 0, 0, 0));
    }
  }
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::expand_v(uint32_t tile, const PageFacts& f,
                                                  int stage) const {
  if (planes(a_.g.v, f)) {
    const uint32_t factor = __byte_perm(f.v_factors, 0, 0x1010);
    const uint32_t residual = __byte_perm(f.v_factors, 0, 0x3232);
    expand_planes<true>(a_.g.v, tile, f.residual >= 0, {factor, f.v_exponent}, residual,
                        shared_address(v_mean(stage)));
  } else {
    expand_plain(a_.g.v, tile, power_of_two(-f.v_exponent));
  }
}

// q'.mean of the pages of a batch, for the 32 rows of each warp: FP16 tensor products of q' in two
// terms with the means, exact in FP16.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::offsets(int batch) const {
  const int lane = thread_ % 32, g = lane / 4, j = lane % 4;
  const int row = warp_ * 32, item = batch * kPageBatch + g;
  const bool exists = item < items_;
  const float factor = exists ? power_of_two(facts(item).mean_exponent) : 0.0f;
  const float up = exists ? power_of_two(-facts(item).mean_exponent) : 0.0f;
  const auto* mean =
      reinterpret_cast<const uint16_t*>(tiles_.k_means) + (batch % 2 * kPageBatch + g) * D;
  float sum[2][4] = {};
  const int d = (j & 1) << 1 | j >> 1;  // the dims at places 2j, 2j + 1 are d, d + 4
#pragma unroll 2
  for (int i = 0; i < D / 16; ++i) {
    uint32_t b[2] = {0, 0};
    if (exists) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint16_t* at = mean + 16 * i + 8 * h + d;
        b[h] = half_pair(bf16_to_f32(at[0]) * up, bf16_to_f32(at[4]) * up);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t x[4];
      load_left(x, tiles_.q, kPrefillRows, row + 16 * m, i, lane);
      mma_f16(sum[m], x, b[0], b[1]);
      load_left(x, tiles_.q_low, kPrefillRows, row + 16 * m, i, lane);
      mma_f16(sum[m], x, b[0], b[1]);
    }
  }
  // Columns 2j, 2j + 1 are pages, whose factors are lanes' of these g.
  const float f0 = __shfl_sync(0xffffffffu, factor, 8 * j);
  const float f1 = __shfl_sync(0xffffffffu, factor, 8 * j + 4);
  float(*to)[kPrefillRows] = shared_.offsets[batch % 2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * m + 8 * h + g;
      const float up_row = shared_.row_factor[r];
      to[2 * j][r] = sum[m][2 * h] * up_row * f0;
      to[2 * j + 1][r] = sum[m][2 * h + 1] * up_row * f1;
    }
  }
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::write_decisions(const TileView& v, const PageFacts& f,
                                                         int page) const {
  const int row = v.first_row + thread_;
  if (row >= v.end_row || row % a_.g.group != 0) return;
  const int seq = blockIdx.x % (a_.g.kv_heads * static_cast<int>(a_.limits.batch)) / a_.g.kv_heads;
  Decision d = Decision::plain;
  if (a_.g.any_layered()) {
    d = f.open >= 0 ? Decision::open : f.residual >= 0 ? Decision::full : Decision::base;
  }
  const int64_t at =
      (int64_t{seq} * a_.limits.step_tokens + row / a_.g.group) * a_.limits.max_pages + page;
  a_.call.decisions[at * a_.g.kv_heads + head_] = static_cast<uint8_t>(d);
}

// Every thread's copies of the batches before have landed: facts of this batch and the next one,
// and K's means of this one, are there for all.
template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::begin_batch(int batch) const {
  filler_barrier(kKeys ? 1 : 2);
  fetch_facts(batch + 2);
  if (!kKeys || !a_.g.k.layered()) return;
  fetch_means(batch + 1);
  offsets(batch);
}

template <int D, int kSides>
__device__ void PrefillPages<D, kSides>::run(const TileView& v) {
  // Sides on their way; the more, the fewer tiles are ready ahead of the attending warps. K and V
  // in turn: a side is fetched when the one 2 * stages before it was given back, for which the
  // attending warps may need the keys of the page behind it: less than 2 * stages - 1. By
  // themselves: `stages` before it; at most `stages`.
  int ahead = a_.stages > 2 ? 2 : 1;
  if (kKeys && kValues) ahead = a_.stages > 2 ? a_.stages - 1 : a_.stages;
  fetch_facts(0);
  fetch_facts(1);
  copies_commit();
  copies_wait(1);
  filler_barrier(kKeys ? 1 : 2);
  if (kKeys && a_.g.k.layered()) fetch_means(0);
  for (int i = 0; i < ahead; ++i) fetch_next();
  Ring keys, values;
  for (int n = 0; n < items_; ++n) {
    copies_wait(ahead);
    if (n % kPageBatch == 0) begin_batch(n / kPageBatch);
    const PageFacts f = facts(n);
    if constexpr (kKeys) {
      if (a_.call.decisions != nullptr) write_decisions(v, f, page_begin_ + n);
      for (int part = 0; part < k_tiles_; ++part) {
        if (part > 0) copies_wait(ahead);
        expand_k(tiles_.k + keys.stage * kTile, f, part);
        if (thread_ == 0) shared_.notes[keys.stage] = {f.k_factor, f.v_exponent};
        fence_stores_before_products();
        barrier_arrive(&shared_.k_full[keys.stage]);
        keys.next(a_.stages);
        fetch_next();
      }
    }
    if constexpr (kValues) {
      if (kKeys) copies_wait(ahead);
      expand_mean(f, values.stage);
      __syncwarp();
      expand_v(tiles_.v + values.stage * kTile, f, values.stage);
      fence_stores_before_products();
      barrier_arrive(&shared_.v_full[values.stage]);
      __syncwarp();  // and is read by all before it is copied again
      values.next(a_.stages);
      fetch_next();
    }
  }
}

}  // namespace thriftattn::cuda
