// Splits text into the words inside which byte-level BPE merges, by the regular expression that a
// model was trained with.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

namespace thriftattn {

class PreTokenizer {
 public:
  // The name is that of tokenizer.ggml.pre: "gpt-2", "llama-bpe", "qwen2" or a synonym. Throws
  // Error unsupported for others: a wrong expression gives a model subtly wrong input.
  explicit PreTokenizer(std::string_view name);
  PreTokenizer(PreTokenizer&&) noexcept;
  PreTokenizer& operator=(PreTokenizer&&) noexcept;
  ~PreTokenizer();

  static bool is_supported(std::string_view name);
  // Llama 3 takes a word that is a token as that token, even where merges would not reach it.
  bool whole_words_first() const { return whole_words_first_; }
  bool adds_bos_by_default() const { return adds_bos_by_default_; }

  // The words, views into text, which cover it in order. Bytes that are not UTF-8 become words of
  // their own, one byte each. Safe to call from several threads.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  struct Regex;
  std::unique_ptr<Regex> regex_;
  bool whole_words_first_ = false;
  bool adds_bos_by_default_ = false;
};

}  // namespace thriftattn
