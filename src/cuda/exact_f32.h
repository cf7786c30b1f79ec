// append() and attend() for pages whose K and V are stored in FP32: plain FP32 arithmetic, any
// head_dim that pages have, K and V of different widths. What quality is judged by (`f32` of eval);
// not made for speed.
#pragma once

#include "cache/sequence_state.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {

// Numbers of a store that the kernels read. Inputs are FP32 with strides given, outputs FP32 or BF16.
struct ExactLayer {
  int64_t slot_bytes = 0;
  int64_t k_head_bytes = 0, v_head_bytes = 0;  // strides between KV heads in a slot
  int64_t k_start = 0, v_start = 0;            // of the first head's rows
  int32_t kv_heads = 0, group = 0, dim_k = 0, dim_v = 0;
  int64_t window = 0;
};
ExactLayer exact_layer(const LayerStore& store);

// As append() and attend(); of one sequence, at most `tokens` of its step.
void exact_append(const ExactLayer& layer, const AppendCall& call, int64_t tokens, Stream stream);
void exact_attend(const ExactLayer& layer, const AttendCall& call, int64_t tokens, Stream stream);

}  // namespace thriftattn::cuda
