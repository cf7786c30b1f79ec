// What the commands share: options about the model, loading it, files, and errors of usage.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/calibrate.h"
#include "engine/device_engine.h"
#include "engine/gguf.h"
#include "engine/model_config.h"
#include "engine/tokenizer.h"
#include "engine/transformer.h"
#include "thriftattn/policy.h"

namespace thriftattn::cli {

inline constexpr int kExitRuntime = 1;
inline constexpr int kExitUsage = 2;

// A wrong command line: exit code 2 where an Error gives 1.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the program with this exit code; everything has been said.
struct ExitRequest {
  int code;
};

struct RopeArgs {
  std::string scaling;           // empty = as the file says
  double scale = 0;              // 0 = not given
  int64_t original_context = 0;  // 0 = not given
};

struct ModelArgs {
  std::string path;
  int threads = 0;  // 0 = all
  bool no_equalize = false;
  RopeArgs rope;
  std::string device = "cpu";

  bool on_device() const { return device == "cuda"; }
};

void add_model_option(CLI::App& app, ModelArgs& args);
void add_threads_option(CLI::App& app, ModelArgs& args);
void add_equalize_option(CLI::App& app, ModelArgs& args);
void add_rope_options(CLI::App& app, ModelArgs& args);
void add_device_option(CLI::App& app, std::string& device);

// Error with the reason where `--device cuda` is asked for and there is none. Costs nothing, so it
// comes before anything is read.
void require_device(const std::string& device);

// What the RoPE options ask for together; nothing if none is given.
std::optional<RopeOverride> rope_override(const RopeArgs& args);

// Limits oneTBB for as long as it lives.
class ThreadLimit {
 public:
  explicit ThreadLimit(int threads);
  ~ThreadLimit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The file with its metadata and tokenizer: what is needed to check a request before the weights,
// which take seconds, are loaded.
struct OpenedModel {
  std::shared_ptr<const GgufFile> file;
  ModelConfig config;
  std::shared_ptr<const Tokenizer> tokenizer;
};
OpenedModel open_model(const ModelArgs& args);

// The context asked for, or the model's where it is 0. Error above the model's.
int64_t checked_context(int64_t asked, const ModelConfig& config);

// The equaliser if a policy has use for it; empty with --no-equalize. `note` is for the user.
struct EqualizerChoice {
  Equalizer equalizer;
  std::string note;
};
EqualizerChoice choose_equalizer(const Model& model, const ModelArgs& args,
                                 std::span<const Policy> policies);

// parse_policy() whose errors are errors of usage.
Policy policy_from_option(const std::string& option, const std::string& text);

// A text file, or standard input for "-". Throws Error for what cannot be read or is empty.
std::string read_text(const std::string& path);
void write_text(const std::string& path, const std::string& text);

// Writes to standard output; an error of the stream (a full disk) is an Error.
void print(const std::string& text);

// "thriftattn: error: ..." on stderr, one line.
void print_error(const std::string& message);

// Runs `body`; every failure becomes one line on stderr and an exit code.
int guarded(const std::function<void()>& body);

// `text` on one line, with control bytes made visible.
std::string one_line(std::string_view text);

}  // namespace thriftattn::cli
