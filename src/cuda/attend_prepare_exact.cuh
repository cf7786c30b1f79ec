// The exact part of a row's floor: the tokens that it sees of its first page and of its own. The
// positions of a pass are at most 16 in a row, so that there are at most two pages of each kind; a
// warp takes 16 tokens of a page, for all rows of the block. Every decoded number of K's base is a
// BF16 number without its page's or its row's scale, so the scores are as exact as FP32 sums are.
#pragma once

#include "cuda/attend_prepare_rows.cuh"
#include "cuda/plane_formats.cuh"

namespace thriftattn::cuda {

struct ExactPage {
  const uint8_t* rows =
      nullptr;  // K of the head in its page slot, or of an open page; nullptr: nothing to read
  const uint16_t* mean = nullptr;  // K's mean or reference, of layered K
  bool open = false;
  bool own = false;
  int page = 0;
  float scale = 1;  // of the page
};

// Job 0: the first page of the first position, 1: its own page; 2, 3: of the last position, where
// they are others.
__device__ inline ExactPage exact_page(const AttendArgs& a, const TileView& v, int head, int job) {
  const auto page_of = [&](int i, bool own) { return (own ? v.end(i) - 1 : v.begin(i)) / kPage; };
  ExactPage x;
  x.own = job & 1;
  const bool last = job >> 1;
  x.page = page_of(last ? v.i_last : 0, x.own);
  if (last && x.page == page_of(0, x.own)) return x;
  if (!x.own && x.page >= page_of(v.i_last, true)) return x;  // everybody's own page
  const SideGeometry& k = a.g.k;
  if (x.own && k.layered()) {
    const int32_t id = v.t.open[x.page % static_cast<int>(v.t.open_pages)];
    if (id < 0) return x;
    const uint8_t* slot = a.call.memory.open + id * a.g.open_bytes;
    x.open = true;
    x.rows = slot + int64_t{head} * kPage * k.dim * 2;
    x.mean = reinterpret_cast<const uint16_t*>(slot + a.g.open_reference) + head * k.dim;
    return x;
  }
  uint8_t* slot = page_slot(a.call.memory, v.t, a.g, x.page);
  if (slot == nullptr) return x;
  x.rows = side_of(slot, k, head);
  if (k.layered()) {
    x.mean = reinterpret_cast<const uint16_t*>(x.rows + k.mean);
    x.scale = meta_of(slot, a.g, head)->k_scale;
  }
  return x;
}

__device__ inline uint32_t pack_bf16(float x, float y) {  // both are BF16 numbers
  return __float_as_uint(x) >> 16 | (__float_as_uint(y) & 0xffff0000u);
}

// 8 codes of E2M1. A code's bits where FP32 has the low bits of its exponent are its value *
// 2^-126.
__device__ inline uint4 expand_codes(uint32_t codes, float scale) {
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float pair[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t code = codes >> (8 * i + 4 * n);
      pair[n] = __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f * scale;
    }
    out[i] = pack_bf16(pair[0], pair[1]);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}
// The scale is E4M3 in the low byte, whose bits are its value * 2^-120.
__device__ inline uint4 nvfp4_chunk(uint32_t codes, uint32_t scale) {
  return expand_codes(codes, __uint_as_float((scale & 0x7fu) << 20) * 0x1p120f);
}

// The 8 dims at 32 c + 8 j of a token that is not NVFP4, without scales of rows or pages.
__device__ inline uint4 token_chunk(const SideGeometry& k, const ExactPage& x, int token, int c,
                                    int j) {
  const int d = 32 * c + 8 * j;
  if (x.open) return *reinterpret_cast<const uint4*>(x.rows + (token * k.dim + d) * 2);
  if (k.kind == SideKind::bf16) {
    return *reinterpret_cast<const uint4*>(x.rows + k.rows + int64_t{token} * k.row_bytes + 2 * d);
  }
  uint32_t out[4];
  if (k.kind == SideKind::fp8) {
    const auto* words =
        reinterpret_cast<const uint32_t*>(x.rows + k.rows + int64_t{token} * k.row_bytes + 4 + d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = words[i / 2] >> (16 * (i % 2));
      out[i] = pack_bf16(e4m3_to_f32(pair & 255u), e4m3_to_f32(pair >> 8 & 255u));
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
  }
  if (k.kind == SideKind::int3) {
    const uint8_t* at = x.rows + k.codes + (token * k.dim + d) / 8 * 3;
    const uint32_t codes = at[0] | at[1] << 8 | at[2] << 16;
    const float scale = e4m3_to_f32(x.rows[k.scales + (token * k.dim + d) / 32]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] =
          pack_bf16(int3_value(codes >> 6 * i) * scale, int3_value(codes >> (6 * i + 3)) * scale);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
  }
  const uint32_t codes =
      *reinterpret_cast<const uint32_t*>(x.rows + k.codes + (token * k.dim + d) / 2);
  return expand_codes(codes,
                      __uint_as_float(x.rows[k.scales + (token * k.dim + d) / 32] << 23));  // MXFP4
}

__device__ inline float capped(const AttendArgs& a, float s) {
  return a.softcap > 0 ? a.softcap * tanhf(s / a.softcap) : s;
}

// Asks for what the warp's job will read, while other things are done: its 16 tokens of codes or
// rows, scales, means. Nothing of it needs to be exact.
__device__ inline void prefetch_exact_page(const SideGeometry& k, const ExactPage& x, int slice,
                                           int lane) {
  if (x.rows == nullptr) return;
  const bool rows = x.open || !k.layered();
  const int row = x.open ? 2 * k.dim : rows ? k.row_bytes : (k.scales - k.codes) / kPage;
  const uint8_t* at = x.rows + (x.open ? 0 : rows ? k.rows : k.codes) + 16 * slice * row;
  for (int i = 128 * lane; i < 16 * row; i += 32 * 128) prefetch_l2(at + i);
  if (!rows && lane < 4) prefetch_l2(x.rows + k.scales + 128 * lane);
  if (x.mean != nullptr && lane * 64 < k.dim) prefetch_l2(x.mean + lane * 64);
}

// The rows of two tokens of 8 dims a lane and chunk. Of the usual formats all reads are under way
// together.
template <int Regs>
__device__ inline void load_tokens(const SideGeometry& k, const ExactPage& x, const int (&token)[2],
                                   int j, BrainRows<Regs>& rows) {
  if (x.open) {
    const uint8_t* at = x.rows + 16 * j;
#pragma unroll
    for (int c = 0; c < Regs; ++c) {
      rows.low[c] = *reinterpret_cast<const uint4*>(at + token[0] * 2 * k.dim + 64 * c);
      rows.high[c] = *reinterpret_cast<const uint4*>(at + token[1] * 2 * k.dim + 64 * c);
    }
    return;
  }
  if (k.kind != SideKind::nvfp4) {
#pragma unroll
    for (int c = 0; c < Regs; ++c) {
      rows.low[c] = token_chunk(k, x, token[0], c, j);
      rows.high[c] = token_chunk(k, x, token[1], c, j);
    }
    return;
  }
  uint32_t codes[2][Regs], scales[2][Regs / 2];  // a word has the scales of two chunks
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint8_t* at = x.rows + k.codes + token[h] * (16 * Regs) + 4 * j;
    const uint8_t* scale_at = x.rows + k.scales + token[h] * (2 * Regs);
#pragma unroll
    for (int c = 0; c < Regs; ++c)
      codes[h][c] = read_now(reinterpret_cast<const uint32_t*>(at + 16 * c));
#pragma unroll
    for (int c = 0; c < Regs / 2; ++c)
      scales[h][c] = read_now(reinterpret_cast<const uint32_t*>(scale_at + 4 * c)) >> 8 * (j / 2);
  }
  // Chunks move through the registers, which no index can name: short code matters more here, where
  // it runs once.
#pragma unroll 1
  for (int c = 0; c < Regs; ++c) {
    const uint4 low = nvfp4_chunk(codes[0][0], scales[0][0]);
    const uint4 high = nvfp4_chunk(codes[1][0], scales[1][0]);
#pragma unroll
    for (int i = 0; i + 1 < Regs; ++i) {
      rows.low[i] = rows.low[i + 1], rows.high[i] = rows.high[i + 1];
      codes[0][i] = codes[0][i + 1], codes[1][i] = codes[1][i + 1];
    }
    rows.low[Regs - 1] = low, rows.high[Regs - 1] = high;
    scales[0][0] >>= 16, scales[1][0] >>= 16;
    if (c % 2 == 0) continue;
#pragma unroll
    for (int i = 0; i + 1 < Regs / 2; ++i)
      scales[0][i] = scales[0][i + 1], scales[1][i] = scales[1][i + 1];
  }
}

// Adds the exact pages to the warp's own sums, the first of its jobs being x. A function of its
// own, so that the blocks that take other pages need no registers for it.
template <int Regs, int Warps>
__device__ __noinline__ void add_exact_pages(const AttendArgs& a, int seq, int head, int tiles,
                                             ExactPage x, PrepareShared<Regs, Warps>& s) {
  static_assert(Warps % 4 == 0);
  const TileView v = tile_view(a, seq, 0, static_cast<int>(a.ws.rows));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
  const int slice = warp % 4;
  for (int job = warp / 4; job < 4; job += Warps / 4) {
    if (job != warp / 4) x = exact_page(a, v, head, job);
    if (x.rows == nullptr) continue;
    BrainRows<Regs> mean, rows;
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int c = 0; c < Regs; ++c) {
      mean.low[c] = mean.high[c] =
          x.mean != nullptr ? *reinterpret_cast<const uint4*>(x.mean + 32 * c + 8 * j) : none;
    }
    const int token[2] = {16 * slice + g, 16 * slice + 8 + g};
    float scale[2] = {x.scale, x.scale};
    load_tokens<Regs>(a.g.k, x, token, j, rows);
    float offset[2] = {};  // of tile g's columns 2 j and 2 j + 1
    if (x.mean != nullptr) {
      for (int n = 0; n < tiles; ++n) {
        float sum[4];
        multiply_rows<Regs>(mean, s.query[n], lane, sum);
        if (g == n) offset[0] = sum[0], offset[1] = sum[1];
      }
    }
    if (a.g.k.kind == SideKind::fp8) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scale[h] = *reinterpret_cast<const float*>(x.rows + a.g.k.rows +
                                                   int64_t{token[h]} * a.g.k.row_bytes);
      }
    }
    ColumnSums sums;
    for (int n = 0; n < tiles; ++n) {
      float t[4];
      multiply_rows<Regs>(rows, s.query[n], lane, t);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float add = __shfl_sync(~0u, offset[e], 4 * n + j);
        const int i = s.facts[8 * n + 2 * j + e].position;
        const int begin = v.begin(i), end = v.end(i), own_page = (end - 1) / kPage;
        const bool counts =
            i >= 0 && (x.own ? own_page == x.page : begin / kPage == x.page && x.page < own_page);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = x.page * kPage + token[h];
          const float score = capped(a, t[2 * h + e] * scale[h] + add);
          t[2 * h + e] = counts && at >= begin && at < end ? score : -INFINITY;
        }
      }
      sums.add(t, n, lane);
    }
    sums.take(s.sums[warp], tiles, lane);
  }
}

}  // namespace thriftattn::cuda
