// Generating one answer (answer.h).
#include "cli/answer.h"

#include <fmt/format.h>

#include "cli/common.h"
#include "cli/interrupt.h"
#include "thriftattn/error.h"

namespace thriftattn::cli {
namespace {

std::vector<std::string> all_stops(const AnswerOptions& options) {
  std::vector<std::string> texts = options.stop_texts;
  if (options.stop_at_line) texts.push_back("\n");
  return texts;
}

}  // namespace

Answer::Answer(const Tokenizer& tokenizer, const AnswerOptions& options)
    : tokenizer_(tokenizer), options_(options), stops_(all_stops(options)) {}

void Answer::generate(Session& session) {
  try {
    decode_until_stop(session);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::cancelled) throw;
    interrupt();
  }
}

void Answer::interrupt() {
  interrupted_ = true;
  stop_ = "interrupted by Ctrl-C";
}

void Answer::decode_until_stop(Session& session) {
  Sampler sampler(options_.sampling);
  if (options_.limit == 0) {
    stop_ = "nothing asked for: -n 0";
    return;
  }
  int32_t token = sampler.sample(session.next_logits());
  while (true) {
    if (InterruptHandler::interrupted()) return interrupt();
    if (tokenizer_.is_end_of_generation(token)) {
      stop_ = "the model ended it";
      return;
    }
    ++tokens_;
    unfed_ = token;
    if (!take(tokenizer_.token_bytes(token))) return;
    if (options_.limit > 0 && tokens_ >= options_.limit) {
      stop_ = fmt::format("limit -n {}", options_.limit);
      return;
    }
    if (session.length() >= session.context()) {
      stop_ = "the context is full";
      return;
    }
    const std::vector<float>& logits = session.decode(token);
    unfed_.reset();
    token = sampler.sample(logits);
  }
}

// False if the bytes end the answer.
bool Answer::take(std::string bytes) {
  if (!begun_) bytes.erase(0, bytes.find_first_not_of(" \n"));  // npos: all of it
  begun_ |= !bytes.empty();
  emit(stops_.push(bytes));
  if (!stops_.found()) return true;
  const bool line = options_.stop_at_line && *stops_.found() == "\n";
  stop_ = line ? "the line ended" : fmt::format("--stop '{}'", one_line(*stops_.found()));
  return false;
}

void Answer::emit(const std::string& text) {
  text_ += text;
  if (options_.stream) print(held_.push(text));
}

void Answer::finish() {
  emit(stops_.flush());
  if (options_.stream) print(held_.flush() + "\n");
}

}  // namespace thriftattn::cli
