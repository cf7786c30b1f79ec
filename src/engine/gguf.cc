// The GGUF reader. A file is: magic, version, tensor count, key count; keys with typed values;
// tensor descriptions; padding to the alignment; tensor data. All counts and lengths come from the
// file and are hostile until compared with the bytes that remain; comparisons are written as
// `count > remaining / size`, which cannot overflow.
#include "engine/gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

namespace thriftattn {
namespace {

constexpr const char* kFetchAgain = "the file is truncated or damaged, fetch or convert it again";

// Value types of the format.
enum : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

// Bytes of a number; 0 for strings, arrays and unknown types.
constexpr uint64_t value_bytes(uint32_t type) {
  switch (type) {
    case kU8:
    case kI8:
    case kBool:
      return 1;
    case kU16:
    case kI16:
      return 2;
    case kU32:
    case kI32:
    case kF32:
      return 4;
    case kU64:
    case kI64:
    case kF64:
      return 8;
    default:
      return 0;
  }
}

const char* value_type_name(uint32_t type) {
  constexpr const char* kNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                    "bool", "string", "array", "u64", "i64", "f64"};
  return type < std::size(kNames) ? kNames[type] : "unknown";
}

template <typename T>
T load(const std::byte* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Calls fn with the number at p in its own type. Not for strings and arrays.
template <typename Fn>
auto visit_number(uint32_t type, const std::byte* p, Fn fn) {
  switch (type) {
    case kU8:
    case kBool:
      return fn(load<uint8_t>(p));
    case kI8:
      return fn(load<int8_t>(p));
    case kU16:
      return fn(load<uint16_t>(p));
    case kI16:
      return fn(load<int16_t>(p));
    case kU32:
      return fn(load<uint32_t>(p));
    case kI32:
      return fn(load<int32_t>(p));
    case kF32:
      return fn(load<float>(p));
    case kI64:
      return fn(load<int64_t>(p));
    case kF64:
      return fn(load<double>(p));
    default:
      return fn(load<uint64_t>(p));
  }
}

bool is_real(uint32_t type) { return type == kF32 || type == kF64; }
bool is_number(uint32_t type) { return value_bytes(type) != 0 && type != kBool; }
bool is_integer(uint32_t type) { return is_number(type) && !is_real(type); }

// The integer as a T, or nothing if it does not fit.
template <typename T>
std::optional<T> load_integer(uint32_t type, const std::byte* p) {
  return visit_number(type, p, [](auto v) -> std::optional<T> {
    if constexpr (std::is_floating_point_v<decltype(v)>) {
      return std::nullopt;
    } else {
      return std::in_range<T>(v) ? std::optional<T>(static_cast<T>(v)) : std::nullopt;
    }
  });
}

double load_real(uint32_t type, const std::byte* p) {
  return visit_number(type, p, [](auto v) { return static_cast<double>(v); });
}

}  // namespace

std::string printable(std::string_view text, size_t limit) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, limit)) {
    const auto u = static_cast<unsigned char>(c);
    if (u >= 0x20 && u < 0x7F) {
      out += c;
    } else {
      out += "\\x";
      out += kHex[u >> 4];
      out += kHex[u & 15];
    }
  }
  if (text.size() > limit) out += "...";
  return out;
}

// Owns the mapping of a file.
class GgufFile::Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
      const int error = errno;
      if (error == ENOENT || error == ENOTDIR) {
        throw Error(ErrorCode::not_found,
                    printable(path, 4096) + ": no such file; check the path of the model");
      }
      throw Error(ErrorCode::io, printable(path, 4096) + ": cannot be opened (" +
                                     std::strerror(error) + "); check its permissions");
    }
    struct stat info {};
    const bool regular = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    int error = 0;
    if (regular && info.st_size > 0) {
      size_ = static_cast<size_t>(info.st_size);
      data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
      if (data_ == MAP_FAILED) error = errno;
    }
    ::close(fd);
    if (!regular) {
      throw Error(ErrorCode::io,
                  printable(path, 4096) + ": is not a regular file; give the path of a .gguf file");
    }
    if (error != 0) {
      throw Error(error == ENOMEM ? ErrorCode::out_of_memory : ErrorCode::io,
                  printable(path, 4096) + ": cannot be mapped into memory (" +
                      std::strerror(error) + "); raise the address-space limit (ulimit -v)");
    }
  }
  ~Mapping() {
    if (size_ > 0) ::munmap(data_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(size_ > 0 ? data_ : nullptr), size_};
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// A cursor over the header that cannot leave the file.
class GgufFile::Parser {
 public:
  explicit Parser(const GgufFile& file) : file_(file), bytes_(file.bytes_) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return bytes_.size() - position_; }

  const std::byte* take(uint64_t n, const char* what) {
    if (n > remaining()) {
      file_.fail(ErrorCode::corrupt, std::string(what) + " at byte " + std::to_string(position_) +
                                         " needs " + std::to_string(n) + " bytes, " +
                                         std::to_string(remaining()) + " are left; " + kFetchAgain);
    }
    const std::byte* p = bytes_.data() + position_;
    position_ += n;
    return p;
  }
  uint32_t u32(const char* what) { return load<uint32_t>(take(4, what)); }
  uint64_t u64(const char* what) { return load<uint64_t>(take(8, what)); }
  std::string_view string(const char* what) {
    const uint64_t n = u64(what);
    return {reinterpret_cast<const char*>(take(n, what)), static_cast<size_t>(n)};
  }
  // A count of things that take at least `min_bytes` each.
  uint64_t checked_count(uint64_t count, uint64_t min_bytes, const char* what) const {
    if (count > remaining() / min_bytes) {
      file_.fail(ErrorCode::corrupt, "claims " + std::to_string(count) + " " + what +
                                         ", more than the " + std::to_string(remaining()) +
                                         " bytes left can hold; " + kFetchAgain);
    }
    return count;
  }

  Value value(std::string_view key) {
    Value v;
    v.type = u32("a value type");
    if (v.type == kArray) {
      v.array = true;
      v.type = u32("an array's type");
      v.count = u64("an array's length");
    }
    if (v.type == kString) {
      checked_count(v.count, 8, "strings");
      v.strings.reserve(v.count);
      for (uint64_t i = 0; i < v.count; ++i) v.strings.push_back(string("a string"));
      return v;
    }
    const uint64_t size = value_bytes(v.type);
    if (size == 0) {
      file_.fail(ErrorCode::corrupt, "key '" + printable(key) + "' has " +
                                         (v.array ? "elements" : "a value") + " of type number " +
                                         std::to_string(v.type) +
                                         ", which GGUF 2 and 3 do not define here; " + kFetchAgain);
    }
    checked_count(v.count, size, "values in an array");
    v.data = take(v.count * size, "a value");
    if (v.type == kBool) {
      for (uint64_t i = 0; i < v.count; ++i) {
        if (v.data[i] > std::byte{1}) {
          file_.fail(
              ErrorCode::corrupt,
              "key '" + printable(key) + "' has a boolean that is neither 0 nor 1; " + kFetchAgain);
        }
      }
    }
    return v;
  }

 private:
  const GgufFile& file_;
  std::span<const std::byte> bytes_;
  uint64_t position_ = 0;
};

GgufFile::GgufFile() = default;
GgufFile::~GgufFile() = default;
GgufFile::GgufFile(GgufFile&&) noexcept = default;
GgufFile& GgufFile::operator=(GgufFile&&) noexcept = default;

GgufFile GgufFile::open(const std::string& path) {
  GgufFile file;
  file.name_ = path;
  file.mapping_ = std::make_unique<Mapping>(path);
  file.bytes_ = file.mapping_->bytes();
  file.parse();
  return file;
}

GgufFile GgufFile::from_memory(std::span<const std::byte> bytes, std::string name) {
  GgufFile file;
  file.name_ = std::move(name);
  file.bytes_ = bytes;
  file.parse();
  return file;
}

void GgufFile::fail(ErrorCode code, const std::string& message) const {
  throw Error(code, printable(name_, 4096) + ": " + message);
}

void GgufFile::parse() {
  Parser in(*this);
  if (bytes_.size() < 4 || std::memcmp(bytes_.data(), "GGUF", 4) != 0) {
    fail(ErrorCode::corrupt, bytes_.empty()
                                 ? "the file is empty; fetch or convert it again"
                                 : "does not start with 'GGUF'; give a model file in GGUF format");
  }
  in.take(4, "the magic");
  version_ = in.u32("the version");
  if (version_ != 2 && version_ != 3) {
    // A big-endian file shows its version in the upper bytes.
    const bool swapped = version_ != 0 && (version_ & 0xFFFF) == 0;
    fail(ErrorCode::unsupported,
         swapped ? std::string("is big-endian; convert the model again for little-endian machines")
                 : "has GGUF version " + std::to_string(version_) +
                       ", supported are 2 and 3; convert the model again with a current converter");
  }
  const uint64_t n_tensors = in.u64("the tensor count");
  const uint64_t n_keys = in.u64("the key count");
  // A key: length, one byte, type, one byte of value. A tensor: length, one byte, dimension count,
  // one dimension, type, offset.
  in.checked_count(n_keys, 8 + 1 + 4 + 1, "keys");
  in.checked_count(n_tensors, 8 + 1 + 4 + 8 + 4 + 8, "tensors");
  // Real files have some dozen keys and some hundred tensors. Their records here are several times
  // larger than in the file, so a large file must not be able to ask for a billion of them.
  constexpr uint64_t kMaxRecords = 1 << 16;
  if (n_keys > kMaxRecords || n_tensors > kMaxRecords) {
    fail(ErrorCode::corrupt, "claims " + std::to_string(n_keys) + " keys and " +
                                 std::to_string(n_tensors) + " tensors, the limit is " +
                                 std::to_string(kMaxRecords) + "; " + kFetchAgain);
  }

  for (uint64_t i = 0; i < n_keys; ++i) {
    const std::string_view key = in.string("a key");
    if (key.empty()) fail(ErrorCode::corrupt, std::string("has an empty key; ") + kFetchAgain);
    Value v = in.value(key);
    if (!values_.emplace(key, std::move(v)).second) {
      fail(ErrorCode::corrupt, "has the key '" + printable(key) + "' twice; " + kFetchAgain);
    }
  }

  const uint64_t alignment = find_u64("general.alignment").value_or(32);
  if (alignment < 8 || alignment > (1u << 20) || !std::has_single_bit(alignment)) {
    fail(ErrorCode::corrupt, "general.alignment is " + std::to_string(alignment) +
                                 ", a power of two from 8 to 1048576 is needed; " + kFetchAgain);
  }

  in.checked_count(n_tensors, 8 + 1 + 4 + 8 + 4 + 8, "tensors");
  tensors_.reserve(n_tensors);
  std::vector<uint64_t> offsets;
  offsets.reserve(n_tensors);
  for (uint64_t i = 0; i < n_tensors; ++i) {
    GgufTensor t;
    t.name = in.string("a tensor's name");
    const auto where = [&] { return "tensor '" + printable(t.name) + "' "; };
    if (t.name.empty()) {
      fail(ErrorCode::corrupt, std::string("has a tensor without a name; ") + kFetchAgain);
    }
    if (!tensor_index_.emplace(t.name, tensors_.size()).second) {
      fail(ErrorCode::corrupt, "has the " + where() + "twice; " + kFetchAgain);
    }
    const uint32_t n_dims = in.u32("a tensor's dimension count");
    if (n_dims < 1 || n_dims > 4) {
      fail(ErrorCode::corrupt, where() + "has " + std::to_string(n_dims) +
                                   " dimensions, 1 to 4 are possible; " + kFetchAgain);
    }
    t.n_dims = static_cast<int>(n_dims);
    uint64_t elements = 1;
    for (uint32_t d = 0; d < n_dims; ++d) {
      const uint64_t n = in.u64("a tensor's dimension");
      // 2^48 elements are far more than any file holds, and leave room for the products below.
      constexpr uint64_t kMaxElements = uint64_t{1} << 48;
      if (n == 0 || n > kMaxElements / elements) {
        fail(ErrorCode::corrupt,
             where() + "has the impossible dimension " + std::to_string(n) + "; " + kFetchAgain);
      }
      elements *= n;
      t.ne[d] = static_cast<int64_t>(n);
    }
    const uint32_t type = in.u32("a tensor's type");
    const GgmlTypeInfo* info = find_ggml_type(type);
    if (info == nullptr) {
      fail(ErrorCode::unsupported, where() + "has the type " + ggml_type_name(type) +
                                       ", supported are " + ggml_type_list() +
                                       "; use a file quantised to one of these (such as Q4_K_M)");
    }
    t.type = info->type;
    if (t.ne[0] % info->block_elements != 0) {
      fail(ErrorCode::corrupt, where() + "of type " + std::string(info->name) + " has rows of " +
                                   std::to_string(t.ne[0]) + " elements, not a multiple of " +
                                   std::to_string(info->block_elements) + "; " + kFetchAgain);
    }
    offsets.push_back(in.u64("a tensor's offset"));
    tensors_.push_back(t);
  }
  if (tensors_.empty()) return;

  // Positions are below 2^63, so the sum cannot overflow.
  const uint64_t data_begin = (in.position() + alignment - 1) & ~(alignment - 1);
  const uint64_t data_bytes = data_begin < bytes_.size() ? bytes_.size() - data_begin : 0;
  std::vector<size_t> order(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    order[i] = i;
    GgufTensor& t = tensors_[i];
    const uint64_t size = static_cast<uint64_t>(t.row_bytes() * t.rows());
    if (offsets[i] % alignment != 0) {
      fail(ErrorCode::corrupt, "tensor '" + printable(t.name) + "' lies at offset " +
                                   std::to_string(offsets[i]) +
                                   ", not a multiple of the alignment " +
                                   std::to_string(alignment) + "; " + kFetchAgain);
    }
    if (offsets[i] > data_bytes || size > data_bytes - offsets[i]) {
      fail(ErrorCode::corrupt, "tensor '" + printable(t.name) + "' needs bytes " +
                                   std::to_string(offsets[i]) + " + " + std::to_string(size) +
                                   " of the tensor data, the file holds " +
                                   std::to_string(data_bytes) + "; " + kFetchAgain);
    }
    t.data = bytes_.subspan(data_begin + offsets[i], size);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return offsets[a] < offsets[b]; });
  for (size_t i = 1; i < order.size(); ++i) {
    const GgufTensor &a = tensors_[order[i - 1]], &b = tensors_[order[i]];
    if (a.data.data() + a.data.size() > b.data.data()) {
      fail(ErrorCode::corrupt, "tensors '" + printable(a.name) + "' and '" + printable(b.name) +
                                   "' overlap in the file; " + kFetchAgain);
    }
  }
}

const GgufFile::Value* GgufFile::lookup(std::string_view key) const {
  const auto it = values_.find(key);
  return it == values_.end() ? nullptr : &it->second;
}

void GgufFile::fail_missing(std::string_view key) const {
  fail(ErrorCode::not_found, "has no metadata key '" + printable(key) +
                                 "'; convert the model again with a current converter");
}

void GgufFile::fail_type(std::string_view key, const Value& value, const char* wanted) const {
  fail(ErrorCode::corrupt, "metadata key '" + printable(key) + "' holds " +
                               (value.array ? "an array of " : "") + value_type_name(value.type) +
                               ", " + wanted + " is needed; convert the model again");
}

std::vector<std::string_view> GgufFile::keys() const {
  std::vector<std::string_view> keys;
  keys.reserve(values_.size());
  for (const auto& [key, value] : values_) keys.push_back(key);
  return keys;
}

std::optional<uint64_t> GgufFile::find_u64(std::string_view key) const {
  const Value* v = lookup(key);
  if (v == nullptr) return std::nullopt;
  std::optional<uint64_t> n;
  if (!v->array && is_integer(v->type)) n = load_integer<uint64_t>(v->type, v->data);
  if (!n) fail_type(key, *v, "a whole number that is not negative");
  return n;
}

std::optional<int64_t> GgufFile::find_i64(std::string_view key) const {
  const Value* v = lookup(key);
  if (v == nullptr) return std::nullopt;
  std::optional<int64_t> n;
  if (!v->array && is_integer(v->type)) n = load_integer<int64_t>(v->type, v->data);
  if (!n) fail_type(key, *v, "a whole number of 64 bits");
  return n;
}

std::optional<double> GgufFile::find_f64(std::string_view key) const {
  const Value* v = lookup(key);
  if (v == nullptr) return std::nullopt;
  if (v->array || !is_number(v->type)) fail_type(key, *v, "a number");
  const double x = load_real(v->type, v->data);
  if (!std::isfinite(x)) {
    fail(ErrorCode::non_finite,
         "metadata key '" + printable(key) + "' is NaN or infinite; " + kFetchAgain);
  }
  return x;
}

std::optional<bool> GgufFile::find_bool(std::string_view key) const {
  const Value* v = lookup(key);
  if (v == nullptr) return std::nullopt;
  if (v->array || v->type != kBool) fail_type(key, *v, "a bool");
  return v->data[0] != std::byte{0};
}

std::optional<std::string_view> GgufFile::find_string(std::string_view key) const {
  const Value* v = lookup(key);
  if (v == nullptr) return std::nullopt;
  if (v->array || v->type != kString) fail_type(key, *v, "a string");
  return v->strings[0];
}

bool GgufFile::is_array(std::string_view key) const {
  const Value* v = lookup(key);
  return v != nullptr && v->array;
}

std::optional<std::vector<int64_t>> GgufFile::find_i64_array(std::string_view key) const {
  const Value* v = lookup(key);
  if (v == nullptr) return std::nullopt;
  if (!v->array || !(is_integer(v->type) || v->type == kBool)) {
    fail_type(key, *v, "an array of whole numbers");
  }
  std::vector<int64_t> out(v->count);
  const uint64_t size = value_bytes(v->type);
  for (uint64_t i = 0; i < v->count; ++i) {
    const auto n = load_integer<int64_t>(v->type, v->data + i * size);
    if (!n) fail_type(key, *v, "an array of whole numbers below 2^63");
    out[i] = *n;
  }
  return out;
}

std::optional<std::vector<double>> GgufFile::find_f64_array(std::string_view key) const {
  const Value* v = lookup(key);
  if (v == nullptr) return std::nullopt;
  if (!v->array || !is_number(v->type)) fail_type(key, *v, "an array of numbers");
  std::vector<double> out(v->count);
  const uint64_t size = value_bytes(v->type);
  for (uint64_t i = 0; i < v->count; ++i) out[i] = load_real(v->type, v->data + i * size);
  return out;
}

std::optional<std::span<const std::string_view>> GgufFile::find_string_array(
    std::string_view key) const {
  const Value* v = lookup(key);
  if (v == nullptr) return std::nullopt;
  if (!v->array || v->type != kString) fail_type(key, *v, "an array of strings");
  return std::span<const std::string_view>(v->strings);
}

uint64_t GgufFile::get_u64(std::string_view key) const {
  if (const auto v = find_u64(key)) return *v;
  fail_missing(key);
}
int64_t GgufFile::get_i64(std::string_view key) const {
  if (const auto v = find_i64(key)) return *v;
  fail_missing(key);
}
double GgufFile::get_f64(std::string_view key) const {
  if (const auto v = find_f64(key)) return *v;
  fail_missing(key);
}
bool GgufFile::get_bool(std::string_view key) const {
  if (const auto v = find_bool(key)) return *v;
  fail_missing(key);
}
std::string_view GgufFile::get_string(std::string_view key) const {
  if (const auto v = find_string(key)) return *v;
  fail_missing(key);
}
std::vector<int64_t> GgufFile::get_i64_array(std::string_view key) const {
  if (auto v = find_i64_array(key)) return std::move(*v);
  fail_missing(key);
}
std::vector<double> GgufFile::get_f64_array(std::string_view key) const {
  if (auto v = find_f64_array(key)) return std::move(*v);
  fail_missing(key);
}
std::span<const std::string_view> GgufFile::get_string_array(std::string_view key) const {
  if (const auto v = find_string_array(key)) return *v;
  fail_missing(key);
}

std::string GgufFile::arch_key(std::string_view pattern) const {
  std::string key(pattern);
  if (const size_t at = key.find("%s"); at != std::string::npos) key.replace(at, 2, architecture());
  return key;
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

const GgufTensor& GgufFile::require(std::string_view name) const {
  if (const GgufTensor* t = find(name)) return *t;
  fail(ErrorCode::not_found, "has no tensor '" + printable(name) +
                                 "'; the file is incomplete or of another model family, fetch or "
                                 "convert it again");
}

std::string GgufFile::content_hash() const {
  const XXH128_hash_t hash = XXH3_128bits(bytes_.data(), bytes_.size());
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  constexpr char kHex[] = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : canonical.digest) {
    text += kHex[byte >> 4];
    text += kHex[byte & 15];
  }
  return text;
}

}  // namespace thriftattn
