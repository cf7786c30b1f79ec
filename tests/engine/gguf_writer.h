// Writes small GGUF files for tests: into memory, sound or broken on purpose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/ggml_types.h"

namespace thriftattn::test {

class GgufWriter {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;  // used for the layout
  int64_t extra_keys = 0;   // added to the counts that the header claims
  int64_t extra_tensors = 0;

  GgufWriter& u8(std::string_view k, uint8_t v) { return number(k, 0, v); }
  GgufWriter& i8(std::string_view k, int8_t v) { return number(k, 1, v); }
  GgufWriter& u16(std::string_view k, uint16_t v) { return number(k, 2, v); }
  GgufWriter& i16(std::string_view k, int16_t v) { return number(k, 3, v); }
  GgufWriter& u32(std::string_view k, uint32_t v) { return number(k, 4, v); }
  GgufWriter& i32(std::string_view k, int32_t v) { return number(k, 5, v); }
  GgufWriter& f32(std::string_view k, float v) { return number(k, 6, v); }
  GgufWriter& boolean(std::string_view k, bool v) { return number(k, 7, uint8_t{v}); }
  GgufWriter& u64(std::string_view k, uint64_t v) { return number(k, 10, v); }
  GgufWriter& i64(std::string_view k, int64_t v) { return number(k, 11, v); }
  GgufWriter& f64(std::string_view k, double v) { return number(k, 12, v); }
  GgufWriter& string(std::string_view k, std::string_view v) {
    std::string& out = key(k, 8);
    put_string(out, v);
    return *this;
  }
  GgufWriter& strings(std::string_view k, const std::vector<std::string>& v) {
    std::string& out = key(k, 9);
    put(out, uint32_t{8});
    put(out, uint64_t{v.size()});
    for (const auto& s : v) put_string(out, s);
    return *this;
  }
  GgufWriter& i32s(std::string_view k, const std::vector<int32_t>& v) { return array(k, 5, v); }
  GgufWriter& f32s(std::string_view k, const std::vector<float>& v) { return array(k, 6, v); }
  GgufWriter& u8s(std::string_view k, uint32_t type, const std::vector<uint8_t>& v) {
    return array(k, type, v);
  }
  // A key with any type number and bytes.
  GgufWriter& raw(std::string_view k, uint32_t type, std::string_view bytes) {
    key(k, type) += bytes;
    return *this;
  }
  GgufWriter& erase(std::string_view k) {
    std::erase_if(keys_, [&](const auto& e) { return e.first == k; });
    return *this;
  }

  struct Tensor {
    std::string name;
    uint32_t type = 0;
    std::vector<uint64_t> ne;
    std::string data;
    int64_t offset_shift = 0;  // added to the true offset
  };
  GgufWriter& tensor(Tensor t) {
    tensors_.push_back(std::move(t));
    return *this;
  }
  GgufWriter& f32_tensor(std::string name, std::vector<uint64_t> ne, std::vector<float> values) {
    std::string data(values.size() * 4, '\0');
    if (!data.empty()) std::memcpy(data.data(), values.data(), data.size());
    return tensor({std::move(name), 0, std::move(ne), std::move(data)});
  }

  std::string build() const {
    std::string out = "GGUF";
    put(out, version);
    put(out, static_cast<uint64_t>(static_cast<int64_t>(tensors_.size()) + extra_tensors));
    put(out, static_cast<uint64_t>(static_cast<int64_t>(keys_.size()) + extra_keys));
    for (const auto& [name, value] : keys_) {
      put_string(out, name);
      out += value;
    }
    uint64_t offset = 0;
    for (const Tensor& t : tensors_) {
      put_string(out, t.name);
      put(out, static_cast<uint32_t>(t.ne.size()));
      for (const uint64_t n : t.ne) put(out, n);
      put(out, t.type);
      put(out, static_cast<uint64_t>(static_cast<int64_t>(offset) + t.offset_shift));
      offset += (t.data.size() + alignment - 1) / alignment * alignment;
    }
    for (const Tensor& t : tensors_) {
      out.append((alignment - out.size() % alignment) % alignment, '\0');
      out += t.data;
    }
    return out;
  }

 private:
  template <typename T>
  static void put(std::string& out, T v) {
    char bytes[sizeof v];
    std::memcpy(bytes, &v, sizeof v);
    out.append(bytes, sizeof v);
  }
  static void put_string(std::string& out, std::string_view s) {
    put(out, uint64_t{s.size()});
    out += s;
  }
  std::string& key(std::string_view name, uint32_t type) {
    keys_.emplace_back(std::string(name), std::string());
    put(keys_.back().second, type);
    return keys_.back().second;
  }
  template <typename T>
  GgufWriter& number(std::string_view name, uint32_t type, T v) {
    put(key(name, type), v);
    return *this;
  }
  template <typename T>
  GgufWriter& array(std::string_view name, uint32_t type, const std::vector<T>& v) {
    std::string& out = key(name, 9);
    put(out, type);
    put(out, uint64_t{v.size()});
    for (const T& x : v) put(out, x);
    return *this;
  }

  std::vector<std::pair<std::string, std::string>> keys_;
  std::vector<Tensor> tensors_;
};

inline std::span<const std::byte> as_bytes(std::string_view s) {
  return {reinterpret_cast<const std::byte*>(s.data()), s.size()};
}

}  // namespace thriftattn::test
