// `thriftattn bench` at tiny sizes: forms of output, the suite, errors.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/command.h"
#include "thriftattn/cuda.h"

namespace thriftattn::test {
namespace {

using nlohmann::json;

class CliBench : public testing::Test {
 protected:
  static std::vector<std::string> tiny(const std::string& op, std::vector<std::string> more) {
    std::vector<std::string> all = {"bench",         op,       "-c", "1024", "--heads", "8/2",
                                    "--head-dim",    "64",     "-t", "1",    "-r",      "2",
                                    "--working-set", "1048576"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  json rows(const std::string& op, std::vector<std::string> more) {
    more.insert(more.end(), {"-o", "json"});
    const Outcome r = box_.run(tiny(op, std::move(more)));
    EXPECT_EQ(r.code, 0) << r.err;
    return json::parse(r.out);
  }
  std::string error(const std::vector<std::string>& arguments, int code) {
    const Outcome r = box_.run(arguments);
    EXPECT_EQ(r.code, code) << r.err;
    EXPECT_EQ(r.out, "");
    const std::string start = "thriftattn: error: ";
    EXPECT_EQ(r.err.substr(0, start.size()), start);
    EXPECT_EQ(r.err.find('\n'), r.err.size() - 1) << r.err;  // one line
    return r.err;
  }

  Sandbox box_;
};

#define EXPECT_SAYS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

TEST_F(CliBench, DecodeAsJson) {
  const json all = rows(
      "decode", {"--policy", "exact,q8_0,balanced", "--promoted", "0.0667", "--skipped", "0.5333"});
  ASSERT_EQ(all.size(), 3u);
  for (const json& row : all) {
    EXPECT_EQ(row.size(), 22u);
    for (const char* key : {"op", "backend", "policy"}) EXPECT_TRUE(row.at(key).is_string()) << key;
    for (const char* key :
         {"ctx", "batch", "q_heads", "kv_heads", "head_dim", "threads", "bytes_read"}) {
      EXPECT_TRUE(row.at(key).is_number_integer()) << key;
    }
    for (const char* key : {"ms_min", "ms_median", "gb_s", "peak_gb_s", "fraction_of_peak",
                            "gflops", "ms_bf16", "speedup_vs_bf16", "byte_ratio_ceiling"}) {
      EXPECT_TRUE(row.at(key).is_number_float()) << key;
      EXPECT_GT(row.at(key), 0.0) << key;
    }
  }
  EXPECT_EQ(all[0]["policy"], "exact");
  EXPECT_EQ(all[0]["backend"], "cpu");
  EXPECT_EQ(all[0]["ctx"], 1024);
  EXPECT_EQ(all[0]["threads"], 1);
  EXPECT_EQ(all[0]["speedup_vs_bf16"], 1.0);
  for (const char* key : {"promoted_fraction", "skipped_fraction", "promote_ms"}) {
    EXPECT_TRUE(all[1].at(key).is_null()) << key;
    EXPECT_TRUE(all[2].at(key).is_number()) << key;
  }
  EXPECT_DOUBLE_EQ(all[2]["promoted_fraction"], 1.0 / 15);
  EXPECT_DOUBLE_EQ(all[2]["skipped_fraction"], 8.0 / 15);
}

TEST_F(CliBench, OtherOperationsAndForms) {
  EXPECT_EQ(rows("prefill", {"-p", "64", "--policy", "thrifty"})[0]["op"], "prefill");
  const json append = rows("append", {"-p", "64", "-b", "2", "--policy", "thrifty"});
  EXPECT_EQ(append[0]["batch"], 2);
  EXPECT_TRUE(append[0]["gflops"].is_null());

  const Outcome csv = box_.run(tiny("decode", {"--policy", "thrifty", "-o", "csv"}));
  EXPECT_EQ(csv.out.substr(0, 18), "op,backend,policy,") << csv.err;
  const Outcome table = box_.run(
      tiny("decode", {"--policy", "balanced", "--promoted", "0.0667", "--skipped", "0.5333"}));
  for (const char* part : {"peak read", "GB/s", "ceiling", "adds ms", "saves ms", "balanced"}) {
    EXPECT_SAYS(table.out, part);
  }
}

TEST_F(CliBench, Suite) {
  const Outcome r = box_.run({"bench", "--suite", "--divide", "128", "-t", "1", "-r", "1",
                              "--working-set", "1048576", "--folder", box_.path("out/deep")});
  ASSERT_EQ(r.code, 0) << r.err;
  const json all = json::parse(Sandbox::read(box_.path("out/deep/bench.json")));
  EXPECT_EQ(all.size(), 7u + 7u + 10u + 2u + 6u);
  EXPECT_EQ(Sandbox::read(box_.path("out/deep/bench.md")), r.out);
  for (const char* part : {"Machine: ", "## Decode, 32/8 heads", "## Append", "thrifty,skip=0"}) {
    EXPECT_SAYS(r.out, part);
  }
}

TEST_F(CliBench, BadInputIsOneLine) {
  EXPECT_SAYS(error({"bench"}, 2), "--suite");
  EXPECT_SAYS(error({"bench", "decode", "--suite"}, 2), "--suite");
  EXPECT_SAYS(error({"bench", "train"}, 2), "train");
  for (const char* heads : {"32", "32/", "/8", "32/7", "0/0", "a/b", "8/2x", "8/-2", "999999/1"}) {
    EXPECT_SAYS(error(tiny("decode", {"--heads", heads}), 2), heads);
  }
  EXPECT_SAYS(error(tiny("decode", {"-c", "0"}), 2), "0");
  EXPECT_SAYS(error(tiny("decode", {"-c", "99999999999999999999"}), 2), "9999");
  EXPECT_SAYS(error(tiny("decode", {"--promoted", "1.5"}), 2), "1.5");
  EXPECT_SAYS(error(tiny("decode", {"--policy", "balancd"}), 2), "balanced");
  EXPECT_SAYS(error(tiny("decode", {"-o", "xml"}), 2), "xml");
  EXPECT_SAYS(error(tiny("decode", {"-t", "4000"}), 1), "4000 threads");
  EXPECT_SAYS(error(tiny("decode", {"--head-dim", "100"}), 1), "100");
  EXPECT_SAYS(error(tiny("decode", {"-c", "4000000000", "-b", "60000"}), 1), "GiB are left");
  EXPECT_SAYS(error(tiny("prefill", {"-p", "2000"}), 1), "2000 queries");
  EXPECT_SAYS(error(tiny("append", {"--promoted", "0.1"}), 1), "decode");
  EXPECT_SAYS(error(tiny("decode", {"--policy", "exact", "--promoted", "0.1"}), 1), "--promoted");
  EXPECT_SAYS(error(tiny("decode", {"--policy", "balanced", "--promoted", "0.01"}), 1),
              "asked for");
  EXPECT_SAYS(
      error({"bench", "--suite", "--folder", "/proc/none/x", "-t", "1", "--working-set", "1048576"},
            1),
      "/proc/none/x");
}

// Before a device is looked for: what it would not serve, and options of the CPU.
TEST_F(CliBench, DeviceRefusals) {
  const auto on_device = [&](const std::string& op, std::vector<std::string> more, int code) {
    std::vector<std::string> all = {"bench", op, "-c", "1024", "--device", "cuda"};
    all.insert(all.end(), more.begin(), more.end());
    return error(all, code);
  };
  EXPECT_SAYS(error({"bench", "decode", "--device", "tpu"}, 2), "tpu");
  EXPECT_SAYS(on_device("decode", {"-t", "2"}, 2), "--threads");
  EXPECT_SAYS(on_device("decode", {"--working-set", "1GB"}, 2), "--working-set");
  EXPECT_SAYS(error({"bench", "--suite", "--device", "cuda"}, 2), "--suite");
  EXPECT_SAYS(on_device("decode", {"--policy", "thrifty,q8_0"}, 1), "supported: nvfp4");
  EXPECT_SAYS(on_device("append", {"--policy", "paper-budget,score=quest"}, 1), "the block mean");
  EXPECT_SAYS(on_device("decode", {"--head-dim", "80"}, 1), "64, 128, 192, 256");
  EXPECT_SAYS(on_device("decode", {"--heads", "128/1"}, 1), "at most 64");
  EXPECT_SAYS(on_device("prefill", {"--promoted", "0.1"}, 1), "decode");
  EXPECT_SAYS(on_device("prefill", {"-p", "2000"}, 1), "2000 queries");
}

TEST_F(CliBench, WithoutADevice) {
  if (cuda::device_count() > 0) GTEST_SKIP() << "there is a device";
  for (const char* op : {"decode", "prefill", "append"}) {
    const std::string message = error({"bench", op, "-c", "1024", "--device", "cuda"}, 1);
    EXPECT_SAYS(message, "--device cuda: ");
    EXPECT_SAYS(message, cuda::compiled() ? "no device" : "without the CUDA backend");
    EXPECT_SAYS(message, "leave --device out");
  }
}

TEST_F(CliBench, DeviceRowsHaveTheKeysOfTheCpu) {
  if (!cuda::compiled()) GTEST_SKIP() << "this build has no CUDA backend";
  if (cuda::device_count() == 0)
    GTEST_SKIP() << "no CUDA device: run `make gpu-test` on a GPU machine";
  const auto keys = [](const json& row) {
    std::vector<std::string> names;
    for (const auto& item : row.items()) names.push_back(item.key());
    return names;
  };
  const json cpu = rows("decode", {"--policy", "exact"})[0];
  for (const char* op : {"decode", "prefill", "append"}) {
    const Outcome r = box_.run({"bench", op, "-c", "4096", "-p", "8", "-b", "2", "--device", "cuda",
                                "-r", "3", "--policy", "exact,thrifty,balanced", "-o", "json"});
    ASSERT_EQ(r.code, 0) << r.err;
    const json all = json::parse(r.out);
    ASSERT_EQ(all.size(), 3u);
    for (const json& row : all) {
      EXPECT_EQ(keys(row), keys(cpu));
      EXPECT_EQ(row["op"], op);
      EXPECT_EQ(row["backend"], "cuda");
      EXPECT_TRUE(row["threads"].is_null());
      for (const char* key : {"ms_min", "ms_median", "bytes_read", "gb_s", "peak_gb_s", "ms_bf16",
                              "speedup_vs_bf16"}) {
        EXPECT_TRUE(row.at(key).is_number()) << key;
        EXPECT_GT(row.at(key), 0.0) << key;
      }
    }
  }
  const Outcome table =
      box_.run({"bench", "decode", "-c", "16384", "--device", "cuda", "-r", "3", "--policy",
                "balanced", "--promoted", "0.04", "--skipped", "0.5"});
  for (const char* part : {"copy", "driver", "adds ms", "saves ms", "balanced"}) {
    EXPECT_SAYS(table.out, part) << table.err;
  }
}

}  // namespace
}  // namespace thriftattn::test
