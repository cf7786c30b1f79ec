// Reads GGUF files (versions 2 and 3): a memory-mapped file, its metadata and its tensors. The
// whole header is checked when the file is opened, so every span handed out lies inside the file;
// anything wrong is thrown as one Error line that names the file. Nothing is allocated that is
// much larger than the bytes of the file which describe it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/ggml_types.h"
#include "thriftattn/error.h"

namespace thriftattn {

class GgufFile {
 public:
  // The file must not be cut short by others while it is open: it is read through the mapping.
  static GgufFile open(const std::string& path);
  // The bytes must outlive the file. `name` is used in messages.
  static GgufFile from_memory(std::span<const std::byte> bytes, std::string name);

  GgufFile(GgufFile&&) noexcept;
  GgufFile& operator=(GgufFile&&) noexcept;
  ~GgufFile();

  const std::string& name() const { return name_; }
  uint32_t version() const { return version_; }
  uint64_t size_bytes() const { return bytes_.size(); }

  // Metadata. get_* throws not_found without the key, find_* returns nothing; both throw corrupt
  // if the value has another type. Integers of any width are accepted where the value fits, and
  // integers where a real number is asked for; real numbers must be finite.
  bool has(std::string_view key) const { return values_.contains(key); }
  std::vector<std::string_view> keys() const;
  uint64_t get_u64(std::string_view key) const;
  int64_t get_i64(std::string_view key) const;
  double get_f64(std::string_view key) const;
  bool get_bool(std::string_view key) const;
  std::string_view get_string(std::string_view key) const;
  std::optional<uint64_t> find_u64(std::string_view key) const;
  std::optional<int64_t> find_i64(std::string_view key) const;
  std::optional<double> find_f64(std::string_view key) const;
  std::optional<bool> find_bool(std::string_view key) const;
  std::optional<std::string_view> find_string(std::string_view key) const;

  // Arrays. Booleans are accepted as integers (0, 1); elements of real arrays may be non-finite.
  bool is_array(std::string_view key) const;
  std::vector<int64_t> get_i64_array(std::string_view key) const;
  std::vector<double> get_f64_array(std::string_view key) const;
  std::span<const std::string_view> get_string_array(std::string_view key) const;
  std::optional<std::vector<int64_t>> find_i64_array(std::string_view key) const;
  std::optional<std::vector<double>> find_f64_array(std::string_view key) const;
  std::optional<std::span<const std::string_view>> find_string_array(std::string_view key) const;

  // general.architecture, and a key with "%s" replaced by it: arch_key("%s.block_count").
  std::string_view architecture() const { return get_string("general.architecture"); }
  std::string arch_key(std::string_view pattern) const;

  std::span<const GgufTensor> tensors() const { return tensors_; }
  const GgufTensor* find(std::string_view name) const;
  const GgufTensor& require(std::string_view name) const;

  // XXH3-128 of the whole file as 32 hexadecimal digits. Reads the file on every call.
  std::string content_hash() const;

  // An Error about this file: "<name>: <message>", with anything unprintable escaped.
  [[noreturn]] void fail(ErrorCode code, const std::string& message) const;

 private:
  class Mapping;
  class Parser;
  struct Value {
    uint32_t type = 0;  // of the elements, if array
    bool array = false;
    uint64_t count = 1;
    const std::byte* data = nullptr;        // numbers: where they lie in the file
    std::vector<std::string_view> strings;  // strings: views into the file
  };

  GgufFile();
  void parse();
  const Value* lookup(std::string_view key) const;
  [[noreturn]] void fail_missing(std::string_view key) const;
  [[noreturn]] void fail_type(std::string_view key, const Value& value, const char* wanted) const;

  std::string name_;
  std::unique_ptr<Mapping> mapping_;
  std::span<const std::byte> bytes_;
  uint32_t version_ = 0;
  std::map<std::string_view, Value> values_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string_view, size_t> tensor_index_;
};

// A text from a file made fit for a one-line message: control bytes and bytes above 0x7E as \xNN,
// at most `limit` bytes.
std::string printable(std::string_view text, size_t limit = 80);

}  // namespace thriftattn
