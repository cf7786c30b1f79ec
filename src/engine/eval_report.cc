// JSON, CSV and the table of evaluations (eval_report.h).
#include "engine/eval_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace thriftattn {
namespace {

using nlohmann::ordered_json;

// The one list of keys, in order; JSON and CSV are made of it.
ordered_json row_json(const EvalRow& row) {
  const MetricsSummary& q = row.quality;
  return {
      {"policy", row.policy},
      {"tokens", row.tokens},
      {"kl_mean", q.kl_mean},
      {"kl_p99", q.kl_p99},
      {"kl_p999", q.kl_p999},
      {"delta_nll", q.delta_nll},
      {"perplexity", q.perplexity},
      {"top1_agreement", q.top1_agreement},
      {"needle_recall", row.needle_recall ? ordered_json(*row.needle_recall) : ordered_json()},
      {"bits_stored_per_element", row.bits_stored_per_element},
      {"bits_read_per_element", row.bits_read_per_element},
      {"promoted_fraction", row.promoted_fraction},
      {"skipped_fraction", row.skipped_fraction},
      {"kv_bytes", row.kv_bytes},
      {"kv_bytes_bf16", row.kv_bytes_bf16},
      {"seconds", row.seconds},
  };
}

std::string to_json(std::span<const EvalRow> rows) {
  ordered_json all = ordered_json::array();
  for (const EvalRow& row : rows) all.push_back(row_json(row));
  return all.dump(2) + "\n";
}

std::string csv_cell(const ordered_json& value) {
  if (value.is_null()) return {};
  if (!value.is_string()) return value.dump();
  const auto& text = value.get_ref<const std::string&>();
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted.append(c == '"' ? 2 : 1, c);
  quoted += '"';
  return quoted;
}

std::string to_csv(std::span<const EvalRow> rows) {
  std::string out;
  const ordered_json empty = row_json({});  // items() refers to it
  for (const auto& item : empty.items()) out += (out.empty() ? "" : ",") + item.key();
  out += "\n";
  for (const EvalRow& row : rows) {
    std::string line;
    const ordered_json values = row_json(row);
    for (const auto& item : values.items()) {
      if (item.key() != "policy") line += ",";
      line += csv_cell(item.value());
    }
    out += line + "\n";
  }
  return out;
}

std::string percent(double fraction) { return fmt::format("{:.1f} %", 100 * fraction); }

// KL spans seven decades: two significant digits, without an exponent where that is readable.
std::string small(double x) {
  if (x == 0) return "0";
  const double size = std::abs(x);
  if (size < 1e-7) return fmt::format("{:.1e}", x);
  const int exponent = static_cast<int>(std::floor(std::log10(size)));
  return fmt::format("{:.{}f}", x, std::clamp(1 - exponent, 1, 8));
}

struct Column {
  const char* head;
  const char* unit;
  std::string (*cell)(const EvalRow&);
};

constexpr Column kColumns[] = {
    {"policy", "", [](const EvalRow& r) { return r.policy; }},
    {"KL mean", "nats", [](const EvalRow& r) { return small(r.quality.kl_mean); }},
    {"KL 99 %", "", [](const EvalRow& r) { return small(r.quality.kl_p99); }},
    {"KL 99.9 %", "", [](const EvalRow& r) { return small(r.quality.kl_p999); }},
    {"dNLL", "nats",
     [](const EvalRow& r) {
       return fmt::format("{}{}", r.quality.delta_nll > 0 ? "+" : "", small(r.quality.delta_nll));
     }},
    {"PPL", "", [](const EvalRow& r) { return fmt::format("{:.3f}", r.quality.perplexity); }},
    {"top-1", "", [](const EvalRow& r) { return percent(r.quality.top1_agreement); }},
    {"needles", "found",
     [](const EvalRow& r) { return r.needle_recall ? percent(*r.needle_recall) : "-"; }},
    {"stored", "bits",
     [](const EvalRow& r) { return fmt::format("{:.2f}", r.bits_stored_per_element); }},
    {"read", "bits",
     [](const EvalRow& r) { return fmt::format("{:.2f}", r.bits_read_per_element); }},
    {"promoted", "", [](const EvalRow& r) { return percent(r.promoted_fraction); }},
    {"skipped", "", [](const EvalRow& r) { return percent(r.skipped_fraction); }},
    {"KV held", "", [](const EvalRow& r) { return human_bytes(r.kv_bytes); }},
    {"of BF16", "",
     [](const EvalRow& r) {
       return percent(static_cast<double>(r.kv_bytes) / static_cast<double>(r.kv_bytes_bf16));
     }},
    {"time", "s", [](const EvalRow& r) { return fmt::format("{:.1f}", r.seconds); }},
};

std::string to_table(std::span<const EvalRow> rows) {
  std::vector<std::vector<std::string>> lines(2);
  for (const Column& c : kColumns) {
    lines[0].push_back(c.head);
    lines[1].push_back(c.unit);
  }
  for (const EvalRow& row : rows) {
    auto& line = lines.emplace_back();
    for (const Column& c : kColumns) line.push_back(c.cell(row));
  }
  std::vector<size_t> widths(std::size(kColumns));
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  std::string out;
  for (size_t l = 0; l < lines.size(); ++l) {
    std::string text = fmt::format("{:<{}}", lines[l][0], widths[0]);
    for (size_t i = 1; i < lines[l].size(); ++i) {
      text += fmt::format("  {:>{}}", lines[l][i], widths[i]);
    }
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
    if (l == 1) {
      size_t total = 0;
      for (const size_t w : widths) total += w + 2;
      out += std::string(total - 2, '-') + "\n";
    }
  }
  return out;
}

}  // namespace

std::string human_bytes(int64_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1000 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  if (unit == 0) return fmt::format("{} B", bytes);
  return fmt::format("{:.{}f} {}", value, value < 10 ? 2 : value < 100 ? 1 : 0, kUnits[unit]);
}

std::string format_report(std::span<const EvalRow> rows, ReportFormat format) {
  switch (format) {
    case ReportFormat::json:
      return to_json(rows);
    case ReportFormat::csv:
      return to_csv(rows);
    case ReportFormat::table:
      break;
  }
  return to_table(rows);
}

}  // namespace thriftattn
