// Dequantisation against golden blocks from the numpy code of the gguf package, and by hand.
#include "engine/ggml_types.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "engine/gguf.h"
#include "gguf_writer.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using test::as_bytes;
using test::GgufWriter;

std::string from_hex(const std::string& hex) {
  std::string out;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    out += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return out;
}

GgufTensor tensor_of(GgmlType type, int64_t columns, int64_t rows, std::string_view data) {
  GgufTensor t;
  t.name = "weights";
  t.type = type;
  t.n_dims = 2;
  t.ne[0] = columns;
  t.ne[1] = rows;
  t.data = as_bytes(data);
  return t;
}

constexpr GgmlType kAll[] = {GgmlType::f32,  GgmlType::f16,  GgmlType::bf16,
                             GgmlType::q4_0, GgmlType::q5_0, GgmlType::q8_0,
                             GgmlType::q4_k, GgmlType::q5_k, GgmlType::q6_k};

TEST(GgmlTypes, MatchGoldenBlocksBitForBit) {
  const auto json = nlohmann::json::parse(
      std::ifstream(THRIFTATTN_SOURCE_DIR "/tests/engine/data/ggml_goldens.json"));
  int compared = 0;
  for (const GgmlType type : kAll) {
    const GgmlTypeInfo& info = ggml_type_info(type);
    if (type == GgmlType::f32) continue;
    const auto& golden = json.at("types").at(std::string(info.name));
    const std::string bytes = from_hex(golden.at("bytes"));
    const std::string want = from_hex(golden.at("values"));
    const int64_t n = golden.at("elements");
    ASSERT_EQ(static_cast<int64_t>(bytes.size()), n / info.block_elements * info.block_bytes);
    // An odd address: data inside a file has the alignment of its block's fields only by chance.
    const std::string shifted = "x" + bytes;
    std::vector<float> got(static_cast<size_t>(n));
    dequantize_rows(tensor_of(type, n, 1, std::string_view(shifted).substr(1)), 0, 1, got.data());
    for (size_t i = 0; i < got.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, want.data() + 4 * i, 4);
      ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), bits)
          << info.name << " element " << i << ": " << got[i] << " not "
          << std::bit_cast<float>(bits);
      ++compared;
    }
  }
  EXPECT_EQ(compared, 5 * 96 + 3 * 512);
}

// One golden nibble each, so that the order of nibbles is told by a test and not by a comment.
TEST(GgmlTypes, NibbleOrder) {
  std::string q4(18, '\x88');  // every element 8 - 8 = 0
  q4[0] = 0;
  q4[1] = 0x3C;    // d = 1
  q4[2] = '\x9A';  // byte 0: low A, high 9
  std::vector<float> out(32);
  dequantize_rows(tensor_of(GgmlType::q4_0, 32, 1, q4), 0, 1, out.data());
  EXPECT_EQ(out[0], 2);
  EXPECT_EQ(out[16], 1);
  EXPECT_EQ(out[1], 0);

  std::string q5(22, '\0');  // every element 0 - 16
  q5[1] = 0x3C;
  q5[2] = 1;  // fifth bit of element 0
  q5[6] = 3;
  dequantize_rows(tensor_of(GgmlType::q5_0, 32, 1, q5), 0, 1, out.data());
  EXPECT_EQ(out[0], 3);
  EXPECT_EQ(out[1], -16);
}

TEST(GgmlTypes, RowRanges) {
  std::string data;
  for (int row = 0; row < 5; ++row) {
    data += std::string("\0\x3C", 2) + std::string(32, static_cast<char>(row));
  }
  const GgufTensor t = tensor_of(GgmlType::q8_0, 32, 5, data);
  std::vector<float> out(65, 99.0f);
  dequantize_rows(t, 3, 2, out.data());
  EXPECT_EQ(out[0], 3);
  EXPECT_EQ(out[32], 4);
  EXPECT_EQ(out[63], 4);
  EXPECT_EQ(out[64], 99);
  dequantize_rows(t, 5, 0, out.data());
  EXPECT_THROW(dequantize_rows(t, 4, 2, out.data()), Error);
  EXPECT_THROW(dequantize_rows(t, -1, 1, out.data()), Error);
  EXPECT_THROW(dequantize_rows(t, 1, std::numeric_limits<int64_t>::max(), out.data()), Error);
}

// Every type, the scale of the last block of the second row.
TEST(GgmlTypes, NonFiniteScalesAreFound) {
  for (const GgmlType type : kAll) {
    const GgmlTypeInfo& info = ggml_type_info(type);
    const int64_t columns = 2 * std::max<int64_t>(info.block_elements, 2);
    const auto row_bytes = static_cast<size_t>(columns / info.block_elements * info.block_bytes);
    const std::string zero(2 * row_bytes, '\0');
    check_finite(tensor_of(type, columns, 2, zero));
    const size_t block = 2 * row_bytes - static_cast<size_t>(info.block_bytes);
    std::vector<size_t> at = {block};
    if (type == GgmlType::f32) at = {block + 2};
    if (type == GgmlType::q4_k || type == GgmlType::q5_k) at = {block, block + 2};
    if (type == GgmlType::q6_k) at = {block + 208};
    const bool half = type != GgmlType::f32 && type != GgmlType::bf16;
    for (const size_t position : at) {
      for (const uint16_t value : half ? std::vector<uint16_t>{0x7C00, 0xFC00, 0x7E01}
                                       : std::vector<uint16_t>{0x7F80, 0xFF80, 0x7FC1}) {
        std::string data = zero;
        std::memcpy(&data[position], &value, 2);
        try {
          check_finite(tensor_of(type, columns, 2, data));
          FAIL() << info.name << " " << value;
        } catch (const Error& e) {
          EXPECT_EQ(e.code(), ErrorCode::non_finite);
          EXPECT_THAT(e.what(), testing::HasSubstr("'weights'"));
          EXPECT_THAT(e.what(), testing::HasSubstr("row 1"));
        }
        check_finite(tensor_of(type, columns, 2, data), 0, 1);
      }
    }
    // Integers of quantised blocks may have any bits.
    if (info.block_elements > 1) {
      std::string data = zero;
      const size_t quants = type == GgmlType::q6_k ? 0 : info.block_elements == 256 ? 16 : 2;
      for (size_t i = 0; i < 16; ++i) data[block + quants + i] = '\xff';
      check_finite(tensor_of(type, columns, 2, data));
    }
  }
}

TEST(GgmlTypes, Names) {
  EXPECT_EQ(ggml_type_name(12), "Q4_K");
  EXPECT_EQ(ggml_type_name(10), "Q2_K");
  EXPECT_EQ(ggml_type_name(999), "type 999");
  EXPECT_EQ(find_ggml_type(10), nullptr);
  EXPECT_EQ(find_ggml_type(30)->name, "BF16");
  EXPECT_EQ(ggml_type_list(), "F32, F16, Q4_0, Q5_0, Q8_0, Q4_K, Q5_K, Q6_K, BF16");
}

}  // namespace
}  // namespace thriftattn
