// Builds a tokenizer from a GGUF file's metadata, cuts special tokens out of text, and hands what
// lies between them to byte-level BPE or to SentencePiece-style BPE.
#include "engine/tokenizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <unordered_map>

#include "engine/bpe.h"
#include "engine/pretokenize.h"
#include "engine/special_tokens.h"
#include "engine/spm.h"

namespace thriftattn {
namespace {

constexpr const char* kFetchAgain = "the file is damaged, fetch or convert it again";
constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, SentencePiece's visible space

enum class TokenType : uint8_t { normal = 1, unknown, control, user_defined, unused, byte };

// Names of the tokens that end an answer, for files that do not list them all. Only tokens that are
// not ordinary text count.
constexpr std::string_view kEndOfTurn[] = {"<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>",
                                           "<EOT>"};
constexpr std::string_view kEndOfText[] = {"<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"};

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0;;) {
    const size_t next = text.find(from, at);
    out += text.substr(at, next - at);
    if (next == std::string_view::npos) return out;
    out += to;
    at = next + from.size();
  }
}

// "<0x0A>" as SentencePiece writes byte tokens; -1 for anything else.
int byte_token_value(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return -1;
  int value = 0;
  for (const char c : text.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

}  // namespace

struct Tokenizer::State {
  std::vector<std::string> texts;
  std::vector<TokenType> types;
  std::unordered_map<std::string_view, int32_t> ids;  // of all tokens, into `texts`
  bool sentencepiece = false;
  bool add_space_prefix = false;
  bool adds_bos = false;
  std::optional<int32_t> bos, eos, eot;
  std::vector<int32_t> end_of_generation;

  SpecialTokens always, with_control;      // found without and with parse_special
  std::vector<std::string> special_texts;  // user-defined tokens as they stand in text

  std::optional<PreTokenizer> pre;
  BpeMerges merges;
  std::array<int32_t, 256> byte_ids{};
  SpmPieces pieces;

  void load_vocabulary(const GgufFile& file);
  void load_special(const GgufFile& file);
  void load_bpe(const GgufFile& file);
  void load_spm(const GgufFile& file);
  std::optional<int32_t> load_id(const GgufFile& file, const char* key) const;
  void check(int32_t token) const;
  std::string bytes_of(int32_t token) const;
  void encode_bpe(std::string_view text, std::vector<int32_t>& out) const;
  void encode_spm(std::string_view text, bool prefix, std::vector<int32_t>& out) const;
  bool is(int32_t token, TokenType type) const { return types[static_cast<size_t>(token)] == type; }
};

void Tokenizer::State::load_vocabulary(const GgufFile& file) {
  const auto tokens = file.get_string_array("tokenizer.ggml.tokens");
  // The largest vocabularies have 262144; the limit keeps a damaged file from asking for gigabytes.
  constexpr size_t kMaxTokens = 1 << 22;
  if (tokens.empty() || tokens.size() > kMaxTokens) {
    file.fail(ErrorCode::corrupt, "the vocabulary has " + std::to_string(tokens.size()) +
                                      " tokens, 1 to " + std::to_string(kMaxTokens) +
                                      " are possible; " + kFetchAgain);
  }
  texts.assign(tokens.begin(), tokens.end());
  types.assign(texts.size(), TokenType::normal);
  if (const auto listed = file.find_i64_array("tokenizer.ggml.token_type")) {
    if (listed->size() != texts.size()) {
      file.fail(ErrorCode::corrupt, "lists " + std::to_string(listed->size()) +
                                        " token types for " + std::to_string(texts.size()) +
                                        " tokens; " + kFetchAgain);
    }
    for (size_t i = 0; i < listed->size(); ++i) {
      const int64_t t = (*listed)[i];
      if (t < 0 || t > 6) {
        file.fail(ErrorCode::corrupt, "token " + std::to_string(i) + " has the unknown type " +
                                          std::to_string(t) + "; " + kFetchAgain);
      }
      if (t > 0) types[i] = static_cast<TokenType>(t);
    }
  }
  ids.reserve(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) ids.emplace(texts[i], static_cast<int32_t>(i));
}

std::optional<int32_t> Tokenizer::State::load_id(const GgufFile& file, const char* key) const {
  const auto id = file.find_i64(key);
  // Converters write -1 (also as an unsigned number) for "none".
  if (!id || *id == -1 || *id == 0xFFFFFFFF) return std::nullopt;
  if (*id < 0 || *id >= static_cast<int64_t>(texts.size())) {
    file.fail(ErrorCode::corrupt, std::string(key) + " is " + std::to_string(*id) +
                                      ", outside the vocabulary of " +
                                      std::to_string(texts.size()) + " tokens; " + kFetchAgain);
  }
  return static_cast<int32_t>(*id);
}

void Tokenizer::State::load_special(const GgufFile& file) {
  bos = load_id(file, "tokenizer.ggml.bos_token_id");
  eos = load_id(file, "tokenizer.ggml.eos_token_id");
  eot = load_id(file, "tokenizer.ggml.eot_token_id");
  const auto special_id = [&](std::string_view name) -> std::optional<int32_t> {
    const auto it = ids.find(name);
    if (it == ids.end() || is(it->second, TokenType::normal)) return std::nullopt;
    return it->second;
  };
  std::vector<int32_t>& ends = end_of_generation;
  const auto add_end = [&](std::optional<int32_t> id) {
    if (id && std::find(ends.begin(), ends.end(), *id) == ends.end()) ends.push_back(*id);
  };
  for (const std::string_view name : kEndOfTurn) {
    const auto id = special_id(name);
    if (!eot) eot = id;
    add_end(id);
  }
  for (const std::string_view name : kEndOfText) add_end(special_id(name));
  add_end(eos);
  add_end(eot);
  add_end(load_id(file, "tokenizer.ggml.eom_token_id"));

  // Converters write the spaces of user-defined tokens either way; text has plain ones.
  special_texts.reserve(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    if (types[i] == TokenType::user_defined) {
      special_texts.push_back(sentencepiece ? replace_all(texts[i], kSpace, " ") : texts[i]);
      always.add(special_texts.back(), id);
      with_control.add(special_texts.back(), id);
    } else if (types[i] == TokenType::control) {
      with_control.add(texts[i], id);
    }
  }
  always.build();
  with_control.build();
}

void Tokenizer::State::load_bpe(const GgufFile& file) {
  const auto name = file.find_string("tokenizer.ggml.pre");
  if (!name) {
    file.fail(ErrorCode::unsupported,
              "does not say its pre-tokenizer (tokenizer.ggml.pre), and a wrong one would damage "
              "results silently; convert the model again with a current converter");
  }
  if (!PreTokenizer::is_supported(*name)) {
    try {
      PreTokenizer unsupported(*name);  // throws the message that lists the supported ones
    } catch (const Error& e) {
      file.fail(e.code(), e.what());
    }
  }
  pre.emplace(*name);
  adds_bos = file.find_bool("tokenizer.ggml.add_bos_token").value_or(pre->adds_bos_by_default());

  byte_ids.fill(-1);
  for (size_t i = 0; i < texts.size(); ++i) {
    if (types[i] != TokenType::normal && types[i] != TokenType::byte) continue;
    if (texts[i].empty() || texts[i].size() > 2) continue;  // the alphabet ends at U+0143
    const std::string bytes = decode_byte_alphabet(texts[i]);
    if (bytes.size() != 1) continue;
    int32_t& id = byte_ids[static_cast<unsigned char>(bytes[0])];
    if (id < 0) id = static_cast<int32_t>(i);
  }
  if (const auto missing = std::find(byte_ids.begin(), byte_ids.end(), -1);
      missing != byte_ids.end()) {
    file.fail(ErrorCode::corrupt, "the vocabulary has no token for byte " +
                                      std::to_string(missing - byte_ids.begin()) +
                                      ", which byte-level BPE needs; " + kFetchAgain);
  }

  const auto lines = file.get_string_array("tokenizer.ggml.merges");
  if (lines.size() > 4 * texts.size()) {
    file.fail(ErrorCode::corrupt, "has " + std::to_string(lines.size()) + " merges for " +
                                      std::to_string(texts.size()) + " tokens; " + kFetchAgain);
  }
  merges.reserve(lines.size());
  std::string joined;
  for (size_t rank = 0; rank < lines.size(); ++rank) {
    const std::string_view line = lines[rank];
    const size_t space = line.find(' ');
    const auto id_of = [&](std::string_view piece) {
      const auto it = ids.find(piece);
      // Without this, a merge could form <|im_end|> from the text of a document.
      return it == ids.end() || is(it->second, TokenType::control) ? -1 : it->second;
    };
    int32_t left = -1, right = -1, result = -1;
    if (space != std::string_view::npos) {
      left = id_of(line.substr(0, space));
      right = id_of(line.substr(space + 1));
      joined.assign(line.substr(0, space)).append(line.substr(space + 1));
      result = id_of(joined);
    }
    if (left < 0 || right < 0 || result < 0) {
      file.fail(ErrorCode::corrupt, "merge " + std::to_string(rank) + " '" + printable(line) +
                                        "' is not two tokens that form a third; " + kFetchAgain);
    }
    merges.add(left, right, {static_cast<int32_t>(rank), result});
  }
}

void Tokenizer::State::load_spm(const GgufFile& file) {
  adds_bos = file.find_bool("tokenizer.ggml.add_bos_token").value_or(true);
  add_space_prefix = file.find_bool("tokenizer.ggml.add_space_prefix").value_or(true);
  const auto scores = file.get_f64_array("tokenizer.ggml.scores");
  if (scores.size() != texts.size()) {
    file.fail(ErrorCode::corrupt, "lists " + std::to_string(scores.size()) + " scores for " +
                                      std::to_string(texts.size()) + " tokens; " + kFetchAgain);
  }
  std::optional<int32_t> unknown = load_id(file, "tokenizer.ggml.unknown_token_id");
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    // NaN would break the order of merges.
    if (std::isnan(scores[i])) {
      file.fail(ErrorCode::non_finite,
                "the score of token " + std::to_string(i) + " is NaN; " + kFetchAgain);
    }
    switch (types[i]) {
      case TokenType::normal:
        pieces.add(texts[i], id, static_cast<float>(scores[i]));
        break;
      case TokenType::byte:
        if (const int b = byte_token_value(texts[i]); b >= 0) {
          pieces.set_byte(static_cast<uint8_t>(b), id);
        } else {
          file.fail(ErrorCode::corrupt, "byte token " + std::to_string(i) + " is named '" +
                                            printable(texts[i]) + "', not <0xNN>; " + kFetchAgain);
        }
        break;
      case TokenType::unknown:
        if (!unknown) unknown = id;
        break;
      default:  // control and user-defined tokens are cut out before, unused ones never appear
        break;
    }
  }
  if (unknown) pieces.set_unknown(*unknown);
  if (!unknown && !pieces.has_all_bytes()) {
    file.fail(ErrorCode::corrupt,
              std::string("the vocabulary has neither all byte tokens nor an unknown token; ") +
                  kFetchAgain);
  }
}

void Tokenizer::State::encode_bpe(std::string_view text, std::vector<int32_t>& out) const {
  std::vector<int32_t> symbols;
  for (const std::string_view word : pre->split(text)) {
    symbols.clear();
    for (const char b : word) symbols.push_back(byte_ids[static_cast<unsigned char>(b)]);
    if (pre->whole_words_first() && symbols.size() > 1) {
      std::string name;
      for (const int32_t id : symbols) name += texts[static_cast<size_t>(id)];
      if (const auto it = ids.find(name); it != ids.end() && is(it->second, TokenType::normal)) {
        out.push_back(it->second);
        continue;
      }
    }
    merges.apply(symbols);
    out.insert(out.end(), symbols.begin(), symbols.end());
  }
}

void Tokenizer::State::encode_spm(std::string_view text, bool prefix,
                                  std::vector<int32_t>& out) const {
  std::string escaped = replace_all(text, " ", kSpace);
  if (prefix) escaped.insert(0, kSpace);
  pieces.encode(escaped, out);
}

void Tokenizer::State::check(int32_t token) const {
  if (token < 0 || static_cast<size_t>(token) >= texts.size()) {
    throw Error(ErrorCode::invalid_argument,
                "token " + std::to_string(token) + " is outside the vocabulary of " +
                    std::to_string(texts.size()) + " tokens; use the model's own tokenizer");
  }
}

std::string Tokenizer::State::bytes_of(int32_t token) const {
  const std::string& text = texts[static_cast<size_t>(token)];
  switch (types[static_cast<size_t>(token)]) {
    case TokenType::control:
      return {};
    case TokenType::user_defined:
      return sentencepiece ? replace_all(text, kSpace, " ") : text;
    case TokenType::byte:
      if (const int b = byte_token_value(text); sentencepiece && b >= 0) {
        return std::string(1, static_cast<char>(b));
      }
      break;
    default:
      break;
  }
  return sentencepiece ? replace_all(text, kSpace, " ") : decode_byte_alphabet(text);
}

Tokenizer::Tokenizer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::from_gguf(const GgufFile& file) {
  auto state = std::make_unique<State>();
  const std::string_view model = file.get_string("tokenizer.ggml.model");
  if (model != "gpt2" && model != "llama") {
    file.fail(ErrorCode::unsupported,
              "has a tokenizer of kind '" + printable(model) +
                  "', supported are gpt2 (byte-level BPE) and llama (SentencePiece); use a model "
                  "of the families Llama, Qwen or Gemma 3");
  }
  state->sentencepiece = model == "llama";
  state->load_vocabulary(file);
  state->load_special(file);
  if (state->sentencepiece) {
    state->load_spm(file);
  } else {
    state->load_bpe(file);
  }
  if (state->adds_bos && !state->bos) {
    file.fail(ErrorCode::corrupt,
              std::string("wants texts to begin with a token that it does not name "
                          "(tokenizer.ggml.bos_token_id); ") +
                  kFetchAgain);
  }
  return Tokenizer(std::move(state));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  // Positions inside the encoders are 32 bits wide, and escaping a space triples it.
  constexpr size_t kMaxBytes = size_t{1} << 30;
  if (text.size() > kMaxBytes) {
    throw Error(ErrorCode::invalid_argument,
                "a text of " + std::to_string(text.size()) + " bytes is too long, at most " +
                    std::to_string(kMaxBytes) + " can be encoded; split it");
  }
  std::vector<int32_t> out;
  out.reserve(text.size() / 3 + 1);
  if (options.add_bos.value_or(state_->adds_bos)) {
    if (!state_->bos) {
      throw Error(ErrorCode::invalid_argument,
                  "the model has no token for the beginning of a text; encode without it");
    }
    out.push_back(*state_->bos);
  }
  const SpecialTokens& special = options.parse_special ? state_->with_control : state_->always;
  // As llama.cpp does, the extra space comes at the start and after control tokens.
  bool prefix = state_->add_space_prefix && !options.continues;
  for (size_t at = 0; at < text.size();) {
    const SpecialTokens::Match match = special.find(text, at);
    if (match.at > at) {
      const std::string_view between = text.substr(at, match.at - at);
      if (state_->sentencepiece) {
        state_->encode_spm(between, prefix, out);
      } else {
        state_->encode_bpe(between, out);
      }
      prefix = false;
    }
    if (match.bytes > 0) {
      out.push_back(match.id);
      prefix = state_->add_space_prefix && state_->is(match.id, TokenType::control);
    }
    at = match.at + match.bytes;
  }
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> tokens) const {
  std::string out;
  bool first = state_->add_space_prefix;
  for (const int32_t token : tokens) {
    state_->check(token);
    if (state_->is(token, TokenType::control)) continue;
    std::string bytes = state_->bytes_of(token);
    if (first && bytes.starts_with(' ')) bytes.erase(0, 1);
    first = false;
    out += bytes;
  }
  return out;
}

std::string Tokenizer::token_bytes(int32_t token) const {
  state_->check(token);
  return state_->bytes_of(token);
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(state_->texts.size()); }

std::string_view Tokenizer::token_text(int32_t token) const {
  state_->check(token);
  return state_->texts[static_cast<size_t>(token)];
}

std::optional<int32_t> Tokenizer::find_token(std::string_view text) const {
  const auto it = state_->ids.find(text);
  return it == state_->ids.end() ? std::nullopt : std::optional(it->second);
}

bool Tokenizer::is_control(int32_t token) const {
  state_->check(token);
  return state_->is(token, TokenType::control);
}

bool Tokenizer::adds_bos() const { return state_->adds_bos; }
std::optional<int32_t> Tokenizer::bos() const { return state_->bos; }
std::optional<int32_t> Tokenizer::eos() const { return state_->eos; }
std::optional<int32_t> Tokenizer::eot() const { return state_->eot; }

bool Tokenizer::is_end_of_generation(int32_t token) const {
  const auto& ends = state_->end_of_generation;
  return std::find(ends.begin(), ends.end(), token) != ends.end();
}

}  // namespace thriftattn
