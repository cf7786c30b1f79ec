// MXFP4, Q4_0, INT3 and Q8_0 as the NVFP4 kernels take them (expand_rows.h).
#pragma once

#include <cstdint>

#include "attend/expand_rows.h"

namespace thriftattn {

// Only where cpu_has_avx512_bf16().
void lay_out_codes(const StoredRows& in, int64_t dim, ExpandedRows& out);
// Only where cpu_has_avx512_vbmi().
void lay_out_codes_vbmi(const StoredRows& in, int64_t dim, ExpandedRows& out);

}  // namespace thriftattn
