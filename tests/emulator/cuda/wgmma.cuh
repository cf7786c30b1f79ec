// src/cuda/wgmma.cuh on a CPU: the products are done when the warpgroup's last thread has come.
#pragma once

#include "cuda/ptx.cuh"

#ifdef THRIFTATTN_SM90
#define THRIFTATTN_WGMMA 1

namespace thriftattn::cuda {

// Bits of a descriptor of shared memory: start, both strides (each over 16), the 128-byte swizzle.
struct PanelDescriptor {
  uint32_t low;
  explicit PanelDescriptor(uint32_t at) : low((1024u >> 4) << 16 | at >> 4) {}
  uint64_t behind(int bytes) const {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStep = uint64_t{1024 >> 4} << 32;
    return kSwizzle128 | kStep | (low + (static_cast<uint32_t>(bytes) >> 4));
  }
};

namespace emulated {

// 16-bit number `i` of row `row` of the panel that a descriptor tells of: 8 rows of 128 bytes, and the
// next 8 a stride behind; the 16-byte chunk's number is xored with bits 7 to 9 of the address.
inline float panel_at(uint64_t descriptor, int row, int i) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fffu) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fffu) << 4;
  if (descriptor >> 62 != 1) emulator::fail("a panel without the 128-byte swizzle");
  uint32_t at = start + static_cast<uint32_t>(row / 8) * stride +
                static_cast<uint32_t>(row % 8) * 128 + static_cast<uint32_t>(i) * 2;
  at ^= at >> 3 & 0x70u;
  uint16_t bits;
  std::memcpy(&bits, emulator::shared_pointer(at), sizeof bits);
  return _cvtsh_ss(bits);
}

struct GroupProduct {
  float (*d)[4];
  uint32_t a[4];
  uint64_t a_panel, b_panel;
  bool add, a_held, b_transposed;
};

inline void multiply(void* const* given) {
  const auto at = [&](int thread) -> const GroupProduct& {
    return *static_cast<const GroupProduct*>(given[thread]);
  };
  const GroupProduct& first = at(0);
  float left[64][16], right[16][64], sum[64][64];
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      if (first.a_held) {
        const GroupProduct& p = at(row / 16 * 32 + row % 8 * 4 + k % 8 / 2);
        left[row][k] = half_at(p.a[row % 16 / 8 + k / 8 * 2], k % 2);
      } else {
        left[row][k] = panel_at(first.a_panel, row, k);
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 64; ++n) {
      right[k][n] = first.b_transposed ? panel_at(first.b_panel, k, n)
                                       : panel_at(first.b_panel, n, k);
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int n = 0; n < 64; ++n) sum[row][n] = 0;
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 64; ++n) sum[row][n] += left[row][k] * right[k][n];
    }
  }
  for (int t = 0; t < 128; ++t) {
    const GroupProduct& p = at(t);
    const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    for (int n = 0; n < 8; ++n) {
      for (int e = 0; e < 4; ++e) {
        const float x = sum[row + e / 2 * 8][8 * n + column + e % 2];
        p.d[n][e] = p.add ? p.d[n][e] + x : x;
      }
    }
  }
}

}  // namespace emulated

inline void wgmma_shared(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  emulated::GroupProduct p{d, {}, a, b, add, false, false};
  emulator::warpgroup_meet(&p, emulated::multiply);
}
inline void wgmma_fragment(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  emulated::GroupProduct p{d, {a[0], a[1], a[2], a[3]}, 0, b, true, true, true};
  emulator::warpgroup_meet(&p, emulated::multiply);
}
inline void wgmma_held(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulated::GroupProduct p{d, {a[0], a[1], a[2], a[3]}, 0, b, add, true, false};
  emulator::warpgroup_meet(&p, emulated::multiply);
}

inline void hold(float (&)[8][4]) {}
inline void hold(uint32_t (&)[4][4]) {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N>
void wgmma_wait() {}

}  // namespace thriftattn::cuda
#endif
