// The scalar truth of the K transform.
#include <cmath>
#include <vector>

#include "formats/k_transform.h"

namespace thriftattn {

void hadamard_rows_scalar(float* x, int64_t rows, int64_t dim, int64_t stride) {
  const int64_t n = hadamard_block(dim);
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x + r * stride;
    for (int64_t step = 1; step < n; step *= 2) {
      for (int64_t i = 0; i < dim; ++i) {
        if ((i & step) != 0) continue;  // blocks are aligned to n, so i & step tells the side
        const float a = row[i];
        const float b = row[i + step];
        row[i] = a + b;
        row[i + step] = a - b;
      }
    }
    for (int64_t i = 0; i < dim; ++i) row[i] *= scale;
  }
}

void equalize_rotate_rows_scalar(const float* in, int64_t in_stride, int64_t rows, int64_t dim,
                                 const float* s_or_null, bool invert, bool rotate, float* out,
                                 int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = in + r * in_stride;
    float* to = out + r * out_stride;
    for (int64_t i = 0; i < dim; ++i) {
      to[i] = s_or_null == nullptr ? from[i]
              : invert             ? from[i] / s_or_null[i]
                                   : from[i] * s_or_null[i];
    }
  }
  if (rotate) hadamard_rows_scalar(out, rows, dim, out_stride);
}

void page_mean_scalar(const float* x, int64_t rows, int64_t dim, float* mean) {
  std::vector<float> level(static_cast<size_t>(rows));
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t r = 0; r < rows; ++r) level[r] = x[r * dim + d];
    for (int64_t n = rows; n > 1; n = (n + 1) / 2) {
      for (int64_t i = 0; i < n / 2; ++i) level[i] = level[2 * i] + level[2 * i + 1];
      if (n % 2 != 0) level[n / 2] = level[n - 1];
    }
    mean[d] = level[0] / static_cast<float>(rows);
  }
}

}  // namespace thriftattn
