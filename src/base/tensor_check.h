// Checks of the tensor views that cross the public API: null pointers, shapes, strides whose
// offsets overflow, and memory that is written while something else uses it.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "thriftattn/tensor_view.h"

namespace thriftattn {

// A view under the name that messages use.
struct NamedView {
  std::string name;
  TensorView<const float> view;
  bool written = false;
};

struct ViewShape {
  int64_t tokens = 0, heads = 0, head_dim = 0;
};

template <typename T>
NamedView named(std::string name, const TensorView<T>& v) {
  return {std::move(name),
          {v.data, v.tokens, v.heads, v.head_dim, v.token_stride, v.head_stride},
          !std::is_const_v<T>};
}

// Throws Error(invalid_argument), which begins with `who`, unless the view has this shape, its
// last element can be addressed, and no two rows of a written view share memory.
void check_view(const char* who, const NamedView& named, const ViewShape& shape);

// Throws unless every written view is apart from all others. Rows may interleave: only shared
// bytes are refused.
void check_disjoint(const char* who, std::span<const NamedView> views);

}  // namespace thriftattn
