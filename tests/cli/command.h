// Runs the built `thriftattn` and collects what it prints; a small model with a tokenizer on disk.
#pragma once

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "engine/tiny_model.h"
#include "engine/tokenizer_files.h"

namespace thriftattn::test {

struct Outcome {
  int code = -1;  // 128 + signal if it was killed
  std::string out, err;
};

// A folder for one test, which is also the user's cache folder.
class Sandbox {
 public:
  Sandbox() {
    std::string name = (std::filesystem::temp_directory_path() / "thriftattn-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::abort();
    folder_ = name;
  }
  ~Sandbox() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::string write(const std::string& name, const std::string& content) const {
    std::ofstream(path(name), std::ios::binary) << content;
    return path(name);
  }
  static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }

  // `address_space`: bytes the command may map; 0 = as the test.
  Outcome run(const std::vector<std::string>& arguments, const std::string& input = {},
              rlim_t address_space = 0) const {
    write("stdin", input);
    return finish(start(arguments, -1, address_space));
  }

  // The two halves of run(). Standard input is `input_fd`, or the file "stdin" where it is -1.
  pid_t start(const std::vector<std::string>& arguments, int input_fd = -1,
              rlim_t address_space = 0) const {
    const std::string in = path("stdin");
    if (!std::filesystem::exists(in)) write("stdin", "");
    for (const char* stream : {"stdout", "stderr"}) write(stream, "");
    const pid_t child = fork();
    if (child == 0) {
      setenv("XDG_CACHE_HOME", path("cache").c_str(), 1);
      const auto redirect = [](const std::string& file, int flags, int to) {
        const int fd = open(file.c_str(), flags, 0600);
        if (fd < 0 || dup2(fd, to) < 0) _exit(126);
      };
      if (input_fd < 0) {
        redirect(in, O_RDONLY, STDIN_FILENO);
      } else if (dup2(input_fd, STDIN_FILENO) < 0) {
        _exit(126);
      }
      redirect(path("stdout"), O_WRONLY | O_CREAT | O_TRUNC, STDOUT_FILENO);
      redirect(path("stderr"), O_WRONLY | O_CREAT | O_TRUNC, STDERR_FILENO);
      std::vector<char*> argv = {const_cast<char*>(THRIFTATTN_CLI)};
      for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
      argv.push_back(nullptr);
      const rlimit limit{.rlim_cur = address_space, .rlim_max = address_space};
      if (address_space > 0 && setrlimit(RLIMIT_AS, &limit) != 0) _exit(125);
      execv(THRIFTATTN_CLI, argv.data());
      _exit(127);
    }
    return child;
  }
  Outcome finish(pid_t child) const {
    int status = 0;
    waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read(path("stdout")),
            read(path("stderr"))};
  }

 private:
  std::filesystem::path folder_;
};

// A random llama model in which every byte is a token, with an end-of-text token.
inline TinyModel tiny_with_tokenizer(const TinyEdit& edit = {}) {
  BpeVocabulary vocabulary;
  const int32_t eos = vocabulary.special("<|eos|>", 3);
  TinySpec spec;
  spec.layers = 1;
  spec.context = 1024;
  spec.vocab = static_cast<int64_t>(vocabulary.tokens.size());
  return make_tiny(spec, {.keys =
                              [&](GgufWriter& w) {
                                w.string("tokenizer.ggml.model", "gpt2");
                                w.string("tokenizer.ggml.pre", "qwen2");
                                w.strings("tokenizer.ggml.tokens", vocabulary.tokens);
                                w.i32s("tokenizer.ggml.token_type", vocabulary.types);
                                w.strings("tokenizer.ggml.merges", vocabulary.merges);
                                w.boolean("tokenizer.ggml.add_bos_token", false);
                                w.u32("tokenizer.ggml.eos_token_id", static_cast<uint32_t>(eos));
                                if (edit.keys) edit.keys(w);
                              },
                          .tensors = edit.tensors});
}

inline std::string sample_text(size_t bytes) {
  std::string text;
  for (int i = 0; text.size() < bytes; i = (i + 1) % 1000) {
    text += "Line " + std::to_string(i * i) + " of it.\n";
  }
  text.resize(bytes);
  return text;
}

}  // namespace thriftattn::test
