// FP32 pages: rows stored as they come, attention by FP32 products and an online softmax
// (exact_f32.h).
//
// exact_attend: one block a (query head, tile of 16 query positions) walks the pages that its tile
// sees. A page's K, then its V, lie in shared memory; thread (row, column) of 16 x 16 holds the
// scores of 4 keys and the output of every 16th element.
#include <algorithm>
#include <cmath>

#include "base/float_convert.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/exact_f32.h"

namespace thriftattn::cuda {

ExactLayer exact_layer(const LayerStore& store) {
  const PageLayout& layout = store.layout;
  ExactLayer l;
  l.slot_bytes = layout.slot_bytes;
  // As PageLayout::head(): K of every head, then V of every head.
  l.k_head_bytes = layout.k.head_bytes;
  l.v_head_bytes = layout.v.head_bytes;
  l.k_start = layout.k.rows;
  l.v_start = layout.kv_heads * layout.k.head_bytes + layout.v.rows;
  l.kv_heads = static_cast<int32_t>(store.shape.kv_heads);
  l.group = static_cast<int32_t>(store.shape.q_heads / store.shape.kv_heads);
  l.dim_k = static_cast<int32_t>(layout.k.dim);
  l.dim_v = static_cast<int32_t>(layout.v.dim);
  l.window = store.shape.window;
  return l;
}

namespace {

constexpr int kPage = static_cast<int>(kPageTokens);
constexpr int kRows = 16;      // query positions of a tile
constexpr int kColumns = 16;   // threads of a row
constexpr int kKeys = kPage / kColumns;
constexpr int kMaxDim = 256;

__device__ void store_row(const float* from, float* to, int dim, bool& bad) {
  for (int d = threadIdx.x; d < dim; d += blockDim.x) {
    const float x = from[d];
    bad |= !(fabsf(x) < INFINITY);
    to[d] = x;
  }
}

__global__ void exact_append_kernel(const ExactLayer l, const AppendCall call) {
  const int head = blockIdx.y, at = blockIdx.x;
  const int first_row = call.tables.step_offsets[0];
  const int step = call.tables.step_offsets[1] - first_row;
  if (at >= step) return;
  const int64_t token = int64_t{call.tables.lengths[0]} - step + at;
  uint8_t* slot = call.memory.pages + call.tables.block_table[token / kPage] * l.slot_bytes;
  const int64_t row = token % kPage;
  const auto* k = static_cast<const float*>(call.k) + (first_row + at) * call.k_token_stride;
  const auto* v = static_cast<const float*>(call.v) + (first_row + at) * call.v_token_stride;
  bool bad[2] = {};
  store_row(k + head * l.dim_k,
            reinterpret_cast<float*>(slot + l.k_start + head * l.k_head_bytes) + row * l.dim_k,
            l.dim_k, bad[0]);
  store_row(v + head * l.dim_v,
            reinterpret_cast<float*>(slot + l.v_start + head * l.v_head_bytes) + row * l.dim_v,
            l.dim_v, bad[1]);
  for (int side = 0; side < 2; ++side) {
    if (!__syncthreads_or(bad[side]) || threadIdx.x != 0 || call.status == nullptr) continue;
    if (atomicAdd(&call.status->failed, 1) != 0) continue;
    call.status->side = side;
    call.status->kv_head = head;
    call.status->token = static_cast<int32_t>(token);
  }
}

// Rows of a page into shared memory, `pitch` floats apart; rows from `held` on are zero.
__device__ void load_rows(const float* from, int dim, int held, int pitch, float* to) {
  for (int i = threadIdx.x; i < kPage * dim; i += kRows * kColumns) {
    const int row = i / dim, d = i % dim;
    to[row * pitch + d] = row < held ? from[i] : 0.0f;
  }
}

// Sums over the 16 threads of a row.
__device__ float row_sum(float x) {
  for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
__device__ float row_max(float x) {
  for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

__global__ void __launch_bounds__(kRows * kColumns)
    exact_attend_kernel(const ExactLayer l, const AttendCall call) {
  THRIFTATTN_DYNAMIC_SHARED(float, shared, 16);
  const int q_head = blockIdx.y, head = q_head / l.group;
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  const int first_row = call.tables.step_offsets[0];
  const int step = call.tables.step_offsets[1] - first_row;
  const int tile = blockIdx.x * kRows;
  if (tile >= step) return;
  const int64_t length = call.tables.lengths[0];
  const int64_t first = length - step;
  const bool active = tile + row < step;
  const int64_t position = first + min(tile + row, step - 1);
  const int64_t end = call.config.causal ? position + 1 : length;
  const int64_t begin = l.window > 0 && end > l.window ? end - l.window : 0;

  const int pitch_k = l.dim_k + 1, pitch_v = l.dim_v + 1;
  const int pitch = max(pitch_k, pitch_v);
  float* q = shared;                              // [kRows][pitch_k]
  float* page_rows = q + kRows * pitch_k;         // [kPage][pitch]
  float* weights = page_rows + kPage * pitch;     // [kRows][kPage]
  for (int i = threadIdx.x; i < kRows * l.dim_k; i += kRows * kColumns) {
    const int r = i / l.dim_k, d = i % l.dim_k;
    const int64_t token = first_row + min(tile + r, step - 1);
    q[r * pitch_k + d] = static_cast<const float*>(call.q)[token * call.q_token_stride +
                                                           int64_t{q_head} * l.dim_k + d];
  }

  float out[kMaxDim / kColumns] = {};
  float top = -INFINITY, sum = 0;
  const int64_t tile_last = first + min(tile + kRows, step) - 1;
  const int64_t tile_end = call.config.causal ? tile_last + 1 : length;
  const int64_t tile_from = call.config.causal ? first + tile + 1 : length;
  const int64_t tile_begin = l.window > 0 && tile_from > l.window ? tile_from - l.window : 0;
  for (int64_t page = tile_begin / kPage; page * kPage < tile_end; ++page) {
    const uint8_t* slot = call.memory.pages + call.tables.block_table[page] * l.slot_bytes;
    const int held = static_cast<int>(min(int64_t{kPage}, length - page * kPage));
    __syncthreads();
    load_rows(reinterpret_cast<const float*>(slot + l.k_start + head * l.k_head_bytes), l.dim_k,
              held, pitch_k, page_rows);
    __syncthreads();
    float score[kKeys] = {};
    for (int d = 0; d < l.dim_k; ++d) {
      const float x = q[row * pitch_k + d];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        score[i] = fmaf(x, page_rows[(i * kColumns + column) * pitch_k + d], score[i]);
      }
    }
    float page_top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int64_t key = page * kPage + i * kColumns + column;
      float s = score[i] * call.config.softmax_scale;
      if (call.config.softcap > 0) s = call.config.softcap * tanhf(s / call.config.softcap);
      score[i] = key >= begin && key < end ? s : -INFINITY;
      page_top = fmaxf(page_top, score[i]);
    }
    const float next = fmaxf(top, row_max(page_top));
    const float factor = top == -INFINITY ? 0.0f : expf(top - next);
    float page_sum = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const float p = score[i] == -INFINITY ? 0.0f : expf(score[i] - next);
      weights[row * kPage + i * kColumns + column] = p;
      page_sum += p;
    }
    sum = sum * factor + row_sum(page_sum);
    top = next;
    __syncthreads();
    load_rows(reinterpret_cast<const float*>(slot + l.v_start + head * l.v_head_bytes), l.dim_v,
              held, pitch_v, page_rows);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMaxDim / kColumns; ++i) {
      const int d = i * kColumns + column;
      if (d >= l.dim_v) break;
      float o = out[i] * factor;
      for (int t = 0; t < kPage; ++t) {
        o = fmaf(weights[row * kPage + t], page_rows[t * pitch_v + d], o);
      }
      out[i] = o;
    }
  }
  if (call.sink_logits != nullptr) {
    const float sink = call.sink_logits[q_head];
    const float next = fmaxf(top, sink);
    const float factor = top == -INFINITY ? 0.0f : expf(top - next);
    sum = sum * factor + expf(sink - next);
    for (float& o : out) o *= factor;
    top = next;
  }
  if (!active) return;
  const int64_t token = first_row + tile + row;
  const int64_t q_heads = int64_t{l.kv_heads} * l.group;
  const int64_t stride = call.out_token_stride ? call.out_token_stride : q_heads * l.dim_v;
  const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxDim / kColumns; ++i) {
    const int d = i * kColumns + column;
    if (d >= l.dim_v) break;
    const int64_t at = token * stride + int64_t{q_head} * l.dim_v + d;
    const float value = out[i] * inverse;
    if (call.out_element == Element::f32) {
      static_cast<float*>(call.out)[at] = value;
    } else {
      static_cast<uint16_t*>(call.out)[at] = f32_to_bf16(value);
    }
  }
  if (column == 0 && call.lse != nullptr) {
    call.lse[token * q_heads + q_head] = sum > 0 ? top + logf(sum) : -INFINITY;
  }
}

}  // namespace

void exact_append(const ExactLayer& layer, const AppendCall& call, int64_t tokens, Stream stream) {
  const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(layer.kv_heads));
  launch_kernel(exact_append_kernel, {grid, dim3(64), 0}, stream, "exact_append", layer, call);
}

void exact_attend(const ExactLayer& layer, const AttendCall& call, int64_t tokens, Stream stream) {
  const int pitch_k = layer.dim_k + 1, pitch = std::max(layer.dim_k, layer.dim_v) + 1;
  const size_t bytes = sizeof(float) * (kRows * pitch_k + kPage * pitch + kRows * kPage);
  allow_shared(exact_attend_kernel, static_cast<int>(bytes), "shared memory of exact_attend");
  const dim3 grid(static_cast<unsigned>((tokens + kRows - 1) / kRows),
                  static_cast<unsigned>(layer.kv_heads * layer.group));
  launch_kernel(exact_attend_kernel, {grid, dim3(kRows * kColumns), bytes}, stream, "exact_attend",
                layer, call);
}

}  // namespace thriftattn::cuda
