// The equaliser: its formula against a computation in the test, and its file.
#include "engine/calibrate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include "engine/calibration_text.h"
#include "engine/gguf.h"
#include "engine/tiny_model.h"
#include "engine/tokenizer.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

namespace fs = std::filesystem;
using test::make_tiny;
using test::random_tokens;
using test::tiny_spec;

class Calibrate : public ::testing::Test {
 protected:
  void SetUp() override {
    folder = fs::temp_directory_path() /
             ("thriftattn_calibrate_" + std::to_string(::getpid()) + "_" +
              ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder);
  }
  void TearDown() override { fs::remove_all(folder); }

  ErrorCode read_error(const std::string& path) const {
    try {
      read_equalizer(path, *model);
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("calibrate"), std::string::npos) << error.what();
      return error.code();
    }
    return ErrorCode::unsupported;  // which no path here gives
  }
  static std::string slurp(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static void spill(const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::trunc) << text;
  }

  fs::path folder;
  test::TinyModel tiny = make_tiny(tiny_spec("gemma3"));
  std::shared_ptr<const Model> model = tiny.load();
  std::vector<int32_t> tokens = random_tokens(150, 61);
};

TEST_F(Calibrate, FollowsTheFormula) {
  const Equalizer got = measure_equalizer(*model, tokens);
  test::TinyTrace trace;
  test::reference_logits(tiny, tokens, &trace);
  ASSERT_EQ(got.layers.size(), 6u);
  for (size_t l = 0; l < 6; ++l) {
    ASSERT_EQ(got.layers[l].size(), 32u);
    // Two whole pages of one KV head with four query heads.
    std::vector<double> q2(32), k2(32), s(32);
    for (size_t d = 0; d < 32; ++d) {
      for (size_t page = 0; page < 128; page += 64) {
        double mean = 0.0;
        for (size_t t = page; t < page + 64; ++t) mean += trace.k[l][t][d] / 64.0;
        for (size_t t = page; t < page + 64; ++t) {
          k2[d] += std::pow(trace.k[l][t][d] - mean, 2.0);
          for (size_t h = 0; h < 4; ++h) q2[d] += std::pow(trace.q[l][t][h * 32 + d], 2.0);
        }
      }
    }
    double log_mean = 0.0;
    for (size_t d = 0; d < 32; ++d) {
      s[d] = std::pow(q2[d] / k2[d], 0.25);
      log_mean += std::log(s[d]) / 32.0;
    }
    for (size_t d = 0; d < 32; ++d) {
      EXPECT_NEAR(got.layers[l][d], s[d] / std::exp(log_mean), 1e-3) << l << " " << d;
    }
  }
}

// A channel that is always zero must not make s infinite.
TEST_F(Calibrate, SilentChannelsAreClamped) {
  const test::TinyModel silent = make_tiny(
      {}, {.tensors = [](auto& tensors) {
        std::fill_n(tensors["blk.0.attn_k.weight"].begin(), 2 * 64, 0.0f);    // K pair 0 of head 0
        std::fill_n(tensors["blk.1.attn_q.weight"].begin(), 128 * 64, 0.0f);  // all Q
      }});
  const auto other = silent.load();
  const Equalizer got = measure_equalizer(*other, tokens);
  for (const auto& layer : got.layers) {
    for (size_t head = 0; head < 2; ++head) {
      double log_sum = 0.0;
      for (size_t d = 0; d < 32; ++d) {
        const float s = layer[head * 32 + d];
        ASSERT_TRUE(s > 0.0f && std::isfinite(s));
        log_sum += std::log(s);
      }
      EXPECT_NEAR(log_sum, 0.0, 1e-3);
    }
  }
  EXPECT_GT(got.layers[0][0], 10.0f);
  EXPECT_THROW(measure_equalizer(*other, std::span(tokens).first(63)), Error);
}

TEST_F(Calibrate, FileRoundTrip) {
  const Equalizer made = measure_equalizer(*model, tokens);
  const std::string path = equalizer_path(folder.string(), *model);
  EXPECT_EQ(read_error(path), ErrorCode::not_found);
  write_equalizer(path, *model, made);
  EXPECT_EQ(read_equalizer(path, *model).layers, made.layers);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 1);  // no temporary left
}

TEST_F(Calibrate, RefusesWhatDoesNotFit) {
  const std::string path = equalizer_path(folder.string(), *model);
  write_equalizer(path, *model, measure_equalizer(*model, tokens));
  const std::string sound = slurp(path);
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string text = sound;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    spill(path, text.replace(at, from.size(), to));
    return read_error(path);
  };
  EXPECT_EQ(replaced("\"version\":1", "\"version\":2"), ErrorCode::invalid_argument);
  EXPECT_EQ(replaced(model->hash(), std::string(32, '0')), ErrorCode::invalid_argument);
  EXPECT_EQ(replaced("thriftattn-equalizer", "something else"), ErrorCode::corrupt);
  EXPECT_EQ(replaced("[[", "[[1.5,"), ErrorCode::corrupt);  // the checksum notices
  for (const size_t cut : {size_t{0}, size_t{1}, sound.size() / 2, sound.size() - 3}) {
    spill(path, sound.substr(0, cut));
    EXPECT_EQ(read_error(path), ErrorCode::corrupt) << cut;
  }
  // A file of another model under this model's name: load must say so, not use it.
  const test::TinyModel other = make_tiny(tiny_spec("qwen2"));
  const auto other_model = other.load();
  write_equalizer(path, *other_model, measure_equalizer(*other_model, tokens));
  EXPECT_THROW(load_or_measure_equalizer(*model, {.cache_folder = folder.string()}), Error);
}

TEST_F(Calibrate, TwoWritersAtOnce) {
  const Equalizer made = measure_equalizer(*model, tokens);
  const std::string path = equalizer_path(folder.string(), *model);
  write_equalizer(path, *model, made);
  const auto writer = [&] {
    for (int i = 0; i < 30; ++i) write_equalizer(path, *model, made);
  };
  std::thread one(writer);
  std::thread two(writer);
  for (int i = 0; i < 60; ++i) EXPECT_EQ(read_equalizer(path, *model).layers, made.layers);
  one.join();
  two.join();
  EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 1);
}

TEST_F(Calibrate, FolderRules) {
  const auto set = [](const char* name, const char* value) {
    if (value == nullptr) {
      unsetenv(name);
    } else {
      setenv(name, value, 1);
    }
  };
  const char* home = std::getenv("HOME");
  const std::string home_before = home == nullptr ? "" : home;
  set("XDG_CACHE_HOME", "/x/cache");
  EXPECT_EQ(default_cache_folder(), "/x/cache/thriftattn");
  set("XDG_CACHE_HOME", "relative");
  set("HOME", "/home/someone");
  EXPECT_EQ(default_cache_folder(), "/home/someone/.cache/thriftattn");
  set("XDG_CACHE_HOME", nullptr);
  set("HOME", nullptr);
  EXPECT_EQ(default_cache_folder(), "");
  set("HOME", home == nullptr ? nullptr : home_before.c_str());
}

class CalibrateDemo : public Calibrate {
 protected:
  void SetUp() override {
    Calibrate::SetUp();
    const std::string path = THRIFTATTN_SOURCE_DIR "/models/demo/thrift-demo.gguf";
    if (!fs::exists(path)) GTEST_SKIP() << path << " is not there";
    demo = Model::load(path);
  }
  std::shared_ptr<const Model> demo;
};

TEST_F(CalibrateDemo, MeasuresOnceAndKeepsIt) {
  const Tokenizer tokenizer = Tokenizer::from_gguf(demo->file());
  EXPECT_GT(tokenizer.encode(kCalibrationText).size(), 900u);
  const EqualizerOptions options{.cache_folder = folder.string()};
  const EqualizerResult first = load_or_measure_equalizer(*demo, options);
  EXPECT_TRUE(first.measured);
  EXPECT_EQ(first.note, "");
  const EqualizerResult second = load_or_measure_equalizer(*demo, options);
  EXPECT_FALSE(second.measured);
  EXPECT_EQ(second.path, first.path);
  EXPECT_EQ(first.equalizer.layers, second.equalizer.layers);
}

// A home that cannot be written (here: its place is taken by a file) only costs the next start.
TEST_F(CalibrateDemo, GoesOnWithoutAFolder) {
  fs::create_directories(folder);
  spill((folder / "taken").string(), "a file");
  const EqualizerResult result =
      load_or_measure_equalizer(*demo, {.cache_folder = (folder / "taken" / "x").string()});
  EXPECT_TRUE(result.measured);
  EXPECT_EQ(result.path, "");
  EXPECT_NE(result.note.find("not stored"), std::string::npos);
  EXPECT_EQ(result.equalizer.layers.size(), demo->config().layers.size());
}

}  // namespace
}  // namespace thriftattn
