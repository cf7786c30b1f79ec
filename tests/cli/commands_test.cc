// The commands on a small random model: what goes to which stream, in which form.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/command.h"
#include "cli/utf8_stream.h"

namespace thriftattn::test {
namespace {

using nlohmann::json;

class CliCommands : public testing::Test {
 protected:
  Outcome run(std::vector<std::string> more) {
    std::vector<std::string> all = {"run", "-m", model_, "-f", text_, "-p", "What?", "-n", "8"};
    all.insert(all.end(), more.begin(), more.end());
    return box_.run(all);
  }
  json run_json(std::vector<std::string> more) {
    more.insert(more.end(), {"-o", "json"});
    const Outcome r = run(more);
    EXPECT_EQ(r.code, 0) << r.err;
    return json::parse(r.out);
  }

  Sandbox box_;
  TinyModel tiny_ = tiny_with_tokenizer();
  std::string model_ = box_.write("tiny.gguf", tiny_.bytes);
  std::string text_ = box_.write("text.txt", sample_text(700));
};

TEST_F(CliCommands, HelpAndVersion) {
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{{"--help"},
                                             {"run", "--help"},
                                             {"eval", "--help"},
                                             {"calibrate", "--help"},
                                             {"policies", "--help"},
                                             {"formats", "--help"},
                                             {"bench", "--help"}}) {
    const Outcome r = box_.run(args);
    EXPECT_EQ(r.code, 0);
    EXPECT_EQ(r.err, "");
    EXPECT_NE(r.out.find("Examples:"), std::string::npos) << args[0];
  }
  const Outcome version = box_.run({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_EQ(version.out.substr(0, 11), "thriftattn ");
}

TEST_F(CliCommands, RunPutsTheAnswerOnStdoutAndTheSummaryOnStderr) {
  const Outcome r = run({"--policy", "balanced", "--raw"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_TRUE(r.out.ends_with('\n'));
  EXPECT_EQ(r.out.find("KV cache"), std::string::npos);
  for (const char* part : {"prompt, 8 answer", "chunk 512", "prefill", "decode", "KV cache",
                           "residual", "stored per K/V element", "promoted", "guarantee",
                           "equaliser measured now", "policy    balanced"}) {
    EXPECT_NE(r.err.find(part), std::string::npos) << part << "\n" << r.err;
  }
  EXPECT_EQ(run({"--policy", "balanced", "--raw"}).out, r.out);  // greedy: the same every time
}

TEST_F(CliCommands, RunAsJson) {
  const json r = run_json({"--policy", "thrifty", "--raw"});
  EXPECT_EQ(r["policy"], "thrifty");
  EXPECT_EQ(r["prompt_tokens"], 705);
  EXPECT_EQ(r["answer_tokens"], 8);
  EXPECT_EQ(r["chunk"], 512);
  EXPECT_EQ(r["context"], 1024);
  EXPECT_EQ(r["prefill"]["tokens"], 705);
  EXPECT_EQ(r["decode"]["tokens"], 7);
  EXPECT_GT(r["decode"]["tokens_per_second"], 0.0);
  int64_t planes = 0;
  for (const auto& item : r["kv_planes"].items()) planes += item.value().get<int64_t>();
  EXPECT_EQ(r["kv_bytes"], planes);
  EXPECT_LT(r["kv_bytes"], r["kv_bytes_bf16"]);
  EXPECT_LE(r["guarantee"]["max_mass_skipped"], 0.0003);
  EXPECT_TRUE(r["answer"].is_string());

  const json none = run_json({"-n", "0", "--raw"});
  EXPECT_EQ(none["answer"], "");
  EXPECT_TRUE(none["bits_read_per_element"].is_null());
}

TEST_F(CliCommands, CacheTypesAreLlamaCppsFlags) {
  EXPECT_EQ(run_json({"-ctk", "q8_0", "-ctv", "q4_0"})["policy"], "k=q8_0,v=q4_0");
  EXPECT_EQ(run_json({"--policy", "exact", "-ctk", "fp8"})["policy"], "exact,k=fp8");
  EXPECT_EQ(run_json({"--policy", "exact"})["equalizer"], "not used by this policy");
  EXPECT_EQ(run_json({"--no-equalize"})["equalizer"], "off (--no-equalize)");
}

TEST_F(CliCommands, StopsAtTheContextsEnd) {
  const json r = run_json({"-c", "720", "-n", "-1", "--raw"});
  EXPECT_EQ(r["stop"], "the context is full");
  EXPECT_EQ(r["answer_tokens"], 16);
}

TEST_F(CliCommands, SamplingFollowsItsSeed) {
  const auto sample = [&](const char* seed) {
    return run_json({"--temp", "1.5", "-s", seed, "--raw"})["answer"];
  };
  EXPECT_EQ(sample("1"), sample("1"));
  EXPECT_NE(sample("1"), sample("2"));
}

TEST_F(CliCommands, DocumentFromStandardInput) {
  const Outcome a = box_.run({"run", "-m", model_, "-f", "-", "-p", "What?", "-n", "4", "--raw"},
                             sample_text(700));
  EXPECT_EQ(a.code, 0) << a.err;
  EXPECT_EQ(a.out, run({"-n", "4", "--raw"}).out);
}

TEST_F(CliCommands, ThreadsDoNotChangeTheAnswer) {
  EXPECT_EQ(run({"-t", "1", "--raw"}).out, run({"-t", "2", "--raw"}).out);
}

TEST_F(CliCommands, EvalInEveryForm) {
  const std::vector<std::string> base = {
      "eval", "-m", model_, "-f", text_, "-c", "512", "--policies", "exact,balanced,promote=0.05"};
  const auto with = [&](std::vector<std::string> more) {
    auto all = base;
    all.insert(all.end(), more.begin(), more.end());
    const Outcome r = box_.run(all);
    EXPECT_EQ(r.code, 0) << r.err;
    return r;
  };
  const Outcome as_json = with({"-o", "json"});
  EXPECT_EQ(as_json.err, "");  // a short run without a terminal says nothing
  const json rows = json::parse(as_json.out);
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0]["policy"], "exact");
  EXPECT_EQ(rows[1]["policy"], "balanced,promote=0.05");
  EXPECT_EQ(rows[1]["tokens"], 512);
  EXPECT_TRUE(rows[1]["needle_recall"].is_null());

  const Outcome as_csv = with({"-o", "csv"});
  EXPECT_EQ(as_csv.out.substr(0, 7), "policy,");
  const Outcome as_table = with({"--save", box_.path("rows.json")});
  EXPECT_NE(as_table.out.find("KL mean"), std::string::npos);
  EXPECT_NE(as_table.err.find("255 scored"), std::string::npos);
  EXPECT_EQ(json::parse(Sandbox::read(box_.path("rows.json")))[0]["kl_mean"], rows[0]["kl_mean"]);
}

TEST_F(CliCommands, EvalWithNeedles) {
  const std::string text = box_.write("longer.txt", sample_text(1100));
  const Outcome r = box_.run({"eval", "-m", model_, "-f", text, "-c", "1024", "--needles", "2",
                              "--policies", "exact", "-o", "json"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(json::parse(r.out)[0]["needle_recall"], 0.0);
}

TEST_F(CliCommands, CalibrateOnceThenAgainByForce) {
  const Outcome first = box_.run({"calibrate", "-m", model_});
  EXPECT_EQ(first.code, 0) << first.err;
  EXPECT_NE(first.out.find("measured"), std::string::npos);
  EXPECT_NE(first.out.find(box_.path("cache")), std::string::npos);
  EXPECT_NE(box_.run({"calibrate", "-m", model_}).out.find("already there"), std::string::npos);
  EXPECT_NE(box_.run({"calibrate", "-m", model_, "--force"}).out.find("measured"),
            std::string::npos);
}

TEST_F(CliCommands, Policies) {
  const Outcome all = box_.run({"policies"});
  EXPECT_EQ(all.code, 0) << all.err;
  for (const char* name : {"f32", "exact", "thrifty", "balanced", "swift", "max-savings",
                           "max-savings-mx", "paper-budget"}) {
    EXPECT_NE(all.out.find(std::string(name) + "\n"), std::string::npos) << name;
  }
  const Outcome one = box_.run({"policies", "balanced", "-m", model_});
  EXPECT_NE(one.out.find("layer"), std::string::npos) << one.out;
  const Outcome text = box_.run({"policies", "swift", "-o", "json"});
  const std::string file = box_.write("mine.json", text.out);
  const Outcome again = box_.run({"policies", "@" + file, "-o", "json"});
  EXPECT_EQ(json::parse(again.out)["rules"], json::parse(text.out)["rules"]);
}

// The ladder: every format, with errors that lie between known bounds and fall with the bits.
TEST_F(CliCommands, Formats) {
  const Outcome table = box_.run({"formats"});
  EXPECT_EQ(table.code, 0) << table.err;
  EXPECT_TRUE(table.out.starts_with("page format version 2; "));
  const std::string docs = Sandbox::read(std::string(THRIFTATTN_SOURCE_DIR) + "/docs/formats.md");
  EXPECT_NE(docs.find("\n" + table.out), std::string::npos) << "docs/formats.md has another ladder";
  const json all = json::parse(box_.run({"formats", "-o", "json"}).out);
  EXPECT_EQ(all["page_format_version"], 2);
  EXPECT_EQ(all["formats"].size(), 13u);
  std::map<std::string, json> by_name;
  for (const json& row : all["formats"]) {
    const std::string name = row["format"];
    by_name[name] = row;
    EXPECT_NE(table.out.find("\n" + name + " "), std::string::npos) << name;
    EXPECT_EQ(row["rms_student_t3_rotated"].is_null(), !row["layered"].get<bool>()) << name;
  }
  const auto error = [&](const char* name, const char* key) {
    return by_name.at(name)[key].get<double>();
  };
  EXPECT_EQ(error("f32", "rms_gaussian"), 0.0);
  const std::vector<const char*> worse = {"fp16",     "bf16", "q8_0",  "nvfp4x2", "fp8_e4m3",
                                          "fp8_e5m2", "q4_0", "nvfp4", "mxfp4",   "int3"};
  for (size_t i = 1; i < worse.size(); ++i) {
    EXPECT_GT(error(worse[i], "rms_gaussian"), error(worse[i - 1], "rms_gaussian")) << worse[i];
  }
  EXPECT_NEAR(error("nvfp4", "rms_gaussian"), 0.0875, 0.0015);
  EXPECT_NEAR(error("q4_0", "rms_gaussian"), 0.0862, 0.0015);
  EXPECT_NEAR(error("fp8_e4m3", "rms_gaussian"), 0.0258, 0.0005);
  // Heavy tails cost the integers most; the rotation takes that back.
  EXPECT_GT(error("q4_0", "rms_student_t3"), 1.3 * error("q4_0", "rms_gaussian"));
  EXPECT_LT(error("int3", "rms_student_t3_rotated"), 0.9 * error("int3", "rms_student_t3"));
  EXPECT_EQ(by_name.at("int3")["bits_per_element"], 3.25);

  const std::string csv = box_.run({"formats", "-o", "csv"}).out;
  EXPECT_TRUE(csv.starts_with("page_format_version,format,aliases,bits_per_element,"));
  EXPECT_NE(csv.find("\n2,q8_0,int8,8.5,8,1,32,"), std::string::npos) << csv;
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 14);
  EXPECT_EQ(box_.run({"formats", "-o", "yaml"}).code, 2);
}

TEST(Utf8Stream, HoldsHalfCharacters) {
  const std::string text = "a\u00e9\u20ac\U0001F600z";
  cli::Utf8Stream stream;
  std::string out;
  for (const char c : text) {
    const std::string piece = stream.push(std::string(1, c));
    // Every piece is whole characters: none begins with a continuation byte.
    if (piece.empty()) continue;
    EXPECT_NE(static_cast<unsigned char>(piece[0]) & 0xC0, 0x80);
    out += piece;
  }
  EXPECT_EQ(out, text);
  EXPECT_EQ(stream.flush(), "");
}

TEST(Utf8Stream, PassesOnWhatIsNotUtf8) {
  cli::Utf8Stream stream;
  EXPECT_EQ(stream.push("\xff\xfe"), "\xff\xfe");
  EXPECT_EQ(stream.push("\x80\x80\x80\x80"), "\x80\x80\x80\x80");
  EXPECT_EQ(stream.push("x\xe2\x82"), "x");
  EXPECT_EQ(stream.flush(), "\xe2\x82");
  EXPECT_EQ(stream.push("y"), "y");
}

}  // namespace
}  // namespace thriftattn::test
