// Pre-tokenization with PCRE2. The expressions are the published ones of the model families, with
// one change: \s is written out as Unicode's White_Space property, because PCRE2's \s also takes
// U+180E, which the regex engines of the original tokenizers do not.
#define PCRE2_CODE_UNIT_WIDTH 8
#include "engine/pretokenize.h"

#include <pcre2.h>

#include <cstdint>
#include <string>

#include "engine/gguf.h"
#include "engine/utf8.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

// %s inside brackets and %S in them negated are filled in with the white space characters.
constexpr const char* kWhiteSpace =
    "\\x{9}-\\x{D} \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}"
    "\\x{3000}";

struct Family {
  const char* expression;
  bool whole_words_first;
  bool adds_bos;
};

constexpr Family kGpt2 = {
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^%s\\p{L}\\p{N}]+|[%s]+(?![^%s])|[%s]+", false,
    false};
constexpr Family kLlama3 = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^%s\\p{L}\\p{N}]+[\\r\\n]*|[%s]*[\\r\\n]+|[%s]+(?![^%s])|[%s]+",
    true, true};
constexpr Family kQwen2 = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
    " ?[^%s\\p{L}\\p{N}]+[\\r\\n]*|[%s]*[\\r\\n]+|[%s]+(?![^%s])|[%s]+",
    false, false};

constexpr struct {
  std::string_view name;
  const Family* family;
} kNames[] = {
    {"gpt-2", &kGpt2},      {"gpt2", &kGpt2},   {"llama-bpe", &kLlama3},       {"llama3", &kLlama3},
    {"llama-v3", &kLlama3}, {"qwen2", &kQwen2}, {"deepseek-r1-qwen", &kQwen2},
};

const Family* find_family(std::string_view name) {
  for (const auto& entry : kNames) {
    if (entry.name == name) return entry.family;
  }
  return nullptr;
}

struct MatchState {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, 8 << 20, nullptr);
  MatchState() {
    // The expressions never backtrack more than once over a run of one class, so the limit that
    // guards against catastrophic ones would only refuse long runs of white space.
    if (context != nullptr) pcre2_set_match_limit(context, UINT32_MAX);
    if (context != nullptr && stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~MatchState() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
  MatchState(const MatchState&) = delete;
  MatchState& operator=(const MatchState&) = delete;
};

}  // namespace

struct PreTokenizer::Regex {
  pcre2_code* code = nullptr;
  ~Regex() { pcre2_code_free(code); }

  // Splits a text that is known to be UTF-8.
  void split(std::string_view text, MatchState& state, std::vector<std::string_view>& words) const {
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    size_t at = 0;
    while (at < text.size()) {
      const int rc = pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK, state.data,
                                 state.context);
      if (rc == PCRE2_ERROR_NOMATCH) break;
      if (rc < 0) {
        throw Error(ErrorCode::out_of_memory, "splitting a text of " + std::to_string(text.size()) +
                                                  " bytes into words failed (PCRE2 error " +
                                                  std::to_string(rc) +
                                                  "); split the text or free memory");
      }
      const size_t* range = pcre2_get_ovector_pointer(state.data);
      if (range[1] <= at) break;  // every alternative takes a character, so this cannot happen
      // What no alternative takes is a word too; the expressions leave nothing, but text must
      // never be lost.
      if (range[0] > at) words.push_back(text.substr(at, range[0] - at));
      words.push_back(text.substr(range[0], range[1] - range[0]));
      at = range[1];
    }
    if (at < text.size()) words.push_back(text.substr(at));
  }
};

PreTokenizer::PreTokenizer(std::string_view name) : regex_(std::make_unique<Regex>()) {
  const Family* family = find_family(name);
  if (family == nullptr) {
    std::string list;
    for (const auto& entry : kNames) list += (list.empty() ? "" : ", ") + std::string(entry.name);
    throw Error(ErrorCode::unsupported, "pre-tokenizer '" + printable(name) +
                                            "' is not supported, supported are " + list +
                                            "; use a model of the families Llama 3, Qwen 2, "
                                            "Qwen 3 or GPT-2");
  }
  whole_words_first_ = family->whole_words_first;
  adds_bos_by_default_ = family->adds_bos;

  std::string expression = family->expression;
  for (size_t at; (at = expression.find("%s")) != std::string::npos;) {
    expression.replace(at, 2, kWhiteSpace);
  }
  int error = 0;
  size_t offset = 0;
  regex_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(),
                               PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  if (regex_->code == nullptr) {
    throw Error(ErrorCode::unsupported,
                "the installed PCRE2 cannot compile a pre-tokenizer (error " +
                    std::to_string(error) + "); install PCRE2 10.30 or later with Unicode");
  }
  // Without JIT (an unusual build or machine) matching is slower and gives the same words.
  (void)pcre2_jit_compile(regex_->code, PCRE2_JIT_COMPLETE);
}

PreTokenizer::PreTokenizer(PreTokenizer&&) noexcept = default;
PreTokenizer& PreTokenizer::operator=(PreTokenizer&&) noexcept = default;
PreTokenizer::~PreTokenizer() = default;

bool PreTokenizer::is_supported(std::string_view name) { return find_family(name) != nullptr; }

std::vector<std::string_view> PreTokenizer::split(std::string_view text) const {
  std::vector<std::string_view> words;
  MatchState state;
  if (state.data == nullptr || state.context == nullptr || state.stack == nullptr) {
    throw Error(ErrorCode::out_of_memory, "no memory to split a text into words; free memory");
  }
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t n = utf8_char_bytes(text, at);
    if (n > 0) {
      at += n;
      continue;
    }
    if (at > begin) regex_->split(text.substr(begin, at - begin), state, words);
    words.push_back(text.substr(at, 1));
    begin = ++at;
  }
  if (begin < text.size()) regex_->split(text.substr(begin), state, words);
  return words;
}

}  // namespace thriftattn
