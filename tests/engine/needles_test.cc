// The plan of the needle test, with a codec in which every byte is a token, and its marking.
#include "engine/needles.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "engine/tiny_model.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

TextCodec byte_codec() {
  return {
      .encode =
          [](std::string_view text) {
            std::vector<int32_t> ids;
            for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
            return ids;
          },
      .token_bytes = [](int32_t token) { return std::string(1, static_cast<char>(token)); },
      .ends_generation = [](int32_t) { return false; },
  };
}

std::string text_of(std::span<const int32_t> tokens) {
  std::string text;
  for (const int32_t t : tokens) text += static_cast<char>(t);
  return text;
}

// Lines of different lengths, numbered so that an order can be seen.
std::vector<int32_t> haystack(size_t bytes) {
  std::string text = "^";  // stands for the beginning-of-text token
  for (int i = 0; text.size() < bytes; ++i) {
    text += "line " + std::to_string(i) + std::string(static_cast<size_t>(i % 23), '.') + "\n";
  }
  return byte_codec().encode(text);
}

NeedleOptions options(int64_t context, int64_t facts, uint64_t seed = 1) {
  return {.context = context, .facts = facts, .seed = seed, .prefix = 1};
}

TEST(Needles, TotalIsExactlyTheContext) {
  for (const int64_t context : {2048, 2049, 3000, 4095}) {
    const NeedlePlan plan = plan_needles(byte_codec(), haystack(5000), options(context, 5));
    size_t longest = 0;
    for (const auto& fact : plan.facts) longest = std::max(longest, fact.question.size());
    EXPECT_EQ(static_cast<int64_t>(plan.context.size() + longest) + plan.answer_tokens, context);
  }
}

TEST(Needles, FactsStandOnLinesOfTheirOwnAndTheTextIsWhole) {
  const auto text = haystack(9000);
  const NeedlePlan plan = plan_needles(byte_codec(), text, options(8192, 16));
  std::string context = text_of(plan.context);
  EXPECT_EQ(context[0], '^');
  for (const NeedleFact& fact : plan.facts) {
    const std::string line = "The access code of " + fact.name + " is " + fact.code + ".\n";
    const size_t at = context.find(line);
    ASSERT_NE(at, std::string::npos) << fact.name;
    EXPECT_TRUE(at == 1 || context[at - 1] == '\n');
    EXPECT_EQ(text_of(plan.context).substr(static_cast<size_t>(fact.at), line.size()), line);
    EXPECT_EQ(text_of(fact.question), "\nQuestion: What is the access code of " + fact.name +
                                          "?\nAnswer: The access code of " + fact.name + " is");
    context.erase(at, line.size());
  }
  EXPECT_EQ(context, text_of(text).substr(0, context.size()));
}

TEST(Needles, DepthsAreSpread) {
  const NeedlePlan plan = plan_needles(byte_codec(), haystack(30000), options(28000, 16));
  const auto size = static_cast<double>(plan.context.size());
  for (size_t i = 0; i < 16; ++i) {
    EXPECT_NEAR(static_cast<double>(plan.facts[i].at) / size, (static_cast<double>(i) + 0.5) / 16,
                0.02);
  }
}

TEST(Needles, SameSeedSameFactsOtherSeedOthers) {
  const auto text = haystack(9000);
  const auto a = plan_needles(byte_codec(), text, options(8192, 16, 4));
  const auto b = plan_needles(byte_codec(), text, options(8192, 16, 4));
  const auto c = plan_needles(byte_codec(), text, options(8192, 16, 5));
  EXPECT_EQ(a.context, b.context);
  EXPECT_NE(a.context, c.context);
}

// Golden: the questions of a seed must not change with the standard library.
TEST(Needles, SeedZeroIsPinned) {
  const auto plan = plan_needles(byte_codec(), haystack(9000), options(4096, 2, 0));
  EXPECT_EQ(plan.facts[0].name, "Golden Temple");
  EXPECT_EQ(plan.facts[0].code, "73868");
}

TEST(Needles, NamesAreDistinctAndCodesHaveFiveDigits) {
  const auto plan = plan_needles(byte_codec(), haystack(60000), options(58000, 256));
  std::set<std::string> names;
  for (const auto& fact : plan.facts) {
    names.insert(fact.name);
    EXPECT_EQ(fact.code.size(), 5u);
    EXPECT_EQ(fact.code.find_first_not_of("0123456789"), std::string::npos);
  }
  EXPECT_EQ(names.size(), 256u);
}

TEST(Needles, TextWithoutLinesStillTakesFacts) {
  const auto plan =
      plan_needles(byte_codec(), byte_codec().encode(std::string(4000, 'x')), options(3000, 4));
  EXPECT_NE(text_of(plan.context).find("xThe access code of"), std::string::npos);
}

TEST(Needles, WhatDoesNotFitIsAnError) {
  const auto text = haystack(9000);
  EXPECT_THROW(plan_needles(byte_codec(), text, options(8192, 0)), Error);
  EXPECT_THROW(plan_needles(byte_codec(), text, options(8192, 257)), Error);
  EXPECT_THROW(plan_needles(byte_codec(), text, options(512, 16)), Error);
  EXPECT_THROW(plan_needles(byte_codec(), haystack(1000), options(8192, 4)), Error);
}

TEST(Needles, FirstNumber) {
  EXPECT_EQ(first_number(" 48213."), "48213");
  EXPECT_EQ(first_number(" **48213**, or 7"), "48213");
  EXPECT_EQ(first_number("none"), "");
  EXPECT_EQ(first_number("12 345"), "12");
  EXPECT_EQ(first_number(""), "");
}

// A random model knows nothing, so the codec speaks: every token it decodes reads as `says`.
class NeedleRun : public testing::Test {
 protected:
  NeedleResult ask(const std::string& says, bool ends = false) {
    TextCodec codec = byte_codec();
    const NeedlePlan plan = plan_needles(codec, haystack(3000), options(2048, 1));
    std::string spoken = says;
    for (size_t at; (at = spoken.find("CODE")) != std::string::npos;) {
      spoken.replace(at, 4, plan.facts[0].code);
    }
    codec.token_bytes = [spoken](int32_t) { return spoken; };
    codec.ends_generation = [ends](int32_t) { return ends; };
    Session session(model_, preset("balanced"), {.context = 2048});
    int64_t last = 0, total = 0;
    const NeedleResult result = run_needles(session, plan, codec, [&](int64_t done, int64_t all) {
      EXPECT_GE(done, last);
      last = done;
      total = all;
    });
    EXPECT_EQ(last, total);
    EXPECT_EQ(session.length(), static_cast<int64_t>(plan.context.size()));
    return result;
  }

  test::TinyModel tiny_ = test::make_tiny({.layers = 1, .vocab = 256});
  std::shared_ptr<const Model> model_ = tiny_.load();
};

TEST_F(NeedleRun, TheCodeIsFound) {
  const NeedleResult r = ask(" CODE.");
  EXPECT_EQ(r.found, 1);
  EXPECT_EQ(r.asked, 1);
  EXPECT_EQ(r.answers.size(), 1u);
}

TEST_F(NeedleRun, OtherAnswersAreNotFound) {
  EXPECT_EQ(ask(" 1CODE.").found, 0);  // six digits
  EXPECT_EQ(ask(" 7, CODE.").found, 0);
  EXPECT_EQ(ask("x").found, 0);
  EXPECT_EQ(ask(" CODE.", true).found, 0);  // ended before it said anything
}

}  // namespace
}  // namespace thriftattn
