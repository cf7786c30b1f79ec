// The demo model against its goldens: what the training framework computed on the dequantised
// weights of the same file (models/demo/goldens.json).
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/differences.h"
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

  static void compare(const char* policy, const char* golden, double tolerance) {
    compare_goldens(goldens, golden, tolerance,
                    [&] { return Session(model, parse_policy(policy)); });
  }

  static inline json goldens;
  static inline std::shared_ptr<const Model> model;
};

TEST_F(DemoModel, Fp32MatchesTheTrainingFramework) { compare("f32", "fp32", 1e-3); }
TEST_F(DemoModel, ExactMatchesPlainBf16) { compare("exact", "bf16_kv", 2e-2); }

}  // namespace
}  // namespace thriftattn
