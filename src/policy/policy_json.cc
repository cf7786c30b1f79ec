// Reads and writes policies as JSON, strictly: an unknown key, a key given twice or a wrong type
// is an error, so that no setting is ignored.
#include "policy/policy_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "policy/fields.h"
#include "policy/text.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 4;  // object, rules, rule, and one more for a better message

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

// The library's message on one line, whatever bytes it quotes.
std::string one_line(std::string_view what) {
  std::string out;
  for (const char c : what.substr(0, 200)) {
    const auto byte = static_cast<unsigned char>(c);
    out += byte < 0x20 || byte >= 0x7f ? '?' : c;
  }
  // "[json.exception.parse_error.101] parse error at ...": the tag says nothing to a user.
  const size_t tag = out.find("] ");
  return out.starts_with('[') && tag != std::string::npos ? out.substr(tag + 2) : out;
}

json parse_strictly(std::string_view text) {
  std::vector<std::set<std::string>> keys;  // of the objects being read, outermost first
  const auto callback = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kMaxDepth) fail("the JSON of the policy is nested too deeply (docs/policy.md)");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
      fail(fmt::format("key {} is given twice: remove one", quote(value.get<std::string>())));
    }
    return true;
  };
  try {
    return json::parse(text, callback);
  } catch (const json::exception& error) {
    fail(fmt::format("the policy is not valid JSON: {}", one_line(error.what())));
  }
}

PolicyRule rule_from_json(const json& object) {
  if (!object.is_object()) {
    fail(
        fmt::format("it is {} and must be an object such as {{\"layers\": \"*\", \"format\": "
                    "\"nvfp4\"}}",
                    object.type_name()));
  }
  PolicyRule rule;
  for (const auto& [key, value] : object.items()) {
    const bool selects = key == "layers" || key == "heads";
    if (!selects) {
      set_field(rule, key, value);
    } else if (!value.is_string()) {
      fail(fmt::format("\"{}\" is {} and must be a string such as \"0-3\" or \"{}\"", key,
                       value.type_name(), key == "layers" ? "first:2" : "1"));
    } else if (key == "layers") {
      rule.layers = selector_from_text(value.get<std::string>());
    } else if (value.get<std::string>() != "*") {
      rule.heads = heads_from_text(value.get<std::string>());
    }
  }
  return rule;
}

void check_name(const std::string& name) {
  const bool has_control = std::any_of(name.begin(), name.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
  if (name.empty() || has_control) {
    fail(fmt::format("name {}: accepted is one line of text that is not empty", quote(name)));
  }
}

const std::string& string_at(const json& object, const std::string& key) {
  const json& value = object.at(key);
  if (!value.is_string()) {
    fail(fmt::format("\"{}\" is {} and must be a string", key, value.type_name()));
  }
  return value.get_ref<const std::string&>();
}

}  // namespace

Policy policy_from_json(std::string_view text, const std::string& default_name) {
  const json root = parse_strictly(text);
  if (!root.is_object()) {
    fail(fmt::format("the JSON of a policy is an object, and this is {}", root.type_name()));
  }
  constexpr std::array<std::string_view, 3> kKeys = {"name", "preset", "rules"};
  for (const auto& [key, value] : root.items()) {
    if (std::find(kKeys.begin(), kKeys.end(), key) == kKeys.end()) {
      fail(
          fmt::format("unknown key {}: accepted are {} (settings go into a rule: {{\"rules\": "
                      "[{{...}}]}}){}",
                      quote(key), one_of(kKeys), did_you_mean(key, kKeys)));
    }
  }
  if (!root.contains("preset") && !root.contains("rules")) {
    fail("the JSON of a policy needs \"preset\" or \"rules\"");
  }

  Policy policy;
  if (root.contains("preset")) policy = preset(string_at(root, "preset"));
  policy.name = default_name;
  if (root.contains("name")) policy.name = string_at(root, "name");
  check_name(policy.name);
  if (!root.contains("rules")) return policy;

  const json& rules = root.at("rules");
  if (!rules.is_array()) {
    fail(fmt::format("\"rules\" is {} and must be an array", rules.type_name()));
  }
  for (size_t i = 0; i < rules.size(); ++i) {
    try {
      policy.rules.push_back(rule_from_json(rules[i]));
    } catch (const Error& error) {
      throw Error(error.code(), fmt::format("rule {}: {}", i, error.what()));
    }
  }
  return policy;
}

std::string policy_to_json(const Policy& policy) {
  check_name(policy.name);
  // Written piece by piece: the keys keep the order of the documentation.
  std::string rules;
  for (const PolicyRule& rule : policy.rules) {
    check_ranges(rule);
    std::string object = fmt::format("\"layers\":\"{}\"", to_string(rule.layers));
    if (!rule.heads.all()) object += fmt::format(",\"heads\":\"{}\"", to_string(rule.heads));
    const bool one_format = rule.k_format && rule.k_format == rule.v_format;
    if (one_format) object += fmt::format(",\"format\":\"{}\"", to_string(*rule.k_format));
    for (const PolicyField& field : policy_fields()) {
      if (!field.is_set(rule) || (one_format && (field.name == "k" || field.name == "v"))) continue;
      object += fmt::format(",\"{}\":{}", field.name, field_to_json(field, rule).dump());
    }
    rules += fmt::format("{}{{{}}}", rules.empty() ? "" : ",", object);
  }
  try {
    return fmt::format("{{\"name\":{},\"rules\":[{}]}}", json(policy.name).dump(), rules);
  } catch (const json::exception&) {
    fail(fmt::format("name {} is not UTF-8", quote(policy.name)));
  }
}

}  // namespace thriftattn
