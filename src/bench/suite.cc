// Which runs the suite has, and its Markdown (suite.h).
#include "bench/suite.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "bench/report.h"
#include "thriftattn/error.h"

namespace thriftattn::bench {
namespace {

std::vector<BenchEntry> entries(const std::vector<std::string>& policies) {
  std::vector<BenchEntry> all;
  for (const std::string& policy : policies) all.push_back({.policy = parse_policy(policy)});
  return all;
}

// A multiple of a page, so that every divided context is one too.
int64_t tokens(int64_t full, int64_t divide) {
  return std::max<int64_t>(64, full / divide / 64 * 64);
}

SuitePart decode(const std::string& title, int64_t q_heads, int64_t divide) {
  BenchSpec spec{.ctx = tokens(131072, divide), .q_heads = q_heads};
  spec.entries = entries({"exact", "q8_0", "fp8", "q4_0", "thrifty"});
  // Whole pages, at least one: a divided suite has few.
  const double pages = static_cast<double>((spec.ctx - 1) / 64);
  const double promoted = std::max(1.0, std::round(0.04 * pages)) / pages;
  const Policy balanced = parse_policy("balanced");
  spec.entries.push_back({.policy = balanced, .promoted = promoted});
  spec.entries.push_back({.policy = balanced, .promoted = promoted, .skipped = 0.5});
  return {title, {spec}};
}

}  // namespace

std::vector<SuitePart> suite_parts(int64_t divide) {
  std::vector<SuitePart> parts;
  parts.push_back(decode("Decode, 32/8 heads", 32, divide));
  parts.push_back(decode("Decode, 64/8 heads", 64, divide));
  SuitePart growth{"Decode, growing context", {}};
  for (const int64_t ctx : {8192, 32768, 131072, 524288, 1048576}) {
    // Above 850 K tokens four heads cannot hold every page above `skip`, so nothing may be
    // skipped by the policy at any length.
    growth.runs.push_back(
        {.ctx = tokens(ctx, divide), .entries = entries({"exact", "thrifty,skip=0"})});
  }
  parts.push_back(growth);
  const int64_t chunk = std::max<int64_t>(1, 512 / divide);
  parts.push_back({"Prefill over cached pages",
                   {{.op = BenchOp::prefill,
                     .ctx = tokens(4096, divide),
                     .queries = chunk,
                     .entries = entries({"exact", "thrifty"})}}});
  parts.push_back(
      {"Append",
       {{.op = BenchOp::append,
         .ctx = tokens(4096, divide),
         .queries = std::max<int64_t>(64, chunk),
         .entries = entries({"exact", "q8_0", "fp8", "q4_0", "thrifty", "balanced"})}}});
  return parts;
}

SuiteResult run_suite(Bench& bench, int64_t divide) {
  SuiteResult result;
  for (const SuitePart& part : suite_parts(divide)) {
    std::vector<BenchRow> rows;
    std::string notes;
    for (const BenchSpec& spec : part.runs) {
      try {
        for (BenchRow& row : bench.run(spec)) rows.push_back(std::move(row));
      } catch (const Error& error) {
        if (error.code() != ErrorCode::out_of_memory) throw;
        notes += fmt::format("\nLeft out, {} of {} tokens: {}\n", to_string(spec.op), spec.ctx,
                             error.what());
      }
    }
    result.markdown +=
        fmt::format("\n## {}\n\n{}{}", part.title,
                    rows.empty() ? "" : format_rows(rows, ReportForm::markdown), notes);
    result.rows.insert(result.rows.end(), rows.begin(), rows.end());
  }
  result.markdown = "Machine: " + bench.machine() + ".\n" + result.markdown;
  return result;
}

}  // namespace thriftattn::bench
