// `thriftattn bench`: times attention and appending beside the machine's own peak.
#include <fmt/format.h>

#include <charconv>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "bench/bench.h"
#include "bench/device_bench.h"
#include "bench/report.h"
#include "bench/suite.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/progress.h"
#include "engine/memory_limit.h"
#include "policy/policy_list.h"
#include "thriftattn/error.h"

namespace thriftattn::cli {
namespace {

struct BenchArgs {
  std::string op;
  int64_t context = 131072;
  int64_t queries = 0;  // 0 = the operation's own
  int64_t batch = 1;
  std::string heads = "32/8";
  int64_t head_dim = 128;
  std::string policies = "exact,thrifty,balanced";
  double promoted = 0, skipped = 0;
  int threads = 0;
  int rounds = 15;
  int64_t working_set = 0;
  std::string output = "table";
  bool suite = false;
  int64_t divide = 1;
  std::string folder = "out";
  std::string device = "cpu";
  bool threads_given = false, working_set_given = false;
};

constexpr int64_t kMaxTokens = int64_t{1} << 32;

constexpr const char* kFooter = R"(
Examples:
  thriftattn bench decode -c 131072 --policy exact,q8_0,thrifty,balanced
  thriftattn bench decode -c 131072 --heads 64/8 --policy balanced --promoted 0.04 --skipped 0.5
  thriftattn bench prefill -c 4096 -p 512 --policy exact,thrifty -o json
  thriftattn bench append -c 4096 -p 512 --policy balanced
  thriftattn bench decode -c 131072 -b 4 --policy exact,thrifty --device cuda
  thriftattn bench --suite

Policies of one run are interleaved, threads are pinned, and read bandwidth is measured beside each
timing. Decode is judged by GB/s against that peak, prefill by GFLOP/s with all keys counted. The
data is drawn so that the fractions asked for are promoted and skipped by the policy's own rule.
docs/performance-cpu.md says how to read the figures, docs/run.md what differs with --device cuda.)";

// "32/8" as query heads and KV heads.
std::pair<int64_t, int64_t> parse_heads(const std::string& text) {
  int64_t q = 0, kv = 0;
  const char* end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, q);
  const bool slash = first.ec == std::errc() && first.ptr != end && *first.ptr == '/';
  const auto second = slash ? std::from_chars(first.ptr + 1, end, kv) : first;
  if (!slash || second.ec != std::errc() || second.ptr != end || q < 1 || kv < 1 || q > 65536 ||
      q % kv != 0) {
    throw UsageError(
        fmt::format("--heads: '{}' is not QUERY/KV such as 32/8, query heads a "
                    "multiple of KV heads and at most 65536",
                    one_line(text)));
  }
  return {q, kv};
}

bench::BenchSpec spec_of(const BenchArgs& args) {
  using bench::BenchOp;
  const BenchOp op = args.op == "decode"    ? BenchOp::decode
                     : args.op == "prefill" ? BenchOp::prefill
                                            : BenchOp::append;
  const auto [q_heads, kv_heads] = parse_heads(args.heads);
  const int64_t chunk = op == BenchOp::decode ? 1 : 512;
  bench::BenchSpec spec{.op = op,
                        .ctx = args.context,
                        .queries = args.queries > 0 ? args.queries : chunk,
                        .batch = args.batch,
                        .q_heads = q_heads,
                        .kv_heads = kv_heads,
                        .head_dim = args.head_dim};
  for (const std::string& text : split_policy_list(args.policies)) {
    spec.entries.push_back({.policy = policy_from_option("--policy", text),
                            .promoted = args.promoted,
                            .skipped = args.skipped});
  }
  return spec;
}

void write_suite(const BenchArgs& args, bench::Bench& timer) {
  std::error_code error;
  std::filesystem::create_directories(args.folder, error);
  if (error) {
    throw Error(ErrorCode::io, fmt::format("cannot make the folder '{}': {}; name another with "
                                           "--folder",
                                           one_line(args.folder), error.message()));
  }
  const bench::SuiteResult result = bench::run_suite(timer, args.divide);
  const std::string json = args.folder + "/bench.json", markdown = args.folder + "/bench.md";
  write_text(json, bench::format_rows(result.rows, bench::ReportForm::json));
  write_text(markdown, result.markdown);
  print(result.markdown);
  std::fprintf(stderr, "written: %s, %s\n", one_line(json).c_str(), one_line(markdown).c_str());
}

// What --device cuda has no use for.
void check_device_args(const BenchArgs& args) {
  const auto refuse = [](const char* option, const char* why) {
    throw UsageError(fmt::format("{} is for --device cpu: {}; leave one of them out", option, why));
  };
  if (args.suite) refuse("--suite", "its runs are those of docs/performance-cpu.md");
  if (args.threads_given) refuse("--threads", "a GPU has no threads to pin");
  if (args.working_set_given) {
    refuse("--working-set", "sequences rotate through more than twice any GPU's L2");
  }
}

void print_rows(const BenchArgs& args, const std::vector<bench::BenchRow>& rows,
                const std::string& machine) {
  if (args.output == "json") {
    print(bench::format_rows(rows, bench::ReportForm::json));
  } else if (args.output == "csv") {
    print(bench::format_rows(rows, bench::ReportForm::csv));
  } else {
    print(machine + "\n\n" + bench::format_rows(rows, bench::ReportForm::table));
  }
}

void bench_on_device(const BenchArgs& args) {
  check_device_args(args);
  const bench::BenchSpec spec = spec_of(args);
  bench::check_device_spec(spec);
  require_device(args.device);
  Progress progress;
  bench::DeviceBench timer({.rounds = args.rounds,
                            .progress = [&](const std::string& what, int64_t done, int64_t total) {
                              progress.update(what, done, total);
                            }});
  std::vector<bench::BenchRow> rows;
  for (const bench::DeviceRow& r : timer.run(spec)) rows.push_back(r.row);
  progress.clear();
  print_rows(args, rows, timer.machine());
}

void bench_command(const BenchArgs& args) {
  if (args.suite == !args.op.empty()) {
    throw UsageError(
        "give decode, prefill or append, or --suite alone; see 'thriftattn bench "
        "--help'");
  }
  if (args.device == "cuda") return bench_on_device(args);
  const bench::BenchSpec spec = args.suite ? bench::BenchSpec{} : spec_of(args);
  Progress progress;
  bench::Bench timer({.threads = args.threads,
                      .rounds = args.rounds,
                      .working_set = args.working_set,
                      .memory_limit = available_memory(),
                      .progress = [&](const std::string& what, int64_t done, int64_t total) {
                        progress.update(what, done, total);
                      }});
  if (args.suite) {
    write_suite(args, timer);
    return;
  }
  const std::vector<bench::BenchRow> rows = timer.run(spec);
  progress.clear();
  print_rows(args, rows, timer.machine());
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto args = std::make_shared<BenchArgs>();
  CLI::App* cmd =
      app.add_subcommand("bench", "Time decode, prefill and append beside the machine's peak");
  cmd->footer(kFooter);
  cmd->add_option("OP", args->op, "decode, prefill or append")
      ->check(CLI::IsMember({"decode", "prefill", "append"}));
  cmd->add_option("-c,--ctx-size", args->context, "Tokens of a sequence, the queries' own included")
      ->check(CLI::Range(int64_t{1}, kMaxTokens))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("-p,--queries", args->queries,
                  "Queries, or tokens appended; 0 takes 1 for decode and 512 else")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("-b,--batch", args->batch, "Sequences of a batch")
      ->check(CLI::Range(int64_t{1}, int64_t{65536}))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--heads", args->heads, "Query heads / KV heads")
      ->capture_default_str()
      ->type_name("Q/KV");
  cmd->add_option("--head-dim", args->head_dim, "Elements of a head")
      ->check(CLI::Range(int64_t{1}, int64_t{65536}))
      ->capture_default_str()
      ->type_name("D");
  cmd->add_option("--policy,--policies", args->policies, "Policies to time, as in 'eval'")
      ->capture_default_str()
      ->type_name("LIST");
  cmd->add_option("--promoted", args->promoted, "Fraction of the pages that the data promotes")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->type_name("F");
  cmd->add_option("--skipped", args->skipped, "Fraction of the pages whose V the data skips")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->type_name("F");
  cmd->add_option("-t,--threads", args->threads, "Threads, each on its own core; 0 takes all cores")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("-r,--rounds", args->rounds, "Timings of each policy")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--working-set", args->working_set,
                  "Bytes of the bandwidth buffer, such as 1GB; sequences rotate through half of "
                  "it; 0 takes 4 times the last-level cache")
      ->transform(CLI::AsSizeValue(false))
      ->type_name("SIZE");
  cmd->add_option("-o,--output", args->output, "table, json (one array) or csv")
      ->check(CLI::IsMember({"table", "json", "csv"}))
      ->capture_default_str()
      ->type_name("FORM");
  cmd->add_flag("--suite", args->suite, "All runs of docs/performance-cpu.md");
  cmd->add_option("--divide", args->divide, "Suite: contexts divided by this, for a quick look")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str()
      ->type_name("N");
  cmd->add_option("--folder", args->folder, "Suite: where bench.json and bench.md are written")
      ->capture_default_str()
      ->type_name("DIR");
  add_device_option(*cmd, args->device);
  cmd->callback([args, cmd] {
    args->threads_given = cmd->count("--threads") > 0;
    args->working_set_given = cmd->count("--working-set") > 0;
    bench_command(*args);
  });
}

}  // namespace thriftattn::cli
