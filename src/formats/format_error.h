// What a storage format costs in accuracy, measured: the precision ladder of `thriftattn formats`.
#pragma once

#include <cstdint>
#include <span>

#include "thriftattn/policy.h"

namespace thriftattn {

// ||x - decode(encode(x))|| / ||x|| over dense rows of `dim`, in pages of 64 rows; nvfp4x2 with
// both planes. The codec alone: no rotation, no centring. x is a whole number of pages, finite.
double relative_rms_error(Format format, std::span<const float> x, int64_t dim);

}  // namespace thriftattn
