// Random data of every tensor type: any bytes are codes, only scales must be moderate.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/float_convert.h"
#include "engine/ggml_types.h"

namespace thriftattn::test {

inline constexpr GgmlType kTensorTypes[] = {GgmlType::f32,  GgmlType::f16,  GgmlType::bf16,
                                            GgmlType::q4_0, GgmlType::q5_0, GgmlType::q8_0,
                                            GgmlType::q4_k, GgmlType::q5_k, GgmlType::q6_k};

// n rows of k elements. `scale` other than 0 is every block's scale, `fill` every other byte.
inline std::string random_rows(GgmlType type, int64_t n, int64_t k, uint32_t seed,
                               float scale = 0.0f, int fill = -1) {
  const GgmlTypeInfo& info = ggml_type_info(type);
  std::mt19937 random(seed);
  std::string out;
  for (int64_t i = 0; i < n * k / info.block_elements; ++i) {
    std::string block(static_cast<size_t>(info.block_bytes), '\0');
    const auto put = [&](size_t at, float value) {
      const uint16_t half = f32_to_fp16(value);
      std::memcpy(&block[at], &half, sizeof half);
    };
    const float any = static_cast<float>(static_cast<int>(random() % 4001) - 2000) / 1000.0f;
    if (type == GgmlType::f32) {
      std::memcpy(block.data(), &any, sizeof any);
    } else if (type == GgmlType::bf16) {
      const uint16_t bits = f32_to_bf16(any);
      std::memcpy(block.data(), &bits, sizeof bits);
    } else if (type == GgmlType::f16) {
      put(0, i % 7 == 0 ? any * 1e-6f : any);  // subnormal halves among them
    } else {
      for (char& c : block) c = static_cast<char>(fill < 0 ? random() % 256 : fill);
      const float d = scale != 0.0f ? scale : any * 0.01f;
      const bool k_quant = type == GgmlType::q4_k || type == GgmlType::q5_k;
      put(type == GgmlType::q6_k ? 208 : 0, d);
      if (k_quant) put(2, scale != 0.0f ? scale : -any * 0.02f);
    }
    out += block;
  }
  return out;
}

}  // namespace thriftattn::test
