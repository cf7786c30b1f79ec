// append(): staging a step's tokens and encoding full pages on the device, byte-equal to
// src/cache/append.cc and src/cache/page_codec.cc. The order of operations is the page format, so
// this file is compiled without FMA contraction (--fmad=false), divides by IEEE division, and
// takes conversions from the header that the CPU takes them from.
//
// Two kernels. append_stage: one block a (sequence, KV head) walks the step's pages, because a
// page's reference is the stored mean of the page before it. append_seal: one block a (sequence,
// page, KV head, side) encodes what became full.
#include <cmath>

#include "base/float_convert.h"
#include "cuda/checks.h"
#include "cuda/device_tables.cuh"
#include "cuda/hadamard.cuh"
#include "cuda/launch.h"
#include "formats/nvfp4.h"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockPad = 17;  // a scale block's 16 elements and one float against bank conflicts

struct AppendArgs {
  Geometry g;
  AttendLimits limits;
  AppendCall call;
};

__device__ float load_element(const void* p, Element type, int64_t i) {
  if (type == Element::f32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return type == Element::bf16 ? bf16_to_f32(bits) : fp16_to_f32(bits);
}

// The tree of adjacent pairs over 64 rows of one column.
template <class Load>
__device__ float tree_sum_64(Load load) {
  float level[8];
  for (int i = 0; i < 8; ++i) {
    const float a = (load(8 * i) + load(8 * i + 1)) + (load(8 * i + 2) + load(8 * i + 3));
    const float b = (load(8 * i + 4) + load(8 * i + 5)) + (load(8 * i + 6) + load(8 * i + 7));
    level[i] = a + b;
  }
  return ((level[0] + level[1]) + (level[2] + level[3])) +
         ((level[4] + level[5]) + (level[6] + level[7]));
}

__device__ void report(AppendStatus* status, int side, int sequence, int head, int64_t token) {
  if (status == nullptr) return;
  if (atomicAdd(&status->failed, 1) != 0) return;
  status->side = side;
  status->sequence = sequence;
  status->kv_head = head;
  status->token = static_cast<int32_t>(token);
}

// One token of a plain side: a row of the slot.
template <int Regs>
__device__ void store_plain(const SideGeometry& side, const float (&x)[Regs], int lane,
                            uint8_t* row) {
  if (side.kind == SideKind::bf16) {
#pragma unroll
    for (int r = 0; r < Regs; ++r) {
      reinterpret_cast<uint16_t*>(row)[r * 32 + lane] = f32_to_bf16(x[r]);
    }
    return;
  }
  float amax = 0;
#pragma unroll
  for (int r = 0; r < Regs; ++r) amax = fmaxf(amax, fabsf(x[r]));
  for (int step = 16; step > 0; step /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
  }
  const float scale = usable_scale(amax / kE4m3Max);
  if (lane == 0) *reinterpret_cast<float*>(row) = scale;
#pragma unroll
  for (int r = 0; r < Regs; ++r) row[4 + r * 32 + lane] = f32_to_e4m3(x[r] / scale);
}

template <int Regs>
__global__ void __launch_bounds__(kThreads) append_stage(const AppendArgs a, float factor) {
  constexpr int kDim = 32 * Regs;
  __shared__ float reference[kDim];
  __shared__ int bad;
  const int head = blockIdx.x, seq = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Geometry& g = a.g;
  const SequenceTables t = sequence_tables(a.call.tables, a.limits, g, seq);
  if (t.step <= 0) return;
  const int64_t first_token = t.length - t.step;
  const int64_t first_page = first_token / kPageTokens;
  const int64_t end_page = (t.length + kPageTokens - 1) / kPageTokens;
  const int64_t k_stride =
      a.call.k_token_stride ? a.call.k_token_stride : int64_t{g.kv_heads} * kDim;
  const int64_t v_stride =
      a.call.v_token_stride ? a.call.v_token_stride : int64_t{g.kv_heads} * kDim;
  const float* equalizer =
      a.call.memory.equalizer ? a.call.memory.equalizer + int64_t{head} * kDim : nullptr;

  for (int64_t page = first_page; page < end_page; ++page) {
    uint8_t* open = open_slot(a.call.memory, t, g, page);
    uint8_t* slot = page_slot(a.call.memory, t, g, page);
    uint16_t* open_ref = reinterpret_cast<uint16_t*>(open + g.open_reference) + head * kDim;
    if (threadIdx.x == 0) bad = 0;
    if (g.k.layered()) {
      // A page that opens takes the previous page's stored mean; one that goes on has its own.
      const bool opens = page * kPageTokens >= first_token;
      for (int d = threadIdx.x; d < kDim; d += kThreads) {
        uint16_t ref;
        if (!opens) {
          ref = open_ref[d];
        } else {
          ref = 0;
          if (page > 0 && page == first_page) {
            const uint8_t* previous =
                side_of(page_slot(a.call.memory, t, g, page - 1), g.k, head);
            ref = reinterpret_cast<const uint16_t*>(previous + g.k.mean)[d];
          } else if (page > 0) {
            ref = f32_to_bf16(reference[d]);  // the mean of the page before, set below
          }
          open_ref[d] = ref;
        }
        reference[d] = bf16_to_f32(ref);
      }
    }
    __syncthreads();
    const int64_t begin = max(first_token, page * kPageTokens);
    const int64_t end = min(t.length, (page + 1) * kPageTokens);
    for (int64_t token = begin + warp; token < end; token += kWarps) {
      const int64_t row = t.first_row + token - first_token;
      const int64_t at = token % kPageTokens;
      float x[Regs];
      bool over = false;
#pragma unroll
      for (int r = 0; r < Regs; ++r) {
        x[r] = load_element(a.call.k, a.call.element, row * k_stride + head * kDim + r * 32 + lane);
        over |= !(fabsf(x[r]) <= g.k.range_max);
      }
      if (__any_sync(0xffffffffu, over)) {
        if (lane == 0) {
          bad = 1;
          report(a.call.status, 0, seq, head, token);
        }
      }
      if (g.k.layered()) {
        if (equalizer != nullptr) {
#pragma unroll
          for (int r = 0; r < Regs; ++r) x[r] *= equalizer[r * 32 + lane];
        }
        if (g.rotate) hadamard_row(x, lane, factor);
        uint16_t* out =
            reinterpret_cast<uint16_t*>(open) + (int64_t{head} * kPageTokens + at) * kDim;
#pragma unroll
        for (int r = 0; r < Regs; ++r) {
          out[r * 32 + lane] = f32_to_bf16(x[r] - reference[r * 32 + lane]);
        }
      } else {
        store_plain(g.k, x, lane, side_of(slot, g.k, head) + g.k.rows + at * g.k.row_bytes);
      }
      over = false;
#pragma unroll
      for (int r = 0; r < Regs; ++r) {
        x[r] = load_element(a.call.v, a.call.element, row * v_stride + head * kDim + r * 32 + lane);
        over |= !(fabsf(x[r]) <= g.v.range_max);
      }
      if (__any_sync(0xffffffffu, over)) {
        if (lane == 0) {
          bad = 1;
          report(a.call.status, 1, seq, head, token);
        }
      }
      if (g.v.layered()) {
        uint16_t* out = reinterpret_cast<uint16_t*>(open + g.open_v) +
                        (int64_t{head} * kPageTokens + at) * kDim;
#pragma unroll
        for (int r = 0; r < Regs; ++r) out[r * 32 + lane] = f32_to_bf16(x[r]);
      } else {
        store_plain(g.v, x, lane, side_of(slot, g.v, head) + g.v.rows + at * g.v.row_bytes);
      }
    }
    __syncthreads();
    if (bad) return;  // the pages behind would have a meaningless reference
    if (g.k.layered() && end == (page + 1) * kPageTokens && g.center) {
      const uint16_t* rows =
          reinterpret_cast<const uint16_t*>(open) + int64_t{head} * kPageTokens * kDim;
      for (int d = threadIdx.x; d < kDim; d += kThreads) {
        const float mean =
            tree_sum_64([&](int i) { return bf16_to_f32(rows[i * kDim + d]); }) / 64.0f;
        reference[d] = bf16_to_f32(f32_to_bf16(reference[d] + mean));
      }
    } else if (g.k.layered()) {
      for (int d = threadIdx.x; d < kDim; d += kThreads) reference[d] = 0;  // not centred
    }
    __syncthreads();
  }
}

// A nibble to its value, by arithmetic: tables of the host header have no device address.
__device__ float e2m1_value(uint32_t code) {
  const uint32_t magnitude = code & 7u;
  const float v = magnitude < 2 ? 0.5f * magnitude
                                : __uint_as_float(((magnitude >> 1) + 126u) << 23 |
                                                  (magnitude & 1u) << 22);
  return code & 8u ? -v : v;
}

__device__ float block_max(float v, float* scratch) {
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[0];
  for (int w = 1; w < kWarps; ++w) v = fmaxf(v, scratch[w]);
  __syncthreads();
  return v;
}

// quantize_block() of nvfp4_scalar.cc: codes of 16 elements in a word pair, and the error.
__device__ float quantize_block(const float (&t)[16], uint8_t scale_code, uint64_t& codes) {
  const float scale = e4m3_to_f32(scale_code);
  float e[16];
  codes = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t code = scale == 0.0f ? 0u : f32_to_e2m1(t[i] / scale);
    const float diff = t[i] - e2m1_value(code) * scale;
    e[i] = diff * diff;
    codes |= uint64_t{code} << (4 * i);
  }
#pragma unroll
  for (int n = 8; n >= 1; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) e[i] = e[2 * i] + e[2 * i + 1];
  }
  return e[0];
}

// nvfp4_encode_page() of x [64 * dim / 16][kBlockPad]; decoded values are taken off x, and kept in
// `decoded` where it is not null. Returns the page scale.
__device__ float encode_plane(float* x, int blocks, uint8_t* codes, uint8_t* scales,
                              float* decoded, float* scratch) {
  float amax = 0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) {
    for (int i = 0; i < 16; ++i) amax = fmaxf(amax, fabsf(x[b * kBlockPad + i]));
  }
  const float page_scale = usable_scale(block_max(amax, scratch) / kNvfp4Max);
  for (int b = threadIdx.x; b < blocks; b += kThreads) {
    float t[16];
    float top = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      t[i] = x[b * kBlockPad + i] / page_scale;
      top = fmaxf(top, fabsf(t[i]));
    }
    uint8_t scale = f32_to_e4m3(top / 6.0f);
    uint64_t best;
    const float error = quantize_block(t, scale, best);
    if (top / 4.0f <= kScale4Limit) {
      const uint8_t scale4 = f32_to_e4m3(top / 4.0f);
      uint64_t four;
      if (quantize_block(t, scale4, four) < error) {
        scale = scale4;
        best = four;
      }
    }
    if (codes != nullptr) {
      scales[b] = scale;
      reinterpret_cast<uint64_t*>(codes)[b] = best;
    }
    const float factor = e4m3_to_f32(scale);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float v = e2m1_value(static_cast<uint32_t>(best >> (4 * i)) & 15u) * factor * page_scale;
      x[b * kBlockPad + i] -= v;
      if (decoded != nullptr) decoded[b * kBlockPad + i] = v;
    }
  }
  __syncthreads();
  return page_scale;
}

// rms_of() of page_codec.cc, by 16 threads: FP64 sums of the elements i mod 16, then pairs. The
// square of an FP32 number is exact in FP64.
__device__ float rms_of(const float* x, int blocks, double* sums) {
  if (threadIdx.x < 16) {
    double sum = 0;
    for (int b = 0; b < blocks; ++b) {
      const double v = x[b * kBlockPad + threadIdx.x];
      sum += v * v;
    }
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
  float rms = 0;
  if (threadIdx.x == 0) {
    for (int step = 1; step < 16; step *= 2) {
      for (int j = 0; j < 16; j += 2 * step) sums[j] += sums[j + step];
    }
    rms = static_cast<float>(sqrt(sums[0] / static_cast<double>(blocks * 16)));
  }
  __syncthreads();
  return rms;
}

__global__ void __launch_bounds__(kThreads) append_seal(const AppendArgs a) {
  extern __shared__ float shared[];
  __shared__ double sums[16];
  __shared__ float scratch[kWarps];
  const Geometry& g = a.g;
  const int head = blockIdx.x / 2, side_index = blockIdx.x % 2, seq = blockIdx.z;
  const SideGeometry& side = side_index == 0 ? g.k : g.v;
  if (!side.layered()) return;
  const SequenceTables t = sequence_tables(a.call.tables, a.limits, g, seq);
  if (t.step <= 0) return;
  const int64_t page = (t.length - t.step) / kPageTokens + blockIdx.y;
  if ((page + 1) * kPageTokens > t.length) return;  // not full

  const int dim = side.dim, n = static_cast<int>(kPageTokens) * dim, blocks = n / 16;
  float* x = shared;
  float* decoded = side_index == 0 ? shared + blocks * kBlockPad : nullptr;
  const uint8_t* open = open_slot(a.call.memory, t, g, page);
  const auto* rows = reinterpret_cast<const uint16_t*>(open + (side_index == 0 ? 0 : g.open_v)) +
                     int64_t{head} * n;
  const auto* reference =
      reinterpret_cast<const uint16_t*>(open + g.open_reference) + head * dim;
  uint8_t* whole = page_slot(a.call.memory, t, g, page);
  uint8_t* slot = side_of(whole, side, head);
  uint8_t* residual = residual_slot(a.call.memory, t, g, page, head);
  PageMeta* meta = meta_of(whole, g, head);

  int bad = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float v = bf16_to_f32(rows[i]);
    bad |= !(fabsf(v) <= side.range_max);
    x[i / 16 * kBlockPad + i % 16] = v;
  }
  if (__syncthreads_or(bad)) return;  // reported by append_stage
  auto* stored_mean = reinterpret_cast<uint16_t*>(slot + side.mean);
  for (int d = threadIdx.x; d < dim; d += kThreads) {
    if (!g.center) {
      stored_mean[d] = 0;
      continue;
    }
    const auto at = [&](int i) { return (i * dim + d) / 16 * kBlockPad + d % 16; };
    const float mean = tree_sum_64([&](int i) { return x[at(i)]; }) / 64.0f;
    const float ref = side_index == 0 ? bf16_to_f32(reference[d]) : 0.0f;
    const uint16_t stored = f32_to_bf16(ref + mean);
    stored_mean[d] = stored;
    const float taken = bf16_to_f32(stored) - ref;
    for (int i = 0; i < kPageTokens; ++i) x[at(i)] -= taken;
  }
  __syncthreads();

  const float scale =
      encode_plane(x, blocks, slot + side.codes, slot + side.scales, decoded, scratch);
  const float error = rms_of(x, blocks, sums);
  float norm = 0;
  if (side_index == 0) {
    // The norm of the mean of the decoded K', rounded up; summed in order in FP64.
    float* mean = shared + 2 * blocks * kBlockPad;
    for (int d = threadIdx.x; d < dim; d += kThreads) {
      mean[d] = tree_sum_64([&](int i) {
                  return decoded[(i * dim + d) / 16 * kBlockPad + d % 16];
                }) / 64.0f;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double norm2 = 0;
      for (int d = 0; d < dim; ++d) norm2 += static_cast<double>(mean[d]) * mean[d];
      norm = nextafterf(static_cast<float>(sqrt(norm2)), INFINITY);
    }
    __syncthreads();
  }
  // Without a residual slot its metadata is still that of the plane that would be there.
  const float res_scale =
      encode_plane(x, blocks, residual ? residual + side.res_codes : nullptr,
                   residual ? residual + side.res_scales : nullptr, nullptr, scratch);
  const float error_both = rms_of(x, blocks, sums);
  if (threadIdx.x != 0) return;
  if (side_index == 0) {
    meta->k_scale = scale;
    meta->k_res_scale = res_scale;
    meta->k_error = error;
    meta->k_error_both = error_both;
    meta->k_mean_norm = norm;
  } else {
    meta->v_scale = scale;
    meta->v_res_scale = res_scale;
    meta->v_error = error;
    meta->v_error_both = error_both;
  }
  // What the other side would not write.
  if (side_index == 0 && !g.v.layered()) {
    meta->v_scale = meta->v_res_scale = 1;
    meta->v_error = meta->v_error_both = 0;
  }
  if (side_index == 1 && !g.k.layered()) {
    meta->k_scale = meta->k_res_scale = 1;
    meta->k_error = meta->k_error_both = meta->k_mean_norm = 0;
  }
}

}  // namespace

// x, K's decoded values and their mean.
int seal_shared_bytes(int dim) {
  const int plane = static_cast<int>(kPageTokens) * dim / 16 * kBlockPad;
  return (2 * plane + dim) * static_cast<int>(sizeof(float));
}

void launch_append(const AttendPlan::State& plan, const AppendCall& call, Stream stream) {
  const AppendArgs args{plan.geometry, plan.limits, call};
  const Geometry& g = plan.geometry;
  const int block = g.k.dim & -g.k.dim;
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  const dim3 grid(g.kv_heads, static_cast<unsigned>(plan.limits.batch));
  switch (g.k.dim) {
    case 64:
      append_stage<2><<<grid, kThreads, 0, stream>>>(args, factor);
      break;
    case 128:
      append_stage<4><<<grid, kThreads, 0, stream>>>(args, factor);
      break;
    case 192:
      append_stage<6><<<grid, kThreads, 0, stream>>>(args, factor);
      break;
    default:
      append_stage<8><<<grid, kThreads, 0, stream>>>(args, factor);
      break;
  }
  check_launch("append_stage");
  if (!g.any_layered()) return;
  const int bytes = seal_shared_bytes(g.k.dim);
  check(cudaFuncSetAttribute(append_seal, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "append_seal");
  const dim3 seal_grid(2 * g.kv_heads, static_cast<unsigned>(pages_touched(plan.limits)),
                       static_cast<unsigned>(plan.limits.batch));
  append_seal<<<seal_grid, kThreads, bytes, stream>>>(args);
  check_launch("append_seal");
}

}  // namespace thriftattn::cuda
