// Checks of tensor views (tensor_check.h).
#include "base/tensor_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "thriftattn/error.h"

namespace thriftattn {
namespace {

[[noreturn]] void fail(const char* who, const std::string& message) {
  throw Error(ErrorCode::invalid_argument, fmt::format("{}: {}", who, message));
}

bool is_empty(const TensorView<const float>& v) {
  return v.tokens == 0 || v.heads == 0 || v.head_dim == 0;
}

// Elements from the first to one past the last; false if they cannot be addressed.
bool extent_of(const TensorView<const float>& v, int64_t& elements) {
  constexpr int64_t kMax = int64_t{1} << 55;  // 2^57 bytes: more than any machine addresses
  int64_t tokens, heads;
  if (__builtin_mul_overflow(v.tokens - 1, v.token_stride, &tokens) ||
      __builtin_mul_overflow(v.heads - 1, v.head_stride, &heads) ||
      __builtin_add_overflow(tokens, heads, &elements) ||
      __builtin_add_overflow(elements, v.head_dim, &elements) || elements > kMax) {
    return false;
  }
  const auto begin = reinterpret_cast<uintptr_t>(v.data);
  return begin <=
         std::numeric_limits<uintptr_t>::max() - static_cast<uintptr_t>(elements) * sizeof(float);
}

// Rows of a written view: the wider stride must step over everything that the narrower spans.
bool rows_are_apart(const TensorView<const float>& v) {
  struct Axis {
    int64_t stride, count;
  };
  Axis inner{v.head_stride, v.heads}, outer{v.token_stride, v.tokens};
  if (inner.count == 1) return outer.count == 1 || outer.stride >= v.head_dim;
  if (outer.count == 1) return inner.stride >= v.head_dim;
  if (inner.stride > outer.stride) std::swap(inner, outer);
  return inner.stride >= v.head_dim &&
         outer.stride >= (inner.count - 1) * inner.stride + v.head_dim;
}

struct Range {
  uintptr_t begin, end;
  size_t view;
};

// The first pair, in the order of addresses, of which one is written and which share bytes.
const Range* find_overlap(std::vector<Range>& ranges, std::span<const NamedView> views,
                          const Range** other) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  // The furthest end so far, among all and among written ones.
  const Range* any = nullptr;
  const Range* written = nullptr;
  for (const Range& range : ranges) {
    const Range* before = views[range.view].written ? any : written;
    if (before != nullptr && before->end > range.begin) {
      *other = before;
      return &range;
    }
    if (any == nullptr || range.end > any->end) any = &range;
    if (views[range.view].written && (written == nullptr || range.end > written->end)) {
      written = &range;
    }
  }
  return nullptr;
}

uintptr_t address(const float* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace

void check_view(const char* who, const NamedView& named, const ViewShape& shape) {
  const auto& v = named.view;
  const bool same =
      v.tokens == shape.tokens && v.heads == shape.heads && v.head_dim == shape.head_dim;
  const bool null = v.data == nullptr && !is_empty(v);
  if (!same || null || v.tokens < 0) {
    fail(who, fmt::format("{} is [{}][{}][{}]{}, it must be [{}][{}][{}]", named.name, v.tokens,
                          v.heads, v.head_dim, null ? " at a null pointer" : "", shape.tokens,
                          shape.heads, shape.head_dim));
  }
  if (is_empty(v)) return;
  if (address(v.data) % alignof(float) != 0) {
    fail(who, fmt::format("{} begins at address {:#x}, which is not a multiple of {}", named.name,
                          address(v.data), alignof(float)));
  }
  if (v.token_stride < 0 || v.head_stride < 0) {
    fail(who, fmt::format("{} has token_stride = {} and head_stride = {}: strides are not negative",
                          named.name, v.token_stride, v.head_stride));
  }
  int64_t elements = 0;
  if (!extent_of(v, elements)) {
    fail(who,
         fmt::format("{} [{}][{}][{}] with token_stride = {} and head_stride = {} ends beyond "
                     "the address space",
                     named.name, v.tokens, v.heads, v.head_dim, v.token_stride, v.head_stride));
  }
  if (named.written && !rows_are_apart(v)) {
    fail(who, fmt::format("{} [{}][{}][{}] with token_stride = {} and head_stride = {} writes some "
                          "elements twice; rows of {} elements must lie apart",
                          named.name, v.tokens, v.heads, v.head_dim, v.token_stride, v.head_stride,
                          v.head_dim));
  }
}

void check_disjoint(const char* who, std::span<const NamedView> views) {
  std::vector<Range> ranges;
  for (size_t i = 0; i < views.size(); ++i) {
    const auto& v = views[i].view;
    int64_t elements = 0;
    if (v.data == nullptr || is_empty(v) || !extent_of(v, elements)) continue;
    ranges.push_back({address(v.data), address(v.data + elements), i});
  }
  const Range* other = nullptr;
  if (find_overlap(ranges, views, &other) == nullptr) return;
  // Whole extents meet; it may be that only rows interleave.
  std::vector<Range> rows;
  for (const Range& range : ranges) {
    const auto& v = views[range.view].view;
    for (int64_t t = 0; t < v.tokens; ++t) {
      for (int64_t h = 0; h < v.heads; ++h) {
        rows.push_back({address(v.row(t, h)), address(v.row(t, h) + v.head_dim), range.view});
      }
    }
  }
  if (const Range* found = find_overlap(rows, views, &other)) {
    fail(who,
         fmt::format("{} at {:#x} and {} at {:#x} share memory, and one of them is written; "
                     "give the output its own buffer",
                     views[other->view].name, other->begin, views[found->view].name, found->begin));
  }
}

}  // namespace thriftattn
