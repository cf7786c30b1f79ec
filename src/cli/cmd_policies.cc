// `thriftattn policies`: lists the presets, or says what a policy really does.
#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/common.h"
#include "policy/policy_list.h"

namespace thriftattn::cli {
namespace {

struct PoliciesArgs {
  std::string model;
  std::vector<std::string> policies;
  std::string output = "text";
};

// Without a model: enough layers for any selector in an example.
constexpr int64_t kExampleLayers = 32;

constexpr const char* kFooter = R"(
Examples:
  thriftattn policies
  thriftattn policies 'balanced,promote=0.05' -m model.gguf
  thriftattn policies balanced -o json > mine.json       # edit, then --policy @mine.json)";

void policies(const PoliciesArgs& args) {
  std::vector<Policy> all;
  for (const std::string& text : args.policies) {
    for (const std::string& one : split_policy_list(text)) {
      all.push_back(policy_from_option("POLICY", one));
    }
  }
  if (args.policies.empty()) {
    for (const std::string& name : preset_names()) all.push_back(preset(name));
  }
  if (args.output == "json") {
    std::string text;
    for (const Policy& policy : all) text += policy_to_json(policy) + "\n";
    print(text);
    return;
  }
  PolicyContext context;
  context.layers = kExampleLayers;
  if (!args.model.empty()) {
    context = policy_context(read_model_config(GgufFile::open(args.model)));
  }
  std::string text;
  for (const Policy& policy : all) {
    std::string what = explain(resolve(policy, context));
    while (what.ends_with('\n')) what.pop_back();
    text += fmt::format("{}\n  ", policy.name);
    for (const char c : what) text += c == '\n' ? std::string("\n  ") : std::string(1, c);
    text += "\n";
  }
  print(text);
}

}  // namespace

void add_policies_command(CLI::App& app) {
  auto args = std::make_shared<PoliciesArgs>();
  CLI::App* cmd =
      app.add_subcommand("policies", "List the presets, or say what a policy really does");
  cmd->footer(kFooter);
  cmd->add_option("POLICY", args->policies, "Policies to explain; all presets if none is named")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  cmd->add_option("-m,--model", args->model, "Explain for the layers of this model")
      ->type_name("FILE");
  cmd->add_option("-o,--output", args->output, "text or json")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str()
      ->type_name("FORM");
  cmd->callback([args] { policies(*args); });
}

}  // namespace thriftattn::cli
