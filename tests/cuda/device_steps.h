// One sequence in a cache on the current device, as one thread of an engine would drive it: steps
// are appended, attended to and committed on a stream of its own, with tables and workspace of its
// own.
#pragma once

#ifdef THRIFTATTN_WITH_CUDA
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cache/sequence_io.h"
#include "cuda/device_cache.h"
#include "thriftattn/error.h"

namespace thriftattn::testing {

struct StepsOptions {
  LayerShape shape{.kv_heads = 2, .q_heads = 8, .head_dim_k = 128, .head_dim_v = 128};
  LayerPolicy policy;
  std::vector<int64_t> steps;  // tokens of each; more than 16 are prefill
  uint32_t seed = 1;
};

class OwnStream {
 public:
  OwnStream() {
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  ~OwnStream() { EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class DeviceSteps {
 public:
  explicit DeviceSteps(const StepsOptions& options);

  // The parts of the next step. begin() throws Error(out_of_memory) and takes the step back.
  void begin();
  void append() { cuda::append(plan(), append_call(), stream_.get()); }
  void attend() { cuda::attend(plan(), attend_call(), stream_.get()); }
  void commit();
  void step() {
    begin();
    append();
    attend();
    commit();
  }
  void run() {
    while (next_ < options_.steps.size()) step();
  }

  // Rows of all steps so far, and the sequence as it is saved.
  struct Result {
    std::vector<float> out, lse;
    std::vector<uint8_t> saved;
    bool operator==(const Result&) const = default;
  };
  Result result() const;

  KvCache& cache() { return *cache_; }
  SequenceId sequence() const { return sequence_; }
  cudaStream_t stream() const { return stream_.get(); }
  const cuda::AttendPlan& plan() const { return plans_.at(options_.steps[next_]); }
  cuda::AppendCall append_call() const;
  cuda::AttendCall attend_call() const;
  // What a cache in CPU memory saves after the same steps.
  std::vector<uint8_t> saved_by_cpu() const;

 private:
  int64_t kv_row() const { return options_.shape.kv_heads * options_.shape.head_dim_k; }
  int64_t q_row() const { return options_.shape.q_heads * options_.shape.head_dim_k; }
  cuda::DeviceMemory upload(const void* from, int64_t bytes) const {
    cuda::DeviceMemory memory(bytes);
    cuda::copy_to_device(memory.data(), from, bytes, stream_.get());
    return memory;
  }
  static std::vector<uint8_t> saved(const KvCache& cache, SequenceId sequence) {
    std::vector<uint8_t> bytes;
    save_sequence(cache, sequence, [&](const void* data, size_t n) {
      const auto* from = static_cast<const uint8_t*>(data);
      bytes.insert(bytes.end(), from, from + n);
    });
    return bytes;
  }

  StepsOptions options_;
  int64_t total_ = 0, at_ = 0;
  size_t next_ = 0;
  std::vector<float> k_, v_, q_;
  OwnStream stream_;  // outlives what is used on it
  std::unique_ptr<KvCache> cache_;
  SequenceId sequence_ = 0;
  std::unique_ptr<cuda::DeviceTables> tables_;
  std::map<int64_t, cuda::AttendPlan> plans_;
  cuda::DeviceMemory d_k_, d_v_, d_q_, out_, lse_, ids_, status_, workspace_;
};

inline DeviceSteps::DeviceSteps(const StepsOptions& options)
    : options_(options),
      total_(std::accumulate(options.steps.begin(), options.steps.end(), int64_t{0})) {
  std::mt19937 rng(options.seed);
  std::normal_distribution<float> normal;
  const auto draw = [&](std::vector<float>& x, int64_t row) {
    x.resize(static_cast<size_t>(total_ * row));
    for (float& value : x) value = normal(rng);
  };
  draw(k_, kv_row());
  draw(v_, kv_row());
  draw(q_, q_row());
  cache_ = cuda::make_device_cache({.layers = {options.shape}, .policy = {options.policy}},
                                   stream_.get());
  sequence_ = cache_->create();
  const int64_t most = *std::max_element(options.steps.begin(), options.steps.end());
  const int64_t max_pages = total_ / kPageTokens + 1, open_pages = (most + 62) / kPageTokens + 1;
  tables_ = std::make_unique<cuda::DeviceTables>(*cache_, max_pages, open_pages);
  int64_t workspace = 0;
  for (const int64_t n : options.steps) {
    const auto at = plans_.try_emplace(
        n, options.shape, options.policy,
        cuda::AttendLimits{
            .batch = 1, .max_pages = max_pages, .step_tokens = n, .open_pages = open_pages});
    workspace = std::max(workspace, at.first->second.workspace_bytes());
  }
  d_k_ = upload(k_.data(), static_cast<int64_t>(k_.size() * 4));
  d_v_ = upload(v_.data(), static_cast<int64_t>(v_.size() * 4));
  d_q_ = upload(q_.data(), static_cast<int64_t>(q_.size() * 4));
  const cuda::AppendStatus none;
  status_ = upload(&none, sizeof none);
  out_ = cuda::DeviceMemory(total_ * q_row() * 4);
  lse_ = cuda::DeviceMemory(total_ * options.shape.q_heads * 4);
  ids_ = cuda::DeviceMemory(tables_->bytes());
  workspace_ = cuda::DeviceMemory(workspace);
  cuda::fill(workspace_.data(), 0xff, workspace, stream_.get());
  cuda::synchronize(stream_.get());
}

inline void DeviceSteps::begin() {
  cache_->begin_step(sequence_, options_.steps[next_]);
  try {
    cache_->impl().make_room(cache_->impl().sequence(sequence_));
    tables_->fill(*cache_, sequence_);
    cuda::copy_to_device(ids_.data(), tables_->ids().data(), tables_->bytes(), stream_.get());
  } catch (...) {
    cache_->rollback(sequence_);
    throw;
  }
}

inline cuda::AppendCall DeviceSteps::append_call() const {
  cuda::AppendCall call;
  call.memory = cuda::layer_memory(*cache_, 0);
  call.tables = tables_->tables(0, ids_.as<int32_t>());
  call.k = d_k_.as<float>() + at_ * kv_row();
  call.v = d_v_.as<float>() + at_ * kv_row();
  call.element = cuda::Element::f32;
  call.status = status_.as<cuda::AppendStatus>();
  call.workspace = workspace_.data();
  return call;
}

inline cuda::AttendCall DeviceSteps::attend_call() const {
  cuda::AttendCall call;
  call.memory = cuda::layer_memory(*cache_, 0);
  call.tables = tables_->tables(0, ids_.as<int32_t>());
  call.config = {.mode = options_.steps[next_] > 16 ? AttendMode::prefill : AttendMode::decode,
                 .softmax_scale = 1.0f / std::sqrt(static_cast<float>(options_.shape.head_dim_k))};
  call.q = d_q_.as<float>() + at_ * q_row();
  call.q_element = cuda::Element::f32;
  call.out = out_.as<float>() + at_ * q_row();
  call.out_element = cuda::Element::f32;
  call.lse = lse_.as<float>() + at_ * options_.shape.q_heads;
  call.workspace = workspace_.data();
  return call;
}

inline void DeviceSteps::commit() {
  cache_->commit(sequence_);
  at_ += options_.steps[next_++];
}

inline DeviceSteps::Result DeviceSteps::result() const {
  Result r;
  const auto download = [&](std::vector<float>& to, const cuda::DeviceMemory& from, int64_t row) {
    to.resize(static_cast<size_t>(at_ * row));
    cuda::copy_to_host(to.data(), from.data(), static_cast<int64_t>(to.size() * 4), stream_.get());
  };
  download(r.out, out_, q_row());
  download(r.lse, lse_, options_.shape.q_heads);
  cuda::AppendStatus status;
  cuda::copy_to_host(&status, status_.data(), sizeof status, stream_.get());
  cuda::synchronize(stream_.get());
  cuda::throw_if_failed(status, 0, options_.policy);
  r.saved = saved(*cache_, sequence_);
  return r;
}

inline std::vector<uint8_t> DeviceSteps::saved_by_cpu() const {
  KvCache cpu({.layers = {options_.shape}, .policy = {options_.policy}});
  const SequenceId id = cpu.create();
  int64_t at = 0;
  for (size_t i = 0; i < next_; ++i) {
    const int64_t n = options_.steps[i];
    const auto view = [&](const std::vector<float>& x) {
      return TensorView<const float>::dense(&x[static_cast<size_t>(at * kv_row())], n,
                                            options_.shape.kv_heads, options_.shape.head_dim_k);
    };
    cpu.begin_step(id, n);
    cpu.append(id, 0, view(k_), view(v_));
    cpu.commit(id);
    at += n;
  }
  return saved(cpu, id);
}

}  // namespace thriftattn::testing
#endif
