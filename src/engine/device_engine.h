// The forward pass on a CUDA device: the steps of transformer.h with weights, activations and KV cache
// in device memory. What changes from token to token is read on the device, so that a decode step is
// one captured graph.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "engine/transformer.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn {

class DeviceEngine {
 public:
  // Copies the weights to the current device, in BF16 or (ComputeType::f32) FP32; the model need only
  // keep what its file stores. Throws Error where the backend, the device, cuBLASLt or memory is
  // missing.
  static std::shared_ptr<DeviceEngine> load(std::shared_ptr<const Model> model, ComputeType compute);
  ~DeviceEngine();

  const Model& model() const;
  ComputeType compute() const;
  int64_t weight_bytes() const;  // in device memory
  // How the dense layers compute, one line; device and libraries, one line.
  std::string explain_compute() const;
  std::string explain_device() const;
  // What a decode step of a cache launches, a line for each kind of layer.
  std::string explain_attention(const KvCache& cache) const;

  // A cache for this engine alone, which must outlive it.
  std::unique_ptr<KvCache> make_cache(KvCacheConfig config);

  // What forward() copies back, FP32 after the final norm; either may be null.
  struct Outputs {
    float* hidden = nullptr;  // [tokens][width]
    float* last = nullptr;    // [width]: of the last token
  };
  // As forward() and logits() of transformer.h. One call at a time: further ones wait. `on_qk` must be
  // empty, and the masses in AttendStats stay unknown.
  void forward(KvCache& cache, SequenceId sequence, std::span<const int32_t> tokens,
               const ForwardOptions& options, const Outputs& outputs);
  void logits(const float* hidden, int64_t rows, float* out, ForwardTimes* times = nullptr);

 private:
  struct State;
  explicit DeviceEngine(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace thriftattn
