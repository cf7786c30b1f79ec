// The presets: DESIGN section 5, docs/policy.md.
#include <fmt/format.h>

#include <array>

#include "policy/text.h"
#include "thriftattn/error.h"
#include "thriftattn/policy.h"

namespace thriftattn {
namespace {

PolicyRule plain(Format format) { return {.k_format = format, .v_format = format}; }

// Layered by mass; no page is forced, sinks and recency show up as mass.
PolicyRule layered(double promote, double skip) {
  PolicyRule rule = plain(Format::nvfp4);
  rule.rule = PromoteRule::mass;
  rule.promote = promote;
  rule.skip = skip;
  rule.residency = Residency::device;
  rule.sinks = 0;
  rule.recent = 0;
  return rule;
}

// Once the residual is gone nothing can be promoted: `promote` is then only the bound above
// which mass is reported as wanted.
PolicyRule sealed(double promote, double skip, int64_t sinks, int64_t recent) {
  PolicyRule rule = layered(promote, skip);
  rule.residency = Residency::dropped;
  rule.sinks = sinks;
  rule.recent = recent;
  return rule;
}

PolicyRule by_budget(double budget) {
  PolicyRule rule = layered(1.0, 0.0);
  rule.rule = PromoteRule::budget;
  rule.promote.reset();
  rule.budget = budget;
  rule.score = BlockScore::mean;
  return rule;
}

// K in `k` and V in INT3: V's error is averaged by attention, K's goes into the scores, so V can
// do with fewer bits.
PolicyRule with_int3_values(Format k) {
  PolicyRule rule = sealed(0.02, 0.0003, 64, 512);
  rule.k_format = k;
  rule.v_format = Format::int3;
  return rule;
}

struct Preset {
  std::string_view name;
  PolicyRule rule;
};

const std::array<Preset, 11>& presets() {
  static const std::array<Preset, 11> all = {{
      {"f32", plain(Format::f32)},
      {"exact", plain(Format::bf16)},
      {"fp8", plain(Format::fp8_e4m3)},
      {"q8_0", plain(Format::q8_0)},
      {"q4_0", plain(Format::q4_0)},
      {"thrifty", sealed(0.02, 0.0003, 64, 512)},
      {"balanced", layered(0.02, 0.0003)},
      {"swift", layered(0.05, 0.001)},
      {"max-savings", with_int3_values(Format::nvfp4)},
      {"max-savings-mx", with_int3_values(Format::mxfp4)},
      {"paper-budget", by_budget(0.05)},
  }};
  return all;
}

// The preset that a format's name stands for: the one with everything in that format, if any.
const Preset* preset_of(std::string_view name) {
  const std::optional<Format> format = parse_format(name);
  for (const Preset& preset : presets()) {
    if (preset.name == name || (format && preset.rule == plain(*format))) return &preset;
  }
  return nullptr;
}

// For the error about a format that is no preset: what people who name it probably want.
std::string_view preset_with(Format format) {
  switch (format) {
    case Format::nvfp4:
      return ", or take the preset 'balanced'";
    case Format::mxfp4:
      return ", or take the preset 'max-savings-mx'";
    case Format::int3:
      return ", or take the preset 'max-savings'";
    default:
      return "";
  }
}

}  // namespace

const std::vector<std::string>& preset_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const Preset& preset : presets()) list.emplace_back(preset.name);
    return list;
  }();
  return names;
}

Policy preset(std::string_view name) {
  if (const Preset* found = preset_of(name)) return {std::string(found->name), {found->rule}};
  if (const auto format = parse_format(name)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("'{0}' is a format, not a policy: for all layers write '*:{0}'{1}",
                            name, preset_with(*format)));
  }
  std::vector<std::string_view> names;
  for (const Preset& preset : presets()) names.push_back(preset.name);
  throw Error(ErrorCode::invalid_argument,
              fmt::format("unknown policy {}: accepted are {}, settings such as '0-3:fp8', a JSON "
                          "object or @FILE{}",
                          quote(name), one_of(names), did_you_mean(name, names)));
}

}  // namespace thriftattn
