// `thriftattn eval`: measures policies against a reference on the same text.
#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/progress.h"
#include "engine/eval.h"
#include "engine/eval_report.h"
#include "policy/policy_list.h"
#include "thriftattn/error.h"

namespace thriftattn::cli {
namespace {

struct EvalArgs {
  ModelArgs model;
  std::string file;
  std::string policies = "exact,fp8,thrifty,balanced";
  std::string reference = "f32";
  int64_t context = 0;
  int64_t needles = 0;
  uint64_t seed = 0;
  int64_t chunk = 512;
  int64_t max_kv_bytes = 0;
  std::string output = "table";
  std::string save;
};

constexpr const char* kFooter = R"(
Examples:
  thriftattn eval -m model.gguf -f book.txt -c 8192
  thriftattn eval -m model.gguf -f book.txt -c 16384 --needles 16 --policies exact,balanced,swift
  thriftattn eval -m model.gguf -f book.txt -c 4096 -o json \
      --policies 'balanced;balanced,promote=0.05;first:2:bf16,2-27:nvfp4'

Every token attends as it would when decoded; the last half of the context is scored, with dense
layers in FP32. KL is KL(reference || policy) per token in nats. Policies are separated by ';',
or by ',' before a preset's name. 'stored' and 'read' are bits per K/V element with all scales,
means and tables counted; BF16 has 16. 'needles' is the share of hidden facts that are found.
docs/eval.md says how each figure is made.)";

// What was asked and not found, a line each: recall alone does not say whether a policy lost a fact
// or the model never had it.
void print_missed(const std::vector<EvalRow>& rows) {
  for (const EvalRow& row : rows) {
    for (const NeedleMiss& miss : row.missed) {
      std::fprintf(stderr, "missed under %s: %s at depth %.2f is %s, answered '%s'\n",
                   row.policy.c_str(), miss.name.c_str(), miss.depth, miss.expected.c_str(),
                   one_line(miss.answer).c_str());
    }
  }
}

void eval(const EvalArgs& args) {
  std::vector<Policy> policies;
  for (const std::string& text : split_policy_list(args.policies)) {
    policies.push_back(policy_from_option("--policies", text));
  }
  const Policy reference = policy_from_option("--reference", args.reference);
  const ThreadLimit threads(args.model.threads);
  const OpenedModel opened = open_model(args.model);
  const int64_t context = checked_context(args.context, opened.config);
  for (const Policy& policy : policies) resolve(policy, policy_context(opened.config, context));
  std::vector<int32_t> tokens = opened.tokenizer->encode(read_text(args.file));
  const auto have = static_cast<int64_t>(tokens.size());
  if (have < context) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("'{}' has {} tokens and a context of {} needs as many: use a longer "
                            "text or -c {}",
                            one_line(args.file), have, context, have));
  }
  tokens.resize(static_cast<size_t>(context));

  // FP32, because BF16 activations alone would hide what is measured.
  const bool on_device = args.model.on_device();
  const auto model = Model::load(
      opened.file, {.compute = on_device ? ComputeType::stored : ComputeType::f32,
                    .rope = rope_override(args.model.rope)});
  const auto device = on_device ? DeviceEngine::load(model, ComputeType::f32) : nullptr;
  std::vector<Policy> all = policies;
  all.push_back(reference);
  EqualizerChoice equalizer = choose_equalizer(*model, args.model, all);
  std::vector<EvalRow> rows;
  {
    Progress progress;
    rows = evaluate(model, tokens,
                    {.context = context,
                     .policies = policies,
                     .reference = reference,
                     .needles = args.needles,
                     .seed = args.seed,
                     .chunk = args.chunk,
                     .max_kv_bytes = args.max_kv_bytes,
                     .equalizer = std::move(equalizer.equalizer),
                     .device = device,
                     .codec = text_codec(*opened.tokenizer),
                     .needle_prefix = opened.tokenizer->adds_bos() ? 1 : 0,
                     .progress = [&](const EvalProgress& p) {
                       std::string label(p.stage);
                       if (!p.policy.empty()) label += " under " + std::string(p.policy);
                       progress.update(label, p.done, p.total);
                     }});
  }
  if (!args.save.empty()) write_text(args.save, format_report(rows, ReportFormat::json));
  if (args.output == "table") {
    std::fprintf(stderr, "%s: %s tokens of %s, %s scored, reference %s, equaliser %s\n",
                 one_line(opened.config.name).c_str(), fmt::to_string(context).c_str(),
                 one_line(args.file).c_str(),
                 fmt::to_string(rows.front().quality.positions).c_str(), reference.name.c_str(),
                 equalizer.note.c_str());
    if (device != nullptr) std::fprintf(stderr, "device: %s\n", device->explain_device().c_str());
  }
  print_missed(rows);
  print(format_report(rows, args.output == "json"  ? ReportFormat::json
                            : args.output == "csv" ? ReportFormat::csv
                                                   : ReportFormat::table));
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto args = std::make_shared<EvalArgs>();
  CLI::App* cmd = app.add_subcommand(
      "eval", "Measure quality, memory and speed of policies against a reference");
  cmd->footer(kFooter);
  add_model_option(*cmd, args->model);
  cmd->add_option("-f,--file", args->file, "Text, at least as long as the context")
      ->required()
      ->type_name("FILE");
  cmd->add_option("-c,--ctx-size", args->context, "Context in tokens; 0 takes the model's")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--policies", args->policies, "Policies to compare")
      ->capture_default_str()
      ->type_name("LIST");
  cmd->add_option("--reference", args->reference, "Policy that counts as the truth")
      ->capture_default_str()
      ->type_name("POLICY");
  cmd->add_option("--needles", args->needles, "Facts to hide in the text and ask for, at most 256")
      ->check(CLI::Range(0, 256))
      ->capture_default_str()
      ->type_name("K");
  cmd->add_option("-s,--seed", args->seed, "Seed of the facts")
      ->capture_default_str()
      ->type_name("N");
  add_threads_option(*cmd, args->model);
  cmd->add_option("--chunk", args->chunk, "Tokens of a step")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--kv-memory,--max-kv", args->max_kv_bytes,
                  "Bytes that each cache may take, such as 2GB; 0 sets no limit")
      ->transform(CLI::AsSizeValue(false))
      ->type_name("SIZE");
  add_equalize_option(*cmd, args->model);
  add_rope_options(*cmd, args->model);
  add_device_option(*cmd, args->model.device);
  cmd->add_option("-o,--output", args->output, "table, json (one array) or csv")
      ->check(CLI::IsMember({"table", "json", "csv"}))
      ->capture_default_str()
      ->type_name("FORM");
  cmd->add_option("--save", args->save, "Write the JSON to this file too")->type_name("FILE");
  cmd->callback([args] {
    require_device(args->model.device);
    eval(*args);
  });
}

}  // namespace thriftattn::cli
