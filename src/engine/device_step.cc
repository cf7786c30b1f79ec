// The launches of one step: transformer.cc's forward pass, on a stream (device_state.h).
#ifdef THRIFTATTN_WITH_CUDA
#include <fmt/format.h>

#include <algorithm>

#include "cuda/checks.h"
#include "engine/device_state.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

constexpr size_t kMostPlans = 256;

int64_t qkv_row(const LayerConfig& l) {
  return (l.q_heads + l.kv_heads) * l.head_dim_k + l.kv_heads * l.head_dim_v;
}

}  // namespace

void DeviceEngine::State::multiply(const device::Matrix& w, const device::Operand& x, int64_t rows,
                                   float* y) {
  multiplier.multiply({.element = weights.element,
                       .x = x.data,
                       .w = w.data.data(),
                       .y = y,
                       .m = rows,
                       .n = w.rows,
                       .k = w.columns},
                      stream.get());
}

void DeviceEngine::State::prepare_products(int64_t rows) {
  for (const device::Layer& layer : weights.layers) {
    for (const device::Matrix* w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) {
      multiplier.prepare({.element = weights.element, .m = rows, .n = w->rows, .k = w->columns});
    }
  }
}

const cuda::AttendPlan& DeviceEngine::State::plan(const LayerStore& store,
                                                  const cuda::AttendLimits& limits) {
  for (const KnownPlan& known : plans_) {
    if (known.limits.step_tokens == limits.step_tokens &&
        known.limits.max_pages == limits.max_pages &&
        known.limits.open_pages == limits.open_pages && known.shape == store.shape &&
        known.policy == store.policy) {
      return *known.plan;
    }
  }
  if (plans_.size() >= kMostPlans) plans_.clear();
  auto made = std::make_unique<cuda::AttendPlan>(store.shape, store.policy, limits);
  plans_.push_back({store.shape, store.policy, limits, std::move(made)});
  return *plans_.back().plan;
}

void DeviceEngine::State::record(const Step& step, size_t event) {
  // In a graph an event must be external to be read from outside.
  cuda::check(cudaEventRecordWithFlags(events_[event].get(), stream.get(),
                                       step.capturing ? cudaEventRecordExternal
                                                      : cudaEventRecordDefault),
              "record an event");
}

void DeviceEngine::State::attend(const Step& step, int64_t index, const float* qkv, int64_t row) {
  const LayerConfig& layer = config.layers[static_cast<size_t>(index)];
  const KvCache::Impl& impl = step.cache->impl();
  const size_t s = impl.first_store[static_cast<size_t>(index)];
  const LayerStore& store = impl.layers[s];
  const StepReport report(impl.layers.size(), config.layers.size());
  uint8_t* const reported = report_.as<uint8_t>();
  const int64_t k_at = layer.q_heads * layer.head_dim_k;
  const bool exact = cuda::is_exact(store.policy);

  cuda::AppendCall append;
  append.memory = cuda::layer_memory(*step.cache, s);
  append.tables = table_layout_->tables(s, tables());
  append.k = qkv + k_at;
  append.v = qkv + k_at + layer.kv_heads * layer.head_dim_k;
  append.element = cuda::Element::f32;
  append.k_token_stride = append.v_token_stride = row;
  append.status = reinterpret_cast<cuda::AppendStatus*>(reported + report.statuses) + s;
  append.workspace = workspace_.as<void>();

  cuda::AttendCall call;
  call.memory = append.memory;
  call.tables = append.tables;
  call.config = {.mode = step.mode,
                 .softmax_scale = config.attention_scale,
                 .softcap = config.attention_softcap};
  call.q = qkv;
  call.q_element = cuda::Element::f32;
  call.q_token_stride = row;
  if (narrow_queries(step, index)) {
    call.q = normed_.as<void>();
    call.q_element = cuda::Element::bf16;
    call.q_token_stride = 0;
  }
  call.out = operand_.as<void>();
  call.out_element = weights.element;
  call.workspace = append.workspace;
  call.decisions = exact ? nullptr : decisions_.as<uint8_t>();

  if (exact) {
    const cuda::ExactLayer l = cuda::exact_layer(store);
    cuda::exact_append(l, append, step.tokens, stream.get());
    cuda::exact_attend(l, call, step.tokens, stream.get());
  } else {
    const cuda::AttendPlan& p = plan(
        store, {.batch = 1, .max_pages = step.max_pages, .step_tokens = step.tokens,
                .open_pages = step.open_pages});
    cuda::append(p, append, stream.get());
    cuda::fill(decisions_.as<void>(), 0, step.tokens * step.max_pages * layer.kv_heads,
               stream.get());
    cuda::attend(p, call, stream.get());
  }
  device::count_reads({.decisions = call.decisions,
                       .lengths = tables(),
                       .tokens = step.tokens,
                       .max_pages = step.max_pages,
                       .window = store.shape.window,
                       .kv_heads = layer.kv_heads,
                       .dims = layer.head_dim_k + layer.head_dim_v,
                       .costs = device::read_costs(store.layout),
                       .counts = reinterpret_cast<device::ReadCounts*>(reported + report.counts) +
                                 index},
                      stream.get());
}

// Prefill takes queries of 16 bits in a third of the products; they are rounded as all activations are.
bool DeviceEngine::State::narrow_queries(const Step& step, int64_t index) const {
  const KvCache::Impl& impl = step.cache->impl();
  return weights.element == cuda::Element::bf16 && step.mode == AttendMode::prefill &&
         !cuda::is_exact(impl.layers[impl.first_store[static_cast<size_t>(index)]].policy);
}

void DeviceEngine::State::attention(const Step& step, int64_t index) {
  const LayerConfig& layer = config.layers[static_cast<size_t>(index)];
  const device::Layer& w = weights.layers[static_cast<size_t>(index)];
  const size_t rope = model->rope_table(index);
  float* qkv = wide_.as<float>();
  const float* cos = rope_.as<float>() + rope_at_[rope];
  const int64_t pairs = static_cast<int64_t>(model->rope_frequencies(index).size());
  device::rms_norm({.x = x_.as<float>(),
                    .weight = w.attn_norm.as<float>(),
                    .tokens = step.tokens,
                    .width = config.width,
                    .eps = config.rms_eps,
                    .out = operand()},
                   stream.get());
  multiply(w.qkv, operand(), step.tokens, qkv);
  device::finish_qkv({.qkv = qkv,
                      .bias = w.qkv_bias.as<float>(),
                      .q_norm = w.q_norm.as<float>(),
                      .k_norm = w.k_norm.as<float>(),
                      .cos = cos,
                      .sin = cos + step.tokens * pairs,
                      .tokens = step.tokens,
                      .pairs = pairs,
                      .rope = layer.rope.layout,
                      .q_heads = layer.q_heads,
                      .kv_heads = layer.kv_heads,
                      .dim_k = layer.head_dim_k,
                      .dim_v = layer.head_dim_v,
                      .eps = config.rms_eps,
                      .q = {narrow_queries(step, index) ? normed_.as<void>() : nullptr,
                            cuda::Element::bf16}},
                     stream.get());
  record(step, static_cast<size_t>(2 + 2 * index));
  attend(step, index, qkv, qkv_row(layer));
  record(step, static_cast<size_t>(3 + 2 * index));
  multiply(w.out, operand(), step.tokens, normed_.as<float>());
  device::add_to_stream({.x = x_.as<float>(),
                         .y = normed_.as<float>(),
                         .bias = w.out_bias.as<float>(),
                         .post_norm = w.post_attn_norm.as<float>(),
                         .tokens = step.tokens,
                         .width = config.width,
                         .eps = config.rms_eps},
                        stream.get());
}

void DeviceEngine::State::feed_forward(const Step& step, int64_t index) {
  const LayerConfig& layer = config.layers[static_cast<size_t>(index)];
  const device::Layer& w = weights.layers[static_cast<size_t>(index)];
  device::rms_norm({.x = x_.as<float>(),
                    .weight = w.ffn_norm.as<float>(),
                    .tokens = step.tokens,
                    .width = config.width,
                    .eps = config.rms_eps,
                    .out = operand()},
                   stream.get());
  multiply(w.gate_up, operand(), step.tokens, wide_.as<float>());
  device::gated_activation(config.activation, wide_.as<float>(), step.tokens, layer.ff, operand(),
                           stream.get());
  multiply(w.down, operand(), step.tokens, normed_.as<float>());
  device::add_to_stream({.x = x_.as<float>(),
                         .y = normed_.as<float>(),
                         .post_norm = w.post_ffn_norm.as<float>(),
                         .tokens = step.tokens,
                         .width = config.width,
                         .eps = config.rms_eps},
                        stream.get());
}

void DeviceEngine::State::launch(const Step& step) {
  const StepReport report(step.cache->impl().layers.size(), config.layers.size());
  cuda::fill(report_.as<void>(), 0, report.bytes, stream.get());
  cuda::fill(report_.as<void>(), 0x7f, sizeof(int32_t), stream.get());  // above any row
  record(step, 0);
  for (int64_t i = 0; i < config.layer_count(); ++i) {
    if (!step.capturing && *step.cancelled && (*step.cancelled)()) {
      throw Error(ErrorCode::cancelled, "the step was cancelled; nothing of it is stored");
    }
    attention(step, i);
    feed_forward(step, i);
  }
  device::rms_norm({.x = x_.as<float>(),
                    .weight = weights.final_norm.as<float>(),
                    .tokens = step.tokens,
                    .width = config.width,
                    .eps = config.rms_eps,
                    .out = {hidden_.as<void>(), cuda::Element::f32},
                    .not_finite = report_.as<int32_t>()},
                   stream.get());
  record(step, 1);
}

// A decode step is launched as a graph: captured once for a cache and a size of its tables.
void DeviceEngine::State::launch_graph(Step& step) {
  constexpr size_t kMostGraphs = 16;
  if (*step.cancelled && (*step.cancelled)()) {
    throw Error(ErrorCode::cancelled, "the step was cancelled; nothing of it is stored");
  }
  const GraphKey key{cuda::device_state(*step.cache).serial(), step.max_pages, generation_};
  auto found = graphs_.find(key);
  if (found == graphs_.end()) {
    if (graphs_.size() >= kMostGraphs) graphs_.clear();
    prepare_products(step.tokens);
    cudaGraph_t graph = nullptr;
    step.capturing = true;
    cuda::check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal),
                "cudaStreamBeginCapture");
    try {
      launch(step);
    } catch (...) {
      if (cudaStreamEndCapture(stream.get(), &graph) == cudaSuccess && graph != nullptr) {
        (void)cudaGraphDestroy(graph);
      }
      (void)cudaGetLastError();
      throw;
    }
    step.capturing = false;
    cuda::check(cudaStreamEndCapture(stream.get(), &graph), "cudaStreamEndCapture");
    cudaGraphExec_t exec = nullptr;
    const cudaError_t made = cudaGraphInstantiate(&exec, graph, 0);
    (void)cudaGraphDestroy(graph);
    cuda::check(made, "cudaGraphInstantiate");
    found = graphs_.emplace(key, exec).first;
  }
  cuda::check(cudaGraphLaunch(found->second.get(), stream.get()), "cudaGraphLaunch");
}

}  // namespace thriftattn
#endif
