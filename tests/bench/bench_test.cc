// The measuring itself: threads on their own cores, bytes counted, twins, reports.
#include "bench/bench.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <tbb/parallel_for.h>

#include <chrono>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "bench/report.h"
#include "bench/statistics.h"
#include "bench/suite.h"
#include "thriftattn/error.h"

namespace thriftattn::bench {
namespace {

constexpr int64_t kSmall = int64_t{1} << 20;

BenchEntry entry(const char* policy, double promoted = 0, double skipped = 0) {
  return {.policy = parse_policy(policy), .promoted = promoted, .skipped = skipped};
}

BenchSpec small(BenchOp op, std::vector<BenchEntry> entries) {
  return {.op = op,
          .ctx = 1024,
          .queries = op == BenchOp::decode ? 1 : 64,
          .q_heads = 8,
          .kv_heads = 2,
          .head_dim = 64,
          .entries = std::move(entries)};
}

TEST(Statistics, OfFewSamples) {
  EXPECT_EQ(median(std::vector<double>{}), 0.0);
  EXPECT_EQ(median(std::vector<double>{3, 1, 2}), 2.0);
  EXPECT_EQ(median(std::vector<double>{4, 1, 2, 9}), 3.0);
  EXPECT_EQ(minimum(std::vector<double>{3, 1, 2}), 1.0);
  // Pairs, not medians: 2 and 5 are the medians, and every pair differs by 1 but one.
  EXPECT_EQ(median_difference(std::vector<double>{6, 2, 1}, std::vector<double>{5, 1, 9}), 1.0);
}

// Calls `f` on `count` threads of the current arena: no thread leaves before all have come.
template <class F>
void on_threads(size_t count, const F& f) {
  std::mutex mutex;
  std::set<std::thread::id> come;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  tbb::parallel_for(size_t{0}, 4 * count, [&](size_t) {
    size_t seen = 0;
    while (seen < count && std::chrono::steady_clock::now() < deadline) {
      {
        const std::lock_guard lock(mutex);
        f();
        come.insert(std::this_thread::get_id());
        seen = come.size();
      }
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(come.size(), count);
}

cpu_set_t affinity() {
  cpu_set_t mine;
  sched_getaffinity(0, sizeof mine, &mine);
  return mine;
}

TEST(PinnedThreads, EachOnItsOwnCore) {
  const cpu_set_t before = affinity();
  PinnedThreads threads(0);
  EXPECT_EQ(threads.count(), static_cast<int>(distinct_cores().size()));
  std::map<std::thread::id, int> cpus;
  threads.run([&] {
    on_threads(static_cast<size_t>(threads.count()), [&] {
      const cpu_set_t mine = affinity();
      EXPECT_EQ(CPU_COUNT(&mine), 1);
      cpus[std::this_thread::get_id()] = sched_getcpu();
    });
  });
  std::set<int> all;
  for (const auto& [id, cpu] : cpus) all.insert(cpu);
  EXPECT_EQ(all.size(), cpus.size());  // no core twice
  const cpu_set_t after = affinity();
  EXPECT_TRUE(CPU_EQUAL(&before, &after));  // given back
  EXPECT_THROW(PinnedThreads(100000), Error);
}

// Its threads may run anywhere again when it is gone: oneTBB lends them to the next arena.
TEST(PinnedThreads, LeavesNoThreadPinned) {
  const cpu_set_t before = affinity();
  const size_t count = distinct_cores().size();
  for (int round = 0; round < 20; ++round) {
    {
      PinnedThreads threads(0);
      threads.run([&] { on_threads(count, [] {}); });
    }
    on_threads(count, [&] {
      const cpu_set_t mine = affinity();
      EXPECT_TRUE(CPU_EQUAL(&before, &mine));
    });
  }
}

TEST(PeakMeter, MeasuresSomethingPossible) {
  PinnedThreads threads(1);
  PeakMeter meter(threads, int64_t{8} << 20);
  EXPECT_GT(meter.read_gb_s(), 0.05);
  EXPECT_LT(meter.read_gb_s(), 5000.0);
  EXPECT_GT(meter.fp32_gflops(), 0.01);
  // Two 512-bit multiply-adds a cycle at 8 GHz: more means that the compiler left work out.
  EXPECT_LT(meter.fp32_gflops(), 512.0);
  if (const auto bf16 = meter.bf16_gflops()) {
    EXPECT_GT(*bf16, 0.01);
    EXPECT_LT(*bf16, 1024.0);
  }
}

TEST(Bench, DecodeCountsBytesAndKeepsRatios) {
  Bench bench({.threads = 1, .rounds = 2, .working_set = kSmall});
  const auto rows = bench.run(small(
      BenchOp::decode, {entry("q8_0"), entry("exact"), entry("balanced", 2.0 / 15, 8.0 / 15)}));
  ASSERT_EQ(rows.size(), 3u);
  // 1024 tokens x 2 heads x 64 x (K and V), and 4 bytes of table for each of 15 pages; whether the
  // query's own page is in the table is the kernel's business.
  EXPECT_NEAR(rows[1].bytes_read, 1024.0 * 2 * 64 * 2 * 2 + 15 * 4, 4);
  EXPECT_NEAR(rows[0].bytes_read, 1024.0 * 2 * 64 * 2 * 34 / 32 + 15 * 4, 4);
  EXPECT_DOUBLE_EQ(*rows[0].byte_ratio_ceiling, rows[1].bytes_read / rows[0].bytes_read);
  for (const BenchRow& row : rows) {
    EXPECT_GT(row.ms_min, 0);
    EXPECT_LE(row.ms_min, row.ms_median);
    EXPECT_GT(row.peak_gb_s, 0);
    EXPECT_DOUBLE_EQ(row.ms_bf16, rows[1].ms_median);
    EXPECT_DOUBLE_EQ(row.speedup_vs_bf16, row.ms_bf16 / row.ms_median);
    EXPECT_DOUBLE_EQ(row.gb_s, row.bytes_read / row.ms_median * 1e-6);
    EXPECT_DOUBLE_EQ(*row.fraction_of_peak, row.gb_s / row.peak_gb_s);
    EXPECT_DOUBLE_EQ(*row.gflops, 4.0 * 8 * 1024 * 64 / row.ms_median * 1e-6);
  }
  EXPECT_FALSE(rows[0].promote_ms || rows[0].promoted_fraction || rows[1].skip_saves_ms);
  EXPECT_DOUBLE_EQ(*rows[2].promoted_fraction, 2.0 / 15);
  EXPECT_DOUBLE_EQ(*rows[2].skipped_fraction, 8.0 / 15);
  EXPECT_TRUE(rows[2].promote_ms && rows[2].skip_saves_ms);
  EXPECT_NE(bench.machine().find("1 thread on core"), std::string::npos) << bench.machine();
}

TEST(Bench, ABatchReadsItsSequences) {
  Bench bench({.threads = 1, .rounds = 1, .working_set = kSmall});
  BenchSpec spec = small(BenchOp::decode, {entry("exact")});
  const double one = bench.run(spec)[0].bytes_read;
  spec.batch = 3;
  EXPECT_DOUBLE_EQ(bench.run(spec)[0].bytes_read, 3 * one);
}

TEST(Bench, PrefillAndAppend) {
  Bench bench({.threads = 1, .rounds = 1, .working_set = kSmall});
  const auto rows = bench.run(small(BenchOp::prefill, {entry("thrifty"), entry("exact")}));
  const BenchRow& prefill = rows[0];
  // The mean query sees 31.5 tokens less than the last one.
  EXPECT_NEAR(rows[1].bytes_read, 992.5 * 2 * 64 * 2 * 2 + 15 * 4, 4);
  EXPECT_DOUBLE_EQ(*prefill.gflops, 4.0 * 8 * 64 * 1024 * 64 / prefill.ms_median * 1e-6);
  EXPECT_DOUBLE_EQ(*prefill.fraction_of_peak, *prefill.gflops / *prefill.peak_gflops);
  const BenchRow append = bench.run(small(BenchOp::append, {entry("balanced")}))[0];
  EXPECT_DOUBLE_EQ(append.bytes_read, 64.0 * 2 * 64 * 2 * 4);
  EXPECT_DOUBLE_EQ(*append.elements_per_s, 64.0 * 2 * 64 * 2 / append.ms_median * 1e3);
  EXPECT_FALSE(append.gflops || append.promoted_fraction || append.byte_ratio_ceiling);
}

TEST(Bench, RefusesWhatItCannotMeasure) {
  Bench bench({.threads = 1, .rounds = 1, .working_set = kSmall, .memory_limit = kSmall});
  const auto message = [&](const BenchSpec& spec) -> std::string {
    try {
      bench.run(spec);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const auto says = [&](const BenchSpec& spec, const char* part) {
    const std::string text = message(spec);
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  says(small(BenchOp::decode, {}), "no policy");
  says(small(BenchOp::decode, {entry("thrifty", 0.1)}), "none of the policies promotes");
  says(small(BenchOp::decode, {entry("balanced,skip=0", 0, 0.1)}), "none of the policies skips");
  says(small(BenchOp::prefill, {entry("balanced", 0.1)}), "for decode");
  says(small(BenchOp::decode, {entry("balanced", 1.5)}), "1.5 is not in 0..1");
  BenchSpec spec = small(BenchOp::prefill, {entry("exact")});
  spec.ctx = 32;
  says(spec, "64 queries at the end of 32 tokens");
  spec = small(BenchOp::decode, {entry("exact")});
  spec.ctx = int64_t{1} << 32;
  says(spec, "GiB are left");
  spec = small(BenchOp::decode, {entry("exact")});
  spec.kv_heads = 3;
  says(spec, "kv_heads = 3");
  spec = small(BenchOp::decode, {entry("exact")});
  spec.head_dim = 100;
  says(spec, "head_dim");
}

TEST(Report, JsonHasTheseKeysAndCsvTheSame) {
  const BenchRow row{.op = "decode",
                     .policy = "balanced,promote=0.05",
                     .ctx = 8,
                     .bytes_read = 5e9,
                     .promoted_fraction = 0.5};
  const auto j = nlohmann::ordered_json::parse(format_rows({&row, 1}, ReportForm::json));
  std::string keys;
  for (const auto& item : j[0].items()) keys += item.key() + ",";
  keys.pop_back();
  EXPECT_EQ(keys,
            "op,backend,policy,ctx,batch,q_heads,kv_heads,head_dim,threads,ms_min,ms_median,"
            "bytes_read,gb_s,peak_gb_s,fraction_of_peak,gflops,ms_bf16,speedup_vs_bf16,"
            "byte_ratio_ceiling,promoted_fraction,skipped_fraction,promote_ms");
  EXPECT_EQ(j[0]["bytes_read"], 5000000000);
  EXPECT_TRUE(j[0]["skipped_fraction"].is_null());
  const std::string csv = format_rows({&row, 1}, ReportForm::csv);
  EXPECT_EQ(csv.substr(0, csv.find('\n')), keys);
  EXPECT_NE(csv.find("decode,cpu,\"balanced,promote=0.05\",8,"), std::string::npos) << csv;
  const std::string table = format_rows({&row, 1}, ReportForm::markdown);
  EXPECT_NE(table.find("promoted"), std::string::npos) << table;
  EXPECT_EQ(table.find("saves ms"), std::string::npos) << table;  // nothing to show
}

TEST(Suite, HasWhatTheIssueAsksFor) {
  const auto parts = suite_parts(1);
  std::set<int64_t> grown;
  int decodes = 0;
  for (const SuitePart& part : parts) {
    for (const BenchSpec& spec : part.runs) {
      if (spec.op == BenchOp::decode && spec.entries.size() == 2) grown.insert(spec.ctx);
      if (spec.entries.size() < 7) continue;
      ++decodes;
      EXPECT_EQ(spec.ctx, 131072);
      EXPECT_NEAR(spec.entries[5].promoted, 0.04, 0.0005);
      EXPECT_EQ(spec.entries[5].skipped, 0.0);
      EXPECT_EQ(spec.entries[6].skipped, 0.5);
    }
  }
  EXPECT_EQ(decodes, 2);
  EXPECT_EQ(grown, (std::set<int64_t>{8192, 32768, 131072, 524288, 1048576}));
}

}  // namespace
}  // namespace thriftattn::bench
