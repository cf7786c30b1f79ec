// Ctrl-C: a real SIGINT to the command while it reads, while it answers and while it waits for a
// question. The summary is printed and the exit code is 130; a second one ends it at once.
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "cli/command.h"

namespace thriftattn::test {
namespace {

using namespace std::chrono_literals;

// Whether the process handles SIGINT by itself, from /proc.
bool handles_interrupt(pid_t child) {
  std::istringstream status(Sandbox::read("/proc/" + std::to_string(child) + "/status"));
  for (std::string line; std::getline(status, line);) {
    if (!line.starts_with("SigCgt:")) continue;
    return (std::stoull(line.substr(7), nullptr, 16) >> (SIGINT - 1) & 1) != 0;
  }
  return false;
}

bool wait_for(const std::function<bool()>& condition) {
  for (int i = 0; i < 6000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(10ms);
  }
  return false;
}

class CliInterrupt : public testing::Test {
 protected:
  // Nothing ends an answer of this model but the context, which is far away.
  CliInterrupt() {
    const TinyModel tiny = tiny_with_tokenizer({.keys = [](GgufWriter& w) {
      w.erase("tokenizer.ggml.eos_token_id");
      w.erase("llama.context_length").u32("llama.context_length", 1u << 20);
    }});
    model_ = box_.write("tiny.gguf", tiny.bytes);
  }

  Sandbox box_;
  std::string model_;
};

TEST_F(CliInterrupt, WhileAnswering) {
  const pid_t child =
      box_.start({"run", "-m", model_, "-p", "abc", "--raw", "-n", "-1", "--temp", "1"});
  EXPECT_TRUE(wait_for([&] { return Sandbox::read(box_.path("stdout")).size() > 20; }));
  kill(child, SIGINT);
  const Outcome r = box_.finish(child);
  EXPECT_EQ(r.code, 130) << r.err;
  EXPECT_TRUE(r.out.ends_with('\n'));
  for (const char* part : {"interrupted by Ctrl-C", "decode", "KV cache", "policy"}) {
    EXPECT_NE(r.err.find(part), std::string::npos) << part << "\n" << r.err;
  }
  EXPECT_EQ(r.err.find("error"), std::string::npos) << r.err;
}

TEST_F(CliInterrupt, WhileReading) {
  const std::string text = box_.write("long.txt", sample_text(600000));
  const pid_t child = box_.start({"run", "-m", model_, "-f", text, "-p", "?", "-o", "json"});
  EXPECT_TRUE(wait_for([&] { return handles_interrupt(child); }));
  std::this_thread::sleep_for(300ms);
  kill(child, SIGINT);
  const Outcome r = box_.finish(child);
  EXPECT_EQ(r.code, 130) << r.err;
  const auto report = nlohmann::json::parse(r.out);
  EXPECT_EQ(report["stop"], "interrupted by Ctrl-C while reading");
  EXPECT_EQ(report["answer"], "");
  EXPECT_LT(report["prompt_tokens"], 600000);
  EXPECT_EQ(report["prompt_tokens"], report["prefill"]["tokens"]);
}

TEST_F(CliInterrupt, WhileWaitingForAQuestion) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  const pid_t child = box_.start({"run", "-m", model_, "-i", "--raw", "-n", "3"}, ends[0]);
  ASSERT_EQ(::write(ends[1], "abc\n", 4), 4);
  EXPECT_TRUE(wait_for([&] { return Sandbox::read(box_.path("stdout")).ends_with('\n'); }));
  kill(child, SIGINT);
  const Outcome r = box_.finish(child);
  close(ends[0]);
  close(ends[1]);
  EXPECT_EQ(r.code, 130) << r.err;
  EXPECT_NE(r.err.find("3 answer (limit -n 3)"), std::string::npos) << r.err;
}

TEST_F(CliInterrupt, TheSecondEndsAtOnce) {
  // One step of many seconds: the first Ctrl-C takes effect after it.
  const std::string text = box_.write("long.txt", sample_text(300000));
  const pid_t child = box_.start({"run", "-m", model_, "-f", text, "-p", "?", "--chunk", "300000"});
  EXPECT_TRUE(wait_for([&] { return handles_interrupt(child); }));
  std::this_thread::sleep_for(500ms);
  kill(child, SIGINT);
  EXPECT_TRUE(wait_for([&] { return !handles_interrupt(child); }));
  kill(child, SIGINT);
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGINT);  // 130 to a shell
}

}  // namespace
}  // namespace thriftattn::test
