// Scores of an item, its softmax, and how each query row reads it (attend_decode_warp.cuh).
#pragma once

#include "cuda/attend_decode_warp.cuh"

namespace thriftattn::cuda {

template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::scores_bf16(const uint8_t* rows,
                                                       float (&s)[NT][4]) const {
  const uint4* q =
      workspace_at<const uint4>(a_, a_.ws.q_bf16) +
      ((int64_t{seq_} * a_.g.kv_heads + head_) * a_.ws.rows + v_.first_row) / 8 * (D / 16) * 32 +
      lane_;
  const uint8_t* at = rows + perm_ * StageSizes<D>::kRowStride + 16 * j_;
#pragma unroll
  for (int c = 0; c < D / 32; ++c) {
    const uint4 x = *reinterpret_cast<const uint4*>(at + 64 * c);
    const uint4 y = *reinterpret_cast<const uint4*>(at + 8 * StageSizes<D>::kRowStride + 64 * c);
    const uint32_t first[4] = {x.x, y.x, x.y, y.y}, second[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 b0 = q[(n * (D / 16) + 2 * c) * 32];
      const uint4 b1 = q[(n * (D / 16) + 2 * c + 1) * 32];
      mma_bf16(s[n], first, b0.x, b0.y);
      mma_bf16(s[n], second, b1.x, b1.y);
      mma_bf16(s[n], first, b0.z, b0.w);  // what BF16 left of q
      mma_bf16(s[n], second, b1.z, b1.w);
    }
  }
}

template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::scores_fp8(const uint8_t* rows, int slice,
                                                      float (&s)[NT][4]) const {
  const uint2* q =
      workspace_at<const uint2>(a_, a_.ws.q_fp8) +
      ((int64_t{seq_} * a_.g.kv_heads + head_) * a_.ws.rows + v_.first_row) / 8 * (D / 16) * 32 +
      lane_;
  const uint8_t* row0 = rows + (16 * slice + perm_) * (D + 4);
  const uint8_t* row1 = row0 + 8 * (D + 4);
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    const uint32_t x = *reinterpret_cast<const uint32_t*>(row0 + 4 + j_ * (D / 4) + 4 * c);
    const uint32_t y = *reinterpret_cast<const uint32_t*>(row1 + 4 + j_ * (D / 4) + 4 * c);
    const uint32_t k[4] = {expand_e4m3(x), expand_e4m3(y), expand_e4m3(x >> 8),
                           expand_e4m3(y >> 8)};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint2 b = q[(n * (D / 16) + c) * 32];
      mma_f16(s[n], k, b.x, b.y);
    }
  }
  const float scale0 = *reinterpret_cast<const float*>(row0) * 256.0f;
  const float scale1 = *reinterpret_cast<const float*>(row1) * 256.0f;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    s[n][0] *= scale0, s[n][1] *= scale0, s[n][2] *= scale1, s[n][3] *= scale1;
  }
}

// The page's own maximum and sum of every column, and P.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::softmax(float (&s)[4][NT][4], Pending& p) const {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = fmaxf(s[0][n][e], s[0][n][e + 2]);
#pragma unroll
      for (int i = 1; i < 4; ++i) top = fmaxf(top, fmaxf(s[i][n][e], s[i][n][e + 2]));
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
      }
      const float shift = top == -INFINITY ? 0.0f : top - 10.0f;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float p0 = exp2_approx(s[i][n][e] - shift);
        const float p1 = exp2_approx(s[i][n][e + 2] - shift);
        sum += p0 + p1;
        s[i][n][e] = p0, s[i][n][e + 2] = p1;
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      p.m[2 * n + e] = top;
      p.l[2 * n + e] = sum * 0x1p-10f;
    }
    {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const __half2 a = __floats2half2_rn(s[i][n][0], s[i][n][1]);
        const __half2 b = __floats2half2_rn(s[i][n][2], s[i][n][3]);
        p.p[i][n][0] = transpose_8x8(reinterpret_cast<const uint32_t&>(a));
        p.p[i][n][1] = transpose_8x8(reinterpret_cast<const uint32_t&>(b));
      }
    }
  }
}

// The rows that promote an item, bits in the workspace between the walk and the second reading.
template <int D, int NT, class Shared>
__device__ uint32_t* DecodeWarp<D, NT, Shared>::noted_rows(int item) const {
  return workspace_at<uint32_t>(a_, a_.ws.noted) +
         ((int64_t{seq_} * a_.g.kv_heads + head_) * a_.row_tiles + tile_) *
             (a_.limits.max_pages + a_.ws.open_records) +
         item;
}
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::note_columns(int item, uint32_t columns) const {
  uint32_t rows = 0;
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) rows |= (columns >> c & 1u) << column_row(c);
  rows = __reduce_or_sync(0xffffffffu, rows);
  if (lane_ == 0) *noted_rows(item) = rows;
  __syncwarp();
}
template <int D, int NT, class Shared>
__device__ uint32_t DecodeWarp<D, NT, Shared>::noted_columns(int item) const {
  const uint32_t rows = *reinterpret_cast<volatile uint32_t*>(noted_rows(item));
  uint32_t columns = 0;
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) columns |= (rows >> column_row(c) & 1u) << c;
  return columns;
}

// The general case: rows of several positions that may do different things.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::decide_by_position(const ItemNote& note, int page,
                                                              const float (&mass)[2 * NT],
                                                              Pending& cur) const {
  const uint8_t* choices = nullptr;
  if (Base::kByPosition && (note.flags & kItemChosen)) choices = this->choices_at(page);
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) {
    const int i = b_.position[column_row(c)];
    // The largest of the position's heads. Every lane has its columns' masses: a round of the four
    // lanes that share a token.
    float top = -INFINITY;
#pragma unroll
    for (int other = 0; other < 4; ++other) {
#pragma unroll
      for (int k = 0; k < 2 * NT; ++k) {
        const float value = __shfl_sync(0xffffffffu, mass[k], other, 4);
        if (b_.position[k / 2 * 8 + 2 * other + (k & 1)] == i) top = fmaxf(top, value);
      }
    }
    if (i < 0) continue;
    const bool has = note.residual >= 0 && (v_.prefill || residual_in_reach(page, i));
    if (has && (choices != nullptr ? choices[i] != 0
                                   : always_full() || (rules_ && top > a_.log2_promote))) {
      cur.out |= 1u << c;
    } else if (rules_ && a_.g.skip > 0 && !(top > a_.log2_skip) && skippable(page, i)) {
      cur.skip |= 1u << c;
    }
  }
}

// How each column reads a sealed item: what it promotes is noted for the second reading.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::decide(const ItemNote& note, int page, Pending& cur) {
  constexpr int kDiffer = Base::kByPosition ? kItemMixed | kItemChosen : kItemMixed;
  if (!(note.flags & (kItemPromotable | kItemSkippable | kDiffer))) {
    write_decisions(page, Decision::base, ~0u, 0, false);
    return;
  }
  float mass[2 * NT];
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) {
    mass[c] = cur.l[c] > 0 ? cur.m[c] + __log2f(cur.l[c]) - b_.floor[column_row(c)] : -INFINITY;
  }
  if (v_.i_first == v_.i_last && !(note.flags & kDiffer)) {
    float top = mass[0];
#pragma unroll
    for (int c = 1; c < 2 * NT; ++c) top = fmaxf(top, mass[c]);
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    if ((note.flags & kItemPromotable) && top > a_.log2_promote) {
      cur.out = ~0u;
    } else if ((note.flags & kItemSkippable) && !(top > a_.log2_skip)) {
      cur.skip = ~0u;
    }
  } else {
    decide_by_position(note, page, mass, cur);
  }
  write_decisions(page, Decision::base, ~cur.out & ~cur.skip, cur.skip, false);
  if (!__any_sync(0xffffffffu, (cur.out | cur.skip) != 0)) return;
  uint32_t real = 0;
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) real |= b_.position[column_row(c)] >= 0 ? 1u << c : 0u;
  if (__any_sync(0xffffffffu, (cur.out & real) != 0)) {
    const int n = note.index();
    if (lane_ == (n >> 5)) noted_ |= 1u << (n & 31);
    note_columns(note.item, cur.out & real);
  }
  if (!__any_sync(0xffffffffu, (real & ~cur.out) != 0)) {
    cur.units = 0;
  } else if (!__any_sync(0xffffffffu, (real & ~cur.out & ~cur.skip) != 0)) {
    cur.units = 1;
    cur.mean_only = true;
  }
}

// Scores of item n, its softmax, and how each column reads it.
template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::scores(int n, Pending& cur) {
  const ItemNote note = s_.notes[n % kNotes];
  const bool open = note.kind() == kItemOpen;
  const bool planes = a_.g.k.layered() && !open;
  const float* record = s_.record[n % 2];
  float s[4][NT][4];
  clear(s);
  cur.note = n % kNotes;
  cur.issued = 0;
  cur.mean_only = false;
  cur.out = cur.skip = 0;
  cur.units = units_of(a_.g.v, note.kind(), note.held());
  // One unit: the base planes; two: base and residual; or 16 or 32 rows at a time.
  const int units = units_of(a_.g.k, note.kind(), note.held());
  float k_factor = 1.0f;
  float2 offset[NT];
  for (int u = 0; u < units; ++u) {
    const int stage = k_used_ % kRing;
    barrier_wait(&s_.k_bar[stage], k_used_ / kRing & 1);
    if (u == 0) {
      // Before this stage is given back, because the record may go with it.
      cur.v_scale = record[1];
      cur.v_res_scale = record[3];
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        offset[t] = *reinterpret_cast<const float2*>(record + 4 + 8 * t + 2 * j_);
      }
    }
    if (planes) {
      // base * (scale / residual scale) + residual, all times the residual scale; but a ratio
      // beyond FP32's reach means that the residual is nothing beside the base.
      bool adds = true;
      if (u == 1) {
        const float unit = record[2] * Nvfp4Plane::kUnit;
        const float ratio = k_factor / unit;
        adds = ratio < 0x1p60f;
        if (adds) {
          k_factor = unit;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int t = 0; t < NT; ++t) {
#pragma unroll
              for (int e = 0; e < 4; ++e) s[i][t][e] *= ratio;
            }
          }
        }
      }
      if (adds) {
        const uint2* q = query_nvfp4();
        with_plane<kGroups>(u == 0 ? a_.g.k.kind : SideKind::nvfp4, [&]<class Format>(Format) {
          const int top = Format::template largest_scale<D>(s_.k[stage], lane_);
          if (u == 0) k_factor = Format::key_unit(record[0], top);
          SliceAddress from = k_slice<D, Format>(s_.k[stage], lane_);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            score_slice<D, NT, Format>(
                from, [&](int t, int step) { return q[(t * (D / 16) + step) * 32]; }, s[i], top);
            from.codes += 16 * Format::row_bytes(D);
            from.scales += 16 * (D / Format::kGroup);
          }
        });
      }
    } else if (a_.g.k.kind == SideKind::fp8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i / 2 == u) scores_fp8(s_.k[stage], i % 2, s[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i == u) scores_bf16(s_.k[stage], s[i]);
      }
    }
    ++k_used_;
    __syncwarp();
    // The next item's record lies apart from this one's; the one behind it is not asked for
    // before this item's last unit is used.
    issue_k();
  }
  // Linear scores, in base-2 units.
  const bool fp16_query = planes || a_.g.k.kind == SideKind::fp8;
#pragma unroll
  for (int t = 0; t < NT; ++t) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float f = fp16_query ? k_factor * b_.row_factor[column_row(2 * t + e)] : 1.0f;
      const float off = e ? offset[t].y : offset[t].x;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i][t][e] = fmaf(s[i][t][e], f, off);
        s[i][t][e + 2] = fmaf(s[i][t][e + 2], f, off);
      }
    }
  }
  if (a_.softcap > 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int t = 0; t < NT; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][t][e] = a_.softcap * tanhf(s[i][t][e] / a_.softcap);
      }
    }
  }
  const int page = item_page(note.item);
  if (!(note.flags & kItemWhole)) {
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) {
      const int i = b_.position[column_row(c)];
      const bool seen = i >= 0 && (!a_.g.any_layered() || (page < v_.open_from(i)) != open);
      const int lo = seen ? max(0, v_.begin(i) - page * kPage) : kPage;
      const int hi = seen ? min(kPage, v_.end(i) - page * kPage) : 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int token = 8 * k + perm_;
        if (token < lo || token >= hi) s[k / 2][c / 2][(c & 1) + 2 * (k & 1)] = -INFINITY;
      }
    }
  }
  softmax(s, cur);
  if (note.kind() == kItemSealed && a_.g.any_layered()) {
    decide(note, page, cur);
    return;
  }
  uint32_t promoted = ~0u;
  Decision decision = open ? Decision::open : Decision::plain;
  if (note.kind() == kItemFull || note.kind() == kItemAgain) {
    if (note.kind() == kItemAgain) promoted = noted_columns(note.item);
    cur.out = ~promoted;
    decision = Decision::full;
  }
  write_decisions(page, decision, promoted, 0, open);
}

template <int D, int NT, class Shared>
__device__ void DecodeWarp<D, NT, Shared>::write_decisions(int page, Decision decision,
                                                           uint32_t columns, uint32_t skipping,
                                                           bool open) const {
  if (a_.call.decisions == nullptr || g_ != 0) return;
#pragma unroll
  for (int c = 0; c < 2 * NT; ++c) {
    const int i = b_.position[column_row(c)];
    if (i < 0 || (v_.first_row + column_row(c)) % a_.g.group != 0) continue;
    if (a_.g.any_layered() && (page < v_.open_from(i)) == open) continue;
    uint8_t* to = decision_at(i, page);
    if (skipping >> c & 1) {
      *to = static_cast<uint8_t>(Decision::skip);
    } else if (columns >> c & 1) {
      *to = static_cast<uint8_t>(decision);
    }
  }
}

}  // namespace thriftattn::cuda
