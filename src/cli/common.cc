// What the commands share (common.h).
#include "cli/common.h"

#include <fmt/format.h>
#include <tbb/global_control.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <new>

#include "thriftattn/cuda.h"
#include "thriftattn/error.h"

namespace thriftattn::cli {
namespace {

// More text than any model's context takes; a device file must not fill the memory.
constexpr size_t kMaxTextBytes = size_t{1} << 30;

struct CloseFile {
  void operator()(std::FILE* file) const {
    if (file != stdin) std::fclose(file);
  }
};

bool wants_equalizer(const Policy& policy, const ModelConfig& config) {
  const auto layers = resolve(policy, policy_context(config, config.context));
  const auto equalized = [](const LayerPolicy& p) {
    return is_layered(p.k_format) && p.equalize;
  };
  return std::any_of(layers.begin(), layers.end(), [&](const LayerPolicy& layer) {
    return equalized(layer) || std::any_of(layer.heads.begin(), layer.heads.end(), equalized);
  });
}

}  // namespace

void print_error(const std::string& message) {
  std::fprintf(stderr, "thriftattn: error: %s\n", one_line(message).c_str());
}

void add_model_option(CLI::App& app, ModelArgs& args) {
  app.add_option("-m,--model", args.path, "GGUF file (llama, qwen2, qwen3 or gemma3)")
      ->required()
      ->type_name("FILE");
}

void add_threads_option(CLI::App& app, ModelArgs& args) {
  app.add_option("-t,--threads", args.threads, "Threads; 0 takes all cores")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str()
      ->type_name("N");
}

void add_equalize_option(CLI::App& app, ModelArgs& args) {
  app.add_flag("--no-equalize", args.no_equalize,
               "Do without the model's K equaliser (see 'thriftattn calibrate')");
}

void add_rope_options(CLI::App& app, ModelArgs& args) {
  app.add_option(
         "--rope-scaling", args.rope.scaling,
         "Stretch the model's positions: none, linear or yarn, instead of what its file says")
      ->check(CLI::IsMember({"none", "linear", "yarn"}))
      ->type_name("TYPE");
  app.add_option("--rope-scale", args.rope.scale, "How many times the original context, such as 4")
      ->check(CLI::Range(1.0, 1e6))
      ->type_name("F");
  app.add_option("--yarn-orig-ctx", args.rope.original_context,
                 "Original context of YaRN; the model's if it is not given")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
}

void add_device_option(CLI::App& app, std::string& device) {
  app.add_option("--device", device,
                 "Where to compute: cpu, or cuda, an NVIDIA GPU with the cache in its memory")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str()
      ->type_name("DEVICE");
}

void require_device(const std::string& device) {
  if (device != "cuda") return;
  try {
    cuda::device_info();
  } catch (const Error& error) {
    throw Error(error.code(),
                fmt::format("--device cuda: {} (or leave --device out)", error.what()));
  }
}

std::optional<RopeOverride> rope_override(const RopeArgs& args) {
  if (args.scaling.empty()) {
    if (args.scale == 0 && args.original_context == 0) return std::nullopt;
    throw UsageError(
        "--rope-scale and --yarn-orig-ctx need --rope-scaling yarn (or linear): say how positions "
        "are stretched");
  }
  const bool yarn = args.scaling == "yarn";
  if (args.original_context != 0 && !yarn) {
    throw UsageError(fmt::format(
        "--yarn-orig-ctx {} has no meaning with --rope-scaling {}: use yarn, or leave it out",
        args.original_context, args.scaling));
  }
  if (args.scaling == "none") {
    if (args.scale != 0) throw UsageError("--rope-scale has no meaning with --rope-scaling none");
    return RopeOverride{};
  }
  if (args.scale == 0) {
    throw UsageError(fmt::format(
        "--rope-scaling {} needs --rope-scale F: how many times the original context, such as 4",
        args.scaling));
  }
  return RopeOverride{.scaling = yarn ? RopeScaling::yarn : RopeScaling::linear,
                      .factor = args.scale,
                      .original_context = args.original_context};
}

struct ThreadLimit::State {
  explicit State(int threads)
      : control(tbb::global_control::max_allowed_parallelism, static_cast<size_t>(threads)) {}
  tbb::global_control control;
};

ThreadLimit::ThreadLimit(int threads) {
  if (threads > 0) state_ = std::make_unique<State>(threads);
}
ThreadLimit::~ThreadLimit() = default;

OpenedModel open_model(const ModelArgs& args) {
  const std::optional<RopeOverride> rope = rope_override(args.rope);
  OpenedModel opened;
  opened.file = std::make_shared<const GgufFile>(GgufFile::open(args.path));
  opened.config = read_model_config(*opened.file);
  if (rope) apply_rope_override(*rope, opened.config);
  opened.tokenizer = std::make_shared<const Tokenizer>(Tokenizer::from_gguf(*opened.file));
  return opened;
}

int64_t checked_context(int64_t asked, const ModelConfig& config) {
  if (asked > config.context) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("a context of {} tokens is more than the {} that {} was made for: "
                            "lower -c to at most {}, or go beyond it on purpose with "
                            "--rope-scaling yarn --rope-scale {}",
                            asked, config.context, one_line(config.name), config.context,
                            (asked + config.context - 1) / config.context));
  }
  return asked == 0 ? config.context : asked;
}

EqualizerChoice choose_equalizer(const Model& model, const ModelArgs& args,
                                 std::span<const Policy> policies) {
  const bool wanted = std::any_of(policies.begin(), policies.end(), [&](const Policy& policy) {
    return wants_equalizer(policy, model.config());
  });
  if (!wanted) return {{}, "not used by this policy"};
  if (args.no_equalize) return {{}, "off (--no-equalize)"};
  EqualizerResult result = load_or_measure_equalizer(model);
  std::string note = result.measured ? "measured now" : "read from " + result.path;
  if (result.measured && !result.path.empty()) note += ", kept in " + result.path;
  if (!result.note.empty()) note += "; " + result.note;
  return {std::move(result.equalizer), std::move(note)};
}

Policy policy_from_option(const std::string& option, const std::string& text) {
  try {
    return parse_policy(text);
  } catch (const Error& error) {
    throw UsageError(fmt::format("{}: {}", option, error.what()));
  }
}

std::string read_text(const std::string& path) {
  const std::string shown = one_line(path);
  const auto because = [&](const char* action, int reason) {
    return Error(reason == ENOENT ? ErrorCode::not_found : ErrorCode::io,
                 fmt::format("cannot {} '{}': {}; give a readable text file with -f", action, shown,
                             std::strerror(reason)));
  };
  std::error_code ignored;
  if (path != "-" && std::filesystem::is_directory(path, ignored)) throw because("read", EISDIR);
  const std::unique_ptr<std::FILE, CloseFile> file(path == "-" ? stdin
                                                               : std::fopen(path.c_str(), "rb"));
  if (!file) throw because("open", errno);
  std::string text;
  char buffer[1 << 16];
  while (const size_t n = std::fread(buffer, 1, sizeof buffer, file.get())) {
    text.append(buffer, n);
    if (text.size() > kMaxTextBytes) {
      throw Error(ErrorCode::invalid_argument,
                  fmt::format("'{}' is larger than {} MiB, more than any context takes: cut it",
                              shown, kMaxTextBytes >> 20));
    }
  }
  if (std::ferror(file.get())) throw because("read", errno);
  if (text.empty()) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("'{}' is empty: give a file with text in it", shown));
  }
  return text;
}

void write_text(const std::string& path, const std::string& text) {
  const auto because = [&] {
    return Error(ErrorCode::io, fmt::format("cannot write '{}': {}; name a file in a folder that "
                                            "exists and can be written",
                                            one_line(path), std::strerror(errno)));
  };
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) throw because();
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  if (std::fclose(file) != 0 || !written) throw because();
}

void print(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw Error(ErrorCode::io, fmt::format("cannot write to standard output: {}; check the disk "
                                           "or the program that reads it",
                                           std::strerror(errno)));
  }
}

int guarded(const std::function<void()>& body) {
  try {
    body();
    return 0;
  } catch (const ExitRequest& request) {
    return request.code;
  } catch (const UsageError& error) {
    print_error(error.what());
    return kExitUsage;
  } catch (const std::bad_alloc&) {
    print_error(
        "out of memory: use a smaller context (-c), a policy that stores fewer bits, a smaller "
        "model or a machine with more memory");
  } catch (const std::exception& error) {
    print_error(error.what());
  }
  return kExitRuntime;
}

std::string one_line(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      out += ' ';
    } else if (byte < 0x20 || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  while (out.ends_with(' ')) out.pop_back();
  return out;
}

}  // namespace thriftattn::cli
