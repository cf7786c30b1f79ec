// Bad input: one line on stderr that names the cause, an exit code that is not 0, no crash.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cli/command.h"
#include "thriftattn/cuda.h"

namespace thriftattn::test {
namespace {

class CliErrors : public testing::Test {
 protected:
  // The line after "thriftattn: error: ".
  std::string error(const std::vector<std::string>& arguments, int code = 1) {
    const Outcome r = box_.run(arguments);
    EXPECT_EQ(r.code, code) << r.err;
    EXPECT_EQ(r.out, "");
    const std::string start = "thriftattn: error: ";
    EXPECT_EQ(r.err.substr(0, start.size()), start);
    EXPECT_EQ(r.err.find('\n'), r.err.size() - 1) << r.err;  // one line
    return r.err.size() > start.size() ? r.err.substr(start.size()) : r.err;
  }
  std::vector<std::string> run_with(std::vector<std::string> more) const {
    std::vector<std::string> all = {"run", "-m", model_, "-f", text_, "-p", "What?"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::vector<std::string> eval_with(std::vector<std::string> more) const {
    std::vector<std::string> all = {"eval", "-m", model_, "-f", text_};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }

  Sandbox box_;
  TinyModel tiny_ = tiny_with_tokenizer();
  std::string model_ = box_.write("tiny.gguf", tiny_.bytes);
  std::string text_ = box_.write("text.txt", sample_text(500));
};

#define EXPECT_SAYS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

TEST_F(CliErrors, CommandLine) {
  EXPECT_SAYS(error({}, 2), "--help");
  EXPECT_SAYS(error({"bake"}, 2), "bake");
  EXPECT_SAYS(error({"run"}, 2), "--model");
  EXPECT_SAYS(error({"run", "--nonsense"}, 2), "thriftattn run --help");
  EXPECT_SAYS(error(run_with({"-n", "many"}), 2), "many");
  EXPECT_SAYS(error(run_with({"-c", "-5"}), 2), "-5");
  EXPECT_SAYS(error(run_with({"-o", "xml"}), 2), "xml");
  EXPECT_SAYS(error(run_with({"--top-p", "2"}), 2), "2");
  EXPECT_SAYS(error(eval_with({"--needles", "257"}), 2), "257");
  EXPECT_SAYS(error({"run", "-m", model_, "-f", text_}, 2), "-p");
  EXPECT_SAYS(error({"eval", "-m", model_}, 2), "--file");
}

// Said before anything is read, whatever is missing: the build, the driver or the device.
TEST_F(CliErrors, Device) {
  EXPECT_SAYS(error(run_with({"--device", "tpu"}), 2), "tpu");
  EXPECT_SAYS(error(eval_with({"--device", "gpu"}), 2), "gpu");
  if (cuda::device_count() > 0) GTEST_SKIP() << "there is a device";
  for (const std::string& message :
       {error(run_with({"--device", "cuda"})), error(eval_with({"--device", "cuda"}))}) {
    EXPECT_SAYS(message, "--device cuda: ");
    EXPECT_SAYS(message, "leave --device out");
    EXPECT_SAYS(message, cuda::compiled() ? "no device" : "without the CUDA backend");
  }
}

TEST_F(CliErrors, Policies) {
  EXPECT_SAYS(error(run_with({"--policy", "balancd"}), 2), "did you mean 'balanced'");
  EXPECT_SAYS(error(run_with({"--policy", ""}), 2), "empty");
  EXPECT_SAYS(error(run_with({"--policy", "@/no/such/policy.json"}), 2), "policy.json");
  EXPECT_SAYS(error(run_with({"-ctk", "q3_k"}), 2), "q3_k");
  EXPECT_SAYS(error(eval_with({"--policies", "exact,nonsense"}), 2), "nonsense");
  EXPECT_SAYS(error(eval_with({"--reference", "truth"}), 2), "truth");
  EXPECT_SAYS(error({"policies", "none"}, 2), "none");
  // Right by itself, wrong for this model, which has one layer.
  EXPECT_SAYS(error(run_with({"--policy", "0-3:fp8"})), "layer");
}

TEST_F(CliErrors, Files) {
  EXPECT_SAYS(error({"run", "-m", box_.path("none.gguf"), "-p", "x"}), "none.gguf");
  EXPECT_SAYS(error({"run", "-m", "/tmp", "-p", "x"}), "/tmp");
  EXPECT_SAYS(error({"run", "-m", model_, "-f", box_.path("none.txt"), "-p", "x"}), "none.txt");
  EXPECT_SAYS(error({"run", "-m", model_, "-f", "/tmp", "-p", "x"}), "/tmp");
  EXPECT_SAYS(error({"run", "-m", model_, "-f", box_.write("empty", ""), "-p", "x"}), "empty");
  EXPECT_SAYS(error({"calibrate", "-m", box_.path("none.gguf")}), "none.gguf");
  EXPECT_SAYS(error({"eval", "-m", model_, "-f", box_.path("none.txt")}), "none.txt");
  // A name with a line break must not make two lines.
  EXPECT_SAYS(error({"run", "-m", model_, "-f", "no\nsuch", "-p", "x"}), "no such");
}

TEST_F(CliErrors, ResultsThatCannotBeWritten) {
  const Outcome r = box_.run(
      eval_with({"-c", "128", "--policies", "exact", "--save", box_.path("no/folder/x.json")}));
  EXPECT_EQ(r.code, 1);
  EXPECT_SAYS(r.err, "no/folder/x.json");
}

TEST_F(CliErrors, BrokenModels) {
  const auto with = [&](const std::string& bytes) {
    return error({"run", "-m", box_.write("bad.gguf", bytes), "-p", "x"});
  };
  EXPECT_SAYS(with(""), "bad.gguf");
  EXPECT_SAYS(with("not a model at all, but some text"), "bad.gguf");
  for (const size_t kept :
       {size_t{10}, size_t{100}, tiny_.bytes.size() / 2, tiny_.bytes.size() - 1}) {
    EXPECT_SAYS(with(tiny_.bytes.substr(0, kept)), "bad.gguf");
  }
  std::string absurd = tiny_.bytes;
  absurd.replace(8, 8, std::string(8, '\x7f'));  // the number of tensors
  EXPECT_SAYS(with(absurd), "bad.gguf");

  const auto edited = [&](const TinyEdit& edit) { return with(tiny_with_tokenizer(edit).bytes); };
  EXPECT_SAYS(edited({.keys =
                          [](GgufWriter& w) {
                            w.erase("general.architecture").string("general.architecture", "mamba");
                          }}),
              "mamba");
  EXPECT_SAYS(edited({.keys = [](GgufWriter& w) { w.erase("llama.block_count"); }}), "block_count");
  EXPECT_SAYS(edited({.keys = [](GgufWriter& w) { w.erase("tokenizer.ggml.model"); }}),
              "tokenizer.ggml.model");
  EXPECT_SAYS(edited({.tensors = [](auto& t) { t.erase("blk.0.ffn_up.weight"); }}),
              "blk.0.ffn_up.weight");
  EXPECT_SAYS(edited({.tensors = [](auto& t) { t["blk.0.attn_k.weight"][5] = std::nanf(""); }}),
              "blk.0.attn_k.weight");
}

TEST_F(CliErrors, ContextAndText) {
  const std::string above = error(run_with({"-c", "2000"}));
  EXPECT_SAYS(above, "2000");
  EXPECT_SAYS(above, "1024");
  EXPECT_SAYS(error(eval_with({"-c", "2000"})), "1024");

  const std::string short_text = error(eval_with({"-c", "600"}));
  EXPECT_SAYS(short_text, "500 tokens");
  EXPECT_SAYS(short_text, "600");
  EXPECT_SAYS(error(eval_with({"-c", "2"})), "2 tokens");
  EXPECT_SAYS(error(eval_with({"-c", "256", "--needles", "16"})), "needles");

  const std::string too_long = error(run_with({"-c", "300"}));
  EXPECT_SAYS(too_long, "300");
  EXPECT_SAYS(too_long, "at most 1024");
}

TEST_F(CliErrors, Memory) {
  EXPECT_SAYS(error(run_with({"--max-kv", "2KB"})), "2048");
  EXPECT_SAYS(error(eval_with({"-c", "256", "--max-kv", "2KB"})), "2048");
}

#if defined(__SANITIZE_ADDRESS__)
#define THRIFTATTN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define THRIFTATTN_ASAN 1
#endif
#endif

// A limit on the address space stands for a machine without the memory.
TEST_F(CliErrors, AllocationThatFails) {
#ifdef THRIFTATTN_ASAN
  GTEST_SKIP() << "the sanitizer's shadow memory needs all of the address space";
#endif
  const std::string big = box_.write("big.txt", sample_text(size_t{200} << 20));
  const Outcome r =
      box_.run({"run", "-m", model_, "-f", big, "-p", "x", "-t", "1"}, {}, rlim_t{600} << 20);
  EXPECT_EQ(r.code, 1);
  EXPECT_SAYS(r.err, "thriftattn: error: out of memory");
  EXPECT_EQ(r.err.find('\n'), r.err.size() - 1) << r.err;
}

TEST_F(CliErrors, EqualizerOfAnotherModelIsRefused) {
  const Outcome first = box_.run({"calibrate", "-m", model_});
  ASSERT_EQ(first.code, 0) << first.err;
  std::string kept;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(box_.path("cache"))) {
    if (entry.is_regular_file()) kept = entry.path().string();
  }
  ASSERT_NE(kept, "");
  std::ofstream(kept) << "{}";
  EXPECT_SAYS(error(run_with({"--policy", "balanced"})), "calibrate");
  const Outcome without = box_.run(run_with({"--policy", "balanced", "--no-equalize", "-n", "1"}));
  EXPECT_EQ(without.code, 0) << without.err;
}

}  // namespace
}  // namespace thriftattn::test
