// A non-owning, strided view of FP32 activations: the form in which Q, K, V and outputs
// cross the public API. Strides are in elements; the innermost dimension is contiguous.
#pragma once

#include <cstdint>

namespace thriftattn {

// [tokens][heads][head_dim].
template <typename T>
struct TensorView {
  T* data = nullptr;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t token_stride = 0;  // elements from one token to the next
  int64_t head_stride = 0;   // elements from one head to the next

  T* row(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }

  // A view of densely packed [tokens][heads][head_dim] memory.
  static TensorView dense(T* data, int64_t tokens, int64_t heads, int64_t head_dim) {
    return {data, tokens, heads, head_dim, heads * head_dim, head_dim};
  }
};

}  // namespace thriftattn
