// What a transformer does between its matrix products, on a device: all rows of a step at once, FP32
// in, the operand type of the next product out. No CUDA header is needed to include this one.
#pragma once

#include <cstdint>

#include "engine/model_config.h"
#include "precision/mass_rule.h"
#include "thriftattn/cuda.h"

namespace thriftattn::device {

using cuda::Element;
using cuda::Stream;

// Rows of the next product: FP32 or BF16, dense.
struct Operand {
  void* data = nullptr;
  Element element = Element::f32;
};

struct NormArgs {
  const float* x = nullptr;       // [tokens][width]
  const float* weight = nullptr;  // [width]
  int64_t tokens = 0, width = 0;
  float eps = 0;
  Operand out;
  int32_t* not_finite = nullptr;  // optional: the lowest row with NaN or Inf in x, where it is lower
};
// y = x / sqrt(mean(x^2) + eps) * weight.
void rms_norm(const NormArgs& args, Stream stream);

struct AddArgs {
  float* x = nullptr;                // [tokens][width]: the residual stream
  const float* y = nullptr;          // [tokens][width]
  const float* bias = nullptr;       // [width] or null: added to y
  const float* post_norm = nullptr;  // [width] or null: the weight of a norm of y
  int64_t tokens = 0, width = 0;
  float eps = 0;
};
// x += norm(y + bias).
void add_to_stream(const AddArgs& args, Stream stream);

struct QkvArgs {
  float* qkv = nullptr;          // [tokens][(q_heads + kv_heads) * dim_k + kv_heads * dim_v]
  const float* bias = nullptr;   // of a row, or null
  const float* q_norm = nullptr;  // [dim_k] or null
  const float* k_norm = nullptr;
  const float* cos = nullptr;  // [tokens][pairs] (RopeTable)
  const float* sin = nullptr;
  int64_t tokens = 0, pairs = 0;
  RopeLayout rope = RopeLayout::interleaved;
  int64_t q_heads = 0, kv_heads = 0, dim_k = 0, dim_v = 0;
  float eps = 0;
  Operand q;  // where it has data, q goes there as well, [tokens][q_heads][dim_k]
};
// In place: the bias, the norm of each head of q and k, their rotation.
void finish_qkv(const QkvArgs& args, Stream stream);

// out[t] = activation(gate) * up of [tokens][2 * ff].
void gated_activation(Activation activation, const float* gate_up, int64_t tokens, int64_t ff,
                      Operand out, Stream stream);
// x = cap * tanh(x / cap).
void soft_cap(float* x, int64_t count, float cap, Stream stream);
void narrow(const float* x, int64_t count, Operand out, Stream stream);

// What attention read in one layer, in integers: sums that do not depend on the order.
struct ReadCounts {
  uint64_t rows = 0;      // (query, KV head) pairs
  uint64_t bits = 0;      // read, times the KV heads
  uint64_t elements = 0;  // visible
  uint64_t ratios = 0;    // bits an element, times 2^32
  uint64_t pages = 0, promoted = 0, skipped = 0;
};

// Bits that a page costs by its Decision, times the KV heads: fixed + tokens * per_token.
struct ReadCosts {
  int64_t fixed[6] = {}, per_token[6] = {};
};
ReadCosts read_costs(const PageLayout& layout);

struct CountArgs {
  const uint8_t* decisions = nullptr;  // [tokens][max_pages][kv_heads], or null: all plain
  const int32_t* lengths = nullptr;    // of the tables: length, step offsets 0 and n
  int64_t tokens = 0, max_pages = 0, window = 0;
  int64_t kv_heads = 0, dims = 0;  // dims = dim_k + dim_v
  ReadCosts costs;
  ReadCounts* counts = nullptr;
};
void count_reads(const CountArgs& args, Stream stream);

}  // namespace thriftattn::device
