// Interleaved rounds over the cases of a run (bench.h).
#include "bench/bench.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>

#include "bench/bench_case.h"
#include "bench/statistics.h"
#include "thriftattn/error.h"

namespace thriftattn::bench {
namespace {

// The caches must be a small part of what is read. The bandwidth buffer leaves none of a case in
// them; a case only has to keep its own batches from meeting there.
constexpr int64_t kBufferMultiple = 4;
constexpr int64_t kLeastBuffer = int64_t{128} << 20;
constexpr int64_t kRotationShare = 2;  // of the buffer

// One case of a run with its samples, and the peak beside each.
struct Lane {
  CaseSpec spec;
  std::string label;
  std::unique_ptr<BenchCase> run;
  std::vector<double> ms, read_gb_s, gflops;
};

// Where in the lanes an entry's runs are; -1 = not needed.
struct EntryLanes {
  int64_t with = -1, without_promotion = -1, without_skipping = -1;
};

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, "bench: " + message);
}

double flops_of(const BenchSpec& spec) {
  // Two products, all keys counted.
  return 4.0 * static_cast<double>(spec.batch) * static_cast<double>(spec.q_heads) *
         static_cast<double>(spec.queries) * static_cast<double>(spec.ctx) *
         static_cast<double>(spec.head_dim);
}

}  // namespace

void check_spec(const BenchSpec& spec) {
  if (spec.entries.empty()) refuse("no policy to time");
  if (spec.ctx < 1 || spec.queries < 1 || spec.batch < 1) {
    refuse(fmt::format("{} tokens of context, {} queries, batch {}: each must be at least 1",
                       spec.ctx, spec.queries, spec.batch));
  }
  if (spec.op != BenchOp::append && spec.queries > spec.ctx) {
    refuse(fmt::format("{} queries at the end of {} tokens: raise -c or lower -p", spec.queries,
                       spec.ctx));
  }
  bool promoted = false, skipped = false, takes_promoted = false, takes_skipped = false;
  for (const BenchEntry& entry : spec.entries) {
    for (const double fraction : {entry.promoted, entry.skipped}) {
      if (!(fraction >= 0 && fraction <= 1)) {
        refuse(fmt::format("a fraction of {} is not in 0..1", fraction));
      }
    }
    const LayerPolicy policy = policy_of(entry.policy);
    promoted |= entry.promoted > 0;
    skipped |= entry.skipped > 0;
    takes_promoted |= entry.promoted > 0 && can_promote(policy);
    takes_skipped |= entry.skipped > 0 && can_skip(policy);
  }
  if ((promoted || skipped) && spec.op != BenchOp::decode) {
    refuse(
        fmt::format("{} neither promotes nor skips by mass: --promoted and --skipped are for "
                    "decode",
                    to_string(spec.op)));
  }
  if (promoted && !takes_promoted) {
    refuse(
        "--promoted is asked for, but none of the policies promotes pages by mass: add one that "
        "does, such as balanced");
  }
  if (skipped && !takes_skipped) {
    refuse(
        "--skipped is asked for, but none of the policies skips pages: add one that does, such "
        "as thrifty or balanced");
  }
}

std::string_view to_string(BenchOp op) {
  switch (op) {
    case BenchOp::prefill:
      return "prefill";
    case BenchOp::append:
      return "append";
    case BenchOp::decode:
      break;
  }
  return "decode";
}

Bench::Bench(const BenchOptions& options)
    : options_([&] {
        BenchOptions o = options;
        if (o.working_set <= 0) {
          o.working_set = std::max(kLeastBuffer, kBufferMultiple * last_level_cache_bytes());
        }
        o.rounds = std::max(1, o.rounds);
        return o;
      }()),
      threads_(options_.threads),
      meter_(threads_, options_.working_set) {
  read_gb_s_ = meter_.read_gb_s();
  for (int repeat = 0; repeat < 3; ++repeat) {
    fp32_gflops_ = std::max(fp32_gflops_, meter_.fp32_gflops());
    bf16_gflops_ = std::max(bf16_gflops_, meter_.bf16_gflops().value_or(0.0));
  }
}

std::string Bench::machine() const {
  return fmt::format(
      "{} thread{} on core{} {}; {}; peak read {:.1f} GB/s, FP32 {:.0f} GFLOP/s, BF16 dot product "
      "{}",
      threads_.count(), threads_.count() == 1 ? "" : "s", threads_.count() == 1 ? "" : "s",
      fmt::join(threads_.cores(), ", "), isa_name(), read_gb_s_, fp32_gflops_,
      bf16_gflops_ > 0 ? fmt::format("{:.0f} GFLOP/s", bf16_gflops_) : "none");
}

std::vector<BenchRow> Bench::run(const BenchSpec& spec) {
  check_spec(spec);
  std::vector<Lane> lanes;
  const auto add = [&](const LayerPolicy& policy, const BenchEntry& entry,
                       const LayerPolicy& data_policy, const std::string& label) {
    CaseSpec with = case_of(spec, policy, entry);
    with.data_policy = data_policy;
    with.working_set = options_.working_set / kRotationShare;
    lanes.push_back({.spec = with, .label = label});
    return static_cast<int64_t>(lanes.size()) - 1;
  };

  // The BF16 cache comes first; an entry that is one shares it.
  const LayerPolicy bf16 = policy_of(preset("exact"));
  add(bf16, {}, bf16, "exact");
  std::vector<EntryLanes> entries;
  for (const BenchEntry& entry : spec.entries) {
    const LayerPolicy policy = policy_of(entry.policy);
    EntryLanes& at = entries.emplace_back();
    if (is_bf16(policy)) {
      at.with = 0;
      continue;
    }
    at.with = add(policy, entry, policy, entry.policy.name);
    if (entry.promoted > 0 && can_promote(policy)) {
      LayerPolicy without = policy;
      without.promote = 1.0;
      at.without_promotion = add(without, entry, policy, entry.policy.name + ", never promoting");
    }
    if (entry.skipped > 0 && can_skip(policy)) {
      LayerPolicy without = policy;
      without.skip = 0.0;
      at.without_skipping = add(without, entry, policy, entry.policy.name + ", never skipping");
    }
  }

  double bytes = 0;
  for (const Lane& lane : lanes) bytes += static_cast<double>(bytes_of(lane.spec));
  if (options_.memory_limit > 0 && bytes > static_cast<double>(options_.memory_limit)) {
    throw Error(ErrorCode::out_of_memory,
                fmt::format("bench: the caches of this run take {:.2f} GiB and {:.2f} GiB are "
                            "left: lower -c, -b or the number of policies",
                            bytes / 0x1p30, static_cast<double>(options_.memory_limit) / 0x1p30));
  }

  const auto report = [&](const std::string& what, int64_t done, int64_t total) {
    if (options_.progress) options_.progress(what, done, total);
  };
  for (Lane& lane : lanes) {
    threads_.run([&] {
      lane.run = std::make_unique<BenchCase>(lane.spec, [&](int64_t done, int64_t total) {
        report("fill " + lane.label, done, total);
      });
    });
  }
  for (int round = 0; round < options_.rounds; ++round) {
    report(fmt::format("{} {}", to_string(spec.op), spec.ctx), round, options_.rounds);
    for (Lane& lane : lanes) {
      if (spec.op == BenchOp::prefill) {
        lane.gflops.push_back(std::max(meter_.fp32_gflops(), meter_.bf16_gflops().value_or(0.0)));
      }
      lane.read_gb_s.push_back(meter_.read_gb_s());
      double ms = 0;
      threads_.run([&] { ms = lane.run->sample(); });
      lane.ms.push_back(ms);
    }
  }

  // Unlike bandwidth, what a core computes at most does not move: disturbances only lower it.
  double peak_gflops = std::max(fp32_gflops_, bf16_gflops_);
  for (const Lane& lane : lanes) {
    for (const double x : lane.gflops) peak_gflops = std::max(peak_gflops, x);
  }

  std::vector<BenchRow> rows;
  const double ms_bf16 = median(lanes[0].ms);
  for (size_t i = 0; i < spec.entries.size(); ++i) {
    const EntryLanes& at = entries[i];
    const Lane& lane = lanes[static_cast<size_t>(at.with)];
    BenchRow row{.op = std::string(to_string(spec.op)),
                 .policy = spec.entries[i].policy.name,
                 .ctx = spec.ctx,
                 .queries = spec.queries,
                 .batch = spec.batch,
                 .q_heads = spec.q_heads,
                 .kv_heads = spec.kv_heads,
                 .head_dim = spec.head_dim,
                 .threads = threads_.count(),
                 .ms_min = minimum(lane.ms),
                 .ms_median = median(lane.ms),
                 .bytes_read = lane.run->bytes_read(),
                 .peak_gb_s = median(lane.read_gb_s),
                 .ms_bf16 = ms_bf16};
    row.gb_s = row.bytes_read / row.ms_median * 1e-6;
    row.fraction_of_peak = row.gb_s / row.peak_gb_s;
    row.speedup_vs_bf16 = ms_bf16 / row.ms_median;
    if (spec.op == BenchOp::append) {
      row.elements_per_s = lane.run->elements_appended() / row.ms_median * 1e3;
      rows.push_back(std::move(row));
      continue;
    }
    row.gflops = flops_of(spec) / row.ms_median * 1e-6;
    row.byte_ratio_ceiling = lanes[0].run->bytes_read() / row.bytes_read;
    if (lane.run->stats().pages_visible > 0) {
      row.promoted_fraction = lane.run->stats().promoted_fraction();
      row.skipped_fraction = lane.run->stats().skipped_fraction();
    }
    if (spec.op == BenchOp::prefill) {
      row.peak_gflops = peak_gflops;
      row.fraction_of_peak = *row.gflops / *row.peak_gflops;
    }
    if (at.without_promotion >= 0) {
      row.promote_ms =
          median_difference(lane.ms, lanes[static_cast<size_t>(at.without_promotion)].ms);
    }
    if (at.without_skipping >= 0) {
      row.skip_saves_ms =
          median_difference(lanes[static_cast<size_t>(at.without_skipping)].ms, lane.ms);
    }
    rows.push_back(std::move(row));
  }
  std::vector<double> passes;
  for (const Lane& lane : lanes) {
    passes.insert(passes.end(), lane.read_gb_s.begin(), lane.read_gb_s.end());
  }
  read_gb_s_ = median(passes);
  return rows;
}

}  // namespace thriftattn::bench
