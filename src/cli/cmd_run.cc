// `thriftattn run`: answers questions about a document.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cli/answer.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/interrupt.h"
#include "cli/kv_memory.h"
#include "cli/progress.h"
#include "cli/question_reader.h"
#include "cli/run_report.h"
#include "engine/chat_template.h"
#include "engine/prompt_cache.h"
#include "engine/session.h"
#include "thriftattn/error.h"

namespace thriftattn::cli {
namespace {

struct RunArgs {
  ModelArgs model;
  std::string file, prompt;
  std::string policy = "balanced";
  bool policy_given = false;
  std::string type_k, type_v;
  bool interactive = false;
  bool conversation = false;
  std::string prompt_cache;
  int64_t context = 0;
  int64_t chunk = 0;
  int64_t kv_memory = 0;
  AnswerOptions answer;
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
  thriftattn run -m model.gguf -f book.txt -i --prompt-cache book.kv --kv-memory 2GiB
  thriftattn run -m model.gguf -f long.txt -p "What for?" -c 65536 --rope-scaling yarn --rope-scale 2
  thriftattn run -m model.gguf -f report.txt -p "What was decided?" --device cuda

The answer goes to standard output, everything else to standard error. A policy is a preset,
a preset with changes ('balanced,promote=0.05'), layers with formats ('0-3:fp8,4-35:nvfp4'),
JSON, or @FILE; 'thriftattn policies' lists the presets. Ctrl-C ends with the summary and exit code
130, a second one at once. docs/run.md has more.)";

// The one policy that --policy, -ctk and -ctv ask for together.
Policy policy_of(const RunArgs& args) {
  std::string text = args.policy;
  if (!args.type_k.empty() || !args.type_v.empty()) {
    if (!args.policy_given) text.clear();
    const auto add = [&](const char* key, const std::string& value) {
      if (!value.empty()) text += (text.empty() ? "" : ",") + std::string(key) + "=" + value;
    };
    add("k", args.type_k);
    add("v", args.type_v);
  }
  return policy_from_option(args.policy_given || args.type_k.empty() ? "--policy" : "-ctk/-ctv",
                            text);
}

void check_usage(const RunArgs& args) {
  if (args.interactive) {
    if (args.file == "-") {
      throw UsageError(
          "standard input cannot be both the document (-f -) and the questions (-i): put one of "
          "them into a file");
    }
  } else if (args.prompt.empty() && !args.raw) {
    throw UsageError(
        "no question: give one with -p, ask several with -i, or --raw to continue the document");
  }
  if (args.file.empty() && args.prompt.empty() && !args.interactive) {
    throw UsageError("nothing to read: give a document with -f or a prompt with -p");
  }
  if (!args.prompt_cache.empty() && args.file.empty()) {
    throw UsageError("--prompt-cache keeps a document that was read: give one with -f");
  }
}

ComputeType compute_of(const std::string& name) {
  // The file's own bytes are the least that a decode step can read, and need no copy.
  if (name == "auto") return ComputeType::stored;
  return name == "f32" ? ComputeType::f32 : ComputeType::bf16;
}

// Makes tokens of the document, once, and of each question. They are encoded apart in every form,
// so that a document's tokens do not depend on what is asked.
class Prompts {
 public:
  Prompts(const OpenedModel& opened, const RunArgs& args)
      : tokenizer_(*opened.tokenizer), file_(*opened.file), raw_(args.raw) {
    form_ = raw_ ? ChatForm::plain : detect_chat_form(file_);
    if (args.file.empty()) return;
    std::string text = read_text(args.file);
    if (raw_) {
      document_ = tokenizer_.encode(text);
      return;
    }
    // The forms put their own line breaks after a document.
    text.erase(text.find_last_not_of(" \t\r\n") + 1);
    if (text.empty()) return;
    ChatTokens chat = encode(text, "?");
    chat.tokens.resize(chat.document);
    document_ = std::move(chat.tokens);
  }

  ChatForm form() const { return form_; }
  const std::vector<int32_t>& document() const { return document_; }

  std::vector<int32_t> first(const std::string& question) const {
    const bool begins = document_.empty();
    if (raw_) {
      if (begins) return tokenizer_.encode(question);
      return tokenizer_.encode(question, {.add_bos = false, .continues = true});
    }
    ChatTokens chat = encode(begins ? "" : "any document", question);
    chat.tokens.erase(chat.tokens.begin(),
                      chat.tokens.begin() + static_cast<std::ptrdiff_t>(chat.document));
    return std::move(chat.tokens);
  }
  // A question after an answer.
  std::vector<int32_t> next(const std::string& question) const {
    if (raw_) return tokenizer_.encode(question, {.add_bos = false, .continues = true});
    return encode_chat_parts(tokenizer_, format_next_turn(form_, question), false).tokens;
  }

 private:
  ChatTokens encode(const std::string& document, const std::string& question) const {
    std::vector<ChatMessage> messages;
    if (!document.empty()) messages.push_back({"document", document});
    messages.push_back({"user", question});
    return encode_chat_parts(tokenizer_, format_chat(file_, messages, true));
  }

  const Tokenizer& tokenizer_;
  const GgufFile& file_;
  bool raw_;
  ChatForm form_{};
  std::vector<int32_t> document_;
};

// A run from the command line's checks to the last summary.
class Run {
 public:
  explicit Run(const RunArgs& args);
  void run();

 private:
  bool json() const { return args_.output == "json"; }
  void require_room(int64_t past, int64_t tokens) const;
  void read_document();
  void answer_one();
  void answer_many();
  // Reads the question and generates; what happened goes into `report`.
  void ask(Session& session, const std::vector<int32_t>& question, RunReport& report);
  RunReport new_report() const;
  void add_cache(const Session& session, RunReport& report) const;
  void conclude(const RunReport& report) const;

  const RunArgs& args_;
  const Policy policy_;
  const ThreadLimit threads_;
  const OpenedModel opened_;
  const std::vector<LayerPolicy> resolved_;
  const int64_t context_;
  const int64_t chunk_;  // tokens of a prefill step
  const Prompts prompts_;
  const InterruptHandler interrupt_;  // after what may wait for standard input
  AnswerOptions answer_options_;
  std::string compute_, equalizer_note_;
  std::shared_ptr<DeviceEngine> device_;  // --device cuda
  std::unique_ptr<Session> session_;
  DocumentReport document_;
  int64_t document_bf16_bytes_ = 0;  // of its sequence
  std::optional<int32_t> unfed_;     // of the last answer, when the conversation goes on
};

// A device wants more query rows at a time than a few cores do.
int64_t chunk_of(const RunArgs& args) {
  if (args.chunk > 0) return args.chunk;
  return args.model.on_device() ? 2048 : 512;
}

Run::Run(const RunArgs& args)
    : args_(args),
      policy_(policy_of(args)),
      threads_(args.model.threads),
      opened_(open_model(args.model)),
      resolved_(resolve(policy_, policy_context(opened_.config,
                                                checked_context(args.context, opened_.config)))),
      context_(checked_context(args.context, opened_.config)),
      chunk_(chunk_of(args)),
      prompts_(opened_, args),
      answer_options_(args.answer) {
  // A base model has no token that ends an answer: it would go on with a next question.
  answer_options_.stop_at_line = prompts_.form() == ChatForm::plain && !args.raw;
  answer_options_.stream = !json();
}

// Context and memory for `tokens` more and an answer.
void Run::require_room(int64_t past, int64_t tokens) const {
  const int64_t prompt = past + tokens;
  if (prompt >= context_) {
    const int64_t most = opened_.config.context;
    const std::string raise = context_ < most ? fmt::format("raise -c (at most {}) or ", most) : "";
    throw Error(ErrorCode::invalid_argument,
                fmt::format("document and question take {} tokens, and a context of {} has room "
                            "for {} and an answer: {}shorten the document",
                            prompt, context_, context_ - 1, raise));
  }
  const int64_t limit = args_.answer.limit;
  const int64_t room = context_ - prompt;
  require_kv_memory({.config = opened_.config,
                     .policy = resolved_,
                     .policy_name = policy_.name,
                     .request = {.document = past,
                                 .question = tokens,
                                 .answer = limit < 0 ? room : std::min(limit, room),
                                 .chunk = chunk_,
                                 .forked = args_.interactive && !args_.conversation},
                     .max_bytes = args_.kv_memory});
}

void Run::read_document() {
  const std::vector<int32_t>& tokens = prompts_.document();
  document_.tokens = static_cast<int64_t>(tokens.size());
  const PromptCacheKey key{
      .path = args_.prompt_cache, .policy_name = policy_.name, .tokens = tokens};
  const auto seconds_since = [](std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  if (!key.path.empty()) {
    document_.cache_file = one_line(key.path);
    const auto start = std::chrono::steady_clock::now();
    if (load_prompt_cache(key, *session_)) {
      document_.loaded = true;
      document_.cache_bytes = static_cast<int64_t>(std::filesystem::file_size(key.path));
      document_.cache_seconds = seconds_since(start);
      return;
    }
  }
  {
    Progress progress;
    session_->prefill(
        tokens, [&](int64_t done, int64_t total) { progress.update("reading", done, total); });
  }
  document_.prefill = session_->prefill_stats();
  if (!key.path.empty()) {
    const auto start = std::chrono::steady_clock::now();
    document_.cache_bytes = save_prompt_cache(key, *session_);
    document_.cache_seconds = seconds_since(start);
  }
}

RunReport Run::new_report() const {
  return {.model = opened_.config.name,
          .compute = compute_,
          .device = device_ == nullptr ? ""
                                       : device_->explain_device() + "; " +
                                             device_->explain_attention(session_->cache()),
          .policy = policy_.name,
          .layers = resolved_,
          .document = document_,
          .rope_scaling = explain_rope_scaling(opened_.config),
          .context = context_,
          .chunk = chunk_,
          .equalizer = equalizer_note_};
}

// In a series the document's sequence and its fork share pages: the document counts once.
void Run::add_cache(const Session& session, RunReport& report) const {
  const KvCache& cache = session.cache();
  report.usage = cache.usage();
  const bool shared = session.sequence() != session_->sequence();
  report.bf16_bytes = cache.bf16_bytes() - (shared ? document_bf16_bytes_ : 0);
  report.bits_stored_per_element = report.bf16_bytes > 0
                                       ? 16.0 * static_cast<double>(report.usage.total()) /
                                             static_cast<double>(report.bf16_bytes)
                                       : 0.0;
}

void Run::ask(Session& session, const std::vector<int32_t>& question, RunReport& report) {
  Answer answer(*opened_.tokenizer, answer_options_);
  try {
    session.prefill(question);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::cancelled) throw;
    answer.interrupt();
  }
  if (!answer.interrupted()) {
    answer.generate(session);
    answer.finish();
  }
  unfed_ = answer.unfed();
  report.answer = answer.text();
  report.stop = answer.stop();
  report.prompt_tokens += static_cast<int64_t>(question.size());
  report.answer_tokens += answer.tokens();
  report.prefill.merge(session.prefill_stats());
  report.decode.merge(session.decode_stats());
  add_cache(session, report);
}

void Run::conclude(const RunReport& report) const {
  std::fputs(("\n" + run_report_text(report)).c_str(), stderr);
}

void Run::answer_one() {
  const std::vector<int32_t> question =
      args_.prompt.empty() ? std::vector<int32_t>() : prompts_.first(args_.prompt);
  require_room(document_.tokens, static_cast<int64_t>(question.size()));
  RunReport report = new_report();
  report.prompt_tokens = document_.tokens;
  ask(*session_, question, report);
  if (json()) {
    print(run_report_json(report));
  } else {
    conclude(report);
  }
}

// Each question is asked in a fork of the document, which stays as it is; in a conversation, after
// what was said before.
void Run::answer_many() {
  QuestionReader reader(interrupt_);
  std::optional<std::string> question;
  if (!args_.prompt.empty()) question = args_.prompt;
  RunReport all = new_report();
  all.questions = 0;
  all.stop = "nothing was asked";
  all.prompt_tokens = document_.tokens;
  all.prefill = document_.prefill;
  add_cache(*session_, all);
  bool begun = false, failed = false;
  document_bf16_bytes_ = session_->cache().bf16_bytes();
  session_->reset_stats();
  while (question || (question = reader.next())) {
    const int64_t before = session_->length();
    try {
      std::vector<int32_t> tokens = begun ? prompts_.next(*question) : prompts_.first(*question);
      if (begun && unfed_) tokens.insert(tokens.begin(), *unfed_);
      require_room(session_->length(), static_cast<int64_t>(tokens.size()));
      RunReport report = new_report();
      report.question = *question;
      report.prompt_tokens = session_->length();
      if (args_.conversation) {
        session_->reset_stats();
        ask(*session_, tokens, report);
        begun = true;
      } else {
        Session fork = session_->fork();
        ask(fork, tokens, report);
      }
      if (json()) print(run_report_json(report, true));
      ++all.questions;
      all.stop = report.stop;
      all.prompt_tokens += static_cast<int64_t>(tokens.size());
      all.answer_tokens += report.answer_tokens;
      all.prefill.merge(report.prefill);
      all.decode.merge(report.decode);
      all.usage = report.usage;
      all.bf16_bytes = report.bf16_bytes;
      all.bits_stored_per_element = report.bits_stored_per_element;
    } catch (const Error& error) {
      print_error(error.what());  // the other questions can still be answered
      session_->truncate(before);
      failed = true;
    }
    if (InterruptHandler::interrupted()) break;
    question.reset();
  }
  if (!json()) conclude(all);
  if (failed && !InterruptHandler::interrupted()) throw ExitRequest{kExitRuntime};
}

void Run::run() {
  const std::vector<int32_t> question =
      args_.prompt.empty() ? std::vector<int32_t>() : prompts_.first(args_.prompt);
  const auto asked = static_cast<int64_t>(question.size());
  const auto tokens = static_cast<int64_t>(prompts_.document().size());
  if (tokens + asked == 0 && !args_.interactive) {
    throw UsageError("the prompt has no tokens: give some text");
  }
  require_room(tokens, asked);

  // A device takes its weights from the file's own bytes.
  const bool on_device = args_.model.on_device();
  const auto model =
      Model::load(opened_.file, {.compute = compute_of(on_device ? "auto" : args_.compute),
                                 .rope = rope_override(args_.model.rope)});
  if (on_device) device_ = DeviceEngine::load(model, compute_of(args_.compute));
  compute_ = on_device ? device_->explain_compute() : explain_compute(model->compute());
  EqualizerChoice equalizer = choose_equalizer(*model, args_.model, {&policy_, 1});
  equalizer_note_ = equalizer.note;
  session_ = std::make_unique<Session>(
      model, policy_,
      SessionOptions{.context = context_,
                     .equalizer = std::move(equalizer.equalizer),
                     .chunk = chunk_,
                     .max_kv_bytes = args_.kv_memory,
                     .cancelled = [] { return InterruptHandler::interrupted(); },
                     .device = device_});
  try {
    read_document();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::cancelled) throw;
    RunReport report = new_report();
    report.stop = "interrupted by Ctrl-C while reading";
    report.prompt_tokens = session_->length();
    report.prefill = session_->prefill_stats();
    add_cache(*session_, report);
    if (json()) {
      print(run_report_json(report, args_.interactive));
    } else {
      conclude(report);
    }
    throw ExitRequest{kExitInterrupted};
  }
  args_.interactive ? answer_many() : answer_one();
  if (InterruptHandler::interrupted()) throw ExitRequest{kExitInterrupted};
}

}  // namespace

void add_run_command(CLI::App& app) {
  auto args = std::make_shared<RunArgs>();
  CLI::App* cmd = app.add_subcommand("run", "Answer a question about a long document");
  cmd->footer(kFooter);
  add_model_option(*cmd, args->model);
  cmd->add_option("-f,--file", args->file, "Document, a text file; - is standard input")
      ->type_name("FILE");
  cmd->add_option("-p,--prompt", args->prompt, "Question; with -i the first")->type_name("TEXT");
  cmd->add_flag("-i,--interactive", args->interactive,
                "Read questions from standard input, a line each; each is asked of the document "
                "alone");
  cmd->add_flag("--conversation", args->conversation,
                "As -i, but each question follows on what was said before (also -cnv)");
  cmd->add_option("--prompt-cache", args->prompt_cache,
                  "Keep the document, once read, in this file, or load it from there")
      ->type_name("FILE");
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
  cmd->add_option("-n,--n-predict", args->answer.limit,
                  "Tokens of the answer at most; -1 until the context is full")
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 40))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--stop", args->answer.stop_texts,
                  "End the answer before this text; may be given several times")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)
      ->type_name("TEXT");
  add_threads_option(*cmd, args->model);
  cmd->add_option("--temp", args->answer.sampling.temperature,
                  "Temperature; 0 takes the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str()
      ->type_name("T");
  cmd->add_option("--top-p", args->answer.sampling.top_p,
                  "Sample from the likeliest tokens of this mass")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->type_name("P");
  cmd->add_option("-s,--seed", args->answer.sampling.seed, "Seed of the sampling")
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--chunk", args->chunk,
                  "Tokens of a prefill step, part of the result; 0 takes 512, on a device 2048")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--compute", args->compute,
                  "Weights of the dense layers: f32, bf16, or auto: as the file has them (on a "
                  "device BF16)")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str()
      ->type_name("TYPE");
  cmd->add_option("--kv-memory,--max-kv", args->kv_memory,
                  "Bytes that the cache may take, such as 2GiB, checked before anything is read; 0 "
                  "sets no limit")
      ->transform(CLI::AsSizeValue(false))
      ->type_name("SIZE");
  add_equalize_option(*cmd, args->model);
  add_rope_options(*cmd, args->model);
  add_device_option(*cmd, args->model.device);
  cmd->add_flag("--raw", args->raw,
                "Continue document and prompt as they are, without the model's chat form");
  cmd->add_option("-o,--output", args->output, "text, or json: one object with answer and figures")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str()
      ->type_name("FORM");
  cmd->callback([args, policy] {
    args->policy_given = policy->count() > 0;
    args->interactive |= args->conversation;
    check_usage(*args);
    require_device(args->model.device);
    Run(*args).run();
  });
}

}  // namespace thriftattn::cli
