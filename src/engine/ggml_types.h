// The tensor types of GGUF files that the engine reads: sizes of their blocks, and their values as
// FP32. Every type stores a row (ne[0] elements) as whole blocks, one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace thriftattn {

// The numbers are those of the file format.
enum class GgmlType : uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q5_0 = 6,
  q8_0 = 8,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  bf16 = 30,
};

struct GgmlTypeInfo {
  GgmlType type;
  std::string_view name;
  int64_t block_elements;
  int64_t block_bytes;
};

// Null for a type that the engine does not read.
const GgmlTypeInfo* find_ggml_type(uint32_t type);
const GgmlTypeInfo& ggml_type_info(GgmlType type);
// The format's name of a type number, also of those the engine does not read; else "type N".
std::string ggml_type_name(uint32_t type);
// "F32, F16, ...": what the engine reads, for messages.
std::string ggml_type_list();

struct GgufTensor {
  std::string_view name;
  GgmlType type = GgmlType::f32;
  int n_dims = 0;
  int64_t ne[4] = {1, 1, 1, 1};  // ne[0] runs fastest
  std::span<const std::byte> data;

  int64_t rows() const { return ne[1] * ne[2] * ne[3]; }
  int64_t elements() const { return ne[0] * rows(); }
  int64_t row_bytes() const;
  std::string shape() const;  // "1536 x 256"
};

// Writes rows [row_begin, row_begin + rows) as FP32 to out (rows * ne[0] values). Distinct row
// ranges may be converted by different threads.
void dequantize_rows(const GgufTensor& tensor, int64_t row_begin, int64_t rows, float* out);

// Whole blocks of one type, `count` elements, as FP32: the scalar truth of expand-inl.h.
void dequantize(GgmlType type, const uint8_t* blocks, int64_t count, float* out);

// Throws Error non_finite, naming the tensor, the row and the type, if a stored value or a block's
// scale is NaN or Inf. Reads only the scales of the quantised types: finite scales suffice, because
// |scale * integer| <= 65504 * 63 * 32 is far inside the range of FP32.
void check_finite(const GgufTensor& tensor);
void check_finite(const GgufTensor& tensor, int64_t row_begin, int64_t rows);

}  // namespace thriftattn
