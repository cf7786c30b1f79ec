// The inline form: every example of docs/policy.md, what it resolves to, and what is refused.
#include <gmock/gmock.h>

#include <cstdio>
#include <fstream>

#include "policy/policy_list.h"
#include "policy_test_util.h"

namespace thriftattn {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(Inline, ChangesToAPreset) {
  const auto layers = layers_of("balanced,promote=0.05,recent=256");
  for (const LayerPolicy& p : layers) {
    EXPECT_EQ(p.k_format, Format::nvfp4);
    EXPECT_EQ(p.promote, 0.05);
    EXPECT_EQ(p.skip, 0.0003);  // the preset's
    EXPECT_EQ(p.recent, 256);
  }
  EXPECT_EQ(parse_policy(" balanced , promote = 0.05,\trecent=256 "),
            parse_policy("balanced,promote=0.05,recent=256"));
  EXPECT_EQ(parse_policy("balanced, promote=0.05").name, "balanced,promote=0.05");
}

TEST(Inline, KAndVIndependently) {
  for (const LayerPolicy& p : layers_of("thrifty,k=nvfp4,v=bf16")) {
    EXPECT_EQ(p.k_format, Format::nvfp4);
    EXPECT_EQ(p.v_format, Format::bf16);
    EXPECT_EQ(p.residency, Residency::dropped);
    EXPECT_TRUE(p.rotate && p.center && p.equalize);
    EXPECT_EQ(p.skip, 0.0);  // V in BF16 has no codes to skip
  }
  for (const LayerPolicy& p : layers_of("k=q8_0,v=q4_0")) {
    EXPECT_EQ(p.k_format, Format::q8_0);
    EXPECT_EQ(p.v_format, Format::q4_0);
  }
  for (const LayerPolicy& p : layers_of("format=fp8")) {
    EXPECT_EQ(p.k_format, Format::fp8_e4m3);
    EXPECT_EQ(p.v_format, Format::fp8_e4m3);
  }
}

TEST(Inline, RangesOfLayers) {
  const auto layers = layers_of("0-3:fp8,4-35:nvfp4", 36);
  for (size_t l = 0; l < 36; ++l) {
    EXPECT_EQ(layers[l].k_format, l < 4 ? Format::fp8_e4m3 : Format::nvfp4) << l;
    EXPECT_EQ(layers[l].v_format, layers[l].k_format) << l;
    EXPECT_EQ(layers[l].promote, l < 4 ? 1.0 : 0.02) << l;  // balanced's thresholds for nvfp4
    EXPECT_EQ(layers[l].skip, l < 4 ? 0.0 : 0.0003) << l;
  }
  // What is not named is BF16.
  const auto some = layers_of("1:q8_0");
  EXPECT_EQ(some[0].k_format, Format::bf16);
  EXPECT_EQ(some[1].k_format, Format::q8_0);
  EXPECT_EQ(some[2].k_format, Format::bf16);
  // A setting of the text beats balanced's, wherever it stands.
  EXPECT_EQ(layers_of("promote=0.1,*:nvfp4")[0].promote, 0.1);
  EXPECT_EQ(layers_of("*:nvfp4,promote=0.1")[0].promote, 0.1);
}

TEST(Inline, FirstAndLast) {
  const auto layers = layers_of("balanced,first:2:bf16,last:2:fp8", 8);
  for (size_t l = 0; l < 8; ++l) {
    const Format expected = l < 2 ? Format::bf16 : l >= 6 ? Format::fp8_e4m3 : Format::nvfp4;
    EXPECT_EQ(layers[l].k_format, expected) << l;
    EXPECT_EQ(layers[l].v_format, expected) << l;
  }
  EXPECT_EQ(layers_of("*:q8_0"), layers_of("q8_0"));
}

TEST(Inline, ASettingForSomeLayers) {
  const auto layers = layers_of("balanced,0-1:promote=0.1,first:1:k=bf16,last:1:recent=8");
  EXPECT_EQ(layers[0].promote, 0.1);
  EXPECT_EQ(layers[1].promote, 0.1);
  EXPECT_EQ(layers[2].promote, 0.02);
  EXPECT_EQ(layers[0].k_format, Format::bf16);
  EXPECT_EQ(layers[0].v_format, Format::nvfp4);
  EXPECT_EQ(layers[3].recent, 8);
  EXPECT_EQ(layers[2].recent, 0);
}

TEST(Inline, KvHeads) {
  const Policy policy = parse_policy("balanced,2:head:1:bf16,head:0-2:promote=0.1,first:2:head:3:k=fp8");
  ASSERT_EQ(policy.rules.size(), 4u);
  EXPECT_EQ(policy.rules[1].layers, (LayerSelector{LayerSelector::Kind::range, 2, 3}));
  EXPECT_EQ(policy.rules[1].heads, (HeadSelector{1, 2}));
  EXPECT_EQ(policy.rules[2].layers, LayerSelector{});
  EXPECT_EQ(policy.rules[2].heads, (HeadSelector{0, 3}));
  EXPECT_EQ(policy.rules[3].layers.kind, LayerSelector::Kind::first);
  EXPECT_EQ(policy.rules[3].heads, (HeadSelector{3, 4}));
  EXPECT_EQ(parse_policy("*:head:1:bf16").rules, parse_policy("head:1:bf16").rules);
  EXPECT_THAT(parse_error("head:x:bf16"), HasSubstr("cannot read 'x' as a selection of KV heads"));
  EXPECT_THAT(parse_error("head:bf16"), HasSubstr("selection of layers"));
  EXPECT_THAT(parse_error("2:head:bf16"), HasSubstr("selection of layers"));
  EXPECT_THAT(parse_error("head:3-1:bf16"), HasSubstr("write '1-3'"));
  EXPECT_THAT(parse_error("head:1:2:bf16"), HasSubstr("KV heads"));
  EXPECT_THAT(parse_error("head:-1:bf16"), HasSubstr("KV heads"));
  EXPECT_THAT(parse_error("ahead:1:bf16"), HasSubstr("selection of layers"));
}

TEST(Inline, CapCountsAndPerCent) {
  const auto layers = resolve(parse_policy("thrifty,sinks=1%,recent=2.5%"),
                              {.layers = 2, .context_tokens = 10'000});
  EXPECT_EQ(layers[0].sinks, 100);
  EXPECT_EQ(layers[0].recent, 250);
  EXPECT_EQ(layers_of("balanced,max=0.1")[0].max_promoted, 0.1);
  EXPECT_EQ(layers_of("paper-budget,pages=16,score=quest")[0].budget_pages, 16);
  EXPECT_THAT(parse_error("thrifty,recent=5%%"), HasSubstr("share of the context"));
  EXPECT_THAT(parse_error("thrifty,recent=%"), HasSubstr("share of the context"));
  EXPECT_THAT(parse_error("thrifty,recent=-5%"), HasSubstr("recent = -5%"));
  EXPECT_THAT(parse_error("thrifty,recent=inf%"), HasSubstr("recent = inf%"));
  EXPECT_THAT(parse_error("paper-budget,pages=1.5"), HasSubstr("whole numbers of pages"));
  EXPECT_THAT(parse_error("paper-budget,budget=0.1,pages=2"), HasSubstr("both given"));
  EXPECT_THAT(parse_error("balanced,max=1.5"), HasSubstr("max = 1.5"));
  EXPECT_THAT(parse_error("paper-budget,score=quests"), HasSubstr("did you mean 'quest'?"));
}

TEST(Inline, LaterRulesWin) {
  EXPECT_EQ(layers_of("balanced,0-3:fp8,0:bf16")[0].k_format, Format::bf16);
  EXPECT_EQ(layers_of("balanced,0:bf16,0-3:fp8")[0].k_format, Format::fp8_e4m3);
  EXPECT_EQ(layers_of("balanced,first:2:bf16,v=fp8")[0].v_format, Format::fp8_e4m3);
  EXPECT_EQ(layers_of("balanced,first:2:bf16,v=fp8")[0].k_format, Format::bf16);
}

TEST(Inline, RefusesAndSaysWhatIsAccepted) {
  EXPECT_THAT(parse_error(""), HasSubstr("empty"));
  EXPECT_THAT(parse_error("balanced,"), HasSubstr("empty item"));
  EXPECT_THAT(parse_error("balanced,,promote=0.1"), HasSubstr("empty item"));
  EXPECT_THAT(parse_error("balanced,fp8"), HasSubstr("cannot read 'fp8'"));
  EXPECT_THAT(parse_error("promot=0.1"), HasSubstr("did you mean 'promote'?"));
  EXPECT_THAT(parse_error("balanced,promote=lots"), HasSubstr("promote = 'lots'"));
  EXPECT_THAT(parse_error("balanced,promote="), HasSubstr("promote = ''"));
  EXPECT_THAT(parse_error("balanced,promote=1.5"), HasSubstr("from 0 to 1"));
  EXPECT_THAT(parse_error("balanced,promote=-0.1"), HasSubstr("promote = -0.1"));
  EXPECT_THAT(parse_error("balanced,skip=nan"), HasSubstr("skip = 'nan'"));
  EXPECT_THAT(parse_error("balanced,skip=inf"), HasSubstr("skip = 'inf'"));
  EXPECT_THAT(parse_error("balanced,skip=1e999"), HasSubstr("skip = '1e999'"));
  EXPECT_THAT(parse_error("thrifty,recent=-1"), HasSubstr("recent = -1"));
  EXPECT_THAT(parse_error("thrifty,recent=1.5"), HasSubstr("recent = '1.5'"));
  EXPECT_THAT(parse_error("thrifty,recent=9223372036854775807"), HasSubstr("from 0 to"));
  EXPECT_THAT(parse_error("thrifty,recent=99999999999999999999"), HasSubstr("whole numbers"));
  EXPECT_THAT(parse_error("balanced,rotate=1"), HasSubstr("true and false"));
  EXPECT_THAT(parse_error("balanced,k=nvpf4"), HasSubstr("did you mean 'nvfp4'?"));
  EXPECT_THAT(parse_error("balanced,residency=drop"), HasSubstr("device or dropped"));
  EXPECT_THAT(parse_error("balanced,residency=host"), HasSubstr("device or dropped"));
  EXPECT_THAT(parse_error("balanced,rule=best"), HasSubstr("mass or budget"));
  EXPECT_THAT(parse_error("balanced,promote=0.1,promote=0.2"), HasSubstr("given twice"));
  EXPECT_THAT(parse_error("balanced,promote=0.1,0:fp8,promote=0.2"), HasSubstr("given twice"));
  EXPECT_THAT(parse_error("format=fp8,k=bf16"), HasSubstr("k is given twice"));
}

TEST(Inline, RefusesMalformedSelectors) {
  for (const char* text : {":fp8", "-1:fp8", "1-:fp8", "-:fp8", "a:fp8", "first:fp8", "first:0:fp8",
                           "first:-2:fp8", "0--3:fp8", "0-3-5:fp8", "1.5:fp8", "+1:fp8",
                           "99999999999999999999:fp8", "**:fp8", "first:2:3:fp8"}) {
    EXPECT_THAT(parse_error(text), HasSubstr("selection of layers")) << text;
  }
  EXPECT_THAT(parse_error("3-0:fp8"), HasSubstr("write '0-3'"));
  EXPECT_THAT(parse_error("sliding:bf16"), HasSubstr("cannot read 'sliding'"));
  EXPECT_THAT(parse_error("sliding-window:bf16"), HasSubstr("did you mean 'sliding_window'?"));
  EXPECT_THAT(parse_error("0-3:"), HasSubstr("unknown format ''"));
}

TEST(Inline, ControlBytesAndLongTextStayOnOneLine) {
  EXPECT_THAT(parse_error("bal\nanced"), HasSubstr("'bal\\x0aanced'"));
  EXPECT_THAT(parse_error("caf\xc3\xa9"), HasSubstr("\\xc3\\xa9"));
  EXPECT_LT(parse_error(std::string(100000, 'x')).size(), 400u);
  EXPECT_THAT(parse_error(std::string(size_t{2} << 20, 'x')), HasSubstr("bytes"));
}

class PolicyFile : public testing::Test {
 protected:
  std::string write(const std::string& name, const std::string& text) {
    const std::string path = testing::TempDir() + "thriftattn_" + name;
    std::ofstream(path, std::ios::binary) << text;
    paths_.push_back(path);
    return path;
  }
  void TearDown() override {
    for (const std::string& path : paths_) std::remove(path.c_str());
  }
  std::vector<std::string> paths_;
};

TEST_F(PolicyFile, IsReadAndNamed) {
  const std::string path = write("mine.json", R"({"preset": "swift"})");
  const Policy policy = parse_policy("@" + path);
  EXPECT_EQ(policy.name, "thriftattn_mine");
  EXPECT_EQ(policy.rules, preset("swift").rules);
  const std::string named = write("named.json", R"({"name": "my own", "preset": "swift"})");
  EXPECT_EQ(parse_policy("@" + named).name, "my own");
}

TEST_F(PolicyFile, ErrorsNameTheFile) {
  EXPECT_THAT(error_of([] { parse_policy("@/does/not/exist.json"); }, ErrorCode::not_found),
              HasSubstr("'/does/not/exist.json'"));
  EXPECT_THAT(error_of([] { parse_policy("@/tmp"); }, ErrorCode::io), HasSubstr("'/tmp'"));
  EXPECT_THAT(parse_error("@"), HasSubstr("path of a JSON file"));
  const std::string bad = write("bad.json", "{\"preset\": \"swift\",}");
  EXPECT_THAT(parse_error("@" + bad), HasSubstr("bad.json': the policy is not valid JSON"));
  const std::string empty = write("empty.json", "");
  EXPECT_THAT(parse_error("@" + empty), HasSubstr("not valid JSON"));
  const std::string huge = write("huge.json", std::string(size_t{3} << 20, ' '));
  EXPECT_THAT(parse_error("@" + huge), HasSubstr("larger than"));
}

// Each line of a code block of docs/policy.md marked "policy" must parse, and resolve for a
// model of 36 layers, every sixth of them without a window.
TEST(Documentation, EveryExampleWorks) {
  std::ifstream file(THRIFTATTN_SOURCE_DIR "/docs/policy.md");
  ASSERT_TRUE(file) << "docs/policy.md";
  std::vector<bool> sliding(36);
  for (size_t l = 0; l < sliding.size(); ++l) sliding[l] = l % 6 != 5;
  std::string line, json;
  bool in_policies = false, in_json = false;
  int examples = 0;
  while (std::getline(file, line)) {
    if (line.starts_with("```")) {
      if (in_json) {
        const PolicyContext model{.layers = 36,
                                  .sliding_window = sliding,
                                  .kv_heads = std::vector<int64_t>(36, 8),
                                  .context_tokens = 131072};
        EXPECT_NO_THROW(resolve(parse_policy(json), model)) << json;
        ++examples;
      }
      in_policies = line == "```policy";
      in_json = line == "```json";
      json.clear();
    } else if (in_policies) {
      const std::string text = line.substr(0, line.find("  "));
      PolicyContext model{.layers = 36,
                          .kv_heads = std::vector<int64_t>(36, 8),
                          .context_tokens = 131072};
      EXPECT_NO_THROW(resolve(parse_policy(text), model)) << text;
      model.sliding_window = sliding;
      EXPECT_NO_THROW(resolve(parse_policy(text), model)) << text;
      EXPECT_EQ(parse_policy(policy_to_json(parse_policy(text))), parse_policy(text)) << text;
      ++examples;
    } else if (in_json) {
      json += line + "\n";
    }
  }
  EXPECT_GE(examples, 12);
}

TEST(PolicyList, CommasBelongToThePolicyBeforeThem) {
  EXPECT_THAT(split_policy_list("exact"), ElementsAre("exact"));
  EXPECT_THAT(split_policy_list("exact,fp8, thrifty"), ElementsAre("exact", "fp8", "thrifty"));
  EXPECT_THAT(split_policy_list("exact,balanced,promote=0.05,first:2:bf16,thrifty"),
              ElementsAre("exact", "balanced,promote=0.05,first:2:bf16", "thrifty"));
  EXPECT_THAT(split_policy_list("fp8;0-3:fp8,4-35:nvfp4;*:q8_0"),
              ElementsAre("fp8", "0-3:fp8,4-35:nvfp4", "*:q8_0"));
  EXPECT_THAT(split_policy_list("@a.json,@b.json,sinks=1"),
              ElementsAre("@a.json", "@b.json,sinks=1"));
  EXPECT_THAT(split_policy_list(R"(exact,{"name": "a,;b}\"", "rules": []},fp8)"),
              ElementsAre("exact", R"({"name": "a,;b}\"", "rules": []})", "fp8"));
  // What is wrong is kept for parse_policy to refuse.
  EXPECT_THAT(split_policy_list("exact,balancd"), ElementsAre("exact", "balancd"));
  EXPECT_THAT(split_policy_list(""), ElementsAre(""));
  EXPECT_THAT(split_policy_list("exact,,fp8"), ElementsAre("exact", "", "fp8"));
}

}  // namespace
}  // namespace thriftattn
