// thriftattn_cuda_bench: a fixed list of decode, verify, prefill and append on the device, a JSON
// line each: the keys of `thriftattn bench --device cuda` and what only this program shows.
//   --quick       fewer shapes        --append, --prefill  these rows alone
//   --only NAME   of the policies, those whose name has this
//   --profile     a few plain calls of one shape, decode and verify, for a profiler
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/device_bench.h"
#include "bench/report.h"
#include "thriftattn/error.h"

namespace {

using namespace thriftattn;
using namespace thriftattn::bench;
using nlohmann::ordered_json;

constexpr int kRounds = 21;
constexpr int64_t kLong = 131072, kMillion = 1048576;

struct Arguments {
  bool quick = false, append = false, prefill = false, profile = false;
  std::string only;
};

BenchEntry entry(const char* policy, double promoted = 0, double skipped = 0) {
  return {.policy = parse_policy(policy), .promoted = promoted, .skipped = skipped};
}

// Every page with its residual.
BenchEntry nvfp4x2() {
  BenchEntry e = entry("*:nvfp4x2");
  e.policy.name = "nvfp4x2";
  return e;
}

void print_row(const DeviceRow& r, const DevicePeaks& peaks) {
  const BenchRow& row = r.row;
  ordered_json j = ordered_json::parse(format_rows({&row, 1}, ReportForm::json))[0];
  j["queries"] = row.queries;
  j["peak_read_gb_s"] = peaks.read;
  j["rotation"] = r.rotation;
  if (row.op == "decode") {
    j["prepare_ms"] = r.prepare_ms;
    j["decode_ms"] = r.walk_ms;
    j["merge_ms"] = r.merge_ms;
  } else if (row.op == "prefill") {
    j["tflop_s"] = row.gflops.value_or(0) * 1e-3;
    j["workspace_mb"] = static_cast<double>(r.workspace_bytes) * 1e-6;
  } else {
    j["bytes_in"] = r.moved.input;
    j["bytes_open"] = r.moved.open;
    j["bytes_pages"] = r.moved.pages;
    j["gb_s_without_open"] = (r.moved.input + r.moved.pages) / row.ms_median * 1e-6;
  }
  std::printf("%s\n", j.dump().c_str());
  std::fflush(stdout);
}

class Program {
 public:
  explicit Program(const Arguments& args)
      : args_(args), bench_({.rounds = kRounds, .parts = true, .twins = false}) {
    std::fprintf(stderr, "%s\n", bench_.machine().c_str());
  }

  void run() {
    if (args_.profile) {
      for (const int64_t queries : {1, 8}) {
        bench_.run_plain(
            {.ctx = kLong, .queries = queries, .batch = 4, .entries = {entry("thrifty")}}, 3);
      }
      return;
    }
    if (!args_.prefill) append_rows();
    if (args_.append) return;
    if (!args_.prefill) decode_rows();
    prefill_rows();
  }

 private:
  void rows_of(BenchSpec spec) {
    std::erase_if(spec.entries, [&](const BenchEntry& e) {
      return e.policy.name.find(args_.only) == std::string::npos;
    });
    if (spec.entries.empty()) return;
    for (const DeviceRow& row : bench_.run(spec)) print_row(row, bench_.peaks());
  }

  void append_rows() {
    for (const int64_t tokens : {512, 8192, 32768}) {
      rows_of({.op = BenchOp::append,
               .ctx = 1024,
               .queries = tokens,
               .entries = {entry("thrifty"), entry("balanced")}});
    }
  }

  void decode_rows() {
    const int64_t shapes[3][2] = {{4, kLong}, {1, kLong}, {8, 32768}};
    for (const auto& [batch, ctx] : shapes) {
      for (const int64_t heads : {32, 64}) {
        if (args_.quick && heads == 64 && batch != 4) continue;
        BenchSpec spec{.ctx = ctx, .batch = batch, .q_heads = heads};
        spec.entries = {entry("exact"), entry("thrifty")};
        if (ctx == kLong) {
          spec.entries.push_back(entry("balanced,skip=0", 0.04));
          spec.entries.push_back(entry("balanced", 0.02, 0.6));
        }
        if (heads == 32 && (!args_.quick || batch == 4)) {
          spec.entries.push_back(entry("fp8"));
          spec.entries.push_back(nvfp4x2());
        }
        rows_of(spec);
        if (args_.quick && batch != 4) continue;
        spec.queries = 8;
        spec.entries = {entry("thrifty")};
        rows_of(spec);
      }
    }
    // Above 850 K tokens four heads cannot hold every page above `skip`.
    if (!args_.quick) {
      rows_of({.ctx = kMillion, .entries = {entry("exact"), entry("thrifty,skip=0")}});
    }
  }

  // Steps at the end of 32 K tokens.
  void prefill_rows() {
    constexpr int64_t kCtx = 32768;
    const auto step = [&](int64_t queries, std::vector<BenchEntry> entries) {
      rows_of(
          {.op = BenchOp::prefill, .ctx = kCtx, .queries = queries, .entries = std::move(entries)});
    };
    step(kCtx, {entry("exact"), entry("thrifty")});
    step(2048, {entry("exact"), entry("thrifty"), nvfp4x2()});
    step(512, {entry("thrifty")});
  }

  Arguments args_;
  DeviceBench bench_;
};

}  // namespace

int main(int argc, char** argv) {
  try {
    Arguments args;
    for (int i = 1; i < argc; ++i) {
      const std::string a = argv[i];
      if (a == "--quick") {
        args.quick = true;
      } else if (a == "--append") {
        args.append = true;
      } else if (a == "--prefill") {
        args.prefill = true;
      } else if (a == "--profile") {
        args.profile = true;
      } else if (a == "--only" && i + 1 < argc) {
        args.only = argv[++i];
      } else {
        std::fprintf(stderr,
                     "'%s' is none of --quick, --append, --prefill, --profile, --only NAME\n",
                     argv[i]);
        return 2;
      }
    }
    Program(args).run();
  } catch (const Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
