// Policies as JSON: the schema, strictness, and the round trip of every kind of policy.
#include <gmock/gmock.h>

#include <limits>
#include <random>

#include "policy_test_util.h"

namespace thriftattn {
namespace {

using testing::HasSubstr;

TEST(Json, RulesFollowThePreset) {
  const Policy policy = parse_policy(R"({
    "name": "careful", "preset": "balanced",
    "rules": [{"layers": "first:2", "format": "bf16"}, {"promote": 0.01, "recent": 64}]})");
  EXPECT_EQ(policy.name, "careful");
  Policy expected = parse_policy("balanced,first:2:bf16,promote=0.01,recent=64");
  expected.name = "careful";
  EXPECT_EQ(policy, expected);
  EXPECT_EQ(parse_policy(R"({"preset": "swift"})").name, "custom");
}

TEST(Json, EveryField) {
  const Policy policy = parse_policy(R"({"name": "all", "rules": [{
      "layers": "3-4", "k": "nvfp4", "v": "nvfp4x2", "rule": "budget", "promote": 1, "skip": 0,
      "budget": 0.25, "score": "oracle", "residency": "dropped", "sinks": 1, "recent": 2,
      "rotate": false, "center": true, "equalize": false}]})");
  PolicyRule rule;
  rule.layers = {.kind = LayerSelector::Kind::range, .begin = 3, .end = 5};
  rule.k_format = Format::nvfp4;
  rule.v_format = Format::nvfp4x2;
  rule.rule = PromoteRule::budget;
  rule.promote = 1.0;
  rule.skip = 0.0;
  rule.budget = 0.25;
  rule.score = BlockScore::oracle;
  rule.residency = Residency::dropped;
  rule.sinks = 1;
  rule.recent = 2;
  rule.rotate = false;
  rule.center = true;
  rule.equalize = false;
  EXPECT_EQ(policy.rules, std::vector<PolicyRule>{rule});
}

TEST(Json, HeadsCapCountsAndPerCent) {
  const Policy policy = parse_policy(R"({"name": "all", "rules": [{
      "layers": "first:2", "heads": "1-2", "max": 0.1, "pages": 16, "score": "variance",
      "sinks": "0.5%", "recent": "10%"}, {"heads": "*", "format": "fp8"}]})");
  PolicyRule rule;
  rule.layers = {.kind = LayerSelector::Kind::first, .end = 2};
  rule.heads = {.begin = 1, .end = 3};
  rule.max_promoted = 0.1;
  rule.budget_pages = 16;
  rule.score = BlockScore::variance;
  rule.sinks = TokenCount::of_context(0.5);
  rule.recent = TokenCount::of_context(10);
  ASSERT_EQ(policy.rules.size(), 2u);
  EXPECT_EQ(policy.rules[0], rule);
  EXPECT_TRUE(policy.rules[1].heads.all());
  EXPECT_EQ(policy_to_json({.name = "x", .rules = {rule}}),
            R"({"name":"x","rules":[{"layers":"first:2","heads":"1-2","max":0.1,"pages":16,)"
            R"("score":"variance","sinks":"0.5%","recent":"10%"}]})");
  EXPECT_THAT(parse_error(R"({"rules": [{"heads": 1}]})"), HasSubstr("\"heads\" is number"));
  EXPECT_THAT(parse_error(R"({"rules": [{"heads": "head:1"}]})"), HasSubstr("selection of KV heads"));
  EXPECT_THAT(parse_error(R"({"rules": [{"heads": "2-1"}]})"), HasSubstr("write '1-2'"));
  EXPECT_THAT(parse_error(R"({"rules": [{"budget": 0.1, "pages": 3}]})"), HasSubstr("both given"));
  EXPECT_THAT(parse_error(R"({"rules": [{"sinks": "5"}]})"), HasSubstr("such as '5%'"));
  EXPECT_THAT(parse_error(R"({"rules": [{"sinks": "101%"}]})"), HasSubstr("sinks = 101%"));
  EXPECT_THAT(parse_error(R"({"rules": [{"sinks": "nan%"}]})"), HasSubstr("share of the context"));
  EXPECT_THAT(parse_error(R"({"rules": [{"pages": 0}]})"), HasSubstr("pages from 1"));
  EXPECT_THAT(parse_error(R"({"rules": [{"pages": "5%"}]})"), HasSubstr("numbers of pages"));
}

TEST(Json, TheTextThatIsWritten) {
  EXPECT_EQ(policy_to_json(parse_policy("balanced,0-1:k=fp8")),
            R"({"name":"balanced,0-1:k=fp8","rules":[{"layers":"*","format":"nvfp4",)"
            R"("rule":"mass","promote":0.02,"skip":0.0003,"residency":"device","sinks":0,)"
            R"("recent":0},{"layers":"0-1","k":"fp8_e4m3"}]})");
}

TEST(Json, RefusesAndSaysWhere) {
  EXPECT_THAT(parse_error("{"), HasSubstr("not valid JSON"));
  EXPECT_THAT(parse_error("{}"), HasSubstr("needs \"preset\" or \"rules\""));
  EXPECT_THAT(parse_error(R"({"preset": "balanced"} x)"), HasSubstr("not valid JSON"));
  EXPECT_THAT(parse_error(R"({"preset": "balancd"})"), HasSubstr("did you mean 'balanced'?"));
  EXPECT_THAT(parse_error(R"({"preset": 3})"), HasSubstr("\"preset\" is number"));
  EXPECT_THAT(parse_error(R"({"preset": "@x.json"})"), HasSubstr("unknown policy"));
  EXPECT_THAT(parse_error(R"({"preset": "swift", "promote": 0.1})"), HasSubstr("into a rule"));
  EXPECT_THAT(parse_error(R"({"presets": "swift"})"), HasSubstr("did you mean 'preset'?"));
  EXPECT_THAT(parse_error(R"({"preset": "swift", "preset": "f32"})"), HasSubstr("given twice"));
  EXPECT_THAT(parse_error(R"({"rules": [{"skip": 0, "skip": 0.1}]})"), HasSubstr("given twice"));
  EXPECT_THAT(parse_error(R"({"rules": {}})"), HasSubstr("must be an array"));
  EXPECT_THAT(parse_error(R"({"rules": [{}, 3]})"), HasSubstr("rule 1: it is number"));
  EXPECT_THAT(parse_error(R"({"rules": [{"layers": 3}]})"), HasSubstr("\"layers\" is number"));
  EXPECT_THAT(parse_error(R"({"rules": [{"layers": "x"}]})"), HasSubstr("selection of layers"));
  EXPECT_THAT(parse_error(R"({"rules": [{"promot": 1}]})"), HasSubstr("did you mean 'promote'?"));
  EXPECT_THAT(parse_error(R"({"rules": [{"promote": "1"}]})"), HasSubstr("promote = '1'"));
  EXPECT_THAT(parse_error(R"({"rules": [{"promote": true}]})"), HasSubstr("promote = true"));
  EXPECT_THAT(parse_error(R"({"rules": [{"promote": 2}]})"), HasSubstr("from 0 to 1"));
  EXPECT_THAT(parse_error(R"({"rules": [{"promote": 1e400}]})"), HasSubstr("not valid JSON"));
  EXPECT_THAT(parse_error(R"({"rules": [{"promote": NaN}]})"), HasSubstr("not valid JSON"));
  EXPECT_THAT(parse_error(R"({"rules": [{"sinks": 1.0}]})"), HasSubstr("whole numbers"));
  EXPECT_THAT(parse_error(R"({"rules": [{"sinks": -1}]})"), HasSubstr("sinks = -1"));
  EXPECT_THAT(parse_error(R"({"rules": [{"sinks": 18446744073709551615}]})"),
              HasSubstr("sinks = 18446744073709551615"));
  EXPECT_THAT(parse_error(R"({"rules": [{"rotate": 1}]})"), HasSubstr("true and false"));
  EXPECT_THAT(parse_error(R"({"rules": [{"rotate": null}]})"), HasSubstr("rotate = null"));
  EXPECT_THAT(parse_error(R"({"rules": [{"k": ["nvfp4"]}]})"), HasSubstr("a name such as"));
  EXPECT_THAT(parse_error(R"({"rules": [{"format": "fp8", "k": "bf16"}]})"),
              HasSubstr("k is given twice"));
  EXPECT_THAT(parse_error(R"({"name": "", "rules": []})"), HasSubstr("not empty"));
  EXPECT_THAT(parse_error(R"({"name": "a\nb", "rules": []})"), HasSubstr("one line"));
  EXPECT_THAT(parse_error(R"({"rules": [{"k": [[[[[[]]]]]]}]})"), HasSubstr("nested too deeply"));
  EXPECT_THAT(parse_error("{\"name\": \"\xff\", \"rules\": []}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(parse_error(std::string(100000, '{')), HasSubstr("not valid JSON"));
}

// Random rules with every field sometimes set; the values need not make sense together.
PolicyRule random_rule(std::mt19937& random) {
  const auto chance = [&] { return random() % 2 == 0; };
  std::uniform_real_distribution<double> fraction(0.0, 1.0);
  using Kind = LayerSelector::Kind;
  PolicyRule rule;
  if (random() % 3 == 0) {
    rule.heads.begin = static_cast<int64_t>(random() % 9);
    rule.heads.end = rule.heads.begin + 1 + static_cast<int64_t>(random() % 3);
  }
  switch (random() % 5) {
    case 0:
      break;
    case 1:
      rule.layers = {.kind = Kind::range, .begin = static_cast<int64_t>(random() % 50)};
      rule.layers.end = rule.layers.begin + 1 + static_cast<int64_t>(random() % 3);
      break;
    case 2:
      rule.layers = {.kind = Kind::first, .end = 1 + static_cast<int64_t>(random() % 9)};
      break;
    case 3:
      rule.layers = {.kind = Kind::last, .end = 1 + static_cast<int64_t>(random() % 9)};
      break;
    case 4:
      rule.layers = {.kind = Kind::sliding_window};
      break;
  }
  if (chance()) rule.k_format = static_cast<Format>(random() % 8);
  if (chance()) rule.v_format = static_cast<Format>(random() % 8);
  if (chance()) rule.rule = static_cast<PromoteRule>(random() % 2);
  if (chance()) rule.promote = fraction(random);
  if (chance()) rule.skip = fraction(random);
  if (chance()) rule.max_promoted = fraction(random);
  if (chance()) {
    rule.budget = chance() ? 1.0 : 5e-324;
  } else if (chance()) {
    rule.budget_pages = 1 + static_cast<int64_t>(random() % 1000);
  }
  if (chance()) rule.score = static_cast<BlockScore>(random() % 5);
  if (chance()) rule.residency = static_cast<Residency>(random() % 2);
  if (chance()) rule.sinks = static_cast<int64_t>(random());
  if (chance()) rule.recent = static_cast<int64_t>(random());
  if (chance()) rule.recent = TokenCount::of_context(100 * (1 - fraction(random)));
  if (chance()) rule.rotate = chance();
  if (chance()) rule.center = chance();
  if (chance()) rule.equalize = chance();
  return rule;
}

TEST(Json, RoundTripKeepsEverything) {
  for (const std::string& name : preset_names()) {
    EXPECT_EQ(parse_policy(policy_to_json(preset(name))), preset(name));
  }
  std::mt19937 random(7);
  for (int i = 0; i < 2000; ++i) {
    Policy policy{.name = "caf\xc3\xa9 \"" + std::to_string(i) + "\"", .rules = {}};
    const size_t rules = random() % 4;
    for (size_t r = 0; r < rules; ++r) policy.rules.push_back(random_rule(random));
    const std::string text = policy_to_json(policy);
    ASSERT_EQ(parse_policy(text), policy) << text;
  }
}

TEST(Json, RefusesToWriteWhatItWouldNotRead) {
  const auto write = [](Policy policy) { return error_of([&] { policy_to_json(policy); }); };
  EXPECT_THAT(write({.name = "", .rules = {}}), HasSubstr("not empty"));
  EXPECT_THAT(write({.name = "\xff", .rules = {}}), HasSubstr("not UTF-8"));
  PolicyRule rule;
  rule.promote = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT(write({.name = "nan", .rules = {rule}}), HasSubstr("promote = nan"));
}

}  // namespace
}  // namespace thriftattn
