// The rows of attend_prefill's output back in V's basis, where V is stored rotated.
#pragma once

#include <cstdint>

namespace thriftattn::cuda {

// The Hadamard transform of rows of D numbers, of which a lane has the fragments that
// attend_prefill_tile.cuh leaves: element e of o[n][k] is dim 64 n + 8 k + c of row e / 2, where c
// has the bits of 2 j + e % 2 reversed (attend_prefill_shape.h). By whole warps.
template <int D>
__device__ void rotate_back(float (&o)[D / 64][8][4], int j, float factor) {
#pragma unroll
  for (int step = 2; step > 0; step /= 2) {  // strides 1 and 2: other lanes
    const float sign = j & step ? -1.0f : 1.0f;
#pragma unroll
    for (int n = 0; n < D / 64; ++n) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          o[n][k][e] = fmaf(o[n][k][e], sign, __shfl_xor_sync(0xffffffffu, o[n][k][e], step));
        }
      }
    }
  }
  const auto turn = [](float& x, float& y) {
    const float left = x, right = y;
    x = left + right;
    y = left - right;
  };
#pragma unroll
  for (int n = 0; n < D / 64; ++n) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {  // stride 4
      turn(o[n][k][0], o[n][k][1]);
      turn(o[n][k][2], o[n][k][3]);
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {  // strides 8, 16, 32
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k & step) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) turn(o[n][k][e], o[n][k + step][e]);
      }
    }
  }
#pragma unroll
  for (int step = 1; step < (D & -D) / 64; step *= 2) {
#pragma unroll
    for (int n = 0; n < D / 64; ++n) {
      if (n & step) continue;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) turn(o[n][k][e], o[n + step][k][e]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < D / 64; ++n) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][k][e] *= factor;
    }
  }
}

}  // namespace thriftattn::cuda
