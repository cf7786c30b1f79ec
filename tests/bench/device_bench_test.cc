// The device bench: what it refuses without a device, and its bytes, fractions and ratios on one.
#include "bench/device_bench.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cache/page_layout.h"
#include "thriftattn/error.h"

namespace thriftattn::bench {
namespace {

BenchEntry entry(const char* policy, double promoted = 0, double skipped = 0) {
  return {.policy = parse_policy(policy), .promoted = promoted, .skipped = skipped};
}

BenchSpec small(BenchOp op, std::vector<BenchEntry> entries) {
  return {.op = op,
          .ctx = 4096,
          .queries = op == BenchOp::decode ? 1 : 128,
          .q_heads = 8,
          .kv_heads = 2,
          .head_dim = 64,
          .entries = std::move(entries)};
}

template <class Body>
std::string message_of(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

#define EXPECT_SAYS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

TEST(DeviceSpec, RefusesWhatNoKernelServes) {
  const auto message = [](const BenchSpec& spec) {
    return message_of([&] { check_device_spec(spec); });
  };
  EXPECT_EQ(message(small(BenchOp::decode, {entry("exact"), entry("thrifty"), entry("fp8")})), "");
  EXPECT_SAYS(message(small(BenchOp::decode, {entry("exact"), entry("q8_0")})), "supported: nvfp4");
  EXPECT_SAYS(message(small(BenchOp::decode, {entry("thrifty", 0.1)})), "none of the policies");
  BenchSpec spec = small(BenchOp::append, {entry("thrifty")});
  spec.head_dim = 96;
  EXPECT_SAYS(message(spec), "96 of K");
}

TEST(DeviceSpec, WithoutADeviceNothingIsMeasured) {
  if (cuda::device_count() > 0) GTEST_SKIP() << "there is a device";
  EXPECT_SAYS(message_of([] { DeviceBench bench({}); }),
              cuda::compiled() ? "no device" : "without the CUDA backend");
}

class DeviceBenchTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::compiled()) GTEST_SKIP() << "this build has no CUDA backend";
    if (cuda::device_count() == 0) {
      GTEST_SKIP() << "no CUDA device: run `make gpu-test` on a GPU machine";
    }
  }
};

TEST_F(DeviceBenchTest, DecodeCountsBytesAndFindsTheFractions) {
  DeviceBench bench({.rounds = 3, .parts = true});
  // 63 complete pages before the query.
  const auto rows = bench.run(small(
      BenchOp::decode, {entry("fp8"), entry("exact"), entry("balanced", 3.0 / 63, 30.0 / 63)}));
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_NEAR(rows[1].row.bytes_read, 4096.0 * 2 * 64 * 2 * 2 + 64 * 4, 4);
  EXPECT_NEAR(rows[0].row.bytes_read, 4096.0 * 2 * 2 * (64 + 4) + 64 * 4, 4);
  for (const DeviceRow& r : rows) {
    const BenchRow& row = r.row;
    EXPECT_EQ(row.backend, "cuda");
    EXPECT_FALSE(row.threads);
    EXPECT_GT(row.ms_min, 0);
    EXPECT_LE(row.ms_min, row.ms_median);
    EXPECT_DOUBLE_EQ(row.peak_gb_s, bench.peaks().copy);
    EXPECT_DOUBLE_EQ(row.ms_bf16, rows[1].row.ms_median);
    EXPECT_DOUBLE_EQ(row.gb_s, row.bytes_read / row.ms_median * 1e-6);
    EXPECT_DOUBLE_EQ(*row.fraction_of_peak, row.gb_s / row.peak_gb_s);
    EXPECT_DOUBLE_EQ(*row.gflops, 4.0 * 8 * 4096 * 64 / row.ms_median * 1e-6);
    EXPECT_GT(r.prepare_ms, 0);
    EXPECT_GT(r.merge_ms, 0);
    EXPECT_GT(r.rotation, 1);  // none of it is in the L2 when its turn comes
  }
  EXPECT_FALSE(rows[0].row.promoted_fraction || rows[1].row.skipped_fraction);
  // The device promotes a superset and skips a subset of what the rule says.
  const BenchRow& balanced = rows[2].row;
  EXPECT_NEAR(*balanced.promoted_fraction, 3.0 / 63, 0.2 * 3 / 63);
  EXPECT_NEAR(*balanced.skipped_fraction, 30.0 / 63, 0.2 * 30 / 63);
  EXPECT_TRUE(balanced.promote_ms && balanced.skip_saves_ms);
  EXPECT_LT(balanced.bytes_read, rows[0].row.bytes_read);
}

// A floor of the LSE makes a page in two thousand look heavier than it is; nothing was asked for.
TEST_F(DeviceBenchTest, AFewPagesNearTheThresholdsAreNoError) {
  DeviceBench bench({.rounds = 1});
  const auto rows = bench.run({.ctx = 16384, .entries = {entry("balanced")}});
  EXPECT_LT(*rows[0].row.promoted_fraction, 0.005);
  EXPECT_EQ(*rows[0].row.skipped_fraction, 0);
}

TEST_F(DeviceBenchTest, VerifyAndBatchesCountOneQueryOfAllSequences) {
  DeviceBench bench({.rounds = 1});
  BenchSpec spec = small(BenchOp::decode, {entry("exact")});
  const double one = bench.run(spec)[0].row.bytes_read;
  spec.batch = 3;
  EXPECT_DOUBLE_EQ(bench.run(spec)[0].row.bytes_read, 3 * one);
  spec.queries = 8;  // the mean query sees 3.5 tokens less than the last one
  EXPECT_DOUBLE_EQ(bench.run(spec)[0].row.bytes_read, 3 * (one - 3.5 * 2 * 64 * 2 * 2));
}

TEST_F(DeviceBenchTest, PrefillAndAppend) {
  DeviceBench bench({.rounds = 1});
  const auto rows = bench.run(small(BenchOp::prefill, {entry("thrifty"), entry("exact")}));
  const BenchRow& prefill = rows[0].row;
  // Visible pairs: query i of 128 sees 3969 + i keys.
  EXPECT_DOUBLE_EQ(*prefill.gflops, 4.0 * 8 * 64 * 128 * (3969 + 63.5) / prefill.ms_median * 1e-6);
  EXPECT_FALSE(prefill.fraction_of_peak);
  EXPECT_GT(*prefill.byte_ratio_ceiling, 1);

  const DeviceRow append = bench.run(small(BenchOp::append, {entry("balanced")}))[0];
  const PageLayout layout =
      make_page_layout({.kv_heads = 2, .q_heads = 8, .head_dim_k = 64, .head_dim_v = 64},
                       resolve(parse_policy("balanced"), {.layers = 1})[0]);
  const double elements = 128.0 * 2 * 64 * 2;
  EXPECT_DOUBLE_EQ(append.moved.input, 2 * elements);
  EXPECT_DOUBLE_EQ(append.moved.open, 2 * elements);
  EXPECT_DOUBLE_EQ(append.moved.pages,
                   2.0 * static_cast<double>(layout.slot_bytes + 2 * layout.residual_bytes));
  EXPECT_DOUBLE_EQ(append.row.bytes_read,
                   append.moved.input + append.moved.open + append.moved.pages);
  EXPECT_DOUBLE_EQ(*append.row.elements_per_s, elements / append.row.ms_median * 1e3);
  EXPECT_FALSE(append.row.gflops || append.row.promoted_fraction || append.row.byte_ratio_ceiling);
}

TEST_F(DeviceBenchTest, TooLargeIsRefusedWithBytes) {
  DeviceBench bench({.rounds = 1});
  BenchSpec spec = small(BenchOp::decode, {entry("exact")});
  spec.ctx = int64_t{1} << 23;
  spec.batch = 60000;
  EXPECT_SAYS(message_of([&] { bench.run(spec); }), "GiB are free");
}

}  // namespace
}  // namespace thriftattn::bench
