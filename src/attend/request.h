// The checks that attend() and attend_reference() share.
#pragma once

#include "cache/kv_cache_impl.h"
#include "thriftattn/attention.h"

namespace thriftattn {

// Throws Error naming what is wrong; else what the request reads.
LayerView checked_view(const KvCache& cache, const AttendRequest& request);

}  // namespace thriftattn
