// Presets, aliases and format names: the values that DESIGN section 5 promises.
#include <gmock/gmock.h>

#include "formats/format_info.h"
#include "policy_test_util.h"

namespace thriftattn {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(Presets, NamesInTheOrderOfTheDocumentation) {
  EXPECT_THAT(preset_names(),
              ElementsAre("f32", "exact", "fp8", "q8_0", "q4_0", "thrifty", "balanced", "swift",
                          "max-savings", "max-savings-mx", "paper-budget"));
  for (const std::string& name : preset_names()) {
    EXPECT_EQ(preset(name).name, name);
    EXPECT_EQ(parse_policy(name), preset(name));
    EXPECT_EQ(layers_of(name).size(), 4u);
  }
}

TEST(Presets, PlainOnesStoreEverythingInOneFormat) {
  for (const auto& [name, format] : {std::pair{"f32", Format::f32},
                                     {"exact", Format::bf16},
                                     {"fp8", Format::fp8_e4m3},
                                     {"q8_0", Format::q8_0},
                                     {"q4_0", Format::q4_0}}) {
    for (const LayerPolicy& p : layers_of(name)) {
      EXPECT_EQ(p.k_format, format) << name;
      EXPECT_EQ(p.v_format, format) << name;
      EXPECT_FALSE(p.rotate || p.center || p.equalize) << name;  // the peers' caches unchanged
      EXPECT_EQ(p.promote, 1.0) << name;
      EXPECT_EQ(p.skip, 0.0) << name;
    }
  }
}

TEST(Presets, LayeredOnesHaveTheValuesOfTheDesign) {
  LayerPolicy expected;
  expected.k_format = expected.v_format = Format::nvfp4;
  expected.promote = 0.02;
  expected.skip = 0.0003;
  for (const LayerPolicy& p : layers_of("balanced")) EXPECT_EQ(p, expected);

  expected.promote = 0.05;
  expected.skip = 0.001;
  for (const LayerPolicy& p : layers_of("swift")) EXPECT_EQ(p, expected);

  expected.promote = 0.02;
  expected.skip = 0.0003;
  expected.residency = Residency::dropped;
  expected.sinks = 64;
  expected.recent = 512;
  for (const LayerPolicy& p : layers_of("thrifty")) EXPECT_EQ(p, expected);

  expected.v_format = Format::int3;
  for (const LayerPolicy& p : layers_of("max-savings")) EXPECT_EQ(p, expected);
  expected.k_format = Format::mxfp4;
  for (const LayerPolicy& p : layers_of("max-savings-mx")) EXPECT_EQ(p, expected);

  expected = {};
  expected.k_format = expected.v_format = Format::nvfp4;
  expected.rule = PromoteRule::budget;
  expected.budget = 0.05;
  expected.score = BlockScore::mean;
  for (const LayerPolicy& p : layers_of("paper-budget")) EXPECT_EQ(p, expected);

  expected.score = BlockScore::oracle;
  for (const LayerPolicy& p : layers_of("paper-budget,score=oracle")) EXPECT_EQ(p, expected);
}

TEST(Presets, AliasesAreTheSamePolicy) {
  EXPECT_EQ(parse_policy("int8"), preset("q8_0"));
  EXPECT_EQ(parse_policy("int4"), preset("q4_0"));
  EXPECT_EQ(parse_policy("bf16"), preset("exact"));
  EXPECT_EQ(parse_policy("fp32"), preset("f32"));
  EXPECT_EQ(parse_policy("fp8_e4m3"), preset("fp8"));
  EXPECT_EQ(parse_policy("e4m3"), preset("fp8"));
  EXPECT_EQ(parse_policy("bfloat16"), preset("exact"));
}

TEST(Presets, UnknownNamesSuggestTheNearest) {
  EXPECT_THAT(parse_error("balancd"), HasSubstr("did you mean 'balanced'?"));
  EXPECT_THAT(parse_error("Thrifty"), HasSubstr("did you mean 'thrifty'?"));
  EXPECT_THAT(parse_error("paper_budget"), HasSubstr("did you mean 'paper-budget'?"));
  EXPECT_THAT(parse_error("nvfp4"), HasSubstr("'nvfp4' is a format, not a policy"));
  EXPECT_THAT(parse_error("nvfp4"), HasSubstr("'balanced'"));
  EXPECT_THAT(parse_error("int3"), HasSubstr("'max-savings'"));
  EXPECT_THAT(parse_error("mxfp4"), HasSubstr("'max-savings-mx'"));
  EXPECT_THAT(parse_error("fp16"), HasSubstr("'*:fp16'"));
  EXPECT_THAT(parse_error("k=fp6"), HasSubstr("did you mean 'fp6_e3m2'?"));
  const std::string far = parse_error("zzzzzzzzzzz");
  EXPECT_THAT(far, testing::Not(HasSubstr("did you mean")));
  EXPECT_THAT(far, HasSubstr("f32, exact, fp8, q8_0, q4_0, thrifty, balanced, swift, "
                             "max-savings, max-savings-mx or paper-budget"));
}

TEST(Formats, NamesGoBothWays) {
  for (const FormatInfo& info : kFormats) {
    EXPECT_EQ(to_string(info.format), info.name);
    EXPECT_EQ(parse_format(info.name), info.format);
    for (const std::string_view alias : info.aliases) {
      if (alias.empty()) continue;
      EXPECT_EQ(parse_format(alias), info.format) << alias;
    }
  }
  EXPECT_EQ(to_string(Format::fp8_e4m3), "fp8_e4m3");
  EXPECT_EQ(parse_format("fp8"), Format::fp8_e4m3);
  EXPECT_EQ(parse_format("int8"), Format::q8_0);
  EXPECT_EQ(parse_format("int4"), Format::q4_0);
  EXPECT_EQ(parse_format("f16"), Format::fp16);
  EXPECT_EQ(parse_format("fp32"), Format::f32);
  EXPECT_EQ(parse_format("e5m2"), Format::fp8_e5m2);
  EXPECT_EQ(parse_format("e3m2"), Format::fp6_e3m2);
  EXPECT_EQ(parse_format("e2m3"), Format::fp6_e2m3);
  EXPECT_EQ(parse_format("mxfp4"), Format::mxfp4);
  EXPECT_EQ(parse_format("int3"), Format::int3);
  EXPECT_EQ(parse_format("nvfp3"), std::nullopt);
  EXPECT_EQ(parse_format(""), std::nullopt);
}

}  // namespace
}  // namespace thriftattn
