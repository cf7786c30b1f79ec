// Cases, twins and rows of a device bench (device_bench.h).
#include "bench/device_bench.h"

#include <fmt/format.h>

#include <optional>

#include "bench/statistics.h"
#include "bench/synthetic.h"

namespace thriftattn::bench {
namespace {

constexpr int64_t kPartQueries = 16;  // of one pass of the decode kernels

// Two products of each query with the keys that it sees.
double flops_of(const BenchSpec& spec) {
  const auto queries = static_cast<double>(spec.queries);
  const double pairs = queries * (static_cast<double>(spec.ctx) - 0.5 * (queries - 1));
  return 4.0 * static_cast<double>(spec.batch * spec.q_heads * spec.head_dim) *
         (spec.op == BenchOp::prefill ? pairs : queries * static_cast<double>(spec.ctx));
}

}  // namespace

struct DeviceBench::Measured {
  std::vector<double> ms;
  double bytes = 0;
  AttendStats stats;
  double prepare_ms = 0, walk_ms = 0, merge_ms = 0;
  DeviceCase::Moved moved;
  int64_t rotation = 0, workspace_bytes = 0;
};

void check_device_spec(const BenchSpec& spec) {
  check_spec(spec);
  for (const BenchEntry& entry : spec.entries) {
    cuda::slot_sizes(case_of(spec, {}, entry).shape, policy_of(entry.policy));
  }
}

DeviceBench::DeviceBench(const DeviceBenchOptions& options)
    : options_(options), info_(cuda::device_info()), peaks_(measure_device_peaks(clock_)) {}

std::string DeviceBench::machine() const {
  return fmt::format(
      "{}, sm_{}{}, CUDA driver {}.{}, runtime {}.{}; copy {:.0f} GB/s, read {:.0f} GB/s",
      info_.name, info_.major, info_.minor, info_.driver_version / 1000,
      info_.driver_version % 1000 / 10, info_.runtime_version / 1000,
      info_.runtime_version % 1000 / 10, peaks_.copy, peaks_.read);
}

DeviceBench::Measured DeviceBench::measure(const CaseSpec& spec, const std::string& label,
                                           bool parts) {
  const auto report = [&](const std::string& what, int64_t done, int64_t total) {
    if (options_.progress) options_.progress(what, done, total);
  };
  DeviceCase run(spec, clock_,
                 [&](int64_t done, int64_t total) { report("fill " + label, done, total); });
  report("time " + label, 0, 1);
  Measured m{.ms = run.time(options_.rounds),
             .bytes = run.bytes(),
             .stats = run.stats(),
             .moved = run.moved(),
             .rotation = run.rotation(),
             .workspace_bytes = run.workspace_bytes()};
  if (parts && spec.op == BenchOp::decode && spec.queries <= kPartQueries) {
    m.prepare_ms = median(run.time_part(DecodePart::prepare, options_.rounds));
    m.walk_ms = median(run.time_part(DecodePart::walk, options_.rounds)) - m.prepare_ms;
    m.merge_ms = median(run.time_part(DecodePart::merge, options_.rounds));
  }
  return m;
}

std::vector<DeviceRow> DeviceBench::run(const BenchSpec& spec) {
  check_device_spec(spec);
  // The BF16 cache comes first; an entry that is one shares it.
  const Measured bf16 =
      measure(case_of(spec, policy_of(preset("exact")), {}), "exact", options_.parts);
  std::vector<DeviceRow> rows;
  for (const BenchEntry& entry : spec.entries) {
    const LayerPolicy policy = policy_of(entry.policy);
    const CaseSpec with = case_of(spec, policy, entry);
    const std::string& name = entry.policy.name;
    const Measured m = is_bf16(policy) ? bf16 : measure(with, name, options_.parts);
    DeviceRow& out = rows.emplace_back(DeviceRow{.prepare_ms = m.prepare_ms,
                                                 .walk_ms = m.walk_ms,
                                                 .merge_ms = m.merge_ms,
                                                 .moved = m.moved,
                                                 .rotation = m.rotation,
                                                 .workspace_bytes = m.workspace_bytes});
    BenchRow& row = out.row;
    row = {.op = std::string(to_string(spec.op)),
           .backend = "cuda",
           .policy = name,
           .ctx = spec.ctx,
           .queries = spec.queries,
           .batch = spec.batch,
           .q_heads = spec.q_heads,
           .kv_heads = spec.kv_heads,
           .head_dim = spec.head_dim,
           .ms_min = minimum(m.ms),
           .ms_median = median(m.ms),
           .bytes_read = m.bytes,
           .peak_gb_s = peaks_.copy,
           .ms_bf16 = median(bf16.ms)};
    row.gb_s = row.bytes_read / row.ms_median * 1e-6;
    row.speedup_vs_bf16 = row.ms_bf16 / row.ms_median;
    // Prefill is bound by arithmetic, whose peak is not measured here.
    if (spec.op != BenchOp::prefill) row.fraction_of_peak = row.gb_s / row.peak_gb_s;
    if (spec.op == BenchOp::append) {
      const auto elements =
          static_cast<double>(2 * spec.batch * spec.queries * spec.kv_heads * spec.head_dim);
      row.elements_per_s = elements / row.ms_median * 1e3;
      continue;
    }
    row.gflops = flops_of(spec) / row.ms_median * 1e-6;
    row.byte_ratio_ceiling = bf16.bytes / m.bytes;
    if (m.stats.pages_visible > 0) {
      row.promoted_fraction = m.stats.promoted_fraction();
      row.skipped_fraction = m.stats.skipped_fraction();
    }
    if (options_.twins && entry.promoted > 0 && can_promote(policy)) {
      CaseSpec twin = with;
      twin.policy.promote = 1.0;
      row.promote_ms = row.ms_median - median(measure(twin, name + ", never promoting", false).ms);
    }
    if (options_.twins && entry.skipped > 0 && can_skip(policy)) {
      CaseSpec twin = with;
      twin.policy.skip = 0.0;
      row.skip_saves_ms =
          median(measure(twin, name + ", never skipping", false).ms) - row.ms_median;
    }
  }
  return rows;
}

void DeviceBench::run_plain(const BenchSpec& spec, int times) {
  check_device_spec(spec);
  const BenchEntry& entry = spec.entries.front();
  DeviceCase(case_of(spec, policy_of(entry.policy), entry), clock_, [](int64_t, int64_t) {
  }).run(times);
}

}  // namespace thriftattn::bench
