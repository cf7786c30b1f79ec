// A page's planes and metadata, byte-equal to src/cache/page_codec.cc; included by append.cuh alone (no
// contraction of products and sums).
#pragma once

#include "cuda/append_encoder.cuh"
#include "cuda/append_groups.cuh"
#include "cuda/append_rows.cuh"

namespace thriftattn::cuda {

// sum_of_squares() of page_codec.cc, for the 16 elements of a row that one thread has.
__device__ __forceinline__ void add_squares(const float (&x)[16], double (&sums)[4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const double v = x[i];
    sums[i % 4] = __fma_rn(v, v, sums[i % 4]);  // the square is exact
  }
}
// Four sums over the warp, each a tree of adjacent pairs of lanes: lanes 0 to 3 get one each.
__device__ __forceinline__ void sum_lanes(double (&sums)[4]) {
  const bool odd = threadIdx.x & 1, second = threadIdx.x & 2;
  for (int i = 0; i < 2; ++i) {
    const double given = odd ? sums[i] : sums[i + 2];
    if (odd) sums[i] = sums[i + 2];
    sums[i] += __shfl_xor_sync(0xffffffffu, given, 1);
  }
  const double given = second ? sums[0] : sums[1];
  if (second) sums[0] = sums[1];
  sums[0] += __shfl_xor_sync(0xffffffffu, given, 2);
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], step);
}
__device__ __forceinline__ int sum_of_lane(int lane) { return lane % 2 * 2 + lane / 2; }

// Base and residual plane of x, and the metadata. Nothing where a value is not finite by now.
template <int kDim, bool kIsK>
template <bool kGroups>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::encode(float (&x)[2][16]) {
  uint8_t* slot = side_of(this->slot(), side(), head_);
  uint8_t* residual = a_.call.memory.residuals + residual_id_ * a_.g.residual_bytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int at = 2 * pair_ * Shape::kBlocks + block_;  // among the page's blocks of 16
#pragma unroll 1
  for (int plane = 0; plane < 2; ++plane) {
    float largest[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 16; ++i) largest[r] = max_nan(largest[r], fabsf(x[r][i]));
    }
    // Magnitudes order as their bits do, with NaN above infinity.
    uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(max_nan(largest[0], largest[1])));
    if (lane == 0) s_.amax[plane][warp] = bits;
    __syncthreads();  // also: the decoded rows' sums are there
    bits = __reduce_max_sync(0xffffffffu, s_.amax[plane][lane % Shape::kWarps]);
    if (bits >= 0x7f800000u) return;
    const bool groups = kGroups && plane == 0 && side().grouped();
    const float scale = groups ? group_page_scale(side().kind, __uint_as_float(bits))
                               : page_scale_of(__uint_as_float(bits));
    (plane == 0 ? scale_ : residual_scale_) = scale;
    const PageDivisor divisor(scale);

    const bool keeps = plane == 0 && kIsK;
    if (plane == 1 && kIsK) {
      const float mean = column_mean();
      if (threadIdx.x % 2 == 0) s_.decoded[threadIdx.x / 2] = mean;
    }
    uint8_t* to = plane == 0 ? slot : residual;
    uint8_t* codes = to + (plane == 0 ? side().codes : side().res_codes);
    uint8_t* block_scales = to + (plane == 0 ? side().scales : side().res_scales);
    const bool stores = plane == 0 || residual_id_ >= 0;
    double sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto keep = [&](int quarter, const float4& v) {
        if (!keeps) return;
        float4& sum = *s_.row_sum(pair_, block_, quarter);
        if (r == 0) {
          sum = v;
        } else {
          const float4 above = sum;
          sum = {above.x + v.x, above.y + v.y, above.z + v.z, above.w + v.w};
        }
      };
      if constexpr (kGroups) {
        if (groups) {
          const SideKind kind = side().kind;
          store_half_group(kind, encode_half_group(kind, x[r], largest[r], scale, s_.facts, keep),
                           at + r * Shape::kBlocks, codes, block_scales);
          add_squares(x[r], sums);
          continue;
        }
      }
      const EncodedBlock out = encode_block(x[r], largest[r], divisor, s_.facts, keep);
      if (stores) {
        reinterpret_cast<uint2*>(codes)[at + r * Shape::kBlocks] = out.codes;
        block_scales[at + r * Shape::kBlocks] = static_cast<uint8_t>(out.scale);
      }
      add_squares(x[r], sums);
    }
    sum_lanes(sums);
    if (lane < 4) s_.squares[plane][sum_of_lane(lane)][warp] = sums[0];
  }
  pending_ = slot_id_;
}

// The metadata of the page before, by one warp, where a barrier has passed. Lanes 0 to 11 have the
// four sums of the two errors and of the norm of K's mean.
template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::finish() {
  const int pending = pending_;
  pending_ = -1;
  if (pending < 0 || threadIdx.x / 32 != pending % Shape::kWarps) return;
  const int lane = threadIdx.x % 32, kind = lane / 4;
  if (kIsK && lane < Shape::kBlocks) {
    float mean[16];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 m = reinterpret_cast<const float4*>(s_.decoded)[q * Shape::kBlocks + lane];
      mean[4 * q] = m.x, mean[4 * q + 1] = m.y, mean[4 * q + 2] = m.z, mean[4 * q + 3] = m.w;
    }
    double sums[4] = {0, 0, 0, 0};
    add_squares(mean, sums);
#pragma unroll
    for (int j = 0; j < 4; ++j) s_.squares[2][j][lane] = sums[j];
  }
  __syncwarp();
  double squares[Shape::kWarps];
#pragma unroll
  for (int i = 0; i < Shape::kWarps; ++i) squares[i] = s_.squares[kind < 3 ? kind : 0][lane % 4][i];
  double sum = tree_sum(squares);
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  constexpr double kCount = static_cast<double>(kPageTokens * kDim);
  const float root = static_cast<float>(sqrt(kind < 2 ? sum / kCount : sum));
  PageMeta* meta = meta_of(a_.call.memory.pages + pending * a_.g.slot_bytes, a_.g, head_);
  constexpr bool k = kIsK;
  if (lane == 0) {
    (k ? meta->k_scale : meta->v_scale) = scale_;
    (k ? meta->k_res_scale : meta->v_res_scale) = residual_scale_;
    (k ? meta->k_error : meta->v_error) = root;
    // What the other side would not write.
    if (k && !a_.g.v.layered()) {
      meta->v_scale = meta->v_res_scale = 1;
      meta->v_error = meta->v_error_both = 0;
    }
    if (!k && !a_.g.k.layered()) {
      meta->k_scale = meta->k_res_scale = 1;
      meta->k_error = meta->k_error_both = meta->k_mean_norm = 0;
    }
  } else if (lane == 4) {
    (k ? meta->k_error_both : meta->v_error_both) = root;
  } else if (lane == 8 && k) {
    meta->k_mean_norm = nextafterf(root, INFINITY);  // rounded up, as the CPU does
  }
}

}  // namespace thriftattn::cuda
