// `thriftattn run`: answers a question about a document.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/progress.h"
#include "cli/run_report.h"
#include "cli/utf8_stream.h"
#include "engine/chat_template.h"
#include "engine/sampler.h"
#include "engine/session.h"
#include "thriftattn/error.h"

namespace thriftattn::cli {
namespace {

struct RunArgs {
  ModelArgs model;
  std::string file, prompt;
  std::string policy = "balanced";
  std::string type_k, type_v;
  int64_t context = 0;
  int64_t predict = 128;
  int64_t chunk = 512;
  int64_t max_kv_bytes = 0;
  SamplerOptions sampling;
  std::string compute = "auto";
  std::string output = "text";
  bool raw = false;
};

constexpr const char* kFooter = R"(
Examples:
  thriftattn run -m model.gguf -f report.txt -p "What was decided?"
  thriftattn run -m model.gguf -f report.txt -p "List the risks." --policy thrifty -n 300
  thriftattn run -m model.gguf -f report.txt -p "Who signed?" -ctk q8_0 -ctv q8_0 -o json
  cat notes.txt | thriftattn run -m model.gguf -f - -p "Summarise." --temp 0.7 --top-p 0.9 -s 1

The answer goes to standard output, everything else to standard error. A policy is a preset,
a preset with changes ('balanced,promote=0.05'), layers with formats ('0-3:fp8,4-35:nvfp4'),
JSON, or @FILE; 'thriftattn policies' lists the presets.)";

// The one policy that --policy, -ctk and -ctv ask for together.
Policy policy_of(const RunArgs& args, bool policy_given) {
  std::string text = args.policy;
  if (!args.type_k.empty() || !args.type_v.empty()) {
    if (!policy_given) text.clear();
    const auto add = [&](const char* key, const std::string& value) {
      if (!value.empty()) text += (text.empty() ? "" : ",") + std::string(key) + "=" + value;
    };
    add("k", args.type_k);
    add("v", args.type_v);
  }
  return policy_from_option(policy_given || args.type_k.empty() ? "--policy" : "-ctk/-ctv", text);
}

std::vector<int32_t> prompt_tokens(const OpenedModel& opened, const RunArgs& args, ChatForm& form) {
  std::string document = args.file.empty() ? std::string() : read_text(args.file);
  if (args.raw) {
    form = ChatForm::plain;
    return opened.tokenizer->encode(document + args.prompt);
  }
  // The forms put their own line breaks after a document.
  document.erase(document.find_last_not_of(" \t\r\n") + 1);
  std::vector<ChatMessage> messages;
  if (!document.empty()) messages.push_back({"document", document});
  messages.push_back({"user", args.prompt});
  const FormattedChat chat = format_chat(*opened.file, messages, true);
  form = chat.form;
  return encode_chat(*opened.tokenizer, chat);
}

void check_fits(int64_t prompt, int64_t context, const ModelConfig& config) {
  if (prompt < context) return;
  const std::string raise =
      context < config.context ? fmt::format("raise -c (at most {}) or ", config.context) : "";
  throw Error(ErrorCode::invalid_argument,
              fmt::format("document and question take {} tokens, and a context of {} has room for "
                          "{} and an answer: {}shorten the document",
                          prompt, context, context - 1, raise));
}

// Decodes until a token ends the answer, and streams what is printable.
class Answer {
 public:
  Answer(const Tokenizer& tokenizer, bool stream, bool stop_at_line)
      : tokenizer_(tokenizer), stream_(stream), stop_at_line_(stop_at_line) {}

  void generate(Session& session, const SamplerOptions& sampling, int64_t limit) {
    Sampler sampler(sampling);
    if (limit == 0) {
      stop_ = "nothing asked for: -n 0";
      return;
    }
    int32_t token = sampler.sample(session.next_logits());
    while (true) {
      if (tokenizer_.is_end_of_generation(token)) {
        stop_ = "the model ended it";
        break;
      }
      ++tokens_;
      if (!take(tokenizer_.token_bytes(token))) break;
      if (limit > 0 && tokens_ >= limit) {
        stop_ = fmt::format("limit -n {}", limit);
        break;
      }
      if (session.length() >= session.context()) {
        stop_ = "the context is full";
        break;
      }
      token = sampler.sample(session.decode(token));
    }
    if (stream_) print(held_.flush() + "\n");
  }

  const std::string& text() const { return text_; }
  const std::string& stop() const { return stop_; }
  int64_t tokens() const { return tokens_; }

 private:
  // False if the bytes end the answer.
  bool take(std::string bytes) {
    if (text_.empty()) bytes.erase(0, bytes.find_first_not_of(" \n"));  // npos: all of it
    bool more = true;
    if (const size_t end = bytes.find('\n'); stop_at_line_ && end != std::string::npos) {
      bytes.erase(end);
      stop_ = "the line ended";
      more = false;
    }
    text_ += bytes;
    if (stream_) print(held_.push(bytes));
    return more;
  }

  const Tokenizer& tokenizer_;
  bool stream_, stop_at_line_;
  Utf8Stream held_;
  std::string text_, stop_;
  int64_t tokens_ = 0;
};

ComputeType compute_of(const std::string& name) {
  // BF16 weights take half the memory and half the bytes of a decode step on every CPU.
  return name == "f32" ? ComputeType::f32 : ComputeType::bf16;
}

void run(const RunArgs& args, bool policy_given) {
  if (args.prompt.empty() && !args.raw) {
    throw UsageError("no question: give one with -p, or --raw to continue the document");
  }
  if (args.file.empty() && args.prompt.empty()) {
    throw UsageError("nothing to read: give a document with -f or a prompt with -p");
  }
  const Policy policy = policy_of(args, policy_given);
  const ThreadLimit threads(args.model.threads);
  const OpenedModel opened = open_model(args.model.path);
  const int64_t context = checked_context(args.context, opened.config);
  const auto resolved = resolve(policy, policy_context(opened.config, context));
  ChatForm form{};
  const std::vector<int32_t> tokens = prompt_tokens(opened, args, form);
  if (tokens.empty()) throw UsageError("the prompt has no tokens: give some text");
  check_fits(static_cast<int64_t>(tokens.size()), context, opened.config);

  const auto model = Model::load(opened.file, {.compute = compute_of(args.compute)});
  EqualizerChoice equalizer = choose_equalizer(*model, args.model, {&policy, 1});
  Session session(model, policy,
                  {.context = context,
                   .equalizer = std::move(equalizer.equalizer),
                   .chunk = args.chunk,
                   .max_kv_bytes = args.max_kv_bytes});
  {
    Progress progress;
    session.prefill(tokens,
                    [&](int64_t done, int64_t total) { progress.update("reading", done, total); });
  }
  const bool json = args.output == "json";
  // A base model has no token that ends an answer: it would go on with a next question.
  Answer answer(*opened.tokenizer, !json, form == ChatForm::plain && !args.raw);
  answer.generate(session, args.sampling, args.predict);

  const RunReport report = {
      .model = opened.config.name,
      .compute = explain_compute(model->compute()),
      .policy = policy.name,
      .layers = resolved,
      .answer = answer.text(),
      .stop = answer.stop(),
      .prompt_tokens = static_cast<int64_t>(tokens.size()),
      .answer_tokens = answer.tokens(),
      .context = context,
      .chunk = session.chunk(),
      .equalizer = equalizer.note,
      .prefill = session.prefill_stats(),
      .decode = session.decode_stats(),
      .usage = session.cache().usage(),
      .bf16_bytes = session.cache().bf16_bytes(),
      .bits_stored_per_element = session.cache().bits_stored_per_element(),
  };
  if (json) {
    print(run_report_json(report));
  } else {
    std::fputs(("\n" + run_report_text(report)).c_str(), stderr);
  }
}

}  // namespace

void add_run_command(CLI::App& app) {
  auto args = std::make_shared<RunArgs>();
  CLI::App* cmd = app.add_subcommand("run", "Answer a question about a long document");
  cmd->footer(kFooter);
  add_model_option(*cmd, args->model);
  cmd->add_option("-f,--file", args->file, "Document, a text file; - is standard input")
      ->type_name("FILE");
  cmd->add_option("-p,--prompt", args->prompt, "Question")->type_name("TEXT");
  auto* policy = cmd->add_option("--policy", args->policy, "Precision of the KV cache")
                     ->capture_default_str()
                     ->type_name("POLICY");
  cmd->add_option("--cache-type-k", args->type_k,
                  "Format of K (also -ctk), such as q8_0; 'thriftattn formats' lists them")
      ->type_name("FORMAT");
  cmd->add_option("--cache-type-v", args->type_v, "Format of V (also -ctv)")->type_name("FORMAT");
  cmd->add_option("-c,--ctx-size", args->context, "Context in tokens; 0 takes the model's")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("-n,--n-predict", args->predict,
                  "Tokens of the answer at most; -1 until the context is full")
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 40))
      ->capture_default_str()
      ->type_name("N");
  add_threads_option(*cmd, args->model);
  cmd->add_option("--temp", args->sampling.temperature, "Temperature; 0 takes the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str()
      ->type_name("T");
  cmd->add_option("--top-p", args->sampling.top_p, "Sample from the likeliest tokens of this mass")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->type_name("P");
  cmd->add_option("-s,--seed", args->sampling.seed, "Seed of the sampling")
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--chunk", args->chunk, "Tokens of a prefill step; part of the result")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--compute", args->compute,
                  "Weights of the dense layers: f32, bf16, or auto, which is bf16")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str()
      ->type_name("TYPE");
  cmd->add_option("--max-kv", args->max_kv_bytes,
                  "Bytes that the cache may take, such as 2GB; 0 sets no limit")
      ->transform(CLI::AsSizeValue(false))
      ->type_name("SIZE");
  add_equalize_option(*cmd, args->model);
  cmd->add_flag("--raw", args->raw,
                "Continue document and prompt as they are, without the model's chat form");
  cmd->add_option("-o,--output", args->output, "text, or json: one object with answer and figures")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str()
      ->type_name("FORM");
  cmd->callback([args, policy] { run(*args, policy->count() > 0); });
}

}  // namespace thriftattn::cli
