// Which precision each part of the KV cache is stored in and read with.
//
// A Policy is an ordered list of rules; each names the layers it applies to and sets some
// fields. resolve() folds the rules into one LayerPolicy per layer, which is what the cache
// and the attention read. Later rules win.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace thriftattn {

// Storage formats of K and V (docs/formats.md has the byte maps).
enum class Format : uint8_t {
  f32,
  bf16,
  fp16,
  fp8_e4m3,  // FP8 and FP6: one FP32 scale per token and head
  fp8_e5m2,
  fp6_e3m2,
  fp6_e2m3,
  q8_0,     // ggml's block: 32 x int8, FP16 scale
  q4_0,     // ggml's block: 32 x int4, FP16 scale
  nvfp4,    // layered page; base plane, residual plane by residency
  nvfp4x2,  // layered page; base and residual always read
  mxfp4,    // layered as nvfp4, with an MXFP4 base plane
  int3,     // layered as nvfp4, with a 3-bit base plane
};

// Whether pages of this format have planes (base, residual, summary) and an open page.
constexpr bool is_layered(Format f) {
  return f == Format::nvfp4 || f == Format::nvfp4x2 || f == Format::mxfp4 || f == Format::int3;
}

// Layered formats whose residual is kept and read as the policy says; nvfp4x2 always does both.
constexpr bool is_promotable(Format f) { return is_layered(f) && f != Format::nvfp4x2; }

// Where the residual plane of a sealed page of a promotable format lives.
enum class Residency : uint8_t {
  device,   // kept: any query may promote the page
  dropped,  // freed when the page leaves `recent`; the first `sinks` tokens keep theirs
};

enum class PromoteRule : uint8_t {
  mass,    // by the attention mass the page holds for the query (DESIGN section 6)
  budget,  // the best `budget` of the pages by a score known before attention
};

enum class BlockScore : uint8_t {
  mean,      // mean over the group's queries of q . mean(K of page)
  oracle,    // the page's true attention mass (needs every plane; for comparison only)
  quest,     // the largest q . k that the page's elementwise min and max of K allow
  variance,  // q . mean + half of sum q^2 variance: the page's log-sum-exp were K Gaussian
  local,     // the newest pages
};

// What one layer does. All fields are meaningful after resolve().
//
// `quest` and `variance` need statistics that the page summaries do not hold: they are computed
// from the decoded base plane of K at every query, and are there for comparison.
struct LayerPolicy {
  Format k_format = Format::bf16;
  Format v_format = Format::bf16;
  PromoteRule rule = PromoteRule::mass;
  double promote = 1.0;  // mass above which a page is read with its residual; 1 = never
  double skip = 0.0;     // mass up to which a page's V codes are not read; 0 = never
  double max_promoted = 1.0;  // PromoteRule::mass: raises `promote` for a query that would read
                              // more than this fraction of its complete pages with the residual
  double budget = 0.0;   // PromoteRule::budget: fraction of the visible complete pages
  int64_t budget_pages = 0;  // the same as a number of pages; 0 = by fraction
  BlockScore score = BlockScore::mean;
  Residency residency = Residency::device;
  int64_t sinks = 0;   // tokens at the start whose residual is never dropped
  int64_t recent = 0;  // tokens at the end whose residual is never dropped
  bool rotate = true;  // Hadamard rotation of K in layered formats, and of V in int3
  bool center = true;  // layered formats: subtract the page mean (K and V)
  bool equalize = true;  // K only, layered formats: apply the model's equaliser if there is one
  // Where KV heads differ: one policy each (without `heads` of their own). The fields above are
  // then those of most heads. Empty: every head as above.
  std::vector<LayerPolicy> heads;

  bool operator==(const LayerPolicy&) const = default;
  const LayerPolicy& of_head(int64_t kv_head) const {
    return heads.empty() ? *this : heads[static_cast<size_t>(kv_head)];
  }
};

// The layers a rule applies to.
struct LayerSelector {
  enum class Kind : uint8_t { all, range, first, last, sliding_window };
  Kind kind = Kind::all;
  int64_t begin = 0;  // range: first layer; first/last: unused
  int64_t end = 0;    // range: one past the last layer; first/last: the count

  bool operator==(const LayerSelector&) const = default;
};

// The KV heads of those layers.
struct HeadSelector {
  int64_t begin = 0;
  int64_t end = 0;  // one past the last head; 0 = all heads

  bool all() const { return end == 0; }
  bool operator==(const HeadSelector&) const = default;
};

// A number of tokens, or a share of the context that resolve() is told.
struct TokenCount {
  int64_t tokens = 0;
  double percent = 0;  // above 0: in place of `tokens`

  TokenCount() = default;
  TokenCount(int64_t n) : tokens(n) {}  // NOLINT(google-explicit-constructor): counts are numbers
  static TokenCount of_context(double percent) {
    TokenCount count;
    count.percent = percent;
    return count;
  }
  bool operator==(const TokenCount&) const = default;
};

// A rule sets the fields it has.
struct PolicyRule {
  LayerSelector layers;
  HeadSelector heads;
  std::optional<Format> k_format, v_format;
  std::optional<PromoteRule> rule;
  std::optional<double> promote, skip, max_promoted, budget;
  std::optional<int64_t> budget_pages;  // in place of `budget`
  std::optional<BlockScore> score;
  std::optional<Residency> residency;
  std::optional<TokenCount> sinks, recent;
  std::optional<bool> rotate, center, equalize;

  bool operator==(const PolicyRule&) const = default;
};

struct Policy {
  std::string name;  // what reports call it
  std::vector<PolicyRule> rules;

  bool operator==(const Policy&) const = default;
};

// The facts of the model that selectors need.
struct PolicyContext {
  int64_t layers = 0;
  std::vector<bool> sliding_window;  // per layer; empty = none
  std::vector<int64_t> kv_heads;     // per layer; empty = unknown: no rules by head
  int64_t context_tokens = 0;        // of the longest sequence; 0 = unknown: no per cent
};

// One LayerPolicy per layer (with one for each KV head where they differ). Promotable formats of
// sliding-window layers default to nvfp4x2
// (before explicit `sliding_window` rules). Throws Error naming what is wrong.
std::vector<LayerPolicy> resolve(const Policy& policy, const PolicyContext& context);

// Names accepted by parse_policy, in the order of the documentation.
const std::vector<std::string>& preset_names();
Policy preset(std::string_view name);

// `text` is a preset name, a preset with changes ("balanced,promote=0.05,recent=256"),
// selectors with formats ("0-3:fp8,4-35:nvfp4", "balanced,first:2:bf16", "2:head:1:bf16"), a JSON
// object (starts with '{'), or "@FILE" naming a JSON file.
Policy parse_policy(std::string_view text);
std::string policy_to_json(const Policy& policy);

std::string_view to_string(Format format);
std::optional<Format> parse_format(std::string_view name);  // accepts aliases: fp8, int8, int4, ...

// What will really run for these layers, one line a layer group.
std::string explain(const std::vector<LayerPolicy>& layers);

}  // namespace thriftattn
