// Planning and asking needles (needles.h).
#include "engine/needles.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include "engine/sampler.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

// The demo model is trained on the same words and wordings (tools/demo_model/needles.py).
constexpr std::array<std::string_view, 16> kAdjectives = {
    "Amber",   "Crimson", "Silver", "Golden", "Violet", "Azure", "Ivory",  "Scarlet",
    "Emerald", "Copper",  "Cobalt", "Indigo", "Quiet",  "Rapid", "Gentle", "Ancient"};
constexpr std::array<std::string_view, 16> kNouns = {
    "Falcon", "Harbor", "Meadow", "Lantern", "Castle",   "River", "Comet",  "Garden",
    "Tiger",  "Bridge", "Forest", "Anchor",  "Mountain", "Pilot", "Temple", "Mirror"};
constexpr int64_t kNames = kAdjectives.size() * kNouns.size();

constexpr int kDigits = 5;
// A model may put a space or a mark before the code, and needs a token that ends it.
constexpr int64_t kSpareAnswerTokens = 2;

std::string sentence(const NeedleFact& fact) {
  return fmt::format("The access code of {} is {}.\n", fact.name, fact.code);
}

std::string question(const NeedleFact& fact) {
  return fmt::format(
      "\nQuestion: What is the access code of {0}?\nAnswer: The access code of {0} is", fact.name);
}

// Distinct names and codes. Own draws from the engine: the standard's distributions differ between
// libraries, and the same seed must ask the same questions everywhere.
std::vector<NeedleFact> draw_facts(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::array<int32_t, kNames> order{};
  for (int32_t i = 0; i < kNames; ++i) order[static_cast<size_t>(i)] = i;
  std::vector<NeedleFact> facts;
  for (int64_t i = 0; i < count; ++i) {
    const auto left = static_cast<uint64_t>(kNames - i);
    std::swap(order[static_cast<size_t>(i)],
              order[static_cast<size_t>(i) + static_cast<size_t>(random() % left)]);
    const auto pick = static_cast<size_t>(order[static_cast<size_t>(i)]);
    NeedleFact fact;
    fact.name =
        fmt::format("{} {}", kAdjectives[pick / kNouns.size()], kNouns[pick % kNouns.size()]);
    for (int d = 0; d < kDigits; ++d) fact.code += static_cast<char>('0' + random() % 10);
    facts.push_back(std::move(fact));
  }
  return facts;
}

// Positions of the text before which a line begins; every position if it has no line break.
std::vector<int64_t> line_starts(const TextCodec& codec, std::span<const int32_t> text,
                                 int64_t prefix) {
  std::vector<int64_t> starts = {prefix};
  const auto size = static_cast<int64_t>(text.size());
  for (int64_t i = prefix; i < size; ++i) {
    if (codec.token_bytes(text[static_cast<size_t>(i)]).ends_with('\n')) starts.push_back(i + 1);
  }
  if (starts.size() == 1) {
    for (int64_t i = prefix + 1; i <= size; ++i) starts.push_back(i);
  }
  return starts;
}

int64_t nearest(const std::vector<int64_t>& sorted, int64_t wanted) {
  const auto above = std::lower_bound(sorted.begin(), sorted.end(), wanted);
  if (above == sorted.begin()) return *above;
  if (above == sorted.end()) return sorted.back();
  return *above - wanted < wanted - *std::prev(above) ? *above : *std::prev(above);
}

}  // namespace

TextCodec text_codec(const Tokenizer& tokenizer) {
  return {
      .encode = [&](std::string_view text) { return tokenizer.encode(text, {.add_bos = false}); },
      .token_bytes = [&](int32_t token) { return tokenizer.token_bytes(token); },
      .ends_generation = [&](int32_t token) { return tokenizer.is_end_of_generation(token); },
  };
}

std::string first_number(std::string_view text) {
  constexpr std::string_view kDigitChars = "0123456789";
  const size_t begin = text.find_first_of(kDigitChars);
  if (begin == std::string_view::npos) return {};
  const size_t end = text.find_first_not_of(kDigitChars, begin);
  return std::string(text.substr(begin, end == std::string_view::npos ? end : end - begin));
}

NeedlePlan plan_needles(const TextCodec& codec, std::span<const int32_t> text,
                        const NeedleOptions& options) {
  if (options.facts < 1 || options.facts > kNames) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} needles: accepted are 1 to {}", options.facts, kNames));
  }
  NeedlePlan plan;
  plan.facts = draw_facts(options.facts, options.seed);
  std::vector<std::vector<int32_t>> lines;
  size_t line_tokens = 0, question_tokens = 0, answer_tokens = 0;
  for (NeedleFact& fact : plan.facts) {
    lines.push_back(codec.encode(sentence(fact)));
    fact.question = codec.encode(question(fact));
    line_tokens += lines.back().size();
    question_tokens = std::max(question_tokens, fact.question.size());
    answer_tokens = std::max(answer_tokens, codec.encode(" " + fact.code + ".").size());
  }
  plan.answer_tokens = static_cast<int64_t>(answer_tokens) + kSpareAnswerTokens;

  const int64_t asked = static_cast<int64_t>(question_tokens) + plan.answer_tokens;
  const int64_t body = options.context - static_cast<int64_t>(line_tokens) - asked;
  // With less text than facts between them, the depths would mean nothing.
  if (body < options.prefix + static_cast<int64_t>(line_tokens)) {
    throw Error(
        ErrorCode::invalid_argument,
        fmt::format("{} needles with a question take {} tokens, which leaves too little "
                    "text in a context of {}: ask for fewer needles or a context of at "
                    "least {}",
                    options.facts, static_cast<int64_t>(line_tokens) + asked, options.context,
                    options.prefix + 2 * static_cast<int64_t>(line_tokens) + asked));
  }
  if (static_cast<int64_t>(text.size()) < body) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("the text has {} tokens and the needle test needs {} of it: use a "
                            "longer text or a smaller context",
                            text.size(), body));
  }
  text = text.first(static_cast<size_t>(body));

  const std::vector<int64_t> starts = line_starts(codec, text, options.prefix);
  const auto count = static_cast<double>(options.facts);
  plan.context.reserve(static_cast<size_t>(body) + line_tokens);
  int64_t copied = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    const double depth = (static_cast<double>(i) + 0.5) / count;
    const auto wanted =
        options.prefix +
        static_cast<int64_t>(std::llround(depth * static_cast<double>(body - options.prefix)));
    const int64_t spot = std::max(copied, nearest(starts, wanted));
    plan.context.insert(plan.context.end(), text.begin() + copied, text.begin() + spot);
    copied = spot;
    plan.facts[i].at = static_cast<int64_t>(plan.context.size());
    plan.context.insert(plan.context.end(), lines[i].begin(), lines[i].end());
  }
  plan.context.insert(plan.context.end(), text.begin() + copied, text.end());
  return plan;
}

NeedleResult run_needles(Session& session, const NeedlePlan& plan, const TextCodec& codec,
                         const Session::Progress& progress) {
  const auto context = static_cast<int64_t>(plan.context.size());
  int64_t total = context;
  for (const NeedleFact& fact : plan.facts) total += static_cast<int64_t>(fact.question.size());
  int64_t done = context;
  session.prefill(plan.context, [&](int64_t tokens, int64_t) {
    if (progress) progress(tokens, total);
  });

  NeedleResult result;
  for (const NeedleFact& fact : plan.facts) {
    Session fork = session.fork();
    fork.step(fact.question, AttendMode::decode, nullptr);
    std::string answer;
    int32_t token = argmax(fork.next_logits());
    for (int64_t i = 0; i < plan.answer_tokens && !codec.ends_generation(token); ++i) {
      answer += codec.token_bytes(token);
      const std::string number = first_number(answer);
      if (!number.empty() && !answer.ends_with(number)) break;  // something follows the number
      if (i + 1 < plan.answer_tokens) token = argmax(fork.decode(token));
    }
    result.found += first_number(answer) == fact.code;
    ++result.asked;
    result.answers.push_back(std::move(answer));
    done += static_cast<int64_t>(fact.question.size());
    if (progress) progress(done, total);
  }
  return result;
}

}  // namespace thriftattn
