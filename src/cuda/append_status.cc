// What append() found wrong in its input, as an Error.
#include <fmt/format.h>

#include "thriftattn/cuda.h"
#include "thriftattn/error.h"

namespace thriftattn::cuda {

void throw_if_failed(const AppendStatus& status, int64_t layer, const LayerPolicy& policy) {
  if (status.failed == 0) return;
  throw Error(ErrorCode::non_finite,
              fmt::format("{} of layer {}, KV head {}, token {} of sequence {} of the batch holds NaN, Inf or "
                          "a value beyond {}'s range; the step must be rolled back: check the model's "
                          "weights",
                          status.side == 0 ? "K" : "V", layer, status.kv_head, status.token,
                          status.sequence,
                          to_string(status.side == 0 ? policy.k_format : policy.v_format)));
}

}  // namespace thriftattn::cuda
