// What `run` can do besides one question: series and conversations, stop texts, prompt caches,
// memory limits, stretched contexts.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "cli/command.h"
#include "cli/stop_texts.h"

namespace thriftattn::test {
namespace {

using nlohmann::json;

#define EXPECT_SAYS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

const std::string kDemo = THRIFTATTN_SOURCE_DIR "/models/demo/thrift-demo.gguf";

std::string ask(const std::string& name) { return "What is the access code of " + name + "?"; }

// The demo model on a short document: it answers, and its answers end by themselves.
class CliRun : public testing::Test {
 protected:
  std::vector<std::string> arguments(std::vector<std::string> more) const {
    std::vector<std::string> all = {"run", "-m", kDemo, "-f", text_};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  Outcome run(std::vector<std::string> more, const std::string& input = {}) const {
    const Outcome r = box_.run(arguments(std::move(more)), input);
    EXPECT_EQ(r.code, 0) << r.err;
    return r;
  }
  // The line after "thriftattn: error: ".
  std::string error(std::vector<std::string> more, int code = 1,
                    const std::string& input = {}) const {
    const Outcome r = box_.run(arguments(std::move(more)), input);
    EXPECT_EQ(r.code, code) << r.err;
    EXPECT_EQ(r.out, "");
    EXPECT_TRUE(r.err.starts_with("thriftattn: error: ")) << r.err;
    EXPECT_EQ(r.err.find('\n'), r.err.size() - 1) << r.err;
    return r.err;
  }

  // Prose without numbers, which would confuse so small a model.
  static std::string prose(size_t from, size_t bytes) {
    return Sandbox::read(THRIFTATTN_SOURCE_DIR "/models/demo/eval.txt").substr(from, bytes);
  }

  Sandbox box_;
  std::string text_ = box_.write(
      "text.txt", prose(0, 1200) + "\nThe access code of Amber Falcon is 48213.\n" +
                      prose(1200, 2000) + "\nThe access code of Quiet Comet is 15384.\n");
};

TEST_F(CliRun, SeriesOfQuestionsEqualsQuestionsOneByOne) {
  for (const char* policy : {"balanced", "thrifty", "exact"}) {
    const std::string a = run({"-p", ask("Amber Falcon"), "--policy", policy}).out;
    const std::string b = run({"-p", ask("Quiet Comet"), "--policy", policy}).out;
    EXPECT_EQ(a, "The access code of Amber Falcon is 48213.\n");
    const std::string lines = ask("Amber Falcon") + "\n\n   \n" + ask("Quiet Comet");
    const Outcome piped = run({"-i", "--policy", policy}, lines);
    EXPECT_EQ(piped.out, a + b);
    EXPECT_SAYS(piped.err, "2 questions; the last: the model ended it");
    const Outcome first =
        run({"-i", "-p", ask("Quiet Comet"), "--policy", policy}, ask("Amber Falcon") + "\r\n");
    EXPECT_EQ(first.out, b + a);
  }
}

// The document stays as it was: the same question gives the same bytes, wherever it stands.
TEST_F(CliRun, SeriesAsJsonLines) {
  const std::string lines =
      ask("Quiet Comet") + "\n" + ask("Amber Falcon") + "\n" + ask("Quiet Comet") + "\n";
  const Outcome r = run({"-i", "-o", "json"}, lines);
  std::vector<json> answers;
  std::istringstream out(r.out);
  for (std::string line; std::getline(out, line);) answers.push_back(json::parse(line));
  ASSERT_EQ(answers.size(), 3u);
  EXPECT_EQ(answers[1]["question"], ask("Amber Falcon"));
  EXPECT_EQ(answers[0]["answer"], "The access code of Quiet Comet is 15384.");
  for (const char* same : {"answer", "guarantee", "bits_read_per_element", "kv_bytes",
                           "kv_bytes_bf16", "prompt_tokens"}) {
    EXPECT_EQ(answers[0][same], answers[2][same]) << same;
  }
  const json one = json::parse(run({"-p", ask("Quiet Comet"), "-o", "json"}).out);
  EXPECT_EQ(one["guarantee"], answers[0]["guarantee"]);
  EXPECT_EQ(one["kv_bytes_bf16"], answers[0]["kv_bytes_bf16"]);
  EXPECT_EQ(one["prompt_tokens"], answers[0]["prompt_tokens"]);
  EXPECT_LT(answers[0]["prefill"]["tokens"], 30);  // the question alone
  EXPECT_EQ(answers[0]["document"]["tokens"].get<int64_t>() +
                answers[0]["prefill"]["tokens"].get<int64_t>(),
            one["prefill"]["tokens"]);
}

TEST_F(CliRun, ConversationGoesOn) {
  const std::string lines = ask("Quiet Comet") + "\n" + ask("Amber Falcon") + "\n";
  const Outcome r = run({"-cnv", "-o", "json"}, lines);
  std::vector<json> answers;
  std::istringstream out(r.out);
  for (std::string line; std::getline(out, line);) answers.push_back(json::parse(line));
  ASSERT_EQ(answers.size(), 2u);
  EXPECT_EQ(answers[1]["answer"], "The access code of Amber Falcon is 48213.");
  // Document, question and answer are still there.
  const int64_t past =
      answers[0]["prompt_tokens"].get<int64_t>() + answers[0]["decode"]["tokens"].get<int64_t>();
  EXPECT_EQ(answers[1]["prompt_tokens"], past + answers[1]["prefill"]["tokens"].get<int64_t>());
  // A limit leaves the last token unfed; it is fed before the next question.
  const Outcome cut = run({"--conversation", "-n", "3", "-o", "json"}, lines);
  answers.clear();
  std::istringstream again(cut.out);
  for (std::string line; std::getline(again, line);) answers.push_back(json::parse(line));
  ASSERT_EQ(answers.size(), 2u);
  EXPECT_EQ(answers[0]["answer_tokens"], 3);
  EXPECT_EQ(answers[0]["decode"]["tokens"], 2);
}

TEST_F(CliRun, OneBadQuestionDoesNotEndTheSeries) {
  const std::string lines = std::string(40000, 'x') + "\n" + ask("Amber Falcon") + "\n";
  const Outcome r = box_.run(arguments({"-i", "-c", "3000"}), lines);
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(r.out, "The access code of Amber Falcon is 48213.\n");
  EXPECT_SAYS(r.err, "thriftattn: error: document and question take");
  EXPECT_SAYS(r.err, "14 answer (the model ended it)");
}

TEST_F(CliRun, StandardInputHasOneUse) {
  EXPECT_SAYS(box_.run({"run", "-m", kDemo, "-f", "-", "-i"}, "x").err, "both the document (-f -)");
  const Outcome piped =
      box_.run({"run", "-m", kDemo, "-f", "-", "-p", ask("Amber Falcon")}, Sandbox::read(text_));
  EXPECT_EQ(piped.out, "The access code of Amber Falcon is 48213.\n") << piped.err;
  const Outcome none = box_.run({"run", "-m", kDemo, "-i"}, "");
  EXPECT_EQ(none.code, 0);
  EXPECT_EQ(none.out, "");
  EXPECT_SAYS(none.err, "nothing was asked");
}

TEST_F(CliRun, StopTextsAcrossTokens) {
  const auto stopped = [&](std::vector<std::string> stops) {
    std::vector<std::string> all = {"-p", ask("Amber Falcon")};
    for (const std::string& stop : stops) all.insert(all.end(), {"--stop", stop});
    return run(all);
  };
  EXPECT_EQ(stopped({" is 48"}).out, "The access code of Amber Falcon\n");
  EXPECT_SAYS(stopped({" is 48"}).err, "(--stop ' is 48')");
  EXPECT_EQ(stopped({"no such text", "482", "Falcon is 4"}).out, "The access code of Amber \n");
  EXPECT_EQ(stopped({"13.!", "213.\n"}).out, "The access code of Amber Falcon is 48213.\n");
  EXPECT_EQ(stopped({"The access"}).out, "\n");
  EXPECT_EQ(stopped({""}).out, "The access code of Amber Falcon is 48213.\n");
  const json r = json::parse(run({"-p", ask("Amber Falcon"), "--stop", "code", "-o", "json"}).out);
  EXPECT_EQ(r["answer"], "The access ");
  EXPECT_EQ(r["stop"], "--stop 'code'");
}

TEST(StopTexts, NothingOfThemIsPassedOn) {
  const std::string text = "abcabcabdabcabcab";
  // Every cut into pieces of every size, against a search in the whole text.
  for (const std::vector<std::string>& stops : std::vector<std::vector<std::string>>{
           {"abd"}, {"abcabd"}, {"cabda"}, {"zz", "bdab"}, {"dd"}, {"ab", "abc"}, {"cabcabx"}}) {
    size_t end = std::string::npos;
    for (const std::string& stop : stops) end = std::min(end, text.find(stop));
    for (size_t size = 1; size <= text.size(); ++size) {
      cli::StopTexts finder(stops);
      std::string out;
      for (size_t at = 0; at < text.size() && !finder.found(); at += size) {
        out += finder.push(text.substr(at, size));
        EXPECT_TRUE(text.substr(0, end).starts_with(out)) << out;
      }
      out += finder.flush();
      EXPECT_EQ(out, text.substr(0, end)) << stops[0] << ", pieces of " << size;
      EXPECT_EQ(finder.found().has_value(), end != std::string::npos);
    }
  }
}

TEST_F(CliRun, PromptCacheGivesTheSameAnswer) {
  for (const char* policy : {"balanced", "thrifty", "q8_0"}) {
    const std::string file = box_.path(std::string(policy) + ".kv");
    const std::vector<std::string> common = {"--policy", policy, "--raw", "-o", "json", "-n", "40"};
    const auto answer = [&](std::vector<std::string> more) {
      more.insert(more.end(), common.begin(), common.end());
      more.insert(more.end(), {"-p", ask("Quiet Comet")});
      return json::parse(run(more).out);
    };
    const json without = answer({});
    const json saved = answer({"--prompt-cache", file});
    const json loaded = answer({"--prompt-cache", file});
    EXPECT_FALSE(without["document"].contains("prompt_cache"));
    EXPECT_EQ(saved["document"]["prompt_cache"]["loaded"], false);
    EXPECT_EQ(loaded["document"]["prompt_cache"]["loaded"], true);
    EXPECT_EQ(loaded["document"]["prompt_cache"]["bytes"],
              static_cast<int64_t>(std::filesystem::file_size(file)));
    EXPECT_LT(loaded["prefill"]["tokens"], 30);
    for (const char* same : {"answer", "answer_tokens", "guarantee", "bits_read_per_element",
                             "bits_stored_per_element", "kv_bytes", "prompt_tokens"}) {
      EXPECT_EQ(without[same], saved[same]) << same;
      EXPECT_EQ(without[same], loaded[same]) << same;
    }
    EXPECT_EQ(without["answer_tokens"], 40);
  }
}

TEST_F(CliRun, PromptCacheIsRefusedWithTheReason) {
  const std::string file = box_.path("document.kv");
  const std::vector<std::string> base = {"-p", ask("Quiet Comet"), "--prompt-cache", file};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), base.begin(), base.end());
    return more;
  };
  const Outcome kept = run(with({}));
  EXPECT_SAYS(kept.err, "kept in " + file);
  EXPECT_SAYS(run(with({})).err, "loaded from " + file);
  // Other questions of the same document use it too.
  EXPECT_EQ(run({"-p", ask("Amber Falcon"), "--prompt-cache", file}).out,
            "The access code of Amber Falcon is 48213.\n");
  EXPECT_SAYS(error(with({"--policy", "thrifty"})), "made under policy balanced");
  EXPECT_SAYS(error(with({"--chunk", "256"})), "--chunk 512, this run has 256");
  EXPECT_SAYS(error(with({"--no-equalize"})), "equaliser");
  EXPECT_SAYS(error(with({"--compute", "f32"})), "weights");
  EXPECT_SAYS(error(with({"-f", box_.write("other.txt", sample_text(500))})), "another document");
  const std::string good = Sandbox::read(file);
  box_.write("document.kv", good.substr(0, good.size() / 2));
  EXPECT_SAYS(error(with({})), "ends early");
  box_.write("document.kv", "some notes");
  EXPECT_SAYS(error(with({})), "document.kv");
  box_.write("document.kv", "some notes that are longer than sixteen bytes");
  EXPECT_SAYS(error(with({})), "not a prompt cache");
  EXPECT_SAYS(error({"-p", "x", "--prompt-cache", box_.path("no/folder/x.kv")}), "no/folder/x.kv");
  const Outcome no_document = box_.run({"run", "-m", kDemo, "-p", "x", "--prompt-cache", file});
  EXPECT_EQ(no_document.code, 2);
  EXPECT_SAYS(no_document.err, "-f");
}

TEST_F(CliRun, KvMemoryIsCheckedBeforeReading) {
  const json r = json::parse(run({"-p", ask("Quiet Comet"), "--policy", "f32", "-o", "json"}).out);
  const auto limit = std::to_string(r["kv_bytes"].get<int64_t>() / 3);
  const std::string message =
      error({"-p", ask("Quiet Comet"), "--policy", "f32", "--kv-memory", limit});
  EXPECT_SAYS(message, "under f32, --kv-memory allows");
  EXPECT_SAYS(message, "(" + limit + " bytes)");
  EXPECT_SAYS(message, "tokens fit under this policy, and all fits under ");
  EXPECT_SAYS(message, "q8_0 (");
  EXPECT_EQ(message.find("exact ("), std::string::npos) << message;
  EXPECT_SAYS(error({"-p", "x", "--kv-memory", "1KiB"}), "0 tokens fit under this policy, and no");
  // What it names fits.
  EXPECT_EQ(run({"-p", ask("Quiet Comet"), "--policy", "q8_0", "--kv-memory", limit}).out,
            "The access code of Quiet Comet is 15384.\n");
  const Outcome series =
      box_.run(arguments({"-i", "--policy", "f32", "--kv-memory", limit}), "x\n");
  EXPECT_EQ(series.code, 1);
}

TEST_F(CliRun, StretchedContext) {
  EXPECT_SAYS(error({"-p", "x", "-c", "20000"}), "--rope-scaling yarn --rope-scale 2");
  const json r =
      json::parse(run({"-p", ask("Amber Falcon"), "-c", "20000", "--rope-scaling", "yarn",
                       "--rope-scale", "2", "--yarn-orig-ctx", "16384", "-o", "json"})
                      .out);
  EXPECT_EQ(r["context"], 20000);
  EXPECT_EQ(r["rope_scaling"], "YaRN, 2 times 16384 tokens");
  EXPECT_EQ(r["answer"], "The access code of Amber Falcon is 48213.");
  const Outcome linear =
      run({"-p", "x", "-n", "1", "--rope-scaling", "linear", "--rope-scale", "1.5"});
  EXPECT_SAYS(linear.err, "context 24576");
  EXPECT_SAYS(linear.err, "linear, 1.5 times");
  EXPECT_SAYS(error({"-p", "x", "--rope-scale", "2"}, 2), "--rope-scaling yarn");
  EXPECT_SAYS(error({"-p", "x", "--rope-scaling", "yarn"}, 2), "--rope-scale F");
  EXPECT_SAYS(error({"-p", "x", "--rope-scaling", "none", "--rope-scale", "2"}, 2), "no meaning");
  EXPECT_SAYS(
      error({"-p", "x", "--rope-scaling", "linear", "--rope-scale", "2", "--yarn-orig-ctx", "10"},
            2),
      "no meaning");
  EXPECT_SAYS(error({"-p", "x", "--rope-scaling", "dynamic"}, 2), "dynamic");
  const Outcome eval =
      box_.run({"eval", "-m", kDemo, "-f", text_, "-c", "512", "--policies", "exact",
                "--rope-scaling", "yarn", "--rope-scale", "2", "-o", "json"});
  const Outcome plain = box_.run(
      {"eval", "-m", kDemo, "-f", text_, "-c", "512", "--policies", "exact", "-o", "json"});
  EXPECT_EQ(eval.code, 0) << eval.err;
  EXPECT_NE(json::parse(eval.out)[0]["perplexity"], json::parse(plain.out)[0]["perplexity"]);
}

TEST_F(CliRun, AttentionAndDenseTimesApart) {
  const json r = json::parse(run({"-p", ask("Amber Falcon"), "-o", "json"}).out);
  for (const char* phase : {"prefill", "decode"}) {
    const double attention = r[phase]["attention_seconds"];
    const double dense = r[phase]["dense_seconds"];
    EXPECT_GT(attention, 0.0) << phase;
    EXPECT_GT(dense, 0.0) << phase;
    EXPECT_LE(attention + dense, r[phase]["seconds"].get<double>() * 1.0001) << phase;
  }
  const std::string text = run({"-p", ask("Amber Falcon")}).err;
  const size_t decode = text.find("\ndecode ");
  ASSERT_NE(decode, std::string::npos);
  EXPECT_SAYS(text.substr(decode, text.find('\n', decode + 1) - decode), ": attention ");
}

TEST(CliVersion, SaysWhatRuns) {
  const Outcome r = Sandbox().run({"--version"});
  EXPECT_EQ(r.code, 0);
  EXPECT_TRUE(r.out.starts_with("thriftattn ")) << r.out;
  for (const char* part : {"\nSIMD ", " runs; available: ", "\nBF16 ", "\noneDNN ",
                           "\npage format  2", "\nprompt cache 1"}) {
    EXPECT_SAYS(r.out, part);
  }
  // The chosen target is the first of the available ones.
  const size_t simd = r.out.find("\nSIMD ") + 6;
  const std::string line = r.out.substr(simd, r.out.find('\n', simd) - simd);
  std::istringstream words(line);
  std::string chosen, first;
  words >> chosen >> first >> first >> first;
  EXPECT_EQ(first.substr(0, first.find(',')), chosen) << line;
}

}  // namespace
}  // namespace thriftattn::test
