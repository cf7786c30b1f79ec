// Text to tokens and back, by the vocabulary inside a GGUF file: byte-level BPE
// (tokenizer.ggml.model = gpt2) and SentencePiece-style BPE (llama).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/gguf.h"

namespace thriftattn {

struct EncodeOptions {
  std::optional<bool> add_bos = std::nullopt;  // unless given, as the model wants
  // Whether the names of control tokens (<|im_start|>) in the text are those tokens. Leave it off
  // for documents, which must not be able to end a turn. User-defined tokens (runs of line breaks
  // in Gemma, <tool_call> in Qwen) are part of the vocabulary and are always recognised.
  bool parse_special = false;
  // The text goes on where another ended: no space is put before it.
  bool continues = false;
};

// Immutable; safe to use from several threads.
class Tokenizer {
 public:
  static Tokenizer from_gguf(const GgufFile& file);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // O(n log n). Bytes that are not UTF-8 are encoded as bytes, so that decode gives them back.
  std::vector<int32_t> encode(std::string_view text, const EncodeOptions& options = {}) const;
  // Control tokens decode to nothing. Undoes the leading space that some models add.
  std::string decode(std::span<const int32_t> tokens) const;
  // What a token adds to the text; may be part of a UTF-8 character. For streaming.
  std::string token_bytes(int32_t token) const;

  int32_t vocab_size() const;
  // The vocabulary's own name of a token: "Ġthe", "<|im_end|>".
  std::string_view token_text(int32_t token) const;
  // The token with exactly this name, of any kind.
  std::optional<int32_t> find_token(std::string_view text) const;
  bool is_control(int32_t token) const;

  bool adds_bos() const;
  std::optional<int32_t> bos() const;
  std::optional<int32_t> eos() const;
  std::optional<int32_t> eot() const;  // ends a turn of a chat
  bool is_end_of_generation(int32_t token) const;

 private:
  struct State;
  explicit Tokenizer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace thriftattn
