// Products of few rows of x with quantised weights in integer arithmetic (AVX-512 VNNI). x is put
// into fixed point, 23 bits for each 32 elements with a power of two as their scale, and cut into
// three signed bytes; codes are at most eight bits, so the sums of code times x over four elements
// are exact in 32 bits, and only scales and totals are FP32. That is the accuracy of an FP32 sum
// (an x is off by at most 2^-22 of the largest of its 32 neighbours) at a third of the
// instructions of expanding every weight to FP32: docs/decisions.md has the figures.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/gemv.h"

namespace thriftattn {

// Rows of x in fixed point, in runs of 256 elements, the last one padded with zeros.
class FixedRows {
 public:
  static constexpr int64_t kRun = 256;
  static constexpr int64_t kGroup = 32;

  struct Run {
    alignas(64) int8_t digits[kRun / kGroup][3][kGroup];  // base 256, the highest digit first
    alignas(32) int32_t sums[kRun / kGroup][8];           // of four elements each
    alignas(64) float scale[kRun / 16];                   // NaN where x is not finite
    alignas(64) float totals[kRun / 16];                  // of sixteen elements, times the scale
  };

  FixedRows() = default;
  FixedRows(const float* x, int64_t m, int64_t k);  // needs gemv_vnni_available()
  bool empty() const { return rows_.empty(); }
  const Run* row(int64_t m) const { return rows_.data() + m * runs_; }

 private:
  int64_t runs_ = 0;
  std::vector<Run> rows_;
};

// Whether this CPU has the instructions.
bool gemv_vnni_available();
// Whether there is an integer kernel for the type.
bool gemv_vnni_takes(GgmlType type);
// As gemv(), with args.x in fixed point.
void gemv_vnni(const GemvArgs& args, const FixedRows& x);

}  // namespace thriftattn
