// Quoting and suggestions for error messages (text.h).
#include "policy/text.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace thriftattn {
namespace {

constexpr size_t kMaxQuoted = 60;
constexpr size_t kMaxSuggested = 32;  // nobody mistypes a longer name; bounds the table below

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t changed = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({changed, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string quote(std::string_view text) {
  std::string out = "'";
  for (const char c : text.substr(0, kMaxQuoted)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out + (text.size() > kMaxQuoted ? "...'" : "'");
}

std::string did_you_mean(std::string_view given, std::span<const std::string_view> names) {
  if (given.empty() || given.size() > kMaxSuggested) return "";
  std::string lower(given);
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    if (c == '-') c = '_';
  }
  std::string_view best;
  size_t best_distance = std::max<size_t>(1, (given.size() + 1) / 3) + 1;
  for (const std::string_view name : names) {
    std::string normal(name);
    std::replace(normal.begin(), normal.end(), '-', '_');
    // The first word of a name is nearer than any misspelling: fp6 means an fp6_..., not fp8.
    const bool first_word = normal.starts_with(lower + '_');
    const size_t distance = first_word ? 0 : edit_distance(lower, normal);
    if (distance < best_distance) {
      best = name;
      best_distance = distance;
    }
  }
  return best.empty() ? "" : fmt::format("; did you mean '{}'?", best);
}

std::string one_of(std::span<const std::string_view> names) {
  if (names.size() < 2) return fmt::format("{}", fmt::join(names, ""));
  return fmt::format("{} or {}", fmt::join(names.first(names.size() - 1), ", "), names.back());
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

}  // namespace thriftattn
