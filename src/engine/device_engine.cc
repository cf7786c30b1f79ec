// DeviceEngine: buffers, what goes up and comes back, errors (device_engine.h).
#ifdef THRIFTATTN_WITH_CUDA
#include "engine/device_engine.h"

#include <fmt/format.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>

#include "cuda/checks.h"
#include "engine/device_state.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kFloat = sizeof(float);

// The sizes of a token's rows in the buffers.
struct RowFloats {
  int64_t wide = 0, operand = 0, normed = 0;
};

RowFloats row_floats(const ModelConfig& config) {
  RowFloats sizes{.wide = 0, .operand = config.width, .normed = config.width};
  for (const LayerConfig& l : config.layers) {
    const int64_t qkv = (l.q_heads + l.kv_heads) * l.head_dim_k + l.kv_heads * l.head_dim_v;
    sizes.wide = std::max({sizes.wide, qkv, 2 * l.ff});
    sizes.operand = std::max({sizes.operand, l.ff, l.q_heads * l.head_dim_v});
    sizes.normed = std::max(sizes.normed, (l.q_heads * l.head_dim_k + 1) / 2);  // q in BF16
  }
  return sizes;
}

OwnedStream make_stream() {
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return OwnedStream(stream);
}

cuda::Element element_of(ComputeType compute) {
  return compute == ComputeType::f32 ? cuda::Element::f32 : cuda::Element::bf16;
}

AttendStats stats_of(const device::ReadCounts& c, const LayerConfig& layer) {
  AttendStats stats;
  stats.rows = static_cast<int64_t>(c.rows);
  stats.bits_read = static_cast<double>(c.bits) / static_cast<double>(layer.kv_heads);
  stats.elements_visible = static_cast<double>(c.elements);
  stats.bits_per_element_sum = static_cast<double>(c.ratios) / 4294967296.0;
  stats.pages_visible = static_cast<int64_t>(c.pages);
  stats.pages_promoted = static_cast<int64_t>(c.promoted);
  stats.pages_skipped = static_cast<int64_t>(c.skipped);
  stats.masses_known = false;
  return stats;
}

void require_fit(const Model& model, const KvCache& cache) {
  if (cache.config().layers != layer_shapes(model.config())) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("the cache ({} layers) was made for another model than {} ({} layers); "
                            "make it with DeviceEngine::make_cache()",
                            cache.config().layers.size(), model.config().name,
                            model.config().layer_count()));
  }
}

}  // namespace

DeviceEngine::State::State(std::shared_ptr<const Model> m, ComputeType c)
    : model(std::move(m)),
      config(model->config()),
      compute(c == ComputeType::f32 ? ComputeType::f32 : ComputeType::bf16),
      device(cuda::device_info()),
      stream(make_stream()),
      weights(device::upload_weights(*model, element_of(compute), stream.get())) {
  for (int64_t i = 0; i < 2 + 2 * config.layer_count(); ++i) {
    cudaEvent_t event = nullptr;
    cuda::check(cudaEventCreate(&event), "cudaEventCreate");
    events_.emplace_back(event);
  }
}

void DeviceEngine::State::reserve(const Step& step) {
  const KvCache::Impl& impl = step.cache->impl();
  const std::tuple key(cuda::device_state(*step.cache).serial(), step.max_pages, step.open_pages);
  if (table_layout_ == nullptr || table_key_ != key) {
    table_layout_ = std::make_unique<cuda::DeviceTables>(*step.cache, step.max_pages, step.open_pages);
    table_key_ = key;
  }
  int64_t workspace = 256, kv_heads = 1;
  for (size_t s = 0; s < impl.layers.size(); ++s) {
    const LayerStore& store = impl.layers[s];
    if (!store.heads.empty()) {
      throw Error(ErrorCode::unsupported,
                  fmt::format("CUDA: layer {} has rules by KV head; required: {} stores of heads; "
                              "supported: one policy a layer; missing: the gathering of heads",
                              store.layer, impl.stores_of(store.layer).size()));
    }
    kv_heads = std::max(kv_heads, store.shape.kv_heads);
    if (cuda::is_exact(store.policy)) continue;
    workspace = std::max(workspace, plan(store, {.batch = 1,
                                                 .max_pages = step.max_pages,
                                                 .step_tokens = step.tokens,
                                                 .open_pages = step.open_pages})
                                        .workspace_bytes());
  }
  const RowFloats row = row_floats(config);
  const int64_t n = step.tokens;
  int64_t rope = 0;
  rope_at_.clear();
  ropes_.resize(model->rope_tables());
  for (int64_t i = 0; i < config.layer_count(); ++i) {
    const size_t table = model->rope_table(i);
    if (table < rope_at_.size()) continue;
    rope_at_.push_back(rope);  // tables are numbered in the order of their first layers
    rope += 2 * n * static_cast<int64_t>(model->rope_frequencies(i).size());
  }
  const StepReport report(impl.layers.size(), config.layers.size());
  bool moved = false;
  moved |= x_.reserve(n * config.width * kFloat);
  moved |= normed_.reserve(n * row.normed * kFloat);
  moved |= hidden_.reserve(n * config.width * kFloat);
  moved |= wide_.reserve(n * row.wide * kFloat);
  moved |= operand_.reserve(n * row.operand * kFloat);
  moved |= rope_.reserve(rope * kFloat);
  moved |= tables_.reserve(table_layout_->bytes());
  moved |= report_.reserve(report.bytes);
  moved |= decisions_.reserve(n * step.max_pages * kv_heads);
  moved |= workspace_.reserve(workspace);
  if (moved) {
    ++generation_;
    graphs_.clear();
  }
  up_x_.reserve(n * config.width * kFloat);
  up_rope_.reserve(rope * kFloat);
  up_tables_.reserve(table_layout_->bytes());
  down_report_.reserve(report.bytes);
}

void DeviceEngine::State::upload(const Step& step, SequenceId sequence,
                                 std::span<const int32_t> tokens) {
  const int64_t n = step.tokens;
  tbb::parallel_for(int64_t{0}, n, [&](int64_t t) {
    model->embed(tokens[static_cast<size_t>(t)], up_x_.as<float>() + t * config.width);
  });
  const int64_t first = step.cache->length(sequence);
  int64_t floats = 0;
  for (size_t table = 0; table < rope_at_.size(); ++table) {
    for (int64_t i = 0; i < config.layer_count(); ++i) {
      if (model->rope_table(i) != table) continue;
      const RopeTable rope(model->rope_frequencies(i), first, n,
                           rope_magnitude(config.layers[static_cast<size_t>(i)].rope));
      float* to = up_rope_.as<float>() + rope_at_[table];
      std::copy(rope.cos.begin(), rope.cos.end(), to);
      std::copy(rope.sin.begin(), rope.sin.end(), to + n * rope.pairs);
      floats = rope_at_[table] + 2 * n * rope.pairs;
      break;
    }
  }
  table_layout_->fill(*step.cache, sequence);
  std::memcpy(up_tables_.as<void>(), table_layout_->ids().data(),
              static_cast<size_t>(table_layout_->bytes()));
  cuda::copy_to_device(x_.as<void>(), up_x_.as<void>(), n * config.width * kFloat, stream.get());
  cuda::copy_to_device(rope_.as<void>(), up_rope_.as<void>(), floats * kFloat, stream.get());
  cuda::copy_to_device(tables_.as<void>(), up_tables_.as<void>(), table_layout_->bytes(),
                       stream.get());
}

// What the step reports: errors first, then times and what was read.
void DeviceEngine::State::finish(const Step& step, const ForwardOptions& options,
                                 ForwardTimes& times) {
  const KvCache::Impl& impl = step.cache->impl();
  const StepReport layout(impl.layers.size(), config.layers.size());
  cuda::copy_to_host(down_report_.as<void>(), report_.as<void>(), layout.bytes, stream.get());
  cuda::synchronize(stream.get());
  const uint8_t* report = down_report_.as<uint8_t>();
  for (size_t s = 0; s < impl.layers.size(); ++s) {
    cuda::AppendStatus status;
    std::memcpy(&status, report + layout.statuses + s * sizeof status, sizeof status);
    cuda::throw_if_failed(status, impl.layers[s].layer, impl.layers[s].policy);
  }
  int32_t row = 0;
  std::memcpy(&row, report, sizeof row);
  if (row < step.tokens) {
    throw Error(ErrorCode::non_finite,
                fmt::format("token {} of the step has an activation that is NaN or Inf after the last "
                            "layer; the weights overflow FP32 or are damaged: fetch the model again",
                            row));
  }
  const auto seconds = [&](size_t from, size_t to) {
    float ms = 0;
    cuda::check(cudaEventElapsedTime(&ms, events_[from].get(), events_[to].get()), "event times");
    return 1e-3 * ms;
  };
  for (int64_t i = 0; i < config.layer_count(); ++i) {
    const auto at = static_cast<size_t>(i);
    times.attention += seconds(2 + 2 * at, 3 + 2 * at);
    device::ReadCounts counts;
    std::memcpy(&counts, report + layout.counts + at * sizeof counts, sizeof counts);
    const AttendStats stats = stats_of(counts, config.layers[at]);
    if (options.stats != nullptr) options.stats->merge(stats);
    if (options.layer_stats != nullptr) {
      options.layer_stats->resize(config.layers.size());
      (*options.layer_stats)[at].merge(stats);
    }
  }
  times.dense += seconds(0, 1) - times.attention;
}

DeviceEngine::DeviceEngine(std::unique_ptr<State> state) : state_(std::move(state)) {}
DeviceEngine::~DeviceEngine() = default;

std::shared_ptr<DeviceEngine> DeviceEngine::load(std::shared_ptr<const Model> model,
                                                 ComputeType compute) {
  return std::shared_ptr<DeviceEngine>(
      new DeviceEngine(std::make_unique<State>(std::move(model), compute)));
}

const Model& DeviceEngine::model() const { return *state_->model; }
ComputeType DeviceEngine::compute() const { return state_->compute; }
int64_t DeviceEngine::weight_bytes() const { return state_->weights.bytes; }

std::string DeviceEngine::explain_compute() const {
  if (state_->compute == ComputeType::f32) {
    return "dense layers: weights FP32, arithmetic FP32 (no TF32), on the device";
  }
  return "dense layers: weights BF16, activations rounded to BF16 before a product; sums FP32, on the "
         "device";
}

std::string DeviceEngine::explain_device() const {
  const cuda::DeviceInfo& d = state_->device;
  const int64_t lt = state_->multiplier.version();
  return fmt::format("{} (compute capability {}.{}), driver for CUDA {}.{}, cuBLASLt {}, {} MiB of "
                     "weights",
                     d.name, d.major, d.minor, d.driver_version / 1000, d.driver_version % 1000 / 10,
                     lt, weight_bytes() >> 20);
}

std::string DeviceEngine::explain_attention(const KvCache& cache) const {
  const std::lock_guard lock(state_->mutex);
  std::string text;
  std::vector<const LayerStore*> seen;
  for (const LayerStore& store : cache.impl().layers) {
    const bool known = std::any_of(seen.begin(), seen.end(), [&](const LayerStore* other) {
      return other->shape == store.shape && other->policy == store.policy;
    });
    if (known) continue;
    seen.push_back(&store);
    std::string line =
        cuda::is_exact(store.policy)
            ? "exact_attend: FP32 products, tile of 16 query rows x 64 keys, K f32, V f32"
            : cuda::AttendPlan(store.shape, store.policy,
                               {.batch = 1, .max_pages = 1024, .step_tokens = 1})
                  .explain();
    text += fmt::format("{}from layer {}: {}", text.empty() ? "" : "; ", store.layer, line);
  }
  return text;
}

std::unique_ptr<KvCache> DeviceEngine::make_cache(KvCacheConfig config) {
  return cuda::make_device_cache(std::move(config), state_->stream.get());
}

void DeviceEngine::forward(KvCache& cache, SequenceId sequence, std::span<const int32_t> tokens,
                           const ForwardOptions& options, const Outputs& outputs) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  require_fit(*s.model, cache);
  if (tokens.empty()) return;
  if (options.on_qk) {
    throw Error(ErrorCode::unsupported,
                "Q and K cannot be watched on the device; measure the equaliser on the CPU");
  }
  const auto start = Clock::now();
  const auto n = static_cast<int64_t>(tokens.size());
  const int64_t pages = (cache.length(sequence) + n) / kPageTokens + 1;
  State::Step step{
      .cache = &cache,
      .tokens = n,
      // In powers of two, so that plans and graphs serve many steps.
      .max_pages = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(pages, 64)))),
      .open_pages = std::max<int64_t>(2, (n + kPageTokens - 2) / kPageTokens + 1),
      .mode = options.mode,
      .cancelled = &options.cancelled};
  ForwardTimes times;
  cache.begin_step(sequence, n);
  try {
    s.reserve(step);
    cache.impl().make_room(cache.impl().sequence(sequence));
    s.upload(step, sequence, tokens);
    if (n == 1 && step.mode == AttendMode::decode) {
      s.launch_graph(step);
    } else {
      s.launch(step);
    }
    const int64_t width = s.config.width;
    const int64_t rows = outputs.hidden != nullptr ? n : outputs.last != nullptr ? 1 : 0;
    s.down_hidden_.reserve(std::max<int64_t>(rows, 1) * width * kFloat);
    const float* from = s.hidden_.as<float>() + (n - rows) * width;
    if (rows > 0) {
      cuda::copy_to_host(s.down_hidden_.as<void>(), from, rows * width * kFloat, s.stream.get());
    }
    s.finish(step, options, times);
    const float* got = s.down_hidden_.as<float>();
    if (outputs.hidden != nullptr) std::copy_n(got, n * width, outputs.hidden);
    if (outputs.last != nullptr) std::copy_n(got + (rows - 1) * width, width, outputs.last);
    cache.commit(sequence);
  } catch (...) {
    // What is queued may still write to the step's slots.
    if (cudaStreamSynchronize(s.stream.get()) != cudaSuccess) (void)cudaGetLastError();
    cache.rollback(sequence);
    throw;
  }
  times.total = std::chrono::duration<double>(Clock::now() - start).count();
  if (options.times != nullptr) options.times->merge(times);
}

void DeviceEngine::logits(const float* hidden, int64_t rows, float* out, ForwardTimes* times) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  const auto start = Clock::now();
  const int64_t width = s.config.width, vocab = s.config.vocab;
  // FP32 rows, then the same as the product takes them.
  s.logits_x_.reserve(2 * rows * width * kFloat);
  s.logits_.reserve(rows * vocab * kFloat);
  s.down_logits_.reserve(rows * std::max(vocab, width) * kFloat);
  std::memcpy(s.down_logits_.as<void>(), hidden, static_cast<size_t>(rows * width * kFloat));
  cuda::copy_to_device(s.logits_x_.as<void>(), s.down_logits_.as<void>(), rows * width * kFloat,
                       s.stream.get());
  const device::Operand x{s.logits_x_.as<float>() + rows * width, s.weights.element};
  device::narrow(s.logits_x_.as<float>(), rows * width, x, s.stream.get());
  s.multiply(s.weights.lm_head, x, rows, s.logits_.as<float>());
  if (s.config.final_softcap > 0.0f) {
    device::soft_cap(s.logits_.as<float>(), rows * vocab, s.config.final_softcap, s.stream.get());
  }
  cuda::copy_to_host(s.down_logits_.as<void>(), s.logits_.as<void>(), rows * vocab * kFloat,
                     s.stream.get());
  cuda::synchronize(s.stream.get());
  std::memcpy(out, s.down_logits_.as<void>(), static_cast<size_t>(rows * vocab * kFloat));
  if (times != nullptr) {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    times->merge({.attention = 0, .dense = seconds, .total = seconds});
  }
}

}  // namespace thriftattn
#else
#include "engine/device_engine.h"

#include "thriftattn/cuda.h"
#include "thriftattn/error.h"

// A build without the backend: load() says so, and nothing else can be reached.
namespace thriftattn {

struct DeviceEngine::State {};

DeviceEngine::DeviceEngine(std::unique_ptr<State> state) : state_(std::move(state)) {}
DeviceEngine::~DeviceEngine() = default;

std::shared_ptr<DeviceEngine> DeviceEngine::load(std::shared_ptr<const Model> model, ComputeType) {
  (void)model;
  (void)cuda::device_info();
  throw Error(ErrorCode::unsupported,
              "this engine was built without CUDA; required: nvcc 12.8 or later and the header of "
              "cuBLASLt when CMake runs; supported here: the CPU");
}

namespace {
[[noreturn]] void unreachable() {
  throw Error(ErrorCode::unsupported, "this engine was built without CUDA");
}
}  // namespace

const Model& DeviceEngine::model() const { unreachable(); }
ComputeType DeviceEngine::compute() const { unreachable(); }
int64_t DeviceEngine::weight_bytes() const { unreachable(); }
std::string DeviceEngine::explain_compute() const { unreachable(); }
std::string DeviceEngine::explain_device() const { unreachable(); }
std::string DeviceEngine::explain_attention(const KvCache&) const { unreachable(); }
std::unique_ptr<KvCache> DeviceEngine::make_cache(KvCacheConfig) { unreachable(); }
void DeviceEngine::forward(KvCache&, SequenceId, std::span<const int32_t>, const ForwardOptions&,
                           const Outputs&) {
  unreachable();
}
void DeviceEngine::logits(const float*, int64_t, float*, ForwardTimes*) { unreachable(); }

}  // namespace thriftattn
#endif
