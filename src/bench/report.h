// Rows of a benchmark as a table, JSON (one array of objects), CSV, or Markdown.
#pragma once

#include <span>
#include <string>

#include "bench/bench.h"

namespace thriftattn::bench {

enum class ReportForm : uint8_t { table, json, csv, markdown };

std::string format_rows(std::span<const BenchRow> rows, ReportForm form);

}  // namespace thriftattn::bench
