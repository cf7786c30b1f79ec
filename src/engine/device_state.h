// What DeviceEngine holds: weights, buffers, plans and captured graphs. For sources that know CUDA.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <tuple>
#include <vector>

#include "cuda/device_cache.h"
#include "cuda/exact_f32.h"
#include "engine/cublas_lt.h"
#include "engine/device_engine.h"
#include "engine/device_ops.h"
#include "engine/device_weights.h"
#include "engine/pinned_buffer.h"
#include "engine/rope.h"

namespace thriftattn {

// A stream, events and graphs with one owner.
struct CudaDelete {
  void operator()(cudaStream_t p) const { (void)cudaStreamDestroy(p); }
  void operator()(cudaEvent_t p) const { (void)cudaEventDestroy(p); }
  void operator()(cudaGraphExec_t p) const { (void)cudaGraphExecDestroy(p); }
};
using OwnedStream = std::unique_ptr<CUstream_st, CudaDelete>;
using OwnedEvent = std::unique_ptr<CUevent_st, CudaDelete>;
using OwnedGraph = std::unique_ptr<CUgraphExec_st, CudaDelete>;

// What a step writes for the host, in one piece of memory: zeroed before, copied back after.
struct StepReport {
  int64_t statuses = 0, counts = 0, bytes = 0;  // offsets; a row index comes first
  StepReport(size_t stores, size_t layers) {
    statuses = 64;
    counts = statuses + static_cast<int64_t>(stores * sizeof(cuda::AppendStatus));
    bytes = counts + static_cast<int64_t>(layers * sizeof(device::ReadCounts));
  }
};

// Device memory that grows; what it held is lost then.
class GrowingMemory {
 public:
  // Whether it has moved.
  bool reserve(int64_t bytes) {
    if (bytes <= memory_.bytes()) return false;
    memory_ = {};
    memory_ = cuda::DeviceMemory(bytes);
    return true;
  }
  template <typename T>
  T* as() const {
    return memory_.as<T>();
  }

 private:
  cuda::DeviceMemory memory_;
};

struct DeviceEngine::State {
  State(std::shared_ptr<const Model> m, ComputeType c);

  // One step's launches, which read everything that changes from device memory.
  struct Step {
    KvCache* cache = nullptr;
    int64_t tokens = 0;
    int64_t max_pages = 0, open_pages = 0;
    AttendMode mode = AttendMode::decode;
    const std::function<bool()>* cancelled = nullptr;
    bool capturing = false;
  };

  void reserve(const Step& step);
  void upload(const Step& step, SequenceId sequence, std::span<const int32_t> tokens);
  void launch(const Step& step);
  void launch_graph(Step& step);
  void attention(const Step& step, int64_t layer);
  void feed_forward(const Step& step, int64_t layer);
  bool narrow_queries(const Step& step, int64_t index) const;
  void attend(const Step& step, int64_t layer, const float* qkv, int64_t row);
  void multiply(const device::Matrix& w, const device::Operand& x, int64_t rows, float* y);
  // For all products of a step, before a graph is captured.
  void prepare_products(int64_t rows);
  void record(const Step& step, size_t event);
  void finish(const Step& step, const ForwardOptions& options, ForwardTimes& times);
  const cuda::AttendPlan& plan(const LayerStore& store, const cuda::AttendLimits& limits);
  device::Operand operand() const { return {operand_.as<void>(), weights.element}; }
  const int32_t* tables() const { return tables_.as<int32_t>(); }

  struct KnownPlan {
    LayerShape shape;
    LayerPolicy policy;
    cuda::AttendLimits limits;
    std::unique_ptr<cuda::AttendPlan> plan;
  };
  struct GraphKey {
    int64_t cache, max_pages, generation;
    auto operator<=>(const GraphKey&) const = default;
  };

  std::shared_ptr<const Model> model;
  const ModelConfig& config;
  ComputeType compute;
  cuda::DeviceInfo device;
  OwnedStream stream;
  device::Weights weights;
  device::MatrixMultiplier multiplier;
  std::mutex mutex;

  // FP32 [tokens][...] but for operand_: the residual stream, what a product gives, q, k and v or gate
  // and up, what the next product takes, the step's result.
  GrowingMemory x_, normed_, wide_, operand_, hidden_;
  GrowingMemory rope_, tables_, report_, decisions_, workspace_, logits_, logits_x_;
  device::PinnedBuffer up_x_, up_rope_, up_tables_, down_report_, down_hidden_, down_logits_;
  int64_t generation_ = 0;  // of the buffers: graphs of earlier ones are stale
  std::vector<RopeTable> ropes_;
  std::vector<int64_t> rope_at_;  // floats before each table's cos
  std::unique_ptr<cuda::DeviceTables> table_layout_;
  std::tuple<int64_t, int64_t, int64_t> table_key_;
  std::vector<KnownPlan> plans_;
  std::vector<OwnedEvent> events_;  // start, end, and two a layer
  std::map<GraphKey, OwnedGraph> graphs_;
};

}  // namespace thriftattn
