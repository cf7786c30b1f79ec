// Rows to FP32 by the codecs of the formats (expand_rows.h).
#include "attend/expand_rows.h"

#include <algorithm>

#include "formats/plane_codec.h"
#include "formats/row_codec.h"

namespace thriftattn {
void expand_rows_f32(const StoredRows& in, int64_t dim, ExpandedRows& out) {
  auto* values = reinterpret_cast<float*>(out.values);
  if (in.scales == nullptr) {
    decode_rows(in.format, in.rows, in.row_bytes, in.tokens, dim, values, dim);
  } else {
    decode_plane({.format = in.format, .rows = in.tokens, .dim = dim}, in.rows, in.scales,
                 in.page_scale, values);
  }
  for (int64_t t = 0; t < kPageTokens; ++t) out.scale[t] = t < in.tokens ? 1.0f : 0.0f;
  out.tokens = in.tokens;
  out.form = ExpandedRows::Form::rows;
}

}  // namespace thriftattn
