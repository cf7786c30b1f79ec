// Products of many rows by oneDNN, single-threaded: Debian's oneDNN is built with OpenMP, whose
// threads spin after each call and would fight with oneTBB for the cores. So callers cut a product
// into tiles and run them as oneTBB tasks, which also makes results independent of the threads.
#pragma once

#include <cstdint>
#include <string>

namespace thriftattn {

// y[m][ldy] = x[m][ldx] w[n][ldw]^T, or added to what y holds. BF16 is uint16_t, sums are FP32.
template <typename T>
struct GemmArgs {
  const T* x;
  int64_t ldx;
  const T* w;
  int64_t ldw;
  float* y;
  int64_t ldy;
  int64_t m, n, k;
};

void gemm(const GemmArgs<float>& args, bool accumulate = false);
void gemm(const GemmArgs<uint16_t>& args);  // where bf16_is_native()

// Whether oneDNN multiplies BF16 natively here, and does it right.
bool bf16_is_native();
// Why it does not, for messages; empty if it does.
std::string why_bf16_is_not_native();

}  // namespace thriftattn
