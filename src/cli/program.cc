// The program around the commands: options, help, version, errors of the command line.
#include <fmt/format.h>

#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/version_text.h"

namespace thriftattn::cli {
namespace {

constexpr const char* kFooter = R"(
Examples:
  thriftattn run -m model.gguf -f report.txt -p "What was decided?" --policy balanced
  thriftattn eval -m model.gguf -f book.txt -c 8192 --policies exact,fp8,thrifty,balanced
  thriftattn policies

'thriftattn COMMAND --help' has all options and more examples.)";

// llama.cpp's names with one dash and several letters, which CLI11 would take apart.
std::string with_two_dashes(const std::string& argument) {
  if (argument == "-ctk") return "--cache-type-k";
  if (argument == "-ctv") return "--cache-type-v";
  if (argument == "-cnv") return "--conversation";
  return argument;
}

// The command whose --help helps.
std::string command_of(const CLI::App& app) {
  for (const CLI::App* command : app.get_subcommands()) return " " + command->get_name();
  return {};
}

}  // namespace

int run_program(int argc, const char* const* argv) {
  int exit_code = 0;
  const int failed = guarded([&] {
    CLI::App app{
        "ThriftAttention: long-context language models with a 4-bit KV cache that spends "
        "precision where the attention is.",
        "thriftattn"};
    app.footer(kFooter);
    // Not require_subcommand(1), whose message would hide a misspelt command.
    app.require_subcommand(0, 1);
    app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    app.set_version_flag("--version", version_text);
    add_run_command(app);
    add_eval_command(app);
    add_calibrate_command(app);
    add_policies_command(app);
    add_formats_command(app);
    add_bench_command(app);

    std::vector<std::string> arguments;  // CLI11 takes them last first
    for (int i = argc - 1; i > 0; --i) arguments.push_back(with_two_dashes(argv[i]));
    try {
      app.parse(arguments);
      if (app.get_subcommands().empty()) {
        throw UsageError(
            "no command: give run, eval, bench, calibrate, policies or formats; see 'thriftattn --help'");
      }
    } catch (const CLI::Success& success) {  // --help, --version
      exit_code = app.exit(success);
    } catch (const CLI::ParseError& error) {
      throw UsageError(
          fmt::format("{}; see 'thriftattn{} --help'", one_line(error.what()), command_of(app)));
    }
  });
  return failed != 0 ? failed : exit_code;
}

}  // namespace thriftattn::cli
