// libFuzzer target: whatever the bytes, reading them as a GGUF file either works or throws Error,
// and so does all that the engine does with a file before it computes: reading metadata, building
// the tokenizer, encoding and decoding with it, formatting a chat, and dequantising tensors.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/chat_template.h"
#include "engine/ggml_types.h"
#include "engine/gguf.h"
#include "engine/tokenizer.h"
#include "thriftattn/error.h"

namespace {

using namespace thriftattn;

// Runs fn; an Error must be one line.
template <typename Fn>
void tolerant(Fn fn) {
  try {
    fn();
  } catch (const Error& e) {
    if (std::string_view(e.what()).find('\n') != std::string_view::npos) std::abort();
  }
}

void read_metadata(const GgufFile& file) {
  for (const std::string_view key : file.keys()) {
    tolerant([&] { (void)file.find_u64(key); });
    tolerant([&] { (void)file.find_i64(key); });
    tolerant([&] { (void)file.find_f64(key); });
    tolerant([&] { (void)file.find_bool(key); });
    tolerant([&] { (void)file.find_string(key); });
    tolerant([&] { (void)file.find_i64_array(key); });
    tolerant([&] { (void)file.find_f64_array(key); });
    tolerant([&] { (void)file.find_string_array(key); });
  }
}

void read_tensors(const GgufFile& file) {
  std::vector<float> row;
  for (const GgufTensor& tensor : file.tensors()) {
    tolerant([&] { check_finite(tensor); });
    if (tensor.ne[0] > (1 << 16)) continue;
    row.resize(static_cast<size_t>(tensor.ne[0]));
    const int64_t rows = tensor.rows();
    for (int64_t i = 0; i < std::min<int64_t>(rows, 4); ++i) {
      dequantize_rows(tensor, i, 1, row.data());
    }
    dequantize_rows(tensor, rows - 1, 1, row.data());
  }
}

void use_tokenizer(const GgufFile& file, std::string_view bytes) {
  const Tokenizer tokenizer = Tokenizer::from_gguf(file);
  // The tail of the input serves as text: the fuzzer can reach the vocabulary's own words.
  const std::string_view tail = bytes.substr(bytes.size() - std::min<size_t>(bytes.size(), 200));
  for (const std::string_view text :
       {tail,
        std::string_view("Hello  world, it's 2024\n\n <|im_end|> \xE2\x96\x81\xFF\xF0\x9F")}) {
    for (const bool special : {false, true}) {
      const auto ids = tokenizer.encode(text, {.add_bos = false, .parse_special = special});
      const std::string back = tokenizer.decode(ids);
      for (const int32_t id : ids) (void)tokenizer.token_bytes(id);
      if (back.size() > 1000 * (text.size() + bytes.size())) std::abort();
    }
  }
  tolerant([&] {
    const auto chat = format_chat(file, {{"document", "d"}, {"user", "q"}}, true);
    (void)encode_chat(tokenizer, chat);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  tolerant([&] {
    const GgufFile file = GgufFile::from_memory(bytes, "fuzz");
    read_metadata(file);
    read_tensors(file);
    (void)file.content_hash();
    tolerant([&] { use_tokenizer(file, {reinterpret_cast<const char*>(data), size}); });
  });
  return 0;
}
