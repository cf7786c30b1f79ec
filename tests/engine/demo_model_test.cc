// The demo model against its goldens: what the training framework computed on the dequantised
// weights of the same file (models/demo/goldens.json).
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/sampler.h"
#include "engine/session.h"

namespace thriftattn {
namespace {

using nlohmann::json;
const std::string kFolder = THRIFTATTN_SOURCE_DIR "/models/demo/";

class DemoModel : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (!std::filesystem::exists(kFolder + "goldens.json")) return;
    goldens = json::parse(std::ifstream(kFolder + "goldens.json"));
    model = Model::load(kFolder + "thrift-demo.gguf");
  }
  void SetUp() override {
    if (model == nullptr) GTEST_SKIP() << kFolder << "goldens.json is not there";
  }

  // 64 greedy tokens equal to the goldens, but where the two best logits nearly tie; the
  // logits after the prompt within `tolerance`.
  static void compare(const char* policy, const char* golden, double tolerance) {
    for (const json& prompt : goldens.at("prompts")) {
      const json& want = prompt.at(golden);
      const std::string name = prompt.at("name");
      Session session(model, parse_policy(policy));
      session.prefill(prompt.at("prompt_ids").get<std::vector<int32_t>>());
      const std::vector<double> first = want.at("prompt_logits_first_256");
      double worst = 0.0;
      for (size_t i = 0; i < first.size(); ++i) {
        worst = std::max(worst, std::fabs(session.next_logits()[i] - first[i]));
      }
      EXPECT_LT(worst, tolerance) << name;

      const std::vector<int32_t> ids = want.at("greedy_ids");
      const json& top = want.at("top2_logits");
      for (size_t i = 0; i < ids.size(); ++i) {
        const int32_t got = argmax(session.next_logits());
        const double margin = top[i][0].get<double>() - top[i][1].get<double>();
        if (got != ids[i]) {
          EXPECT_LT(margin, 0.02) << name << ": token " << i;
          break;  // the continuations differ from here on
        }
        session.decode(got);
      }
    }
  }

  static inline json goldens;
  static inline std::shared_ptr<const Model> model;
};

TEST_F(DemoModel, Fp32MatchesTheTrainingFramework) { compare("f32", "fp32", 1e-3); }
TEST_F(DemoModel, ExactMatchesPlainBf16) { compare("exact", "bf16_kv", 2e-2); }

}  // namespace
}  // namespace thriftattn
