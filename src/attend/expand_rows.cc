// Rows to FP32 by the codecs of the formats (expand_rows.h).
#include "attend/expand_rows.h"

#include <algorithm>

#include "formats/plane_codec.h"
#include "formats/row_codec.h"

namespace thriftattn {
namespace {

constexpr int64_t kFetch = 8;  // rows decoded at a time

}  // namespace

void expand_rows_f32(const StoredRows& in, int64_t dim, const NextRows& next, ExpandedRows& out) {
  auto* values = reinterpret_cast<float*>(out.values);
  for (int64_t t = 0; t < kPageTokens; t += kFetch) {
    next.fetch(t, kFetch);
    const int64_t n = std::min(kFetch, in.tokens - t);
    if (n <= 0) continue;
    const uint8_t* rows = in.rows + t * in.row_bytes;
    if (in.scales == nullptr) {
      decode_rows(in.format, rows, in.row_bytes, n, dim, values + t * dim, dim);
    } else {
      decode_plane({.format = in.format, .rows = n, .dim = dim}, rows,
                   in.scales + t * in.row_scales, in.page_scale, values + t * dim);
    }
  }
  for (int64_t t = 0; t < kPageTokens; ++t) out.scale[t] = t < in.tokens ? 1.0f : 0.0f;
  out.tokens = in.tokens;
  out.form = ExpandedRows::Form::rows;
}

}  // namespace thriftattn
