// resolve(): selectors, sliding windows, and the combinations that the cache cannot do.
#include <gmock/gmock.h>

#include <limits>

#include "policy_test_util.h"

namespace thriftattn {
namespace {

using testing::HasSubstr;

const std::vector<bool> kAlternating = {true, false, true, false};

TEST(Resolve, SlidingWindowLayersDefaultToTwoPlanes) {
  for (const char* text :
       {"balanced", "thrifty", "max-savings", "max-savings-mx", "paper-budget"}) {
    const auto layers = layers_of(text, 4, kAlternating);
    for (size_t l : {0, 2}) {
      EXPECT_EQ(layers[l].k_format, Format::nvfp4x2) << text;
      EXPECT_EQ(layers[l].v_format, Format::nvfp4x2) << text;
      EXPECT_EQ(layers[l].residency, Residency::device) << text;
      EXPECT_TRUE(layers[l].rotate && layers[l].center && layers[l].equalize) << text;
    }
    EXPECT_EQ(layers[1], layers_of(text)[1]) << text;
    EXPECT_EQ(layers[3], layers_of(text)[3]) << text;
  }
  // Plain policies have nothing to change.
  EXPECT_EQ(layers_of("fp8", 4, kAlternating), layers_of("fp8", 4));
}

TEST(Resolve, ExplicitSlidingWindowRulesOverride) {
  auto layers = layers_of("balanced,sliding_window:bf16", 4, kAlternating);
  EXPECT_EQ(layers[0].k_format, Format::bf16);
  EXPECT_EQ(layers[0].v_format, Format::bf16);
  EXPECT_EQ(layers[1].k_format, Format::nvfp4);
  // They win over rules for all layers, wherever they stand.
  layers = layers_of("sliding_window:bf16,*:fp8", 4, kAlternating);
  EXPECT_EQ(layers[0].k_format, Format::bf16);
  EXPECT_EQ(layers[1].k_format, Format::fp8_e4m3);
  // Asking for nvfp4 makes them like the rest.
  layers = layers_of("thrifty,sliding_window:nvfp4", 4, kAlternating);
  EXPECT_EQ(layers[0], layers[1]);
  EXPECT_EQ(layers[0].residency, Residency::dropped);
  layers = layers_of("max-savings,sliding_window:int3", 4, kAlternating);
  EXPECT_EQ(layers[0].k_format, Format::int3);
  EXPECT_EQ(layers[1].k_format, Format::nvfp4);
  // One side explicit, the other by default.
  layers = layers_of("balanced,sliding_window:k=bf16", 4, kAlternating);
  EXPECT_EQ(layers[0].k_format, Format::bf16);
  EXPECT_EQ(layers[0].v_format, Format::nvfp4x2);
  // A model without windows: the rule waits.
  EXPECT_EQ(layers_of("balanced,sliding_window:bf16"), layers_of("balanced"));
  EXPECT_EQ(layers_of("sliding_window:nvfp4")[0].k_format, Format::bf16);
}

TEST(Resolve, LayersThatDoNotExist) {
  EXPECT_THAT(resolve_error("0-4:fp8"), HasSubstr("layers '0-4' do not exist: the model has 4"));
  EXPECT_THAT(resolve_error("4:fp8"), HasSubstr("0 to 3"));
  EXPECT_THAT(resolve_error("first:5:fp8"), HasSubstr("'first:5'"));
  EXPECT_THAT(resolve_error("last:5:fp8"), HasSubstr("'last:5'"));
  EXPECT_NO_THROW(layers_of("0-3:fp8,first:4:bf16,last:4:q8_0"));
  Policy policy = preset("balanced");
  policy.rules.push_back({.layers = {.kind = LayerSelector::Kind::range, .begin = -1, .end = 1}});
  EXPECT_THAT(error_of([&] { resolve(policy, {.layers = 4}); }), HasSubstr("do not exist"));
  policy.rules.back().layers = {.kind = LayerSelector::Kind::first, .end = 0};
  EXPECT_THAT(error_of([&] { resolve(policy, {.layers = 4}); }), HasSubstr("do not exist"));
}

TEST(Resolve, Context) {
  const Policy policy = preset("balanced");
  EXPECT_THAT(error_of([&] { resolve(policy, {.layers = 0}); }), HasSubstr("0 layers"));
  EXPECT_THAT(error_of([&] { resolve(policy, {.layers = -1}); }), HasSubstr("-1 layers"));
  EXPECT_THAT(error_of([&] { resolve(policy, {.layers = int64_t{1} << 40}); }),
              HasSubstr("layers"));
  EXPECT_THAT(error_of([&] { resolve(policy, {.layers = 3, .sliding_window = {true}}); }),
              HasSubstr("1 entries for 3 layers"));
}

TEST(Resolve, NoRulesIsBf16) {
  const auto layers = resolve({.name = "none", .rules = {}}, {.layers = 2});
  EXPECT_EQ(layers, layers_of("exact", 2));
}

TEST(Resolve, Thresholds) {
  EXPECT_THAT(resolve_error("balanced,skip=0.02"), HasSubstr("skip = 0.02 must be less than"));
  EXPECT_THAT(resolve_error("balanced,promote=0.0003"), HasSubstr("promote = 0.0003"));
  EXPECT_THAT(resolve_error("balanced,promote=0,skip=0"), HasSubstr("nvfp4x2"));
  EXPECT_NO_THROW(layers_of("balanced,promote=1"));
  EXPECT_NO_THROW(layers_of("balanced,promote=0.0004"));
  EXPECT_NO_THROW(layers_of("balanced,skip=0"));
  // Only layers that use the thresholds are checked.
  EXPECT_NO_THROW(layers_of("balanced,0:nvfp4x2,1-3:promote=0.01,1-3:skip=0.001"));
  EXPECT_NO_THROW(layers_of("paper-budget,budget=0"));
  EXPECT_NO_THROW(layers_of("paper-budget,budget=1"));
}

TEST(Resolve, ValuesOfHandMadeRules) {
  const auto with = [](auto member, auto value) {
    PolicyRule rule;
    rule.*member = value;
    Policy policy = preset("thrifty");
    policy.rules.push_back(rule);
    return error_of([&] { resolve(policy, {.layers = 4}); });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT(with(&PolicyRule::promote, nan), HasSubstr("policy 'thrifty': promote = nan"));
  EXPECT_THAT(with(&PolicyRule::skip, -1e-9), HasSubstr("skip = -1e-09"));
  EXPECT_THAT(with(&PolicyRule::budget, 1.01), HasSubstr("budget = 1.01"));
  EXPECT_THAT(with(&PolicyRule::sinks, int64_t{-1}), HasSubstr("sinks = -1"));
  EXPECT_THAT(with(&PolicyRule::recent, std::numeric_limits<int64_t>::max()), HasSubstr("recent"));
  EXPECT_THAT(with(&PolicyRule::k_format, static_cast<Format>(99)), HasSubstr("99"));
}

TEST(Resolve, OneResidualServesKAndV) {
  EXPECT_THAT(resolve_error("balanced,v=nvfp4x2", ErrorCode::unsupported),
              HasSubstr("nvfp4 and nvfp4x2 cannot be mixed"));
  EXPECT_THAT(resolve_error("thrifty,k=nvfp4x2", ErrorCode::unsupported), HasSubstr("layer 0"));
  EXPECT_THAT(resolve_error("max-savings,k=nvfp4x2", ErrorCode::unsupported),
              HasSubstr("int3 and nvfp4x2 cannot be mixed"));
  EXPECT_THAT(resolve_error("max-savings-mx,v=nvfp4x2", ErrorCode::unsupported),
              HasSubstr("mxfp4 and nvfp4x2 cannot be mixed"));
  // Formats whose residual the policy decides on mix freely, with each other and with plain ones.
  for (const char* k : {"nvfp4", "mxfp4", "int3", "bf16", "fp6_e2m3"}) {
    for (const char* v : {"nvfp4", "mxfp4", "int3"}) {
      const std::string text = std::string("balanced,k=") + k + ",v=" + v;
      EXPECT_EQ(layers_of(text)[0].v_format, parse_format(v)) << text;
      EXPECT_EQ(layers_of(text)[0].skip, 0.0003) << text;
    }
  }
  EXPECT_NO_THROW(layers_of("k=nvfp4x2,v=bf16"));
  EXPECT_NO_THROW(layers_of("balanced,k=bf16"));
}

TEST(Resolve, TwoPlanesAreNeverDropped) {
  // A sealed policy leaves alone the layers that another rule makes nvfp4x2 or plain ...
  for (const char* text : {"thrifty,first:2:nvfp4x2", "thrifty,first:2:bf16"}) {
    const auto layers = layers_of(text);
    EXPECT_EQ(layers[0].residency, Residency::device) << text;
    EXPECT_EQ(layers[0].recent, 0) << text;
    EXPECT_EQ(layers[2].residency, Residency::dropped) << text;
  }
  // ... but to ask for it is an error.
  EXPECT_THAT(resolve_error("*:nvfp4x2,residency=dropped"), HasSubstr("always keeps"));
  EXPECT_THAT(resolve_error("exact,residency=dropped"), HasSubstr("it acts on nvfp4"));
}

TEST(Resolve, SettingsThatWouldBeIgnoredAreErrors) {
  EXPECT_THAT(resolve_error("exact,promote=0.05"),
              HasSubstr("promote for layers '*' would have no effect on K and V in bf16"));
  EXPECT_THAT(resolve_error("fp8,rotate=true"), HasSubstr("rotate"));
  EXPECT_THAT(resolve_error("q8_0,center=false"), HasSubstr("center"));
  EXPECT_THAT(resolve_error("q4_0,equalize=true"), HasSubstr("equalize"));
  EXPECT_THAT(resolve_error("balanced,k=bf16,rotate=false"), HasSubstr("it acts on K"));
  EXPECT_THAT(resolve_error("thrifty,v=bf16,skip=0.001"), HasSubstr("only V in nvfp4"));
  EXPECT_THAT(resolve_error("*:nvfp4x2,skip=0.001"), HasSubstr("only V in nvfp4"));
  EXPECT_THAT(resolve_error("max-savings,k=fp8,equalize=false"), HasSubstr("it acts on K"));
  EXPECT_THAT(resolve_error("thrifty,k=fp8,rotate=true"), HasSubstr("and on V in int3"));
  // V in int3 is rotated whatever K is.
  EXPECT_FALSE(layers_of("max-savings,k=fp8,rotate=false")[0].rotate);
  EXPECT_TRUE(layers_of("max-savings,k=fp8")[0].rotate);
  EXPECT_FALSE(layers_of("max-savings,k=fp8")[0].equalize);
  EXPECT_FALSE(layers_of("thrifty,k=fp8")[0].rotate);
  EXPECT_THAT(resolve_error("*:nvfp4x2,promote=0.1"), HasSubstr("always keeps"));
  EXPECT_THAT(resolve_error("balanced,budget=0.1"), HasSubstr("rule=budget"));
  EXPECT_THAT(resolve_error("balanced,score=oracle"), HasSubstr("rule=budget"));
  EXPECT_THAT(resolve_error("paper-budget,promote=0.1"), HasSubstr("rule=mass"));
  EXPECT_THAT(resolve_error("balanced,first:2:bf16,0-1:promote=0.05"), HasSubstr("'0-1'"));
  EXPECT_THAT(resolve_error("balanced,sliding_window:promote=0.1", ErrorCode::invalid_argument,
                            kAlternating),
              HasSubstr("'sliding_window'"));
  // Obeyed by some layer, or when it was given: fine.
  EXPECT_NO_THROW(layers_of("balanced,first:2:bf16,promote=0.05"));
  EXPECT_NO_THROW(layers_of("balanced,promote=0.05,*:q8_0"));
  EXPECT_NO_THROW(layers_of("exact,promote=0.05,2:nvfp4"));
  EXPECT_NO_THROW(layers_of("balanced,*:q8_0"));
  EXPECT_NO_THROW(layers_of("*:nvfp4x2,rotate=false,center=false"));
}

TEST(Resolve, Budget) {
  EXPECT_THAT(resolve_error("balanced,rule=budget"), HasSubstr("needs a budget"));
  EXPECT_EQ(layers_of("balanced,rule=budget,budget=0.1")[0].budget, 0.1);
  EXPECT_EQ(layers_of("balanced,rule=budget,budget=0.1")[0].skip, 0.0003);
  EXPECT_EQ(layers_of("balanced,rule=budget,budget=0.1")[0].promote, 1.0);
  EXPECT_THAT(resolve_error("paper-budget,residency=dropped", ErrorCode::unsupported),
              HasSubstr("needs residency=device"));
  EXPECT_THAT(resolve_error("paper-budget,center=false", ErrorCode::unsupported),
              HasSubstr("score=mean needs"));
  EXPECT_THAT(resolve_error("paper-budget,k=bf16", ErrorCode::unsupported),
              HasSubstr("score=mean needs"));
  EXPECT_NO_THROW(layers_of("paper-budget,center=false,score=oracle"));
  EXPECT_EQ(layers_of("paper-budget,rule=mass,promote=0.1")[0].budget, 0.0);
}

PolicyContext with_heads(int64_t heads) {
  return {.layers = 4, .kv_heads = std::vector<int64_t>(4, heads), .context_tokens = 32768};
}

TEST(Resolve, RulesByHead) {
  const auto layers = resolve(parse_policy("balanced,2:head:1:bf16,head:0:promote=0.1"), with_heads(3));
  ASSERT_EQ(layers[0].heads.size(), 3u);
  EXPECT_EQ(layers[0].heads[0].promote, 0.1);
  EXPECT_EQ(layers[0].heads[1].promote, 0.02);
  EXPECT_EQ(layers[0].heads[2], layers[0].heads[1]);
  // The layer's own fields are those of most heads.
  EXPECT_EQ(layers[0].promote, 0.02);
  EXPECT_EQ(layers[0].k_format, Format::nvfp4);
  EXPECT_EQ(layers[2].heads[1].k_format, Format::bf16);
  EXPECT_EQ(layers[2].heads[1].promote, 1.0);
  EXPECT_EQ(layers[2].heads[2].k_format, Format::nvfp4);
  EXPECT_EQ(&layers[2].of_head(1), &layers[2].heads[1]);
  EXPECT_EQ(&layers[1].of_head(1), &layers[1].heads[1]);
  // Rules that end in equal heads leave no trace.
  EXPECT_EQ(resolve(parse_policy("balanced,head:0-2:promote=0.1"), with_heads(3)),
            layers_of("balanced,promote=0.1"));
  EXPECT_EQ(resolve(parse_policy("balanced"), with_heads(3)), layers_of("balanced"));
  // Later rules win, whatever they select.
  EXPECT_EQ(resolve(parse_policy("balanced,head:0:fp8,first:1:bf16"), with_heads(2))[0].heads.size(), 0u);
  EXPECT_EQ(resolve(parse_policy("exact,1:head:1:nvfp4"), with_heads(2))[1].heads[1].k_format,
            Format::nvfp4);
}

TEST(Resolve, HeadsOfSlidingWindowLayers) {
  PolicyContext context = with_heads(2);
  context.sliding_window = kAlternating;
  const auto layers = resolve(parse_policy("thrifty,sliding_window:head:1:nvfp4"), context);
  EXPECT_EQ(layers[0].heads[0].k_format, Format::nvfp4x2);
  EXPECT_EQ(layers[0].heads[1], layers[1]);
  EXPECT_TRUE(layers[1].heads.empty());
}

TEST(Resolve, HeadsThatDoNotExistOrAreUnknown) {
  const auto refuse = [](const char* text, const PolicyContext& context,
                         ErrorCode code = ErrorCode::invalid_argument) {
    return error_of([&] { resolve(parse_policy(text), context); }, code);
  };
  EXPECT_THAT(refuse("balanced,head:2:bf16", with_heads(2)),
              HasSubstr("KV heads 'head:2' do not exist in layer 0: it has 2, 0 to 1"));
  EXPECT_THAT(refuse("balanced,3:head:1-9:bf16", with_heads(8)), HasSubstr("'3:head:1-9'"));
  EXPECT_THAT(refuse("balanced,head:0:bf16", {.layers = 4}, ErrorCode::unsupported),
              HasSubstr("missing: PolicyContext::kv_heads"));
  EXPECT_THAT(refuse("balanced", {.layers = 4, .kv_heads = {1, 2}}), HasSubstr("2 entries for 4"));
  EXPECT_THAT(refuse("balanced", with_heads(0)), HasSubstr("layer 0 has 0 KV heads"));
  EXPECT_THAT(refuse("balanced,head:0:skip=0.5", with_heads(2)),
              HasSubstr("layer 0, KV head 0: skip = 0.5"));
  EXPECT_THAT(refuse("exact,head:1:promote=0.5", with_heads(2)), HasSubstr("'head:1'"));
  EXPECT_THAT(refuse("balanced,head:1:v=nvfp4x2", with_heads(2), ErrorCode::unsupported),
              HasSubstr("KV head 1: K in nvfp4 and V in nvfp4x2"));
  Policy policy = preset("balanced");
  policy.rules.push_back({.heads = {.begin = 1, .end = 1}});
  EXPECT_THAT(error_of([&] { resolve(policy, with_heads(2)); }), HasSubstr("do not exist"));
}

TEST(Resolve, PerCentOfTheContext) {
  const auto sealed = [](const char* text, int64_t context) {
    return resolve(parse_policy(text), {.layers = 1, .context_tokens = context})[0];
  };
  EXPECT_EQ(sealed("thrifty,recent=10%", 131072).recent, 13108);  // rounded up
  EXPECT_EQ(sealed("thrifty,sinks=0%", 131072).sinks, 0);
  EXPECT_EQ(sealed("thrifty,sinks=100%", 1000).sinks, 1000);
  EXPECT_EQ(sealed("thrifty,sinks=1%,0:sinks=7", 1000).sinks, 7);
  EXPECT_THAT(resolve_error("thrifty,recent=10%", ErrorCode::unsupported),
              HasSubstr("recent = 10%; required: the tokens of the context"));
  EXPECT_THAT(error_of([] { resolve(preset("thrifty"), {.layers = 1, .context_tokens = -1}); }),
              HasSubstr("context_tokens = -1"));
}

TEST(Resolve, CapAndCounts) {
  EXPECT_EQ(layers_of("balanced,max=0.2")[0].max_promoted, 0.2);
  EXPECT_EQ(layers_of("balanced,max=0.2,0:fp8")[0].max_promoted, 1.0);
  EXPECT_THAT(resolve_error("thrifty,max=0.2"), HasSubstr("a sealed layer promotes no page"));
  EXPECT_THAT(resolve_error("paper-budget,max=0.2"), HasSubstr("rule=mass"));
  EXPECT_THAT(resolve_error("exact,max=0.2"), HasSubstr("it acts on nvfp4"));
  EXPECT_THAT(resolve_error("balanced,pages=4"), HasSubstr("rule=budget"));
  // Of a fraction and a number, the later counts.
  EXPECT_EQ(layers_of("paper-budget,pages=4")[0].budget, 0.0);
  EXPECT_EQ(layers_of("paper-budget,pages=4")[0].budget_pages, 4);
  EXPECT_EQ(layers_of("paper-budget,pages=4,0:budget=0.3")[0].budget_pages, 0);
  EXPECT_EQ(layers_of("paper-budget,pages=4,0:budget=0.3")[0].budget, 0.3);
  EXPECT_EQ(layers_of("balanced,rule=budget,pages=4")[0].budget_pages, 4);
  PolicyRule both;
  both.budget = 0.1;
  both.budget_pages = 2;
  EXPECT_THAT(error_of([&] { resolve({.name = "x", .rules = {both}}, {.layers = 1}); }),
              HasSubstr("both given"));
  // Only the mean needs K's page means.
  EXPECT_NO_THROW(layers_of("paper-budget,k=bf16,score=quest"));
  EXPECT_NO_THROW(layers_of("paper-budget,center=false,score=local"));
}

TEST(Resolve, SkippingNeedsTheMeanOfV) {
  EXPECT_THAT(resolve_error("balanced,center=false", ErrorCode::unsupported),
              HasSubstr("set skip=0"));
  EXPECT_NO_THROW(layers_of("balanced,center=false,skip=0"));
  EXPECT_NO_THROW(layers_of("balanced,v=bf16,center=false"));
}

TEST(Explain, GroupsEqualLayers) {
  EXPECT_EQ(explain(layers_of("exact")), "layers 0-3: K and V BF16\n");
  EXPECT_EQ(explain(layers_of("exact", 1)), "layer 0: K and V BF16\n");
  EXPECT_EQ(explain({}), "");
  const std::string text = explain(layers_of("balanced", 4, kAlternating));
  EXPECT_THAT(text, HasSubstr("layers 0, 2: K and V NVFP4 base and residual"));
  EXPECT_THAT(text, HasSubstr("\nlayers 1, 3: K and V NVFP4; K equalised"));
  EXPECT_THAT(text, HasSubstr("read for pages of attention mass above 0.02"));
  EXPECT_THAT(text, HasSubstr("V codes not read for pages of mass up to 0.0003\n"));
  EXPECT_THAT(explain(layers_of("balanced,1:fp8", 4)), HasSubstr("layers 0, 2-3: "));
}

TEST(Explain, HeadsCapsAndCounts) {
  const std::string text =
      explain(resolve(parse_policy("balanced,1:head:1:bf16,max=0.1"), with_heads(3)));
  EXPECT_THAT(text, HasSubstr("layers 0, 2-3: K and V NVFP4"));
  EXPECT_THAT(text, HasSubstr("layer 1, KV heads 0, 2: K and V NVFP4"));
  EXPECT_THAT(text, HasSubstr("layer 1, KV head 1: K and V BF16\n"));
  EXPECT_THAT(text, HasSubstr("above 0.02, at most 10 % of a query's pages"));
  EXPECT_THAT(explain(layers_of("paper-budget,pages=16,score=local")),
              HasSubstr("read for the 16 pages with the best place: the newest"));
  EXPECT_THAT(explain(layers_of("paper-budget,score=quest")), HasSubstr("quest"));
}

TEST(Explain, SaysWhatHasNoEffect) {
  EXPECT_THAT(explain(layers_of("balanced,recent=256")), HasSubstr("recent=256 change nothing"));
  EXPECT_THAT(explain(layers_of("balanced,promote=1")), HasSubstr("never read in decode"));
  EXPECT_THAT(explain(layers_of("thrifty")), HasSubstr("first 64 and the last 512 tokens"));
  EXPECT_THAT(explain(layers_of("paper-budget")), HasSubstr("5 % of the pages"));
  EXPECT_THAT(explain(layers_of("paper-budget,score=oracle,sinks=64")),
              HasSubstr("true mass (oracle) and for the first 64"));
  EXPECT_THAT(explain(layers_of("balanced,rotate=false,equalize=false,center=false,skip=0")),
              HasSubstr("K as it is; V as it is"));
  EXPECT_THAT(explain(layers_of("thrifty,v=bf16")), HasSubstr("K NVFP4, V BF16"));
  const std::string savings = explain(layers_of("max-savings"));
  EXPECT_THAT(savings, HasSubstr("K NVFP4, V INT3; K equalised"));
  EXPECT_THAT(savings, HasSubstr("V rotated and centred by page; sealed"));
  EXPECT_THAT(savings, HasSubstr("V codes not read for pages of mass up to 0.0003"));
  EXPECT_THAT(explain(layers_of("max-savings-mx")), HasSubstr("K MXFP4, V INT3"));
}

}  // namespace
}  // namespace thriftattn
