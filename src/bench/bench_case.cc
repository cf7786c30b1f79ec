// Filling, running and counting one case (bench_case.h).
#include "bench/bench_case.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "cache/page_layout.h"

namespace thriftattn::bench {
namespace {

constexpr int64_t kFillTokens = 1024;  // of a step
constexpr double kSampleMs = 20.0;     // shorter batches are timed several at a time
constexpr int64_t kMaxRotation = 4096;

using View = TensorView<const float>;

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace

int64_t pages_of(const CaseSpec& spec) {
  const int64_t tokens = spec.ctx + (spec.op == BenchOp::append ? spec.queries : 0);
  return (tokens + kPageTokens - 1) / kPageTokens;
}

SyntheticSpec data_spec(const CaseSpec& spec) {
  return {.shape = spec.shape,
          .policy = spec.data_policy,
          .tokens = spec.ctx,
          .queries = spec.op == BenchOp::append ? 0 : spec.queries,
          .promoted = spec.promoted,
          .skipped = spec.skipped};
}

LayerPolicy policy_of(const Policy& policy) { return resolve(policy, {.layers = 1}).front(); }

bool is_bf16(const LayerPolicy& policy) {
  return policy.k_format == Format::bf16 && policy.v_format == Format::bf16;
}

CaseSpec case_of(const BenchSpec& spec, const LayerPolicy& policy, const BenchEntry& entry) {
  return {.op = spec.op,
          .ctx = spec.ctx,
          .queries = spec.queries,
          .batch = spec.batch,
          .shape = {.kv_heads = spec.kv_heads,
                    .q_heads = spec.q_heads,
                    .head_dim_k = spec.head_dim,
                    .head_dim_v = spec.head_dim},
          .policy = policy,
          .promoted = entry.promoted,
          .skipped = entry.skipped,
          .data_policy = policy};
}

int64_t rotation_of(const CaseSpec& spec) {
  if (spec.op == BenchOp::append) return 1;
  const PageLayout layout = make_page_layout(spec.shape, spec.policy);
  // Residual planes are hardly read: what one batch pulls through the caches is all the rest.
  const double batch = static_cast<double>(layout.slot_bytes) *
                       static_cast<double>(pages_of(spec)) * static_cast<double>(spec.batch);
  return std::clamp<int64_t>(
      static_cast<int64_t>(std::ceil(static_cast<double>(spec.working_set) / batch)), 1,
      kMaxRotation);
}

int64_t bytes_of(const CaseSpec& spec) {
  const PageLayout layout = make_page_layout(spec.shape, spec.policy);
  double page = static_cast<double>(layout.slot_bytes);
  if (spec.policy.residency == Residency::device) {
    page += static_cast<double>(layout.residual_bytes * layout.kv_heads);
  }
  const double bytes = page * static_cast<double>(pages_of(spec)) *
                       static_cast<double>(spec.batch) * static_cast<double>(rotation_of(spec));
  return static_cast<int64_t>(std::min(bytes, 9e18));
}

BenchCase::BenchCase(const CaseSpec& spec, const Progress& progress)
    : spec_(spec),
      data_(data_spec(spec)),
      cache_(KvCacheConfig{.layers = {spec.shape}, .policy = {spec.policy}}),
      // A twin, whose policy differs from the data's, finds other fractions on purpose.
      checked_(spec.op == BenchOp::decode && spec.policy == spec.data_policy),
      rotation_(rotation_of(spec)) {
  if (spec_.op == BenchOp::append) {
    fill(progress);
    sample();  // pages that the allocator has not touched yet
    return;
  }
  q_ = data_.queries();
  out_.resize(static_cast<size_t>(spec_.queries * spec_.shape.q_heads * spec_.shape.head_dim_v));
  fill(progress);
  // Sequences of a rotation read the same bytes; only decode is so short that all may warm up.
  counted_ = spec_.op == BenchOp::decode ? rotation_ : 1;
  double ms = 0;
  for (int64_t i = 0; i < counted_; ++i) ms += run_batch(&stats_);
  if (checked_) data_.check(stats_);
  const double enough = std::ceil(kSampleMs * static_cast<double>(counted_) / ms);
  batches_of_sample_ = std::clamp<int64_t>(static_cast<int64_t>(enough), 1, rotation_);
}

void BenchCase::fill(const Progress& progress) {
  const LayerShape& shape = spec_.shape;
  const int64_t staged = spec_.queries;
  const int64_t stored = spec_.op == BenchOp::append ? spec_.ctx : spec_.ctx - staged;
  const int64_t step = std::max(staged, std::min(stored, kFillTokens));
  k_.resize(static_cast<size_t>(step * shape.kv_heads * shape.head_dim_k));
  v_.resize(static_cast<size_t>(step * shape.kv_heads * shape.head_dim_v));
  const auto stage = [&](SequenceId sequence, int64_t first, int64_t n) {
    data_.fill(sequence, first, n, k_.data(), v_.data());
    cache_.begin_step(sequence, n);
    cache_.append(sequence, 0, View::dense(k_.data(), n, shape.kv_heads, shape.head_dim_k),
                  View::dense(v_.data(), n, shape.kv_heads, shape.head_dim_v));
  };
  const int64_t total = rotation_ * spec_.batch;
  for (int64_t i = 0; i < total; ++i) {
    const SequenceId sequence = cache_.create();
    sequences_.push_back(sequence);
    for (int64_t at = 0; at < stored; at += step) {
      progress(i * stored + at, total * stored);
      stage(sequence, at, std::min(step, stored - at));
      cache_.commit(sequence);
    }
    // The step stays open: queries see their own tokens, and attend() changes nothing.
    if (spec_.op != BenchOp::append) stage(sequence, stored, staged);
    if (i == 0 && checked_) {  // before the time that the others take
      AttendStats stats;
      attend_one(sequence, &stats);
      data_.check(stats);
    }
  }
  if (spec_.op == BenchOp::append) data_.fill(0, spec_.ctx, staged, k_.data(), v_.data());
}

double BenchCase::run_batch(AttendStats* stats) {
  const LayerShape& shape = spec_.shape;
  const SequenceId* batch = &sequences_[static_cast<size_t>(next_ * spec_.batch)];
  next_ = (next_ + 1) % rotation_;
  const int64_t n = spec_.queries;
  double ms = 0;
  if (spec_.op == BenchOp::append) {
    const auto k = View::dense(k_.data(), n, shape.kv_heads, shape.head_dim_k);
    const auto v = View::dense(v_.data(), n, shape.kv_heads, shape.head_dim_v);
    for (int64_t b = 0; b < spec_.batch; ++b) {
      const auto start = std::chrono::steady_clock::now();
      cache_.begin_step(batch[b], n);
      cache_.append(batch[b], 0, k, v);
      ms += ms_since(start);
      cache_.rollback(batch[b]);
    }
    return ms;
  }
  const auto start = std::chrono::steady_clock::now();
  for (int64_t b = 0; b < spec_.batch; ++b) attend_one(batch[b], stats);
  return ms_since(start);
}

void BenchCase::attend_one(SequenceId sequence, AttendStats* stats) {
  const LayerShape& shape = spec_.shape;
  const int64_t n = spec_.queries;
  attend(
      cache_,
      {.sequence = sequence,
       .layer = 0,
       .config = {.mode = spec_.op == BenchOp::prefill ? AttendMode::prefill : AttendMode::decode,
                  .softmax_scale =
                      static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim_k)))},
       .q = View::dense(q_.data(), n, shape.q_heads, shape.head_dim_k),
       .out = TensorView<float>::dense(out_.data(), n, shape.q_heads, shape.head_dim_v),
       .stats = stats});
}

double BenchCase::sample() {
  double ms = 0;
  for (int64_t i = 0; i < batches_of_sample_; ++i) ms += run_batch(nullptr);
  return ms / static_cast<double>(batches_of_sample_);
}

double BenchCase::bytes_read() const {
  if (spec_.op == BenchOp::append) return elements_appended() * sizeof(float);
  return stats_.bits_read / 8.0 / static_cast<double>(counted_ * spec_.queries);
}

double BenchCase::elements_appended() const {
  const LayerShape& shape = spec_.shape;
  return static_cast<double>(spec_.batch) * static_cast<double>(spec_.queries) *
         static_cast<double>(shape.kv_heads * (shape.head_dim_k + shape.head_dim_v));
}

}  // namespace thriftattn::bench
