// The inline form of policies, and policy files (docs/policy.md has the grammar).
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "policy/fields.h"
#include "policy/policy_json.h"
#include "policy/policy_list.h"
#include "policy/text.h"
#include "thriftattn/error.h"
#include "thriftattn/policy.h"

namespace thriftattn {
namespace {

constexpr size_t kMaxText = size_t{1} << 20;

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

// "SELECTOR:FORMAT" or "SELECTOR:KEY=VALUE"; the selector itself may hold colons ("first:2",
// "2:head:1").
PolicyRule parse_selected(std::string_view item) {
  const size_t equals = item.find('=');
  const size_t colon = item.substr(0, equals).rfind(':');
  PolicyRule rule;
  select_from_text(trimmed(item.substr(0, colon)), rule);
  const std::string_view setting = item.substr(colon + 1);
  if (equals == std::string_view::npos) {
    rule.k_format = rule.v_format = format_from_text(trimmed(setting));
  } else {
    set_field_from_text(rule, trimmed(item.substr(colon + 1, equals - colon - 1)),
                        trimmed(item.substr(equals + 1)));
  }
  return rule;
}

bool names_promotable(const PolicyRule& rule) {
  return (rule.k_format && is_promotable(*rule.k_format)) ||
         (rule.v_format && is_promotable(*rule.v_format));
}

// What a text without a preset starts from: BF16, and balanced's thresholds for the layers that
// the text makes promotable. The fields' own defaults (never promote) would keep residuals that no
// decode step reads.
PolicyRule base_rule(const std::vector<PolicyRule>& rules) {
  PolicyRule base{.k_format = Format::bf16, .v_format = Format::bf16};
  if (std::any_of(rules.begin(), rules.end(), names_promotable)) {
    const Policy balanced = preset("balanced");
    base.promote = balanced.rules.front().promote;
    base.skip = balanced.rules.front().skip;
  }
  return base;
}

Policy parse_inline(std::string_view text) {
  Policy policy;
  std::vector<PolicyRule> rules;
  PolicyRule given;     // every setting for all layers, to find one that is given twice
  bool extend = false;  // whether rules.back() is for all layers and takes the next setting
  bool has_preset = false;
  bool first = true;
  while (true) {
    const size_t comma = text.find(',');
    const std::string_view item = trimmed(text.substr(0, comma));
    if (item.empty()) fail("the policy has an empty item: remove the comma too many");
    const size_t equals = item.find('=');
    if (item.substr(0, equals).find(':') != std::string_view::npos) {
      rules.push_back(parse_selected(item));
      extend = false;
    } else if (equals != std::string_view::npos) {
      const std::string_view key = trimmed(item.substr(0, equals));
      const std::string_view value = trimmed(item.substr(equals + 1));
      set_field_from_text(given, key, value);
      if (!extend) rules.emplace_back();
      extend = true;
      set_field_from_text(rules.back(), key, value);
    } else if (first) {
      policy = preset(item);
      has_preset = true;
    } else {
      fail(
          fmt::format("cannot read {}: after the first, items are KEY=VALUE, LAYERS:FORMAT or "
                      "LAYERS:KEY=VALUE, such as 'promote=0.05' or '0-3:fp8'",
                      quote(item)));
    }
    first = false;
    if (comma == std::string_view::npos) break;
    text.remove_prefix(comma + 1);
  }
  if (!has_preset) policy.rules.push_back(base_rule(rules));
  policy.rules.insert(policy.rules.end(), rules.begin(), rules.end());
  return policy;
}

std::string read_text_file(const std::string& path) {
  if (path.empty() || path.find('\0') != std::string::npos) {
    fail("after '@' the policy needs the path of a JSON file");
  }
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             &std::fclose);
  const auto because = [&](const char* action) {
    const int reason = errno;
    return Error(
        reason == ENOENT ? ErrorCode::not_found : ErrorCode::io,
        fmt::format("cannot {} policy file {}: {}", action, quote(path), std::strerror(reason)));
  };
  if (!file) throw because("open");
  std::string text(kMaxText + 1, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file.get()));
  if (std::ferror(file.get())) throw because("read");
  return text;
}

Policy parse_file(const std::string& path) {
  const std::string text = read_text_file(path);
  const std::string name = std::filesystem::path(path).stem().string();
  // A name that no report could print falls back; the file can give its own.
  const bool printable = !name.empty() && std::all_of(name.begin(), name.end(),
                                                      [](char c) { return c > 0x20 && c < 0x7f; });
  try {
    if (text.size() > kMaxText) fail(fmt::format("it is larger than {} bytes", kMaxText));
    return policy_from_json(text, printable ? name : "custom");
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("policy file {}: {}", quote(path), error.what()));
  }
}

}  // namespace

Policy parse_policy(std::string_view text) {
  text = trimmed(text);
  if (text.empty()) {
    fail("the policy is empty: give a preset such as 'balanced', settings, JSON or @FILE");
  }
  if (text.size() > kMaxText) {
    fail(fmt::format("the policy has {} bytes: accepted are {}", text.size(), kMaxText));
  }
  if (text.front() == '{') return policy_from_json(text, "custom");
  if (text.front() == '@') return parse_file(std::string(text.substr(1)));
  Policy policy = parse_inline(text);
  // A bare preset keeps its own name (an alias does not); anything else is called by its text.
  if (policy.name.empty() || text.find(',') != std::string_view::npos) {
    policy.name.clear();
    for (const char c : text) {
      if (c != ' ' && c != '\t' && c != '\r' && c != '\n') policy.name += c;
    }
  }
  return policy;
}

std::vector<std::string> split_policy_list(std::string_view text) {
  const auto starts_policy = [](std::string_view item) {
    if (item.starts_with('@') || item.starts_with('{')) return true;
    if (item.find_first_of(":=") != std::string_view::npos) return false;
    return true;  // a preset's name, or a misspelt one, for parse_policy to refuse
  };
  std::vector<std::string> policies;
  std::string_view rest = text;
  bool forced = true;  // whether the next item starts a policy whatever it is
  while (true) {
    // The end of the item; commas inside JSON and its strings do not count.
    size_t end = 0;
    int depth = 0;
    bool in_string = false;
    for (; end < rest.size(); ++end) {
      const char c = rest[end];
      if (in_string) {
        if (c == '\\')
          ++end;
        else if (c == '"')
          in_string = false;
      } else if (c == '"' && depth > 0) {
        in_string = true;
      } else if (c == '{') {
        ++depth;
      } else if (c == '}') {
        --depth;
      } else if (depth <= 0 && (c == ',' || c == ';')) {
        break;
      }
    }
    end = std::min(end, rest.size());
    const std::string item(trimmed(rest.substr(0, end)));
    if (forced || starts_policy(item)) {
      policies.push_back(item);
    } else {
      policies.back() += ',' + item;
    }
    if (end == rest.size()) return policies;
    forced = rest[end] == ';';
    rest.remove_prefix(end + 1);
  }
}

}  // namespace thriftattn
