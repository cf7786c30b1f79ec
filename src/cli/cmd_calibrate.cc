// `thriftattn calibrate`: measures the equaliser of a model and keeps it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>

#include "cli/commands.h"
#include "cli/common.h"

namespace thriftattn::cli {
namespace {

struct CalibrateArgs {
  ModelArgs model;
  bool force = false;
  std::string folder;
};

constexpr const char* kFooter = R"(
'run' and 'eval' measure the equaliser by themselves when there is none yet. The file lies in
$XDG_CACHE_HOME/thriftattn or ~/.cache/thriftattn, under the hash of the model.

Examples:
  thriftattn calibrate -m model.gguf
  thriftattn calibrate -m model.gguf --force)";

void calibrate(const CalibrateArgs& args) {
  const ThreadLimit threads(args.model.threads);
  const auto model = Model::load(args.model.path, {.compute = ComputeType::f32});
  const EqualizerResult result =
      load_or_measure_equalizer(*model, {.cache_folder = args.folder, .force = args.force});
  std::string text =
      fmt::format("{}: equaliser {}", one_line(model->config().name),
                  result.measured ? "measured" : "already there (--force measures again)");
  if (!result.path.empty()) text += fmt::format(", {}", result.path);
  if (!result.note.empty()) text += fmt::format("; {}", result.note);
  text += "\n";
  for (size_t i = 0; i < result.equalizer.layers.size(); ++i) {
    const auto& s = result.equalizer.layers[i];
    if (s.empty()) continue;
    const auto [low, high] = std::minmax_element(s.begin(), s.end());
    text += fmt::format("layer {:>3}: scales {:.3f} to {:.3f}\n", i, *low, *high);
  }
  print(text);
}

}  // namespace

void add_calibrate_command(CLI::App& app) {
  auto args = std::make_shared<CalibrateArgs>();
  CLI::App* cmd =
      app.add_subcommand("calibrate", "Measure the K equaliser of a model, once, and keep it");
  cmd->footer(kFooter);
  add_model_option(*cmd, args->model);
  cmd->add_flag("--force", args->force, "Measure even if there is one");
  cmd->add_option("--cache-folder", args->folder, "Keep it here instead of the user's cache")
      ->type_name("DIR");
  add_threads_option(*cmd, args->model);
  cmd->callback([args] { calibrate(*args); });
}

}  // namespace thriftattn::cli
