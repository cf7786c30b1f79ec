// One answer of `run`: decodes until something ends it, and streams what is printable.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/stop_texts.h"
#include "cli/utf8_stream.h"
#include "engine/sampler.h"
#include "engine/session.h"
#include "engine/tokenizer.h"

namespace thriftattn::cli {

struct AnswerOptions {
  SamplerOptions sampling;
  int64_t limit = 128;  // tokens; -1 = until the context is full
  std::vector<std::string> stop_texts;
  bool stop_at_line = false;  // for base models, which have no token that ends an answer
  bool stream = true;         // to standard output
};

class Answer {
 public:
  Answer(const Tokenizer& tokenizer, const AnswerOptions& options);

  // Ctrl-C ends it too; finish() prints what is still held back.
  void generate(Session& session);
  void finish();
  // Ctrl-C before the first token: nothing is generated.
  void interrupt();

  const std::string& text() const { return text_; }
  const std::string& stop() const { return stop_; }  // why it ended
  int64_t tokens() const { return tokens_; }
  bool interrupted() const { return interrupted_; }
  // The last token of the text if it has not been fed to the session.
  std::optional<int32_t> unfed() const { return unfed_; }

 private:
  void decode_until_stop(Session& session);
  bool take(std::string bytes);
  void emit(const std::string& text);

  const Tokenizer& tokenizer_;
  const AnswerOptions& options_;
  StopTexts stops_;
  Utf8Stream held_;
  bool begun_ = false;
  std::string text_, stop_;
  int64_t tokens_ = 0;
  bool interrupted_ = false;
  std::optional<int32_t> unfed_;
};

}  // namespace thriftattn::cli
