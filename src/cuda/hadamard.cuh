// The normalised Hadamard transform of a row by one warp: K when it is appended, q when it attends.
#pragma once

namespace thriftattn::cuda {

// Element r * 32 + lane of a row in x[r]. Butterflies of stride 1, 2, 4, ... as
// hadamard_rows_scalar().
template <int Regs>
__device__ inline void hadamard_row(float (&x)[Regs], int lane, float factor) {
  constexpr int kDim = 32 * Regs;
  constexpr int kBlock = kDim & -kDim;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int r = 0; r < Regs; ++r) {
      const float other = __shfl_xor_sync(0xffffffffu, x[r], step);
      x[r] = (lane & step) ? other - x[r] : x[r] + other;
    }
  }
#pragma unroll
  for (int step = 1; step < kBlock / 32; step *= 2) {
#pragma unroll
    for (int r = 0; r < Regs; ++r) {
      if (r & step) continue;
      const float a = x[r], b = x[r + step];
      x[r] = a + b;
      x[r + step] = a - b;
    }
  }
#pragma unroll
  for (int r = 0; r < Regs; ++r) x[r] *= factor;
}

}  // namespace thriftattn::cuda
