// What the blocks of attend_prepare share: up to kRowGroup rows of q' as B operands of mma, and
// sums over tokens or pages for each of them.
//
// q' is three BF16 terms, together its 24 bits, so that products with BF16 numbers are as exact as
// FP32 ones: an offset of K's mean may be large where differences of scores matter. A operands are
// 16 rows of BF16 straight from memory; of chunk c of 32 dims lane j of a row has the 8 at 32 c + 8
// j.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/attend_query.cuh"
#include "cuda/mma.cuh"

namespace thriftattn::cuda {

template <int Regs>
inline constexpr int kRowGroup = Regs <= 4 ? 64 : 32;  // rows of a block
inline constexpr int kQueryTerms = 3;

struct RowFacts {
  float norm = 0;      // |q'|
  int first_page = 0;  // of what the row sees
  int open_page =
      0;  // from this one on it reads the open form; no page's mean counts for a row that is none
  int position = -1;  // of the pass; -1: there is no such row
};

struct ColumnSum {  // log2 of a sum is top + log2(sum)
  float top, sum;
};

template <int Regs, int Warps>
struct PrepareShared {
  static constexpr int kTiles = kRowGroup<Regs> / 8;
  RowFacts facts[kRowGroup<Regs>];
  ColumnSum sums[Warps][kRowGroup<Regs>];
  uint4 query[kTiles][Regs][kQueryTerms][32];  // as many tiles as there are; the last in memory
  static size_t bytes(int64_t tiles) {
    return sizeof(PrepareShared) - (kTiles - tiles) * sizeof(PrepareShared::query[0]);
  }
};

// 16 rows of BF16: rows g and g + 8 of a lane.
template <int Regs>
struct BrainRows {
  uint4 low[Regs], high[Regs];
};

// The products of 16 rows with a tile of 8 rows of q': mma's layout, columns 2 j and 2 j + 1 of
// rows g (0, 1) and g + 8 (2, 3).
template <int Regs>
__device__ inline void multiply_rows(const BrainRows<Regs>& rows,
                                     const uint4 (&query)[Regs][kQueryTerms][32], int lane,
                                     float (&sum)[4]) {
  __syncwarp();
  float rest[4] = {};  // of the terms behind the first: two chains of products
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = 0;
#pragma unroll
  for (int c = 0; c < Regs; ++c) {
    const uint4 x = rows.low[c], y = rows.high[c];
    const uint32_t first[4] = {x.x, y.x, x.y, y.y}, second[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
    for (int t = 0; t < kQueryTerms; ++t) {
      const uint4 b = query[c][t][lane];
      mma_bf16(t == 0 ? sum : rest, first, b.x, b.y);
      mma_bf16(t == 0 ? sum : rest, second, b.z, b.w);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] += rest[e];
}

// One row of q', by one warp.
template <int Regs>
__device__ inline void share_row(const float (&x)[Regs], int lane, int row,
                                 uint4 (&query)[Regs][kQueryTerms][32]) {
#pragma unroll
  for (int r = 0; r < Regs; ++r) {
    float rest = x[r];
#pragma unroll
    for (int t = 0; t < kQueryTerms; ++t) {
      const __nv_bfloat16 part = __float2bfloat16_rn(rest);
      reinterpret_cast<__nv_bfloat16*>(query[r][t])[(row % 8) * 32 + lane] = part;
      rest -= __bfloat162float(part);
    }
  }
}

// The fragments of one row for the kernels that walk the pages (attend_decode.cuh says which dims a
// thread holds).
template <int Regs>
__device__ inline void write_fragments(const AttendArgs& a, int64_t seq_head, int row, int lane,
                                       const float (&x)[Regs]) {
  constexpr int kDim = 32 * Regs;
  const int exponent = row_exponent(x);
  const float up = exp2f(static_cast<float>(exponent));
  if (lane == 0) {
    workspace_at<float>(a, a.ws.row_factor)[seq_head * a.ws.rows + row] =
        exp2f(static_cast<float>(-exponent));
  }
  const int64_t n_tile = (seq_head * a.ws.rows + row) / 8;
  const int g = row % 8;
  __half* nvfp4 = workspace_at<__half>(a, a.ws.q_nvfp4);
  __half* fp8 = workspace_at<__half>(a, a.ws.q_fp8);
  __nv_bfloat16* bf16 = workspace_at<__nv_bfloat16>(a, a.ws.q_bf16);
#pragma unroll
  for (int r = 0; r < Regs; ++r) {
    const int d = r * 32 + lane;
    const __half h = __float2half_rn(x[r] * up);
    {
      const int word = d / 8, n = d % 8, j = word / (kDim / 32), w = word % (kDim / 32);
      const int64_t step = n_tile * (kDim / 16) + 2 * w + (n & 1);
      nvfp4[(step * 32 + g * 4 + j) * 4 + (n >> 1 & 1) * 2 + (n >> 2)] = h;
    }
    if (a.g.k.kind == SideKind::fp8) {
      const int j = d / (kDim / 4), c = d % (kDim / 4) / 4, n = d % 4;
      const int64_t step = n_tile * (kDim / 16) + c;
      fp8[(step * 32 + g * 4 + j) * 4 + (n & 1) * 2 + (n >> 1)] = h;
    }
    {
      const int c = d / 32, j = d % 32 / 8, n = d % 8;
      const int64_t step = n_tile * (kDim / 16) + 2 * c + (n >> 2);
      const __nv_bfloat16 high = __float2bfloat16_rn(x[r]);
      __nv_bfloat16* at = bf16 + (step * 32 + g * 4 + j) * 8 + (n >> 1 & 1) * 2 + (n & 1);
      at[0] = high;
      at[4] = __float2bfloat16_rn(x[r] - __bfloat162float(high));
    }
  }
}

// Sums of 2^t over 16 rows of A by a warp, a column of q' at a time. Of tile n of 8 columns the
// lanes with g = n keep columns 2 j and 2 j + 1.
class ColumnSums {
 public:
  // t in mma's layout, -inf for what does not count. By a whole warp.
  __device__ void add(const float (&t)[4], int n, int lane) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = fmaxf(t[e], t[e + 2]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      const float base = top == -INFINITY ? 0.0f : top;
      float sum = exp2_approx(t[e] - base) + exp2_approx(t[e + 2] - base);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane / 4 == n) kept_[e] = {top, sum};
    }
  }
  // Adds what was kept to the warp's sums in shared memory.
  __device__ void take(ColumnSum* sums, int tiles, int lane) {
    if (lane / 4 >= tiles) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      ColumnSum& to = sums[2 * lane + e];
      to = together(to, kept_[e]);
    }
  }
  __device__ static ColumnSum together(ColumnSum x, ColumnSum y) {
    const float top = fmaxf(x.top, y.top);
    if (top == -INFINITY) return {top, 0.0f};
    return {top, x.sum * exp2_approx(x.top - top) + y.sum * exp2_approx(y.top - top)};
  }

 private:
  ColumnSum kept_[2];
};

}  // namespace thriftattn::cuda
