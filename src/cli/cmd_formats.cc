// `thriftattn formats`: the precision ladder, with what each format costs and measured errors.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/common.h"
#include "formats/format_error.h"
#include "formats/format_info.h"
#include "formats/k_transform.h"

namespace thriftattn::cli {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kDim = 128;
constexpr int64_t kRows = 128 * 64;  // a million numbers: errors settle to two digits

constexpr const char* kFooter = R"(
Examples:
  thriftattn formats
  thriftattn formats -o json

Errors are relative RMS errors of encoding and decoding random numbers: normal ones, and
Student's t with 3 degrees of freedom, whose tails are heavy as those of keys can be; 'rotated'
is the latter as the cache stores K in layered formats, behind the Hadamard rotation.
docs/formats.md has the byte maps.)";

struct Samples {
  std::vector<float> gaussian, heavy, heavy_rotated;
};

// Made here rather than by std::normal_distribution, whose numbers are the library's choice: the
// table is the same everywhere.
Samples make_samples() {
  std::mt19937 rng(1);
  const auto uniform = [&] { return (rng() + 0.5) * 0x1p-32; };
  const auto normal = [&] {
    const double radius = std::sqrt(-2.0 * std::log(uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  };
  Samples s;
  for (int64_t i = 0; i < kRows * kDim; ++i) {
    s.gaussian.push_back(static_cast<float>(normal()));
    const double a = normal(), b = normal(), c = normal();
    s.heavy.push_back(static_cast<float>(normal() / std::sqrt((a * a + b * b + c * c) / 3)));
  }
  s.heavy_rotated = s.heavy;
  hadamard_rows(s.heavy_rotated.data(), kRows, kDim, kDim);
  return s;
}

// "" for a format without scales.
std::string group_of(const FormatInfo& info) {
  if (info.group == kGroupRow) return "row";
  return info.group == 0 ? "" : fmt::format("{}", info.group);
}

// The one list of keys, in order; JSON and CSV are made of it.
ordered_json row_json(const FormatInfo& info, const Samples& samples) {
  ordered_json aliases = ordered_json::array();
  for (const std::string_view alias : info.aliases) {
    if (!alias.empty()) aliases.push_back(std::string(alias));
  }
  const auto error = [&](const std::vector<float>& x) {
    return relative_rms_error(info.format, x, kDim);
  };
  return {
      {"format", std::string(info.name)},
      {"aliases", aliases},
      {"bits_per_element", info.bits_per_element(kDim)},
      {"bits_per_code", info.bits_per_code},
      {"planes", info.planes},
      {"group", group_of(info)},
      {"scale", std::string(info.scale_format)},
      {"code_min", info.code_min},
      {"code_max", info.code_max},
      {"range_max", info.range_max},
      {"layered", is_layered(info.format)},
      {"rms_gaussian", error(samples.gaussian)},
      {"rms_student_t3", error(samples.heavy)},
      {"rms_student_t3_rotated",
       is_layered(info.format) ? ordered_json(error(samples.heavy_rotated)) : ordered_json()},
      {"rounding", std::string(info.rounding)},
      {"byte_map", std::string(info.byte_map)},
  };
}

std::string to_json(const std::vector<ordered_json>& rows) {
  const ordered_json all = {
      {"page_format_version", kPageFormatVersion}, {"head_dim", kDim}, {"formats", rows}};
  return all.dump(2) + "\n";
}

std::string csv_cell(const ordered_json& value) {
  if (value.is_null()) return {};
  std::string text = value.is_string() ? value.get<std::string>() : value.dump();
  if (value.is_array()) {
    text.clear();
    for (const auto& item : value) text += (text.empty() ? "" : " ") + item.get<std::string>();
  }
  return text.find(',') == std::string::npos ? text : '"' + text + '"';
}

std::string to_csv(const std::vector<ordered_json>& rows) {
  std::string out = "page_format_version";
  for (const auto& item : rows.front().items()) out += "," + item.key();
  for (const ordered_json& row : rows) {
    out += fmt::format("\n{}", kPageFormatVersion);
    for (const auto& item : row.items()) out += "," + csv_cell(item.value());
  }
  return out + "\n";
}

// Ranges span three hundred decades: three digits, an exponent where it is shorter.
std::string number(const ordered_json& value) {
  return value.is_null() ? "-" : fmt::format("{:.3g}", value.get<double>());
}

std::string percent(const ordered_json& value) {
  if (value.is_null()) return "-";
  const double x = 100 * value.get<double>();
  return x == 0 ? "0" : fmt::format("{:.{}f}", x, x < 0.1 ? 3 : 2);
}

std::string to_table(const std::vector<ordered_json>& rows) {
  std::vector<std::vector<std::string>> lines = {
      {"format", "aliases", "bits", "codes", "|x| up to", "group", "normal", "t3", "rotated",
       "scale"},
      {"", "", "/element", "", "", "", "error %", "error %", "t3 %", ""}};
  for (const ordered_json& row : rows) {
    const std::string group = row["group"];
    lines.push_back({row["format"], csv_cell(row["aliases"]), number(row["bits_per_element"]),
                     number(row["code_min"]) + " .. " + number(row["code_max"]),
                     number(row["range_max"]), group.empty() ? "-" : group,
                     percent(row["rms_gaussian"]), percent(row["rms_student_t3"]),
                     percent(row["rms_student_t3_rotated"]), row["scale"]});
  }
  std::vector<size_t> widths(lines[0].size());
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  std::string out = fmt::format("page format version {}; bits and errors for head_dim {}\n\n",
                                kPageFormatVersion, kDim);
  for (const auto& line : lines) {
    std::string text;
    for (size_t i = 0; i < line.size(); ++i) {
      const bool is_text = i < 2 || i + 1 == line.size();
      text += is_text ? fmt::format("{:<{}}  ", line[i], widths[i])
                      : fmt::format("{:>{}}  ", line[i], widths[i]);
    }
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
  }
  return out;
}

void formats(const std::string& output) {
  const Samples samples = make_samples();
  std::vector<ordered_json> rows;
  for (const FormatInfo& info : kFormats) rows.push_back(row_json(info, samples));
  print(output == "json" ? to_json(rows) : output == "csv" ? to_csv(rows) : to_table(rows));
}

}  // namespace

void add_formats_command(CLI::App& app) {
  auto output = std::make_shared<std::string>("table");
  CLI::App* cmd = app.add_subcommand(
      "formats", "List the storage formats: bits, ranges, scales and measured errors");
  cmd->footer(kFooter);
  cmd->add_option("-o,--output", *output, "table, json or csv")
      ->check(CLI::IsMember({"table", "json", "csv"}))
      ->capture_default_str()
      ->type_name("FORM");
  cmd->callback([output] { formats(*output); });
}

}  // namespace thriftattn::cli
