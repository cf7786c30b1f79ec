// MXFP4, Q4_0 and INT3 as rows of codes of 4 bits for the NVFP4 kernels (expand_rows.h).
#pragma once

#include <cstdint>

#include "attend/expand_rows.h"

namespace thriftattn {

// Only where cpu_has_avx512_bf16().
void lay_out_codes(const StoredRows& in, int64_t dim, const NextRows& next, ExpandedRows& out);

}  // namespace thriftattn
