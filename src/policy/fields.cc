// Names, types and ranges of the settings of a policy rule (fields.h).
#include "policy/fields.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "formats/format_info.h"
#include "policy/text.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using nlohmann::json;

// Above any context and any layer count; sums with token positions cannot overflow.
constexpr int64_t kMaxTokens = int64_t{1} << 40;
constexpr int64_t kMaxLayers = int64_t{1} << 20;

template <typename E>
struct Named {
  std::string_view name;
  E value{};
};

// Calls f(name, format) for all names, then for all aliases: the first name of a value is the one
// that is printed. (By index: GCC 12 refuses a range-for over an array's member array here.)
template <typename F>
constexpr void for_each_format_name(F&& f) {
  for (const FormatInfo& info : kFormats) f(info.name, info.format);
  for (const FormatInfo& info : kFormats) {
    for (size_t i = 0; i < info.aliases.size(); ++i) {
      if (!info.aliases[i].empty()) f(info.aliases[i], info.format);
    }
  }
}

constexpr size_t kFormatNameCount = [] {
  size_t n = 0;
  for_each_format_name([&](std::string_view, Format) { ++n; });
  return n;
}();

constexpr auto kFormatNames = [] {
  std::array<Named<Format>, kFormatNameCount> names{};
  size_t n = 0;
  for_each_format_name([&](std::string_view name, Format format) { names[n++] = {name, format}; });
  return names;
}();
constexpr std::array kRules = {
    Named<PromoteRule>{"mass", PromoteRule::mass},
    Named<PromoteRule>{"budget", PromoteRule::budget},
};
constexpr std::array kScores = {
    Named<BlockScore>{"mean", BlockScore::mean},
    Named<BlockScore>{"oracle", BlockScore::oracle},
    Named<BlockScore>{"quest", BlockScore::quest},
    Named<BlockScore>{"variance", BlockScore::variance},
    Named<BlockScore>{"local", BlockScore::local},
};
constexpr std::array kResidencies = {
    Named<Residency>{"device", Residency::device},
    Named<Residency>{"dropped", Residency::dropped},
};

constexpr const auto& names_of(Format) { return kFormatNames; }
constexpr const auto& names_of(PromoteRule) { return kRules; }
constexpr const auto& names_of(BlockScore) { return kScores; }
constexpr const auto& names_of(Residency) { return kResidencies; }

constexpr std::array kFields = {
    PolicyField{"k", &PolicyRule::k_format},
    PolicyField{"v", &PolicyRule::v_format},
    PolicyField{"rule", &PolicyRule::rule},
    PolicyField{"promote", &PolicyRule::promote},
    PolicyField{"skip", &PolicyRule::skip},
    PolicyField{"max", &PolicyRule::max_promoted},
    PolicyField{"budget", &PolicyRule::budget},
    PolicyField{"pages", &PolicyRule::budget_pages},
    PolicyField{"score", &PolicyRule::score},
    PolicyField{"residency", &PolicyRule::residency},
    PolicyField{"sinks", &PolicyRule::sinks},
    PolicyField{"recent", &PolicyRule::recent},
    PolicyField{"rotate", &PolicyRule::rotate},
    PolicyField{"center", &PolicyRule::center},
    PolicyField{"equalize", &PolicyRule::equalize},
};

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

template <typename E>
std::string_view name_of(E value) {
  for (const auto& entry : names_of(value)) {
    if (entry.value == value) return entry.name;
  }
  return "invalid";
}

template <typename E>
std::optional<E> find_name(std::string_view text) {
  for (const auto& entry : names_of(E{})) {
    if (entry.name == text) return entry.value;
  }
  return std::nullopt;
}

template <typename E>
E name_or_error(std::string_view field, std::string_view text) {
  if (const auto found = find_name<E>(text)) return *found;
  std::vector<std::string_view> all, printed;
  for (const auto& entry : names_of(E{})) {
    all.push_back(entry.name);
    if (name_of(entry.value) == entry.name) printed.push_back(entry.name);
  }
  fail(fmt::format("unknown {} {}: accepted are {}{}", field, quote(text), one_of(printed),
                   did_you_mean(text, all)));
}

// A number as messages print it: what JSON would say, not the type's internals.
std::string given(const json& value) {
  if (value.is_string()) return quote(value.get<std::string>());
  const std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() > 60 ? text.substr(0, 60) + "..." : text;
}

void check_range(std::string_view name, double value) {
  if (!(value >= 0.0 && value <= 1.0)) {  // NaN fails too
    fail(fmt::format("{} = {}: accepted are numbers from 0 to 1", name, value));
  }
}

std::string accepted_pages() {
  return fmt::format("accepted are whole numbers of pages from 1 to {}", kMaxTokens / 64);
}

std::string accepted_tokens() {
  return fmt::format("accepted are whole numbers of tokens from 0 to {}, or a share of the context "
                     "such as '5%'",
                     kMaxTokens);
}

void check_range(std::string_view name, int64_t value) {
  if (value < 1 || value > kMaxTokens / 64) {
    fail(fmt::format("{} = {}: {}", name, value, accepted_pages()));
  }
}

void check_range(std::string_view name, const TokenCount& value) {
  if (!(value.percent >= 0 && value.percent <= 100)) {  // NaN fails too
    fail(fmt::format("{} = {}%: {}", name, value.percent, accepted_tokens()));
  }
  if (value.tokens < 0 || value.tokens > kMaxTokens) {
    fail(fmt::format("{} = {}: {}", name, value.tokens, accepted_tokens()));
  }
}

void check_one_budget(const PolicyRule& rule) {
  if (rule.budget && rule.budget_pages) {
    fail("budget and pages are both given for the same layers: choose a fraction or a number");
  }
}

double from_json(std::string_view name, const json& value, double*) {
  if (!value.is_number()) {
    fail(fmt::format("{} = {}: accepted are numbers from 0 to 1", name, given(value)));
  }
  const double number = value.get<double>();
  check_range(name, number);
  return number;
}

bool fits_count(const json& value) {
  return value.is_number_integer() && (!value.is_number_unsigned() ||
                                       value.get<uint64_t>() <= static_cast<uint64_t>(kMaxTokens));
}

int64_t from_json(std::string_view name, const json& value, int64_t*) {
  if (!fits_count(value)) fail(fmt::format("{} = {}: {}", name, given(value), accepted_pages()));
  const auto number = value.get<int64_t>();
  check_range(name, number);
  return number;
}

TokenCount from_json(std::string_view name, const json& value, TokenCount*) {
  TokenCount count;
  if (fits_count(value)) {
    count.tokens = value.get<int64_t>();
  } else {
    const std::string text = value.is_string() ? value.get<std::string>() : "";
    double percent = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, percent);
    if (error != std::errc() || stop + 1 != end || *stop != '%') {
      fail(fmt::format("{} = {}: {}", name, given(value), accepted_tokens()));
    }
    count.percent = percent;
  }
  check_range(name, count);
  return count;
}

bool from_json(std::string_view name, const json& value, bool*) {
  if (!value.is_boolean()) {
    fail(fmt::format("{} = {}: accepted are true and false", name, given(value)));
  }
  return value.get<bool>();
}

template <typename E>
E from_json(std::string_view name, const json& value, E*) {
  if (!value.is_string()) {
    fail(fmt::format("{} = {}: accepted is a name such as '{}'", name, given(value),
                     names_of(E{}).front().name));
  }
  const bool is_format = std::is_same_v<E, Format>;
  return name_or_error<E>(is_format ? "format" : name, value.get_ref<const std::string&>());
}

// The value as the JSON type that the field takes; a wrong one fails in set_field.
json json_from_text(const PolicyField& field, std::string_view text) {
  const auto parse = [&](auto number) -> json {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size()) return std::string(text);
    if constexpr (std::is_floating_point_v<decltype(number)>) {
      if (!std::isfinite(number)) return std::string(text);  // JSON has neither NaN nor infinity
    }
    return number;
  };
  if (std::holds_alternative<RuleMember<double>>(field.member)) return parse(double{});
  if (std::holds_alternative<RuleMember<int64_t>>(field.member)) return parse(int64_t{});
  if (std::holds_alternative<RuleMember<TokenCount>>(field.member)) return parse(int64_t{});
  if (std::holds_alternative<RuleMember<bool>>(field.member)) {
    if (text == "true") return true;
    if (text == "false") return false;
  }
  return std::string(text);
}

const PolicyField* find_field(std::string_view name) {
  for (const PolicyField& field : kFields) {
    if (field.name == name) return &field;
  }
  return nullptr;
}

const PolicyField& field_or_error(std::string_view name) {
  if (const PolicyField* field = find_field(name)) return *field;
  std::vector<std::string_view> names = {"format"};
  for (const PolicyField& field : kFields) names.push_back(field.name);
  fail(fmt::format("unknown setting {}: accepted are {}{}", quote(name), one_of(names),
                   did_you_mean(name, names)));
}

void set_one(PolicyRule& rule, const PolicyField& field, const json& value) {
  if (field.is_set(rule)) {
    fail(fmt::format("{} is given twice for the same layers: remove one ('format' sets k and v)",
                     field.name));
  }
  std::visit(
      [&]<typename T>(RuleMember<T> member) {
        rule.*member = from_json(field.name, value, static_cast<T*>(nullptr));
      },
      field.member);
  check_one_budget(rule);
}

std::optional<int64_t> layer_number(std::string_view text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 0 ||
      number > kMaxLayers) {
    return std::nullopt;
  }
  return number;
}

}  // namespace

std::string_view to_string(Format format) { return name_of(format); }
std::string_view to_string(PromoteRule rule) { return name_of(rule); }
std::string_view to_string(BlockScore score) { return name_of(score); }
std::string_view to_string(Residency residency) { return name_of(residency); }

std::optional<Format> parse_format(std::string_view name) { return find_name<Format>(name); }

Format format_from_text(std::string_view text) { return name_or_error<Format>("format", text); }

std::span<const PolicyField> policy_fields() { return kFields; }

bool PolicyField::is_set(const PolicyRule& rule) const {
  return std::visit([&](auto m) { return (rule.*m).has_value(); }, member);
}

void set_field(PolicyRule& rule, std::string_view name, const json& value) {
  if (name == "format") {
    set_one(rule, *find_field("k"), value);
    set_one(rule, *find_field("v"), value);
    return;
  }
  set_one(rule, field_or_error(name), value);
}

void set_field_from_text(PolicyRule& rule, std::string_view name, std::string_view text) {
  if (name == "format") {
    set_field(rule, name, std::string(text));
  } else {
    const PolicyField& field = field_or_error(name);
    set_one(rule, field, json_from_text(field, text));
  }
}

nlohmann::json field_to_json(const PolicyField& field, const PolicyRule& rule) {
  return std::visit(
      [&]<typename T>(RuleMember<T> member) -> nlohmann::json {
        if constexpr (std::is_enum_v<T>) {
          return std::string(name_of((rule.*member).value()));
        } else if constexpr (std::is_same_v<T, TokenCount>) {
          const TokenCount& count = (rule.*member).value();
          if (count.percent > 0) return fmt::format("{}%", count.percent);
          return count.tokens;
        } else {
          return (rule.*member).value();
        }
      },
      field.member);
}

void check_ranges(const PolicyRule& rule) {
  for (const PolicyField& field : kFields) {
    if (!field.is_set(rule)) continue;
    std::visit(
        [&]<typename T>(RuleMember<T> member) {
          if constexpr (std::is_enum_v<T>) {
            if (name_of(*(rule.*member)) == "invalid") {
              fail(fmt::format("{} has the value {}, which its type does not name", field.name,
                               static_cast<int>(*(rule.*member))));
            }
          } else if constexpr (!std::is_same_v<T, bool>) {
            check_range(field.name, *(rule.*member));
          }
        },
        field.member);
  }
  check_one_budget(rule);
}

LayerSelector selector_from_text(std::string_view text) {
  using Kind = LayerSelector::Kind;
  const auto malformed = [&] {
    constexpr std::array<std::string_view, 4> kWords = {"first:N", "last:N", "sliding_window", "*"};
    fail(
        fmt::format("cannot read {} as a selection of layers: accepted are '*', a layer '7', a "
                    "range '0-3', 'first:2', 'last:2' and 'sliding_window', each with ':head:1' or "
                    "':head:0-3' behind it for some KV heads{}",
                    quote(text), did_you_mean(text, kWords)));
  };
  if (text == "*") return {};
  if (text == "sliding_window") return {.kind = Kind::sliding_window};
  for (const auto& [prefix, kind] :
       {std::pair{std::string_view("first:"), Kind::first}, {"last:", Kind::last}}) {
    if (!text.starts_with(prefix)) continue;
    const auto count = layer_number(text.substr(prefix.size()));
    if (!count || *count == 0) malformed();
    return {.kind = kind, .end = *count};
  }
  const size_t dash = text.find('-');
  const auto begin = layer_number(text.substr(0, dash));
  const auto last = dash == std::string_view::npos ? begin : layer_number(text.substr(dash + 1));
  if (!begin || !last) malformed();
  if (*last < *begin) {
    fail(fmt::format("layers {} run backwards: write '{}-{}'", quote(text), *last, *begin));
  }
  return {.kind = Kind::range, .begin = *begin, .end = *last + 1};
}

std::string to_string(const LayerSelector& selector) {
  switch (selector.kind) {
    case LayerSelector::Kind::all:
      return "*";
    case LayerSelector::Kind::range:
      return selector.end == selector.begin + 1
                 ? fmt::format("{}", selector.begin)
                 : fmt::format("{}-{}", selector.begin, selector.end - 1);
    case LayerSelector::Kind::first:
      return fmt::format("first:{}", selector.end);
    case LayerSelector::Kind::last:
      return fmt::format("last:{}", selector.end);
    case LayerSelector::Kind::sliding_window:
      return "sliding_window";
  }
  return "invalid";
}

HeadSelector heads_from_text(std::string_view text) {
  const size_t dash = text.find('-');
  const auto begin = layer_number(text.substr(0, dash));
  const auto last = dash == std::string_view::npos ? begin : layer_number(text.substr(dash + 1));
  if (!begin || !last) {
    fail(fmt::format("cannot read {} as a selection of KV heads: accepted are a head '1' and a "
                     "range '0-3'",
                     quote(text)));
  }
  if (*last < *begin) {
    fail(fmt::format("KV heads {} run backwards: write '{}-{}'", quote(text), *last, *begin));
  }
  return {.begin = *begin, .end = *last + 1};
}

std::string to_string(const HeadSelector& selector) {
  return selector.end == selector.begin + 1
             ? fmt::format("{}", selector.begin)
             : fmt::format("{}-{}", selector.begin, selector.end - 1);
}

std::string selection_of(const PolicyRule& rule) {
  if (rule.heads.all()) return to_string(rule.layers);
  const std::string heads = "head:" + to_string(rule.heads);
  return rule.layers == LayerSelector{} ? heads : to_string(rule.layers) + ":" + heads;
}

void select_from_text(std::string_view text, PolicyRule& rule) {
  constexpr std::string_view kWord = "head:";
  const size_t at = text.find(kWord);
  if (at == std::string_view::npos || (at > 0 && text[at - 1] != ':')) {
    rule.layers = selector_from_text(text);
    return;
  }
  if (at > 0) rule.layers = selector_from_text(trimmed(text.substr(0, at - 1)));
  rule.heads = heads_from_text(trimmed(text.substr(at + kWord.size())));
}

}  // namespace thriftattn
