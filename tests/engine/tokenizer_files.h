// Small GGUF vocabularies for tests, and the slow obvious encoders they are compared with.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "gguf_writer.h"

namespace thriftattn::test {

// GPT-2's visible character of a byte, as UTF-8; written from its definition: printable Latin-1
// stays, the k-th of the others becomes U+0100 + k.
inline std::string visible_byte(int byte) {
  const auto printable = [](int b) {
    return (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
  };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

inline std::string visible(const std::string& bytes) {
  std::string out;
  for (const char b : bytes) out += visible_byte(static_cast<unsigned char>(b));
  return out;
}

// A byte-level BPE vocabulary: the 256 bytes in order (so that the id of a byte is its value), then
// one token per merge, then special tokens.
struct BpeVocabulary {
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  std::vector<std::string> merges;
  std::map<std::pair<int32_t, int32_t>, std::pair<int, int32_t>> ranks;  // pair: rank, result

  BpeVocabulary() {
    for (int b = 0; b < 256; ++b) {
      tokens.push_back(visible_byte(b));
      types.push_back(1);
    }
  }
  // The merge of two tokens; returns the id of the result. Repeats are left out.
  int32_t merge(int32_t left, int32_t right) {
    const std::string name = tokens[static_cast<size_t>(left)] + tokens[static_cast<size_t>(right)];
    int32_t result = -1;
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] == name) result = static_cast<int32_t>(i);
    }
    if (result < 0) {
      result = static_cast<int32_t>(tokens.size());
      tokens.push_back(name);
      types.push_back(1);
    }
    if (ranks.emplace(std::pair(left, right), std::pair(static_cast<int>(merges.size()), result))
            .second) {
      merges.push_back(tokens[static_cast<size_t>(left)] + " " +
                       tokens[static_cast<size_t>(right)]);
    }
    return result;
  }
  // Merges that build a word from its left end.
  int32_t word(const std::string& bytes) {
    int32_t id = static_cast<unsigned char>(bytes[0]);
    for (size_t i = 1; i < bytes.size(); ++i) id = merge(id, static_cast<unsigned char>(bytes[i]));
    return id;
  }
  int32_t special(const std::string& name, int32_t type) {
    tokens.push_back(name);
    types.push_back(type);
    return static_cast<int32_t>(tokens.size()) - 1;
  }
  GgufWriter file(const std::string& pre = "qwen2") const {
    GgufWriter w;
    w.string("general.architecture", "qwen2").string("tokenizer.ggml.model", "gpt2");
    w.string("tokenizer.ggml.pre", pre).strings("tokenizer.ggml.tokens", tokens);
    w.i32s("tokenizer.ggml.token_type", types).strings("tokenizer.ggml.merges", merges);
    w.boolean("tokenizer.ggml.add_bos_token", false);
    return w;
  }
  // The definition of BPE: while a pair has a merge, apply the one of the lowest rank, leftmost.
  std::vector<int32_t> slow_encode_word(const std::string& word) const {
    std::vector<int32_t> ids;
    for (const char b : word) ids.push_back(static_cast<unsigned char>(b));
    for (;;) {
      size_t best = ids.size();
      std::pair<int, int32_t> merge{1 << 30, -1};
      for (size_t i = 0; i + 1 < ids.size(); ++i) {
        const auto it = ranks.find({ids[i], ids[i + 1]});
        if (it != ranks.end() && it->second.first < merge.first) {
          best = i;
          merge = it->second;
        }
      }
      if (merge.second < 0) return ids;
      ids[best] = merge.second;
      ids.erase(ids.begin() + static_cast<int64_t>(best) + 1);
    }
  }
};

// A SentencePiece vocabulary: <unk>, <s>, </s>, 256 byte tokens, then pieces with scores.
struct SpmVocabulary {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};
  std::vector<float> scores = {0, 0, 0};
  std::map<std::string, int32_t> pieces;

  SpmVocabulary() {
    for (int b = 0; b < 256; ++b) {
      char name[8];
      std::snprintf(name, sizeof name, "<0x%02X>", b);
      add(name, 6, 0);
    }
  }
  int32_t add(const std::string& text, int32_t type, float score) {
    tokens.push_back(text);
    types.push_back(type);
    scores.push_back(score);
    const auto id = static_cast<int32_t>(tokens.size()) - 1;
    if (type == 1) pieces.emplace(text, id);
    return id;
  }
  int32_t piece(const std::string& text, float score) { return add(text, 1, score); }
  GgufWriter file(bool space_prefix) const {
    GgufWriter w;
    w.string("general.architecture", "gemma3").string("tokenizer.ggml.model", "llama");
    w.strings("tokenizer.ggml.tokens", tokens).i32s("tokenizer.ggml.token_type", types);
    w.f32s("tokenizer.ggml.scores", scores).u32("tokenizer.ggml.bos_token_id", 1);
    w.u32("tokenizer.ggml.eos_token_id", 2).u32("tokenizer.ggml.unknown_token_id", 0);
    w.boolean("tokenizer.ggml.add_space_prefix", space_prefix);
    return w;
  }
  // The definition: of all neighbours that form a piece, join those of the best score, leftmost.
  // For ASCII text in which spaces are already U+2581.
  std::vector<int32_t> slow_encode(const std::vector<std::string>& characters) const {
    std::vector<std::string> parts = characters;
    for (;;) {
      size_t best = parts.size();
      float score = -1e30f;
      for (size_t i = 0; i + 1 < parts.size(); ++i) {
        const auto it = pieces.find(parts[i] + parts[i + 1]);
        if (it != pieces.end() && scores[static_cast<size_t>(it->second)] > score) {
          best = i;
          score = scores[static_cast<size_t>(it->second)];
        }
      }
      if (best == parts.size()) break;
      parts[best] += parts[best + 1];
      parts.erase(parts.begin() + static_cast<int64_t>(best) + 1);
    }
    std::vector<int32_t> ids;
    for (const auto& p : parts) {
      if (const auto it = pieces.find(p); it != pieces.end()) {
        ids.push_back(it->second);
      } else {
        for (const char b : p) ids.push_back(3 + static_cast<unsigned char>(b));
      }
    }
    return ids;
  }
};

}  // namespace thriftattn::test
