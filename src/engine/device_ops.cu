// Elementwise and row kernels of the engine (device_ops.h). Sums of squares are FP64: no overflow, and
// as exact as the CPU's whatever the order.
#include <cuda_bf16.h>

#include "cuda/dependent_launch.cuh"
#include "engine/device_ops.h"

namespace thriftattn::device {
namespace {

constexpr int kThreads = 256;
constexpr float kSigmoidLimit = 87.0f;  // as vector_ops.cc

unsigned blocks_of(int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

__device__ void put(const Operand& out, int64_t i, float x) {
  if (out.element == Element::f32) {
    static_cast<float*>(out.data)[i] = x;
  } else {
    static_cast<__nv_bfloat16*>(out.data)[i] = __float2bfloat16_rn(x);
  }
}

__device__ double warp_sum(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The sum over a block, for every thread of it.
__device__ double block_sum(double x) {
  __shared__ double parts[kThreads / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (const double part : parts) sum += part;
  __syncthreads();
  return sum;
}

__device__ float norm_scale(double sum, int64_t count, float eps) {
  return static_cast<float>(1.0 / sqrt(sum / static_cast<double>(count) + eps));
}

__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const NormArgs a) {
  const int64_t row = blockIdx.x;
  const float* x = a.x + row * a.width;
  double sum = 0;
  bool bad = false;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    const double v = x[i];
    sum += v * v;
    bad |= !(fabsf(x[i]) < INFINITY);
  }
  sum = block_sum(sum);
  if (a.not_finite != nullptr && __syncthreads_or(bad) && threadIdx.x == 0) {
    atomicMin(a.not_finite, static_cast<int32_t>(row));
  }
  const float scale = norm_scale(sum, a.width, a.eps);
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    put(a.out, row * a.width + i, x[i] * scale * a.weight[i]);
  }
}

__global__ void __launch_bounds__(kThreads) add_to_stream_kernel(const AddArgs a) {
  const int64_t row = blockIdx.x;
  const float* y = a.y + row * a.width;
  float* x = a.x + row * a.width;
  const auto value = [&](int64_t i) { return a.bias != nullptr ? y[i] + a.bias[i] : y[i]; };
  if (a.post_norm == nullptr) {
    for (int64_t i = threadIdx.x; i < a.width; i += kThreads) x[i] += value(i);
    return;
  }
  double sum = 0;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    const double v = value(i);
    sum += v * v;
  }
  const float scale = norm_scale(block_sum(sum), a.width, a.eps);
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    x[i] += value(i) * scale * a.post_norm[i];
  }
}

// One warp a head of a token.
__global__ void __launch_bounds__(kThreads) finish_qkv_kernel(const QkvArgs a) {
  const int64_t heads = a.q_heads + 2 * a.kv_heads;
  const int64_t index = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (index >= a.tokens * heads) return;
  const int64_t token = index / heads, head = index % heads;
  const int64_t turned = a.q_heads + a.kv_heads;
  const bool is_v = head >= turned;
  const int64_t dim = is_v ? a.dim_v : a.dim_k;
  const int64_t offset = is_v ? turned * a.dim_k + (head - turned) * a.dim_v : head * a.dim_k;
  float* x = a.qkv + token * (turned * a.dim_k + a.kv_heads * a.dim_v) + offset;
  if (a.bias != nullptr) {
    for (int64_t i = lane; i < dim; i += 32) x[i] += a.bias[offset + i];
    __syncwarp();
  }
  if (is_v) return;
  if (a.q_norm != nullptr) {
    const float* weight = head < a.q_heads ? a.q_norm : a.k_norm;
    double sum = 0;
    for (int64_t i = lane; i < dim; i += 32) sum += static_cast<double>(x[i]) * x[i];
    const float scale = norm_scale(warp_sum(sum), dim, a.eps);
    for (int64_t i = lane; i < dim; i += 32) x[i] = x[i] * scale * weight[i];
    __syncwarp();
  }
  const int64_t step = a.rope == RopeLayout::interleaved ? 2 : 1;
  const int64_t other = a.rope == RopeLayout::interleaved ? 1 : a.pairs;
  const float* cos = a.cos + token * a.pairs;
  const float* sin = a.sin + token * a.pairs;
  for (int64_t i = lane; i < a.pairs; i += 32) {
    const float left = x[i * step], right = x[i * step + other];
    x[i * step] = left * cos[i] - right * sin[i];
    x[i * step + other] = left * sin[i] + right * cos[i];
  }
  if (a.q.data == nullptr || head >= a.q_heads) return;
  __syncwarp();
  for (int64_t i = lane; i < dim; i += 32) put(a.q, (token * a.q_heads + head) * dim + i, x[i]);
}

__device__ float sigmoid(float z) {
  z = fminf(fmaxf(z, -kSigmoidLimit), kSigmoidLimit);
  return 1.0f / (1.0f + expf(-z));
}

__global__ void __launch_bounds__(kThreads)
    gated_activation_kernel(Activation activation, const float* gate_up, int64_t tokens, int64_t ff,
                            Operand out) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= tokens * ff) return;
  const float* gate = gate_up + i / ff * 2 * ff + i % ff;
  const float g = gate[0], up = gate[ff];
  // 0.5 x (1 + tanh(z)) = x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3).
  const float z = activation == Activation::silu
                      ? g
                      : (g * g * g * 0.044715f + g) * (2.0f * 0.7978845608f);
  put(out, i, g * sigmoid(z) * up);
}

__global__ void __launch_bounds__(kThreads) soft_cap_kernel(float* x, int64_t count, float cap) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < count) x[i] = cap * tanhf(x[i] / cap);
}

__global__ void __launch_bounds__(kThreads) narrow_kernel(const float* x, int64_t count, Operand out) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < count) put(out, i, x[i]);
}

__device__ void add_count(uint64_t* to, uint64_t n) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
}

// One warp a (query, KV head).
__global__ void __launch_bounds__(kThreads) count_reads_kernel(const CountArgs a) {
  const int64_t index = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t step = a.lengths[2] - a.lengths[1];
  const int64_t i = index / a.kv_heads, head = index % a.kv_heads;
  if (i >= step) return;
  const int64_t end = a.lengths[0] - step + i + 1;
  const int64_t begin = a.window > 0 && end > a.window ? end - a.window : 0;
  uint64_t bits = 0, pages = 0, promoted = 0, skipped = 0;
  for (int64_t page = begin / kPageTokens + lane; page * kPageTokens < end; page += 32) {
    const int64_t from = page * kPageTokens > begin ? page * kPageTokens : begin;
    const int64_t to = (page + 1) * kPageTokens < end ? (page + 1) * kPageTokens : end;
    // Without decisions all is plain.
    int how = static_cast<int>(cuda::Decision::plain);
    if (a.decisions != nullptr) how = a.decisions[(i * a.max_pages + page) * a.kv_heads + head];
    if (how > 5) how = 0;
    // The query's own page counts as open, as on the CPU.
    if (how == static_cast<int>(cuda::Decision::plain) && page == (end - 1) / kPageTokens) {
      how = static_cast<int>(cuda::Decision::open);
    }
    bits += static_cast<uint64_t>(a.costs.fixed[how] + (to - from) * a.costs.per_token[how]);
    const auto is = [&](cuda::Decision d) { return how == static_cast<int>(d); };
    pages += is(cuda::Decision::base) || is(cuda::Decision::full) || is(cuda::Decision::skip);
    promoted += is(cuda::Decision::full);
    skipped += is(cuda::Decision::skip);
  }
  for (int s = 16; s > 0; s /= 2) {
    bits += __shfl_xor_sync(0xffffffffu, bits, s);
    pages += __shfl_xor_sync(0xffffffffu, pages, s);
    promoted += __shfl_xor_sync(0xffffffffu, promoted, s);
    skipped += __shfl_xor_sync(0xffffffffu, skipped, s);
  }
  if (lane != 0) return;
  const uint64_t elements = static_cast<uint64_t>((end - begin) * a.dims);
  add_count(&a.counts->rows, 1);
  add_count(&a.counts->bits, bits);
  add_count(&a.counts->elements, elements);
  add_count(&a.counts->ratios,
            static_cast<uint64_t>(static_cast<double>(bits) /
                                  static_cast<double>(elements * static_cast<uint64_t>(a.kv_heads)) *
                                  4294967296.0));
  add_count(&a.counts->pages, pages);
  add_count(&a.counts->promoted, promoted);
  add_count(&a.counts->skipped, skipped);
}

template <class... Args>
void launch(void (*kernel)(Args...), unsigned blocks, Stream stream, const char* name,
            const std::type_identity_t<Args>&... args) {
  cuda::launch_kernel(kernel, {dim3(blocks), dim3(kThreads), 0}, stream, name, args...);
}

}  // namespace

void rms_norm(const NormArgs& args, Stream stream) {
  launch(rms_norm_kernel, static_cast<unsigned>(args.tokens), stream, "rms_norm", args);
}

void add_to_stream(const AddArgs& args, Stream stream) {
  launch(add_to_stream_kernel, static_cast<unsigned>(args.tokens), stream, "add_to_stream", args);
}

void finish_qkv(const QkvArgs& args, Stream stream) {
  const int64_t heads = args.q_heads + 2 * args.kv_heads;
  launch(finish_qkv_kernel, blocks_of(args.tokens * heads * 32), stream, "finish_qkv", args);
}

void gated_activation(Activation activation, const float* gate_up, int64_t tokens, int64_t ff,
                      Operand out, Stream stream) {
  launch(gated_activation_kernel, blocks_of(tokens * ff), stream, "gated_activation", activation, gate_up, tokens, ff, out);
}

void soft_cap(float* x, int64_t count, float cap, Stream stream) {
  launch(soft_cap_kernel, blocks_of(count), stream, "soft_cap", x, count, cap);
}

void narrow(const float* x, int64_t count, Operand out, Stream stream) {
  launch(narrow_kernel, blocks_of(count), stream, "narrow", x, count, out);
}

void count_reads(const CountArgs& args, Stream stream) {
  launch(count_reads_kernel, blocks_of(args.tokens * args.kv_heads * 32), stream, "count_reads", args);
}

}  // namespace thriftattn::device
