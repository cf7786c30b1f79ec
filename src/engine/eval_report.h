// Writes what evaluate() found: JSON and CSV with exactly the keys that other tools read, and a
// table for people.
#pragma once

#include <span>
#include <string>

#include "engine/eval.h"

namespace thriftattn {

enum class ReportFormat { table, json, csv };

// Ends with a line break.
std::string format_report(std::span<const EvalRow> rows, ReportFormat format);

// "1.5 KiB", "12.3 MiB": three or four digits.
std::string human_bytes(int64_t bytes);

}  // namespace thriftattn
