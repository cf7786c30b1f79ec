// The needle test: facts hidden at spread depths of a long text, each asked for at its end. What
// perplexity hides, a needle shows: whether one line among thousands can still be read.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/session.h"
#include "engine/tokenizer.h"

namespace thriftattn {

// What the needle test needs of a tokenizer.
struct TextCodec {
  std::function<std::vector<int32_t>(std::string_view)> encode;  // no beginning-of-text token
  std::function<std::string(int32_t)> token_bytes;
  std::function<bool(int32_t)> ends_generation;
};
TextCodec text_codec(const Tokenizer& tokenizer);  // the tokenizer must outlive it

struct NeedleOptions {
  int64_t context = 0;  // tokens of text, facts, one question and its answer together
  int64_t facts = 0;    // at most 256, the number of distinct names
  uint64_t seed = 0;    // of names and codes
  int64_t prefix = 0;   // tokens at the start of the text that stay there (beginning of text)
};

struct NeedleFact {
  std::string name;  // "Amber Falcon"
  std::string code;  // five digits
  int64_t at = 0;    // first token of its line in the context
  std::vector<int32_t> question;
};

struct NeedlePlan {
  std::vector<int32_t> context;  // text with the facts in it
  std::vector<NeedleFact> facts;
  int64_t answer_tokens = 0;  // room kept for an answer
};

// Inserts the facts at line boundaries nearest to the depths (i + 1/2) / facts. The text is cut so
// that context, the longest question and an answer take exactly options.context tokens. Throws
// Error if the facts do not fit or the text is too short.
NeedlePlan plan_needles(const TextCodec& codec, std::span<const int32_t> text,
                        const NeedleOptions& options);

struct NeedleResult {
  int64_t found = 0;
  int64_t asked = 0;
  std::vector<std::string> answers;  // as decoded, one a fact
};

// Prefills the context into the empty session and asks for every fact in a fork of its own. The
// question is fed in mode decode: the question reads the facts as decoding does.
NeedleResult run_needles(Session& session, const NeedlePlan& plan, const TextCodec& codec,
                         const Session::Progress& progress = {});

// The first run of decimal digits, "" if there is none.
std::string first_number(std::string_view text);

}  // namespace thriftattn
