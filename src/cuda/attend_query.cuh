// q' of one query row: what attend_prepare and attend_prefill multiply keys with.
#pragma once

#include <cuda_fp16.h>

#include "base/float_convert.h"
#include "cuda/attend_args.cuh"
#include "cuda/hadamard.cuh"

namespace thriftattn::cuda {

__device__ inline uint32_t read_now(const uint32_t* from) {
  return static_cast<uint32_t>(read_now(reinterpret_cast<const int32_t*>(from)));
}

// What q' of a row is made of, element r * 32 + lane in [r].
template <int Regs>
struct QueryRow {
  float q[Regs], by[Regs];  // q / by
};
template <int Regs>
__device__ inline QueryRow<Regs> read_row(const AttendArgs& a, const TileView& v, int head, int row,
                                          int lane) {
  constexpr int kDim = 32 * Regs;
  QueryRow<Regs> x;
  const AttendCall& c = a.call;
  const int i = position_of(a, row), g = row - i * a.g.group;
  const int64_t stride =
      c.q_token_stride ? c.q_token_stride : int64_t{a.g.kv_heads} * a.g.group * kDim;
  const int64_t at =
      (v.t.first_row + a.first_q + i) * stride + (head * a.g.group + g) * kDim + lane;
  const float* by = a.g.k.layered() ? c.memory.equalizer : nullptr;
#pragma unroll
  for (int r = 0; r < Regs; ++r)
    x.by[r] = by != nullptr ? read_now(by + head * kDim + lane + 32 * r) : 1.0f;
  if (c.q_element == Element::f32) {
#pragma unroll
    for (int r = 0; r < Regs; ++r) x.q[r] = read_now(static_cast<const float*>(c.q) + at + 32 * r);
    return x;
  }
  uint16_t bits[Regs];
#pragma unroll
  for (int r = 0; r < Regs; ++r)
    bits[r] = read_now(static_cast<const uint16_t*>(c.q) + at + 32 * r);
  const bool bf16 = c.q_element == Element::bf16;
#pragma unroll
  for (int r = 0; r < Regs; ++r)
    x.q[r] = bf16 ? bf16_to_f32(bits[r]) : __half2float(__ushort_as_half(bits[r]));
  return x;
}

// q' of one row by one warp: H (q / s).
template <int Regs>
__device__ inline void transform_row(const AttendArgs& a, const QueryRow<Regs>& row, int lane,
                                     float (&x)[Regs]) {
#pragma unroll
  for (int r = 0; r < Regs; ++r) x[r] = row.q[r] / row.by[r];
  if (a.g.k.layered() && a.g.rotate) hadamard_row(x, lane, a.hadamard_factor);
}

// The exponent that brings a row's largest element into [8, 16): FP16 products with codes and their
// sums stay in range. By a whole warp.
template <int Regs>
__device__ inline int row_exponent(const float (&x)[Regs]) {
  float top = 0;
#pragma unroll
  for (int r = 0; r < Regs; ++r) top = fmaxf(top, fabsf(x[r]));
  for (int step = 16; step > 0; step /= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  }
  int exponent = 0;
  if (top > 0 && top < INFINITY) exponent = 3 - ilogbf(top);
  return max(-126, min(126, exponent));
}

}  // namespace thriftattn::cuda
