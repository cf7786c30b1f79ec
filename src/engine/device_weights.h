// A model's weights on a device: matrices in the operand type of its products, vectors in FP32.
#pragma once

#include <vector>

#include "engine/transformer.h"
#include "thriftattn/cuda.h"

namespace thriftattn::device {

struct Matrix {
  cuda::DeviceMemory data;  // [rows][columns]
  int64_t rows = 0, columns = 0;
};

struct Layer {
  cuda::DeviceMemory attn_norm, ffn_norm, post_attn_norm, post_ffn_norm, q_norm, k_norm;
  cuda::DeviceMemory qkv_bias, out_bias;  // empty where the family has none, as the norms
  Matrix qkv, out, gate_up, down;
};

struct Weights {
  cuda::Element element = cuda::Element::bf16;
  std::vector<Layer> layers;
  cuda::DeviceMemory final_norm;
  Matrix lm_head;
  int64_t bytes = 0;  // of all of it
};

// Dequantises what the file stores; `element` is f32 or bf16. Throws Error(out_of_memory) before
// anything is copied where the device has no room; what was taken is given back.
Weights upload_weights(const Model& model, cuda::Element element, cuda::Stream stream);

}  // namespace thriftattn::device
