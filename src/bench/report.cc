// Formatting rows (report.h).
#include "bench/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

namespace thriftattn::bench {
namespace {

using nlohmann::ordered_json;

ordered_json optional_json(const std::optional<double>& x) {
  return x ? ordered_json(*x) : ordered_json(nullptr);
}

ordered_json row_json(const BenchRow& r) {
  ordered_json j;
  j["op"] = r.op;
  j["backend"] = r.backend;
  j["policy"] = r.policy;
  j["ctx"] = r.ctx;
  j["batch"] = r.batch;
  j["q_heads"] = r.q_heads;
  j["kv_heads"] = r.kv_heads;
  j["head_dim"] = r.head_dim;
  j["threads"] = r.threads ? ordered_json(*r.threads) : ordered_json(nullptr);
  j["ms_min"] = r.ms_min;
  j["ms_median"] = r.ms_median;
  j["bytes_read"] = std::llround(r.bytes_read);
  j["gb_s"] = r.gb_s;
  j["peak_gb_s"] = r.peak_gb_s;
  j["fraction_of_peak"] = optional_json(r.fraction_of_peak);
  j["gflops"] = optional_json(r.gflops);
  j["ms_bf16"] = r.ms_bf16;
  j["speedup_vs_bf16"] = r.speedup_vs_bf16;
  j["byte_ratio_ceiling"] = optional_json(r.byte_ratio_ceiling);
  j["promoted_fraction"] = optional_json(r.promoted_fraction);
  j["skipped_fraction"] = optional_json(r.skipped_fraction);
  j["promote_ms"] = optional_json(r.promote_ms);
  return j;
}

std::string to_json(std::span<const BenchRow> rows) {
  ordered_json all = ordered_json::array();
  for (const BenchRow& row : rows) all.push_back(row_json(row));
  return all.dump(2) + "\n";
}

std::string csv_cell(const ordered_json& value) {
  if (value.is_null()) return "";
  if (!value.is_string()) return value.dump();
  const auto text = value.get<std::string>();
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

std::string to_csv(std::span<const BenchRow> rows) {
  std::string out;
  const ordered_json names = row_json({});
  for (const auto& item : names.items()) out += (out.empty() ? "" : ",") + item.key();
  out += "\n";
  for (const BenchRow& row : rows) {
    const ordered_json values = row_json(row);
    std::string line;
    for (const auto& item : values.items()) {
      if (item.key() != "op") line += ",";
      line += csv_cell(item.value());
    }
    out += line + "\n";
  }
  return out;
}

std::string number(double x, int digits) { return fmt::format("{:.{}f}", x, digits); }
std::string milliseconds(double x) { return number(x, std::fabs(x) < 10 ? 3 : 2); }
std::string or_dash(const std::optional<double>& x, std::string (*cell)(double)) {
  return x ? cell(*x) : "-";
}
std::string percent(double x) { return fmt::format("{:.1f} %", 100 * x); }

struct Column {
  const char* head;
  std::string (*cell)(const BenchRow&);
};

constexpr Column kColumns[] = {
    {"op", [](const BenchRow& r) { return r.op; }},
    {"policy", [](const BenchRow& r) { return r.policy; }},
    {"tokens",
     [](const BenchRow& r) {
       const std::string one =
           r.queries > 1 ? fmt::format("{} on {}", r.queries, r.ctx) : fmt::to_string(r.ctx);
       return r.batch > 1 ? fmt::format("{} x {}", r.batch, one) : one;
     }},
    {"heads", [](const BenchRow& r) { return fmt::format("{}/{}", r.q_heads, r.kv_heads); }},
    {"D", [](const BenchRow& r) { return fmt::to_string(r.head_dim); }},
    {"ms min", [](const BenchRow& r) { return milliseconds(r.ms_min); }},
    {"ms", [](const BenchRow& r) { return milliseconds(r.ms_median); }},
    {"MB read", [](const BenchRow& r) { return number(r.bytes_read * 1e-6, 1); }},
    {"GB/s", [](const BenchRow& r) { return number(r.gb_s, 1); }},
    {"peak", [](const BenchRow& r) { return number(r.peak_gb_s, 1); }},
    {"GFLOP/s",
     [](const BenchRow& r) { return or_dash(r.gflops, [](double x) { return number(x, 1); }); }},
    {"peak",
     [](const BenchRow& r) {
       return or_dash(r.peak_gflops, [](double x) { return number(x, 0); });
     }},
    {"of peak", [](const BenchRow& r) { return or_dash(r.fraction_of_peak, percent); }},
    {"M elem/s",
     [](const BenchRow& r) {
       return or_dash(r.elements_per_s, [](double x) { return number(x * 1e-6, 1); });
     }},
    {"vs BF16", [](const BenchRow& r) { return number(r.speedup_vs_bf16, 2); }},
    {"ceiling",
     [](const BenchRow& r) {
       return or_dash(r.byte_ratio_ceiling, [](double x) { return number(x, 2); });
     }},
    {"promoted", [](const BenchRow& r) { return or_dash(r.promoted_fraction, percent); }},
    {"adds ms", [](const BenchRow& r) { return or_dash(r.promote_ms, milliseconds); }},
    {"skipped", [](const BenchRow& r) { return or_dash(r.skipped_fraction, percent); }},
    {"saves ms", [](const BenchRow& r) { return or_dash(r.skip_saves_ms, milliseconds); }},
};

// A column in which no row has a value is left out.
std::vector<std::vector<std::string>> cells_of(std::span<const BenchRow> rows) {
  std::vector<std::vector<std::string>> lines(rows.size() + 1);
  for (const Column& column : kColumns) {
    std::vector<std::string> cells;
    for (const BenchRow& row : rows) cells.push_back(column.cell(row));
    if (!cells.empty() && std::all_of(cells.begin(), cells.end(),
                                      [](const std::string& cell) { return cell == "-"; })) {
      continue;
    }
    lines[0].push_back(column.head);
    for (size_t i = 0; i < rows.size(); ++i) lines[i + 1].push_back(cells[i]);
  }
  return lines;
}

std::string to_table(std::span<const BenchRow> rows, bool markdown) {
  const auto lines = cells_of(rows);
  constexpr size_t kLeft = 2;  // columns of words
  std::vector<size_t> widths(lines[0].size());
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  std::string out;
  const char* between = markdown ? " | " : "  ";
  for (size_t l = 0; l < lines.size(); ++l) {
    std::string text, rule;
    for (size_t i = 0; i < widths.size(); ++i) {
      text += i > 0 ? between : "";
      text += i < kLeft ? fmt::format("{:<{}}", lines[l][i], widths[i])
                        : fmt::format("{:>{}}", lines[l][i], widths[i]);
      rule += (i > 0 ? "|" : "") + std::string(i < kLeft ? "---" : "--:");
    }
    if (markdown) {
      out += "| " + text + " |\n";
      if (l == 0) out += "|" + rule + "|\n";
      continue;
    }
    const size_t width = text.size();
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
    if (l == 0) out += std::string(width, '-') + "\n";
  }
  return out;
}

}  // namespace

std::string format_rows(std::span<const BenchRow> rows, ReportForm form) {
  switch (form) {
    case ReportForm::json:
      return to_json(rows);
    case ReportForm::csv:
      return to_csv(rows);
    case ReportForm::markdown:
      return to_table(rows, true);
    case ReportForm::table:
      break;
  }
  return to_table(rows, false);
}

}  // namespace thriftattn::bench
