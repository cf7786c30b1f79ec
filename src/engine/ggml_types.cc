// Block layouts of ggml's tensor types and their conversion to FP32. The layouts (all little
// endian, d and dmin are FP16):
//   Q4_0  d, 16 bytes: element j in the low nibble of byte j, j + 16 in the high one; d * (q - 8)
//   Q5_0  d, 32 fifth bits, 16 bytes as Q4_0; d * (q - 16)
//   Q8_0  d, 32 int8; d * q
//   Q4_K  d, dmin, 12 bytes of eight 6-bit scales and minima, 128 bytes; 256 elements in eight
//         groups of 32; groups 2c and 2c + 1 are the low and high nibbles of bytes 32c to 32c + 31
//   Q5_K  as Q4_K with 32 bytes of fifth bits (bit g of byte l: element l of group g) before them
//   Q6_K  128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales (16 elements each), d
// The loops have constant trip counts and no branches, so that the compiler vectorises them. They
// multiply scale by scale first and then by the integer, as ggml does, so results are bit-equal.
#include "engine/ggml_types.h"

#include <bit>
#include <cstring>

#include "base/float_convert.h"
#include "engine/gguf.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF data is read in place");

constexpr GgmlTypeInfo kTypes[] = {
    {GgmlType::f32, "F32", 1, 4},       {GgmlType::f16, "F16", 1, 2},
    {GgmlType::q4_0, "Q4_0", 32, 18},   {GgmlType::q5_0, "Q5_0", 32, 22},
    {GgmlType::q8_0, "Q8_0", 32, 34},   {GgmlType::q4_k, "Q4_K", 256, 144},
    {GgmlType::q5_k, "Q5_K", 256, 176}, {GgmlType::q6_k, "Q6_K", 256, 210},
    {GgmlType::bf16, "BF16", 1, 2},
};

// Names of types the engine does not read, so that a message can say which one a file has.
constexpr struct {
  uint32_t type;
  const char* name;
} kOtherTypes[] = {
    {3, "Q4_1"},     {7, "Q5_1"},    {9, "Q8_1"},     {10, "Q2_K"},  {11, "Q3_K"},   {15, "Q8_K"},
    {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"},
    {22, "IQ2_S"},   {23, "IQ4_XS"}, {24, "I8"},      {25, "I16"},   {26, "I32"},    {27, "I64"},
    {28, "F64"},     {29, "IQ1_M"},  {34, "TQ1_0"},   {35, "TQ2_0"}, {39, "MXFP4"},
};

uint16_t load_u16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

uint32_t load_u32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

float load_half(const uint8_t* p) { return fp16_to_f32(load_u16(p)); }

void convert_f16(const uint8_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = fp16_to_f32(load_u16(in + 2 * i));
}

void convert_bf16(const uint8_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = bf16_to_f32(load_u16(in + 2 * i));
  }
}

void block_q4_0(const uint8_t* in, float* out) {
  const float d = load_half(in);
  const uint8_t* q = in + 2;
  for (int j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>((q[j] & 0xF) - 8);
    out[j + 16] = d * static_cast<float>((q[j] >> 4) - 8);
  }
}

void block_q5_0(const uint8_t* in, float* out) {
  const float d = load_half(in);
  const uint32_t high = load_u32(in + 2);
  const uint8_t* q = in + 6;
  for (int j = 0; j < 16; ++j) {
    const int low_value = (q[j] & 0xF) | static_cast<int>((high >> j) & 1) << 4;
    const int high_value = (q[j] >> 4) | static_cast<int>((high >> (j + 16)) & 1) << 4;
    out[j] = d * static_cast<float>(low_value - 16);
    out[j + 16] = d * static_cast<float>(high_value - 16);
  }
}

void block_q8_0(const uint8_t* in, float* out) {
  const float d = load_half(in);
  for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(static_cast<int8_t>(in[2 + j]));
}

// Group g's 6-bit scale and minimum. Groups 0 to 3 lie in the low six bits of bytes g and g + 4;
// groups 4 to 7 have their low nibbles in bytes 8 to 11 and their top two bits above those of
// groups 0 to 3.
struct ScaleMin {
  float scale, min;
};
ScaleMin scale_min(const uint8_t* s, int g, float d, float dmin) {
  int scale, min;
  if (g < 4) {
    scale = s[g] & 63;
    min = s[g + 4] & 63;
  } else {
    scale = (s[g + 4] & 0xF) | (s[g - 4] >> 6) << 4;
    min = (s[g + 4] >> 4) | (s[g] >> 6) << 4;
  }
  return {d * static_cast<float>(scale), dmin * static_cast<float>(min)};
}

void block_q4_k(const uint8_t* in, float* out) {
  const float d = load_half(in), dmin = load_half(in + 2);
  for (int c = 0; c < 4; ++c) {
    const uint8_t* q = in + 16 + 32 * c;
    const ScaleMin a = scale_min(in + 4, 2 * c, d, dmin);
    const ScaleMin b = scale_min(in + 4, 2 * c + 1, d, dmin);
    for (int l = 0; l < 32; ++l) {
      out[64 * c + l] = a.scale * static_cast<float>(q[l] & 0xF) - a.min;
      out[64 * c + 32 + l] = b.scale * static_cast<float>(q[l] >> 4) - b.min;
    }
  }
}

void block_q5_k(const uint8_t* in, float* out) {
  const float d = load_half(in), dmin = load_half(in + 2);
  const uint8_t* high = in + 16;
  for (int c = 0; c < 4; ++c) {
    const uint8_t* q = in + 48 + 32 * c;
    const ScaleMin a = scale_min(in + 4, 2 * c, d, dmin);
    const ScaleMin b = scale_min(in + 4, 2 * c + 1, d, dmin);
    for (int l = 0; l < 32; ++l) {
      const int low_value = (q[l] & 0xF) | ((high[l] >> (2 * c)) & 1) << 4;
      const int high_value = (q[l] >> 4) | ((high[l] >> (2 * c + 1)) & 1) << 4;
      out[64 * c + l] = a.scale * static_cast<float>(low_value) - a.min;
      out[64 * c + 32 + l] = b.scale * static_cast<float>(high_value) - b.min;
    }
  }
}

// Each half of 128 elements is four runs of 32: low nibbles of bytes 0 to 31 and 32 to 63, then the
// high nibbles of the same; run r takes the bit pair 2r of each of its 32 high bytes.
void block_q6_k(const uint8_t* in, float* out) {
  const float d = load_half(in + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* low = in + 64 * half;
    const uint8_t* high = in + 128 + 32 * half;
    const uint8_t* scales = in + 192 + 8 * half;
    float* y = out + 128 * half;
    for (int part = 0; part < 2; ++part) {
      float s[4];
      for (int r = 0; r < 4; ++r) {
        s[r] = d * static_cast<float>(static_cast<int8_t>(scales[2 * r + part]));
      }
      for (int l = 16 * part; l < 16 * part + 16; ++l) {
        const int v0 = (low[l] & 0xF) | (high[l] & 3) << 4;
        const int v1 = (low[l + 32] & 0xF) | ((high[l] >> 2) & 3) << 4;
        const int v2 = (low[l] >> 4) | ((high[l] >> 4) & 3) << 4;
        const int v3 = (low[l + 32] >> 4) | (high[l] >> 6) << 4;
        y[l] = s[0] * static_cast<float>(v0 - 32);
        y[l + 32] = s[1] * static_cast<float>(v1 - 32);
        y[l + 64] = s[2] * static_cast<float>(v2 - 32);
        y[l + 96] = s[3] * static_cast<float>(v3 - 32);
      }
    }
  }
}

template <void (*kBlock)(const uint8_t*, float*), int kElements, int kBytes>
void convert_blocks(const uint8_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n / kElements; ++i) kBlock(in + i * kBytes, out + i * kElements);
}

// True if any of n half-width words, `stride` bytes apart, has all bits of `exponent` set.
bool any_non_finite16(const uint8_t* in, int64_t n, int64_t stride, uint16_t exponent) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= (load_u16(in + i * stride) & exponent) == exponent;
  return bad;
}

bool row_has_non_finite(GgmlType type, const uint8_t* in, int64_t n) {
  constexpr uint16_t kHalf = 0x7C00, kBf16 = 0x7F80;
  const GgmlTypeInfo& info = ggml_type_info(type);
  const int64_t blocks = n / info.block_elements;
  switch (type) {
    case GgmlType::f32:
      return any_non_finite16(in + 2, n, 4, kBf16);
    case GgmlType::bf16:
      return any_non_finite16(in, n, 2, kBf16);
    case GgmlType::f16:
      return any_non_finite16(in, n, 2, kHalf);
    case GgmlType::q4_0:
    case GgmlType::q5_0:
    case GgmlType::q8_0:
      return any_non_finite16(in, blocks, info.block_bytes, kHalf);
    case GgmlType::q4_k:
    case GgmlType::q5_k:
      return any_non_finite16(in, blocks, info.block_bytes, kHalf) ||
             any_non_finite16(in + 2, blocks, info.block_bytes, kHalf);
    case GgmlType::q6_k:
      return any_non_finite16(in + 208, blocks, info.block_bytes, kHalf);
  }
  return false;
}

void check_rows(const GgufTensor& tensor, int64_t row_begin, int64_t rows) {
  // Written so that no sum can overflow.
  if (row_begin < 0 || rows < 0 || row_begin > tensor.rows() || rows > tensor.rows() - row_begin) {
    throw Error(ErrorCode::invalid_argument,
                "rows " + std::to_string(row_begin) + " + " + std::to_string(rows) +
                    " of tensor '" + printable(tensor.name) + "' are outside its " +
                    std::to_string(tensor.rows()) + " rows; ask for rows it has");
  }
}

const uint8_t* row_data(const GgufTensor& tensor, int64_t row) {
  return reinterpret_cast<const uint8_t*>(tensor.data.data()) + row * tensor.row_bytes();
}

}  // namespace

const GgmlTypeInfo* find_ggml_type(uint32_t type) {
  for (const GgmlTypeInfo& info : kTypes) {
    if (static_cast<uint32_t>(info.type) == type) return &info;
  }
  return nullptr;
}

const GgmlTypeInfo& ggml_type_info(GgmlType type) {
  const GgmlTypeInfo* info = find_ggml_type(static_cast<uint32_t>(type));
  if (info == nullptr) {
    throw Error(ErrorCode::invalid_argument, "tensor type number " +
                                                 std::to_string(static_cast<uint32_t>(type)) +
                                                 " is not one of " + ggml_type_list());
  }
  return *info;
}

std::string ggml_type_name(uint32_t type) {
  if (const GgmlTypeInfo* info = find_ggml_type(type)) return std::string(info->name);
  for (const auto& other : kOtherTypes) {
    if (other.type == type) return other.name;
  }
  return "type " + std::to_string(type);
}

std::string ggml_type_list() {
  std::string list;
  for (const GgmlTypeInfo& info : kTypes) {
    if (!list.empty()) list += ", ";
    list += info.name;
  }
  return list;
}

int64_t GgufTensor::row_bytes() const {
  const GgmlTypeInfo& info = ggml_type_info(type);
  return ne[0] / info.block_elements * info.block_bytes;
}

std::string GgufTensor::shape() const {
  std::string text = std::to_string(ne[0]);
  for (int i = 1; i < n_dims; ++i) text += " x " + std::to_string(ne[i]);
  return text;
}

void dequantize(GgmlType type, const uint8_t* in, int64_t n, float* out) {
  switch (type) {
    case GgmlType::f32:
      std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
      return;
    case GgmlType::f16:
      return convert_f16(in, n, out);
    case GgmlType::bf16:
      return convert_bf16(in, n, out);
    case GgmlType::q4_0:
      return convert_blocks<block_q4_0, 32, 18>(in, n, out);
    case GgmlType::q5_0:
      return convert_blocks<block_q5_0, 32, 22>(in, n, out);
    case GgmlType::q8_0:
      return convert_blocks<block_q8_0, 32, 34>(in, n, out);
    case GgmlType::q4_k:
      return convert_blocks<block_q4_k, 256, 144>(in, n, out);
    case GgmlType::q5_k:
      return convert_blocks<block_q5_k, 256, 176>(in, n, out);
    case GgmlType::q6_k:
      return convert_blocks<block_q6_k, 256, 210>(in, n, out);
  }
}

void dequantize_rows(const GgufTensor& tensor, int64_t row_begin, int64_t rows, float* out) {
  check_rows(tensor, row_begin, rows);
  // Rows follow one another without gaps, so the range is one run of blocks.
  if (rows > 0) dequantize(tensor.type, row_data(tensor, row_begin), rows * tensor.ne[0], out);
}

void check_finite(const GgufTensor& tensor, int64_t row_begin, int64_t rows) {
  check_rows(tensor, row_begin, rows);
  for (int64_t row = row_begin; row < row_begin + rows; ++row) {
    if (row_has_non_finite(tensor.type, row_data(tensor, row), tensor.ne[0])) {
      throw Error(ErrorCode::non_finite, "tensor '" + printable(tensor.name) + "' (" +
                                             std::string(ggml_type_info(tensor.type).name) +
                                             ") holds NaN or Inf in row " + std::to_string(row) +
                                             "; the model file is damaged or was converted from "
                                             "a broken one, fetch or convert it again");
    }
  }
}

void check_finite(const GgufTensor& tensor) { check_finite(tensor, 0, tensor.rows()); }

}  // namespace thriftattn
