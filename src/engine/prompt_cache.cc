// The prompt cache file (prompt_cache.h): magic, version, length of the header, header (JSON),
// the session's bytes, XXH3 of everything before it.
#include "engine/prompt_cache.h"

#include <fmt/format.h>
#include <unistd.h>
#include <xxhash.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>

#include "engine/gguf.h"
#include "formats/format_info.h"
#include "thriftattn/error.h"
#include "thriftattn/version.h"

namespace thriftattn {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

constexpr std::array<char, 8> kMagic = {'T', 'H', 'R', 'I', 'F', 'T', 'K', 'V'};
constexpr uint32_t kMaxHeader = 1 << 20;

struct Prologue {
  std::array<char, 8> magic = kMagic;
  uint32_t version = kPromptCacheVersion;
  uint32_t header_bytes = 0;
};
static_assert(sizeof(Prologue) == 16, "no padding: the struct is what is stored");

[[noreturn]] void refuse(ErrorCode code, const std::string& path, const std::string& why) {
  throw Error(code, fmt::format("prompt cache {}: {}; delete it, or name another file with "
                                "--prompt-cache",
                                path, why));
}

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

class Checksum {
 public:
  Checksum() : state_(XXH3_createState()) { XXH3_64bits_reset(state_.get()); }
  void add(const void* data, size_t bytes) { XXH3_64bits_update(state_.get(), data, bytes); }
  uint64_t value() const { return XXH3_64bits_digest(state_.get()); }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

std::string hash_text(const void* data, size_t bytes) {
  const XXH128_hash_t hash = XXH3_128bits(data, bytes);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

std::string equalizer_hash(const Equalizer& equalizer) {
  Checksum sum;
  for (const std::vector<float>& layer : equalizer.layers) {
    const uint64_t count = layer.size();
    sum.add(&count, sizeof count);
    sum.add(layer.data(), layer.size() * sizeof(float));
  }
  return equalizer.layers.empty() ? "none" : fmt::format("{:016x}", sum.value());
}

// Everything that the bytes of the session depend on.
ordered_json header_of(const PromptCacheKey& key, const Session& session) {
  const Model& model = session.model();
  const std::string policy = explain(session.policy());
  // A device rounds otherwise, also with the same type of weights.
  const std::string weights =
      session.device() == nullptr
          ? std::string(to_string(model.compute()))
          : fmt::format("{} on a CUDA device", to_string(session.device()->compute()));
  const std::string rope = explain_rope_scaling(model.config());
  return {{"page_format", kPageFormatVersion},
          {"model", model.hash()},
          {"model_name", model.config().name},
          {"weights", weights},
          {"rope_scaling", rope.empty() ? "none" : rope},
          {"equalizer", equalizer_hash(session.cache().config().equalizer)},
          {"policy", hash_text(policy.data(), policy.size())},
          {"policy_name", key.policy_name},
          {"chunk", session.chunk()},
          {"tokens", key.tokens.size()},
          {"text", hash_text(key.tokens.data(), key.tokens.size_bytes())},
          {"written_by", fmt::format("thriftattn {}", version())}};
}

// Refuses a header that differs from what this run would write, naming the first difference.
void compare(const std::string& path, const ordered_json& file, const ordered_json& wanted) {
  const auto value = [](const ordered_json& header, const char* name) {
    const auto at = header.find(name);
    if (at == header.end()) return std::string("nothing");
    return at->is_string() ? printable(at->get<std::string>()) : at->dump();
  };
  const auto require = [&](const char* name, const char* shown, const char* what) {
    if (value(file, name) == value(wanted, name)) return;
    refuse(ErrorCode::invalid_argument, path,
           fmt::format("it was made {} {}, this run has {}", what, value(file, shown),
                       value(wanted, shown)));
  };
  require("page_format", "page_format", "with page format version");
  require("model", "model", fmt::format("with model {}, hash", value(file, "model_name")).c_str());
  require("weights", "weights", "with weights computed as");
  require("rope_scaling", "rope_scaling", "with RoPE scaling");
  require("equalizer", "equalizer", "with equaliser");
  require("policy",
          value(file, "policy_name") == value(wanted, "policy_name") ? "policy" : "policy_name",
          "under policy");
  require("chunk", "chunk", "with --chunk");
  require("tokens", "tokens", "of another document: tokens");
  require("text", "text", "of another document of the same length: text hash");
}

}  // namespace

bool load_prompt_cache(const PromptCacheKey& key, Session& session) {
  const std::string& path = key.path;
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) refuse(ErrorCode::io, path, "it is a folder");
  const File file(std::fopen(path.c_str(), "rb"));
  if (!file) {
    if (errno == ENOENT) return false;
    refuse(ErrorCode::io, path, fmt::format("cannot be opened: {}", std::strerror(errno)));
  }
  Checksum sum;
  bool ended = false;
  const ByteSource read = [&](void* data, size_t bytes) {
    if (bytes == 0) return;
    if (std::fread(data, 1, bytes, file.get()) != bytes) {
      ended = true;
      if (std::ferror(file.get())) {
        refuse(ErrorCode::io, path, fmt::format("cannot be read: {}", std::strerror(errno)));
      }
      refuse(ErrorCode::corrupt, path, "it ends early");
    }
    sum.add(data, bytes);
  };
  Prologue prologue;
  read(&prologue, sizeof prologue);
  if (prologue.magic != kMagic) refuse(ErrorCode::corrupt, path, "it is not a prompt cache");
  if (prologue.version != kPromptCacheVersion) {
    refuse(ErrorCode::invalid_argument, path,
           fmt::format("its version is {}, this program reads {}", prologue.version,
                       kPromptCacheVersion));
  }
  if (prologue.header_bytes > kMaxHeader)
    refuse(ErrorCode::corrupt, path, "its header is too long");
  std::string text(prologue.header_bytes, '\0');
  read(text.data(), text.size());
  const ordered_json header = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) refuse(ErrorCode::corrupt, path, "its header is damaged");
  compare(path, header, header_of(key, session));

  Session loaded = session.fork();  // empty, as the session is
  try {
    loaded.load(static_cast<int64_t>(key.tokens.size()), read);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::corrupt || ended) throw;
    refuse(ErrorCode::corrupt, path, fmt::format("it is damaged ({})", error.what()));
  }
  const uint64_t expected = sum.value();
  uint64_t stored = 0;
  read(&stored, sizeof stored);
  if (stored != expected)
    refuse(ErrorCode::corrupt, path, "its checksum does not fit: it is damaged");
  if (std::fgetc(file.get()) != EOF) refuse(ErrorCode::corrupt, path, "bytes follow its end");
  session = std::move(loaded);
  return true;
}

int64_t save_prompt_cache(const PromptCacheKey& key, const Session& session) {
  if (session.length() != static_cast<int64_t>(key.tokens.size())) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("save_prompt_cache: {} tokens are named, the session holds {}",
                            key.tokens.size(), session.length()));
  }
  // Beside the target, so that the rename stays inside one file system.
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  const std::string temporary = fmt::format("{}.{}-{}.tmp", key.path, getpid(), now);
  const auto fail = [&](const std::string& reason) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
    throw Error(ErrorCode::io, fmt::format("cannot write prompt cache {}: {}; name a file in a "
                                           "folder that exists, can be written and has room",
                                           key.path, reason));
  };
  File file(std::fopen(temporary.c_str(), "wb"));
  if (!file) fail(std::strerror(errno));
  Checksum sum;
  int64_t bytes = 0;
  const ByteSink write = [&](const void* data, size_t count) {
    if (count == 0) return;
    if (std::fwrite(data, 1, count, file.get()) != count) fail(std::strerror(errno));
    sum.add(data, count);
    bytes += static_cast<int64_t>(count);
  };
  const std::string header =
      header_of(key, session).dump(-1, ' ', false, ordered_json::error_handler_t::replace);
  Prologue prologue;
  prologue.header_bytes = static_cast<uint32_t>(header.size());
  write(&prologue, sizeof prologue);
  write(header.data(), header.size());
  session.save(write);
  const uint64_t checksum = sum.value();
  write(&checksum, sizeof checksum);
  if (std::fclose(file.release()) != 0) fail(std::strerror(errno));
  std::error_code error;
  fs::rename(temporary, key.path, error);
  if (error) fail(error.message());
  return bytes;
}

}  // namespace thriftattn
