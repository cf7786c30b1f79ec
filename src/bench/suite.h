// The runs behind docs/performance-cpu.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bench/bench.h"

namespace thriftattn::bench {

struct SuitePart {
  std::string title;
  std::vector<BenchSpec> runs;
};

// Contexts and chunks divided by `divide`, for a quick look: 1 is the suite.
std::vector<SuitePart> suite_parts(int64_t divide);

struct SuiteResult {
  std::vector<BenchRow> rows;
  std::string markdown;  // machine, a table for each part, notes
};

// Parts that do not fit the memory are left out with a note.
SuiteResult run_suite(Bench& bench, int64_t divide);

}  // namespace thriftattn::bench
