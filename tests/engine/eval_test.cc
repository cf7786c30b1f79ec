// The lockstep evaluation on small random models, and the forms of its report.
#include "engine/eval.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>

#include "engine/eval_report.h"
#include "engine/session.h"
#include "engine/tiny_model.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

constexpr int64_t kContext = 700;
constexpr double kTableBits = 0.02;  // block tables are counted, over small pages here

class Eval : public testing::Test {
 protected:
  Eval() {
    std::mt19937 random(11);
    for (int i = 0; i < 1000; ++i) tokens_.push_back(static_cast<int32_t>(random() % 256));
  }

  EvalOptions options(std::initializer_list<const char*> policies) const {
    EvalOptions o;
    o.context = kContext;
    for (const char* p : policies) o.policies.push_back(parse_policy(p));
    o.reference = preset("f32");
    return o;
  }

  test::TinyModel tiny_ = test::make_tiny({.vocab = 256, .context = 1024});
  std::shared_ptr<const Model> model_ = tiny_.load();
  std::vector<int32_t> tokens_;
};

TEST_F(Eval, TheSamePolicyIsAtZero) {
  // Listed as such it shares the reference's run; as "*:f32" it is a run of its own.
  const auto rows = evaluate(model_, tokens_, options({"f32", "*:f32"}));
  ASSERT_EQ(rows.size(), 2u);
  for (const EvalRow& row : rows) {
    EXPECT_EQ(row.quality.kl_mean, 0.0);
    EXPECT_EQ(row.quality.kl_p999, 0.0);
    EXPECT_EQ(row.quality.delta_nll, 0.0);
    EXPECT_EQ(row.quality.top1_agreement, 1.0);
    EXPECT_EQ(row.quality.perplexity, rows[0].quality.perplexity);
    EXPECT_GE(row.bits_read_per_element, 32.0);
    EXPECT_LT(row.bits_read_per_element, 32.0 + kTableBits);
    EXPECT_EQ(row.tokens, kContext);
    EXPECT_GT(row.seconds, 0.0);
    EXPECT_FALSE(row.needle_recall.has_value());
  }
  EXPECT_EQ(rows[0].policy, "f32");
  EXPECT_EQ(rows[1].policy, "*:f32");
}

TEST_F(Eval, WorseFormatsAreFurtherAway) {
  const auto rows = evaluate(model_, tokens_, options({"exact", "q8_0", "fp8", "q4_0"}));
  EXPECT_GT(rows[0].quality.kl_mean, 0.0);
  EXPECT_LT(rows[0].quality.kl_mean, rows[2].quality.kl_mean);
  EXPECT_LT(rows[1].quality.kl_mean, rows[2].quality.kl_mean);
  EXPECT_LT(rows[2].quality.kl_mean, rows[3].quality.kl_mean);
  for (const EvalRow& row : rows) {
    EXPECT_LE(row.quality.kl_mean, row.quality.kl_p99);
    EXPECT_LE(row.quality.kl_p99, row.quality.kl_p999);
    EXPECT_EQ(row.kv_bytes_bf16, rows[0].kv_bytes_bf16);
  }
  EXPECT_NEAR(rows[0].bits_read_per_element, 16.0, kTableBits);
  EXPECT_NEAR(rows[1].bits_read_per_element, 8.5, kTableBits);
  EXPECT_NEAR(rows[3].bits_read_per_element, 4.5, kTableBits);
  EXPECT_NEAR(rows[3].bits_stored_per_element, 4.5, 0.5);
  // 700 tokens, 2 layers, 2 KV heads, 32 + 32 elements, 2 bytes.
  EXPECT_EQ(rows[0].kv_bytes_bf16, kContext * 2 * 2 * 64 * 2);
}

// Positions N/2 .. N-2 are scored, each against the token after it.
TEST_F(Eval, ScoresTheLastHalfAgainstTheNextTokens) {
  const auto rows = evaluate(model_, tokens_, options({"f32"}));
  EXPECT_EQ(rows[0].quality.positions, kContext - 1 - kContext / 2);
  EXPECT_EQ(rows[0].attend.rows, rows[0].quality.positions * 2 * 2);  // layers, KV heads

  Session session(model_, preset("f32"), {.context = kContext});
  std::vector<float> hidden(static_cast<size_t>(kContext * model_->config().width));
  session.step(std::span(tokens_).first(kContext), AttendMode::decode, hidden.data());
  double nll = 0;
  std::vector<float> row(256);
  for (int64_t i = kContext / 2; i < kContext - 1; ++i) {
    logits(*model_, hidden.data() + i * model_->config().width, 1, row.data());
    double sum = 0;
    for (const float x : row) sum += std::exp(static_cast<double>(x));
    nll += std::log(sum) - row[static_cast<size_t>(tokens_[static_cast<size_t>(i) + 1])];
  }
  const double expected = std::exp(nll / static_cast<double>(kContext - 1 - kContext / 2));
  EXPECT_NEAR(rows[0].quality.perplexity / expected, 1.0, 1e-5);
}

TEST_F(Eval, OddContextsAndChunksChangeNothingThatIsRead) {
  auto o = options({"balanced,promote=0.05", "thrifty,recent=64"});
  const auto rows = evaluate(model_, tokens_, o);
  o.chunk = 96;
  const auto other = evaluate(model_, tokens_, o);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_GT(rows[i].quality.kl_mean, 0.0);
    // The dense layers sum in another order for other step sizes.
    EXPECT_NEAR(other[i].quality.kl_mean / rows[i].quality.kl_mean, 1.0, 0.05);
    EXPECT_NEAR(other[i].bits_read_per_element / rows[i].bits_read_per_element, 1.0, 0.01);
    EXPECT_EQ(other[i].kv_bytes, rows[i].kv_bytes);
    EXPECT_EQ(other[i].attend.rows, rows[i].attend.rows);
  }
  EXPECT_GT(rows[0].promoted_fraction, 0.0);
  EXPECT_LT(rows[1].bits_stored_per_element, rows[0].bits_stored_per_element);

  o.context = 5;
  EXPECT_EQ(evaluate(model_, tokens_, o)[0].quality.positions, 2);
}

TEST_F(Eval, NeedlesAreAPassOfTheirOwn) {
  auto o = options({"exact", "f32"});
  o.context = 1000;
  o.needles = 2;
  o.codec = {
      .encode =
          [](std::string_view text) {
            std::vector<int32_t> ids;
            for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
            return ids;
          },
      .token_bytes = [](int32_t t) { return std::string(1, static_cast<char>(t)); },
      .ends_generation = [](int32_t) { return false; },
  };
  int needle_reports = 0;
  o.progress = [&](const EvalProgress& p) { needle_reports += p.stage == "needles"; };
  const auto rows = evaluate(model_, tokens_, o);
  ASSERT_TRUE(rows[0].needle_recall.has_value());
  EXPECT_EQ(*rows[0].needle_recall, 0.0);  // a random model
  EXPECT_GT(needle_reports, 4);
  o.needles = 0;
  EXPECT_EQ(evaluate(model_, tokens_, o)[0].quality.kl_mean, rows[0].quality.kl_mean);
}

TEST_F(Eval, WrongRequestsAreErrors) {
  const auto message = [&](const EvalOptions& o) {
    try {
      evaluate(model_, tokens_, o);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  auto o = options({"exact"});
  o.context = 1025;
  EXPECT_NE(message(o).find("1024"), std::string::npos);
  o.context = 1024;
  EXPECT_NE(message(o).find("has 1000 tokens"), std::string::npos);
  o.context = 3;
  EXPECT_NE(message(o), "");
  o = options({});
  EXPECT_NE(message(o), "");
  o = options({"exact"});
  o.chunk = 0;
  EXPECT_NE(message(o), "");
  o.chunk = 512;
  o.max_kv_bytes = 4096;
  EXPECT_NE(message(o), "");
}

EvalRow sample_row() {
  EvalRow row;
  row.policy = "balanced,promote=0.05";
  row.tokens = 16384;
  row.quality = {.positions = 8191,
                 .kl_mean = 0.00012,
                 .kl_p99 = 0.002,
                 .kl_p999 = 0.03,
                 .delta_nll = -0.0001,
                 .perplexity = 8.25,
                 .top1_agreement = 0.993};
  row.bits_stored_per_element = 9.25;
  row.bits_read_per_element = 4.5;
  row.promoted_fraction = 0.08;
  row.skipped_fraction = 0.25;
  row.kv_bytes = 12345678;
  row.kv_bytes_bf16 = 20000000;
  row.seconds = 1.5;
  return row;
}

TEST(EvalReport, JsonHasExactlyTheKeys) {
  EvalRow with = sample_row();
  with.needle_recall = 0.9375;
  const auto json = nlohmann::ordered_json::parse(
      format_report(std::vector<EvalRow>{sample_row(), with}, ReportFormat::json));
  ASSERT_TRUE(json.is_array());
  ASSERT_EQ(json.size(), 2u);
  std::string keys;
  for (const auto& item : json[0].items()) keys += item.key() + " ";
  EXPECT_EQ(keys,
            "policy tokens kl_mean kl_p99 kl_p999 delta_nll perplexity top1_agreement "
            "needle_recall bits_stored_per_element bits_read_per_element promoted_fraction "
            "skipped_fraction kv_bytes kv_bytes_bf16 seconds ");
  EXPECT_TRUE(json[0]["needle_recall"].is_null());
  EXPECT_EQ(json[1]["needle_recall"], 0.9375);
  EXPECT_EQ(json[0]["kl_mean"], 0.00012);
  EXPECT_EQ(json[0]["tokens"], 16384);
  EXPECT_EQ(json[0]["kv_bytes"], 12345678);
  EXPECT_EQ(json[0]["policy"], "balanced,promote=0.05");
}

TEST(EvalReport, CsvQuotesAndLeavesNullEmpty) {
  std::istringstream csv(format_report(std::vector<EvalRow>{sample_row()}, ReportFormat::csv));
  std::string head, line, rest;
  std::getline(csv, head);
  std::getline(csv, line);
  EXPECT_EQ(head.substr(0, 22), "policy,tokens,kl_mean,");
  EXPECT_EQ(head.substr(head.size() - 8), ",seconds");
  EXPECT_EQ(line.substr(0, 38), "\"balanced,promote=0.05\",16384,0.00012,");
  EXPECT_NE(line.find(",0.993,,9.25,"), std::string::npos) << line;
  EXPECT_FALSE(std::getline(csv, rest));
}

TEST(EvalReport, TableIsAligned) {
  EvalRow other = sample_row();
  other.policy = "f32";
  other.quality.kl_mean = other.quality.delta_nll = 0;
  other.needle_recall = 1.0;
  std::istringstream table(
      format_report(std::vector<EvalRow>{sample_row(), other}, ReportFormat::table));
  std::vector<std::string> lines;
  for (std::string line; std::getline(table, line);) lines.push_back(line);
  ASSERT_EQ(lines.size(), 5u);  // heads, units, rule, two rows
  EXPECT_EQ(lines[3].size(), lines[2].size());
  EXPECT_EQ(lines[4].size(), lines[2].size());
  EXPECT_NE(lines[3].find("0.00012"), std::string::npos);
  EXPECT_NE(lines[3].find("11.8 MiB"), std::string::npos);
  EXPECT_NE(lines[4].find("100.0 %"), std::string::npos);
}

TEST(EvalReport, HumanBytes) {
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(999), "999 B");
  EXPECT_EQ(human_bytes(1536), "1.50 KiB");
  EXPECT_EQ(human_bytes(12345678), "11.8 MiB");
  EXPECT_EQ(human_bytes(int64_t{1} << 40), "1.00 TiB");
}

}  // namespace
}  // namespace thriftattn
