// The commands of `thriftattn`. Each adds its subcommand to the application; the work is done in
// the callback that CLI11 calls once the command line is complete.
#pragma once

#include <CLI/CLI.hpp>

namespace thriftattn::cli {

void add_run_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_calibrate_command(CLI::App& app);
void add_policies_command(CLI::App& app);
void add_formats_command(CLI::App& app);
void add_bench_command(CLI::App& app);

// The whole program: parses, runs, prints; returns the exit code.
int run_program(int argc, const char* const* argv);

}  // namespace thriftattn::cli
