// Dequantising weights into device memory (device_weights.h).
#ifdef THRIFTATTN_WITH_CUDA
#include "engine/device_weights.h"

#include <fmt/format.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>

#include "engine/gemv.h"
#include "engine/pinned_buffer.h"
#include "thriftattn/error.h"

namespace thriftattn::device {
namespace {

constexpr int64_t kStaging = int64_t{32} << 20;  // bytes dequantised between two copies

class Uploader {
 public:
  Uploader(cuda::Element element, cuda::Stream stream)
      : element_(element), stream_(stream), staging_(kStaging) {}

  Matrix matrix(const DenseMatrix& from) {
    Matrix to;
    to.rows = from.rows();
    to.columns = from.columns();
    const int64_t row_bytes = to.columns * element_bytes();
    to.data = cuda::DeviceMemory(to.rows * row_bytes);
    bytes_ += to.data.bytes();
    const int64_t step = std::max<int64_t>(1, kStaging / row_bytes);
    if (row_bytes > kStaging) staging_ = PinnedBuffer(row_bytes);
    for (int64_t first = 0; first < to.rows; first += step) {
      const int64_t count = std::min(step, to.rows - first);
      tbb::parallel_for(int64_t{0}, count, [&](int64_t i) {
        uint8_t* row = staging_.as<uint8_t>() + i * row_bytes;
        if (element_ == cuda::Element::f32) {
          from.expand_rows(first + i, 1, reinterpret_cast<float*>(row));
          return;
        }
        std::vector<float> wide(static_cast<size_t>(to.columns));
        from.expand_rows(first + i, 1, wide.data());
        narrow_bf16(wide.data(), to.columns, reinterpret_cast<uint16_t*>(row));
      });
      copy(to.data.as<uint8_t>() + first * row_bytes, staging_.as<uint8_t>(), count * row_bytes);
    }
    return to;
  }

  cuda::DeviceMemory vector(const std::vector<float>& from) {
    if (from.empty()) return {};
    cuda::DeviceMemory to(static_cast<int64_t>(from.size() * sizeof(float)));
    bytes_ += to.bytes();
    copy(to.data(), from.data(), to.bytes());
    return to;
  }

  int64_t bytes() const { return bytes_; }

 private:
  int64_t element_bytes() const { return element_ == cuda::Element::f32 ? 4 : 2; }
  // The source may be written again afterwards.
  void copy(void* to, const void* from, int64_t bytes) {
    cuda::copy_to_device(to, from, bytes, stream_);
    cuda::synchronize(stream_);
  }

  cuda::Element element_;
  cuda::Stream stream_;
  PinnedBuffer staging_;
  int64_t bytes_ = 0;
};

void require_room(const Model& model, cuda::Element element) {
  const auto elements = [](const DenseMatrix& m) { return m.rows() * m.columns(); };
  int64_t needed = elements(model.lm_head());
  for (int64_t i = 0; i < model.config().layer_count(); ++i) {
    const LayerWeights& w = model.layer(i);
    needed += elements(w.qkv) + elements(w.out) + elements(w.gate_up) + elements(w.down);
  }
  needed *= element == cuda::Element::f32 ? 4 : 2;
  const cuda::DeviceInfo device = cuda::device_info();
  if (needed <= device.memory_free) return;
  throw Error(ErrorCode::out_of_memory,
              fmt::format("the weights take {} MiB in {}, {} of {} MiB are free on {}; {}use a smaller "
                          "model, or --device cpu",
                          needed >> 20, element == cuda::Element::f32 ? "FP32" : "BF16",
                          device.memory_free >> 20, device.memory_total >> 20, device.name,
                          element == cuda::Element::f32 ? "use --compute bf16, " : ""));
}

}  // namespace

Weights upload_weights(const Model& model, cuda::Element element, cuda::Stream stream) {
  require_room(model, element);
  Uploader up(element, stream);
  Weights weights;
  weights.element = element;
  for (int64_t i = 0; i < model.config().layer_count(); ++i) {
    const LayerWeights& w = model.layer(i);
    Layer layer;
    layer.attn_norm = up.vector(w.attn_norm);
    layer.ffn_norm = up.vector(w.ffn_norm);
    layer.post_attn_norm = up.vector(w.post_attn_norm);
    layer.post_ffn_norm = up.vector(w.post_ffn_norm);
    layer.q_norm = up.vector(w.q_norm);
    layer.k_norm = up.vector(w.k_norm);
    layer.qkv_bias = up.vector(w.qkv_bias);
    layer.out_bias = up.vector(w.out_bias);
    layer.qkv = up.matrix(w.qkv);
    layer.out = up.matrix(w.out);
    layer.gate_up = up.matrix(w.gate_up);
    layer.down = up.matrix(w.down);
    weights.layers.push_back(std::move(layer));
  }
  weights.final_norm = up.vector(model.final_norm());
  weights.lm_head = up.matrix(model.lm_head());
  weights.bytes = up.bytes();
  return weights;
}

}  // namespace thriftattn::device
#endif
