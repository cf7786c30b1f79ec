// Filling, running and counting one case on a device (device_case.h).
#include "bench/device_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "attend/read_stats.h"
#include "base/float_convert.h"
#include "cache/page_layout.h"
#include "thriftattn/error.h"

namespace thriftattn::bench {
namespace {

constexpr int64_t kFillTokens = 1024;                   // of a step
constexpr int64_t kOpenPages = 32;                      // of a sequence, at least
constexpr int64_t kRotationBytes = int64_t{300} << 20;  // more than twice the largest L2
constexpr int64_t kMaxRotation = 512;
// Of the pages: by a floor of the LSE a few of those just below a threshold look heavier.
constexpr double kNearThreshold = 0.005;
constexpr int64_t kStride = 7919;  // prime: where page p lies is p * kStride, unless that is 0

bool appends(const CaseSpec& spec) { return spec.op == BenchOp::append; }

int64_t open_pages_of(const CaseSpec& spec) {
  return std::max(kOpenPages, spec.queries / kPageTokens + 2);
}

// Of the steps that fill. A decode or prefill case has its queries' own step last.
int64_t fill_tokens(const CaseSpec& spec) {
  return appends(spec) ? kFillTokens : std::max(kFillTokens, spec.queries);
}

int64_t first_page_of(const CaseSpec& spec) {
  return appends(spec) ? std::max<int64_t>(0, spec.ctx / kPageTokens - 1) : 0;
}

// Whether the cache would hold page p's residual when the last step is appended.
bool holds_residual(const CaseSpec& spec, int64_t page) {
  const int64_t before = appends(spec) ? spec.ctx : spec.ctx - spec.queries;
  return residual_in_reach(spec.policy, page, before + 1);
}

// By the pages alone: residual planes are hardly read.
int64_t device_rotation(const CaseSpec& spec, const cuda::SlotSizes& sizes) {
  const double batch = static_cast<double>(pages_of(spec) - first_page_of(spec)) *
                       static_cast<double>(sizes.page) * static_cast<double>(spec.batch);
  return std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(kRotationBytes) / batch) + 1,
                             1, kMaxRotation);
}

// Before anything is allocated, in floating point: what is asked for may be beyond any integer.
void check_memory(const CaseSpec& spec, const cuda::SlotSizes& sizes, int64_t rotation) {
  const auto token = static_cast<double>(spec.shape.kv_heads * spec.shape.head_dim_k);
  const auto pages = static_cast<double>(pages_of(spec) - first_page_of(spec));
  const auto sequences = static_cast<double>(rotation) * static_cast<double>(spec.batch);
  double bytes = sequences * pages * static_cast<double>(sizes.page);
  bytes += sequences * static_cast<double>(open_pages_of(spec) * sizes.open);
  if (spec.policy.residency == Residency::device) {
    bytes += sequences * pages * static_cast<double>(sizes.residual * spec.shape.kv_heads);
  }
  bytes += static_cast<double>(pages_of(spec)) * token * sizeof(float);
  if (!appends(spec)) {  // decisions
    bytes += static_cast<double>(spec.batch) * static_cast<double>(spec.queries) * pages *
             static_cast<double>(spec.shape.kv_heads);
  }
  const auto free = static_cast<double>(cuda::device_info().memory_free);
  constexpr double kMaxSlots = 0x1p31;  // ids are int32
  if (bytes <= free && sequences * pages * static_cast<double>(spec.shape.kv_heads) < kMaxSlots)
    return;
  throw Error(
      ErrorCode::out_of_memory,
      fmt::format("bench: a case of {} sequences of {} tokens takes {:.2f} GiB on the device "
                  "and {:.2f} GiB are free there: lower -c, -b or -p",
                  sequences, spec.ctx, bytes / 0x1p30, free / 0x1p30));
}

cuda::AttendPlan checked_plan(const CaseSpec& spec, const cuda::SlotSizes& sizes,
                              int64_t rotation) {
  check_memory(spec, sizes, rotation);
  return {spec.shape, spec.policy,
          cuda::AttendLimits{.batch = spec.batch,
                             .max_pages = pages_of(spec),
                             .step_tokens = spec.queries,
                             .open_pages = open_pages_of(spec)}};
}

template <class T>
cuda::DeviceMemory upload(const std::vector<T>& x, const DeviceClock& clock) {
  cuda::DeviceMemory memory(std::max<int64_t>(16, static_cast<int64_t>(x.size() * sizeof(T))));
  if (!x.empty()) {
    cuda::copy_to_device(memory.data(), x.data(), static_cast<int64_t>(x.size() * sizeof(T)),
                         clock.stream());
    cuda::synchronize(clock.stream());
  }
  return memory;
}

cuda::DeviceMemory allocate(int64_t bytes) {
  return cuda::DeviceMemory(std::max<int64_t>(16, bytes));
}

}  // namespace

DeviceCase::DeviceCase(const CaseSpec& spec, DeviceClock& clock, const Progress& progress)
    : spec_(spec),
      clock_(clock),
      sizes_(cuda::slot_sizes(spec.shape, spec.policy)),
      pages_(pages_of(spec)),
      first_page_(first_page_of(spec)),
      open_pages_(open_pages_of(spec)),
      rotation_(device_rotation(spec, sizes_)),
      // A twin, whose policy differs from the data's, finds other fractions on purpose.
      checked_(spec.op == BenchOp::decode && spec.policy == spec.data_policy),
      plan_(checked_plan(spec, sizes_, rotation_)),
      data_(data_spec(spec)) {
  lay_out();
  fill(progress);
  if (appends(spec_)) return;
  make_queries();
  count();
  if (checked_) data_.check(stats_, kNearThreshold);
}

// Pools and the tables of all sequences.
void DeviceCase::lay_out() {
  const int64_t sequences = rotation_ * spec_.batch, stored = pages_ - first_page_;
  std::vector<int32_t> blocks, residuals, open, lengths;
  int32_t next = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t p = 0; p < pages_; ++p) {
      const int64_t at = stored % kStride == 0 ? p : (p - first_page_) * kStride;
      // Pages that are not stored share a slot of zeros.
      const int64_t slot = p < first_page_ ? sequences * stored : at % stored * sequences + s;
      blocks.push_back(static_cast<int32_t>(slot));
      const bool held = sizes_.residual > 0 && p >= first_page_ && holds_residual(spec_, p);
      for (int64_t h = 0; h < spec_.shape.kv_heads; ++h) residuals.push_back(held ? next++ : -1);
    }
    for (int64_t i = 0; i < open_pages_; ++i)
      open.push_back(static_cast<int32_t>(s * open_pages_ + i));
    lengths.push_back(static_cast<int32_t>(spec_.ctx + (appends(spec_) ? spec_.queries : 0)));
  }
  blocks_ = upload(blocks, clock_);
  residual_table_ = upload(residuals, clock_);
  open_table_ = upload(open, clock_);
  lengths_ = upload(lengths, clock_);
  pool_ = allocate((sequences * stored + 1) * sizes_.page);
  open_ = allocate(sequences * open_pages_ * sizes_.open);
  residual_pool_ = allocate(next * sizes_.residual);
  status_ = allocate(static_cast<int64_t>(sizeof(cuda::AppendStatus)));
  cuda::fill(pool_.as<uint8_t>() + sequences * stored * sizes_.page, 0, sizes_.page,
             clock_.stream());
  cuda::fill(status_.data(), 0, status_.bytes(), clock_.stream());
  cuda::synchronize(clock_.stream());
}

cuda::LayerMemory DeviceCase::memory() const {
  return {pool_.as<uint8_t>(), residual_pool_.as<uint8_t>(), open_.as<uint8_t>(), nullptr};
}

cuda::BatchTables DeviceCase::tables(int64_t sequence) const {
  return {lengths_.as<int32_t>() + sequence, blocks_.as<int32_t>() + sequence * pages_,
          residual_table_.as<int32_t>() + sequence * pages_ * spec_.shape.kv_heads,
          open_table_.as<int32_t>() + sequence * open_pages_, nullptr};
}

void DeviceCase::fill(const Progress& progress) {
  const int64_t width = spec_.shape.kv_heads * spec_.shape.head_dim_k;
  std::vector<float> means(static_cast<size_t>(pages_ * width));
  for (int64_t p = 0; p < pages_; ++p) data_.page_mean(p, &means[static_cast<size_t>(p * width)]);
  means_ = upload(means, clock_);

  const int64_t step = fill_tokens(spec_), sequences = rotation_ * spec_.batch;
  const cuda::AttendPlan filler(
      spec_.shape, spec_.policy,
      {.batch = 1, .max_pages = pages_, .step_tokens = step, .open_pages = open_pages_});
  workspace_ = allocate(std::max(plan_.workspace_bytes(), filler.workspace_bytes()));
  // Every batch that appends has its own input.
  const int64_t rows = std::max(step, appends(spec_) ? sequences * spec_.queries : 0);
  k_ = allocate(rows * width * 2);
  v_ = allocate(rows * width * 2);
  step_lengths_ = allocate(4);
  step_offsets_ = allocate(8);

  const int64_t before = appends(spec_) ? spec_.ctx : spec_.ctx - spec_.queries;
  for (int64_t s = 0; s < sequences; ++s) {
    progress(s, sequences);
    for (int64_t at = first_page_ * kPageTokens; at < before; at += step) {
      append_rows(filler, s, at, std::min(step, before - at));
    }
    if (!appends(spec_)) append_rows(filler, s, before, spec_.queries);
  }
  cuda::AppendStatus status;
  cuda::copy_to_host(&status, status_.data(), sizeof status, clock_.stream());
  cuda::synchronize(clock_.stream());
  cuda::throw_if_failed(status, 0, spec_.policy);
  if (!appends(spec_)) return;
  for (int64_t s = 0; s < sequences; ++s) {
    draw_rows({.k = k_.as<uint16_t>() + s * spec_.queries * width,
               .v = v_.as<uint16_t>() + s * spec_.queries * width,
               .means = means_.as<float>(),
               .first_token = spec_.ctx,
               .n = spec_.queries,
               .width = width,
               .seed = static_cast<uint32_t>(s)},
              clock_.stream());
  }
  cuda::synchronize(clock_.stream());
}

void DeviceCase::append_rows(const cuda::AttendPlan& plan, int64_t sequence, int64_t first,
                             int64_t n) {
  draw_rows({.k = k_.as<uint16_t>(),
             .v = v_.as<uint16_t>(),
             .means = means_.as<float>(),
             .first_token = first,
             .n = n,
             .width = spec_.shape.kv_heads * spec_.shape.head_dim_k,
             .seed = static_cast<uint32_t>(sequence)},
            clock_.stream());
  const auto length = static_cast<int32_t>(first + n);
  const int32_t offsets[2] = {0, static_cast<int32_t>(n)};
  cuda::copy_to_device(step_lengths_.data(), &length, sizeof length, clock_.stream());
  cuda::copy_to_device(step_offsets_.data(), offsets, sizeof offsets, clock_.stream());
  cuda::AppendCall call;
  call.memory = memory();
  call.tables = tables(sequence);
  call.tables.lengths = step_lengths_.as<int32_t>();
  call.tables.step_offsets = step_offsets_.as<int32_t>();
  call.k = k_.data();
  call.v = v_.data();
  call.status = status_.as<cuda::AppendStatus>();
  call.workspace = workspace_.data();
  cuda::append(plan, call, clock_.stream());
  cuda::synchronize(clock_.stream());  // the numbers lie on the host's stack
}

// Decode takes FP32 queries, prefill BF16, as a model's own would be.
void DeviceCase::make_queries() {
  const std::vector<float> one = data_.queries();
  std::vector<float> q;
  for (int64_t b = 0; b < spec_.batch; ++b) q.insert(q.end(), one.begin(), one.end());
  if (spec_.op == BenchOp::prefill) {
    std::vector<uint16_t> narrow(q.size());
    std::transform(q.begin(), q.end(), narrow.begin(), f32_to_bf16);
    q_ = upload(narrow, clock_);
  } else {
    q_ = upload(q, clock_);
  }
  out_ = allocate(static_cast<int64_t>(q.size()) * 2);
}

cuda::AttendCall DeviceCase::attend_call(int64_t batch) const {
  const bool prefill = spec_.op == BenchOp::prefill;
  cuda::AttendCall call;
  call.memory = memory();
  call.tables = tables(batch * spec_.batch);
  call.config = {.mode = prefill ? AttendMode::prefill : AttendMode::decode,
                 .softmax_scale = 1.0f / std::sqrt(static_cast<float>(spec_.shape.head_dim_k))};
  call.q = q_.data();
  call.q_element = prefill ? cuda::Element::bf16 : cuda::Element::f32;
  call.out = out_.data();
  call.workspace = workspace_.data();
  return call;
}

cuda::AppendCall DeviceCase::append_call(int64_t batch) const {
  const int64_t first = batch * spec_.batch;
  const int64_t at = first * spec_.queries * spec_.shape.kv_heads * spec_.shape.head_dim_k;
  cuda::AppendCall call;
  call.memory = memory();
  call.tables = tables(first);
  call.k = k_.as<uint16_t>() + at;
  call.v = v_.as<uint16_t>() + at;
  call.status = status_.as<cuda::AppendStatus>();
  call.workspace = workspace_.data();
  return call;
}

// From what the kernels decided for the first batch. Sequences differ in their noise only.
void DeviceCase::count() {
  const int64_t heads = spec_.shape.kv_heads, rows = spec_.batch * spec_.queries;
  cuda::DeviceMemory decisions = allocate(rows * pages_ * heads);
  cuda::fill(decisions.data(), 0, decisions.bytes(), clock_.stream());
  cuda::AttendCall call = attend_call(0);
  call.decisions = decisions.as<uint8_t>();
  cuda::attend(plan_, call, clock_.stream());
  std::vector<uint8_t> decided(static_cast<size_t>(rows * pages_ * heads));
  cuda::copy_to_host(decided.data(), decisions.data(), static_cast<int64_t>(decided.size()),
                     clock_.stream());
  cuda::synchronize(clock_.stream());

  const PageLayout layout = make_page_layout(spec_.shape, spec_.policy);
  const int64_t group = spec_.shape.q_heads / heads;
  for (int64_t i = 0; i < rows * heads; ++i) {
    const int64_t row = i / heads, visible = spec_.ctx - spec_.queries + row % spec_.queries + 1;
    RowStats stats(stats_, layout, spec_.policy.promote);
    for (int64_t p = 0; p < pages_ && p * kPageTokens < visible; ++p) {
      const int64_t tokens = std::min(kPageTokens, visible - p * kPageTokens);
      const auto how = static_cast<cuda::Decision>(
          decided[static_cast<size_t>((row * pages_ + p) * heads + i % heads)]);
      switch (how) {
        case cuda::Decision::none:
          throw Error(ErrorCode::unsupported,
                      fmt::format("bench: the device left page {} of {} unread", p, pages_));
        case cuda::Decision::base:
          stats.add_page(PageRead::base, tokens);
          break;
        case cuda::Decision::full:
          stats.add_page(PageRead::full, tokens);
          break;
        case cuda::Decision::skip:
          stats.add_page(PageRead::skip, tokens);
          break;
        case cuda::Decision::open:
        case cuda::Decision::plain:
          stats.add_plain(tokens, how == cuda::Decision::open);
          break;
      }
    }
    stats.finish(group);
  }
  stats_.masses_known = false;
}

void DeviceCase::launch(int64_t batch, cuda::Stream stream) {
  if (appends(spec_)) {
    cuda::append(plan_, append_call(batch), stream);
  } else {
    cuda::attend(plan_, attend_call(batch), stream);
  }
}

std::vector<double> DeviceCase::time(int rounds) {
  std::vector<double> ms = clock_.time(rounds, [&](cuda::Stream stream) {
    for (int64_t r = 0; r < rotation_; ++r) launch(r, stream);
  });
  for (double& x : ms) x /= static_cast<double>(rotation_);
  return ms;
}

std::vector<double> DeviceCase::time_part(DecodePart part, int rounds) {
  std::vector<double> ms = clock_.time(rounds, [&](cuda::Stream stream) {
    for (int64_t r = 0; r < rotation_; ++r) {
      if (part == DecodePart::walk) {
        launch_part(DecodePart::prepare, plan_, attend_call(r), stream);
      }
      launch_part(part, plan_, attend_call(r), stream);
    }
  });
  for (double& x : ms) x /= static_cast<double>(rotation_);
  return ms;
}

void DeviceCase::run(int times) {
  for (int i = 0; i < times; ++i) launch(0, clock_.stream());
  cuda::synchronize(clock_.stream());
}

double DeviceCase::bytes() const {
  if (!appends(spec_)) return stats_.bits_read / 8.0 / static_cast<double>(spec_.queries);
  const Moved m = moved();
  return m.input + m.open + m.pages;
}

DeviceCase::Moved DeviceCase::moved() const {
  if (!appends(spec_)) return {};
  const auto batch = static_cast<double>(spec_.batch);
  const int64_t end = spec_.ctx + spec_.queries;
  const auto full = static_cast<double>(end / kPageTokens - spec_.ctx / kPageTokens);
  const auto tokens = static_cast<double>(spec_.queries);
  const LayerShape& shape = spec_.shape;
  const auto width = static_cast<double>(shape.kv_heads * (shape.head_dim_k + shape.head_dim_v));
  const PageLayout layout = make_page_layout(shape, spec_.policy);
  // An open token is 16 bits an element; a plain row goes to its page at once.
  double open = 0, rows = 0;
  for (const SideLayout* side : {&layout.k, &layout.v}) {
    const double a_token = static_cast<double>(side->layered ? 2 * side->dim : side->row_bytes);
    (side->layered ? open : rows) += tokens * static_cast<double>(shape.kv_heads) * a_token;
  }
  double pages = rows;
  if (layout.any_layered()) {
    double slot = static_cast<double>(sizes_.page + sizes_.residual * shape.kv_heads);
    for (const SideLayout* side : {&layout.k, &layout.v}) {
      if (!side->layered)
        slot -= static_cast<double>(kPageTokens * side->row_bytes * shape.kv_heads);
    }
    pages += full * slot;
  }
  return {.input = batch * tokens * width * 2, .open = batch * open, .pages = batch * pages};
}

}  // namespace thriftattn::bench
