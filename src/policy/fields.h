// The settings of a policy rule under the names they have in text and JSON, and layer selectors.
// One table serves the inline form, JSON in both directions and the checks of resolve().
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <variant>

#include "thriftattn/policy.h"

namespace thriftattn {

template <typename T>
using RuleMember = std::optional<T> PolicyRule::*;

struct PolicyField {
  std::string_view name;
  std::variant<RuleMember<Format>, RuleMember<PromoteRule>, RuleMember<BlockScore>,
               RuleMember<Residency>, RuleMember<double>, RuleMember<int64_t>, RuleMember<TokenCount>,
               RuleMember<bool>>
      member;

  bool is_set(const PolicyRule& rule) const;
};

// Every field of PolicyRule but the selector. "format" is not in it: it sets k and v.
std::span<const PolicyField> policy_fields();

// Sets one field, or "format". Throws Error for an unknown name, a wrong type, a value out of
// range, or a field that `rule` has already.
void set_field(PolicyRule& rule, std::string_view name, const nlohmann::json& value);
void set_field_from_text(PolicyRule& rule, std::string_view name, std::string_view text);
nlohmann::json field_to_json(const PolicyField& field, const PolicyRule& rule);

// The ranges of numbers, for rules that were not parsed.
void check_ranges(const PolicyRule& rule);

Format format_from_text(std::string_view text);  // parse_format, or an Error

// "*", "7", "0-3", "first:2", "last:2", "sliding_window".
LayerSelector selector_from_text(std::string_view text);
std::string to_string(const LayerSelector& selector);

// "3", "0-3": KV heads, as they stand after "head:".
HeadSelector heads_from_text(std::string_view text);
std::string to_string(const HeadSelector& selector);  // not for all heads

// "0-3", "0-3:head:1", "head:1": what a rule applies to.
std::string selection_of(const PolicyRule& rule);
void select_from_text(std::string_view text, PolicyRule& rule);

std::string_view to_string(PromoteRule rule);
std::string_view to_string(BlockScore score);
std::string_view to_string(Residency residency);

}  // namespace thriftattn
