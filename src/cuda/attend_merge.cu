// attend_merge: a row's output from the partials of its splits, and the sink; brought back to V's
// basis where V is stored rotated.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "base/float_convert.h"
#include "cuda/attend_launch.h"
#include "cuda/attend_units.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/mma.cuh"

namespace thriftattn::cuda {
namespace {

__device__ void store_out(const AttendCall& c, int64_t i, float x) {
  if (c.out_element == Element::f32) {
    static_cast<float*>(c.out)[i] = x;
  } else {
    static_cast<uint16_t*>(c.out)[i] =
        c.out_element == Element::bf16 ? f32_to_bf16(x) : f32_to_fp16(x);
  }
}

constexpr int kMergeGroups = 8;  // of threads, each with every eighth split
constexpr int kMergeSplits = kMaxSplits / kMergeGroups;

// Element d of the row's Hadamard transform, whose element d is x; by all threads of the block.
__device__ float rotate_back(float x, int d, int dim, float factor,
                             float (&row)[kMergeGroups][256]) {
  for (int step = 1; step < 32; step *= 2) {
    const float other = __shfl_xor_sync(~0u, x, step);
    x = d & step ? other - x : x + other;
  }
  const int block = dim & -dim;
  for (int step = 32; step < block; step *= 2) {
    __syncthreads();  // everybody has read what was there
    if (d < dim) row[0][d] = x;
    __syncthreads();
    if (d < dim) x = d & step ? row[0][d ^ step] - x : x + row[0][d ^ step];
  }
  return x * factor;
}

// One block a row, four dims a thread. All of a thread's reads are in flight before the splits'
// weights are known. The sums are of fixed groups in a fixed order, whatever the batch.
__global__ void __launch_bounds__(64 * kMergeGroups)
    attend_merge(const __grid_constant__ AttendArgs a) {
  __shared__ float values[kMergeGroups][256];
  // attend_planes lets this start when its units are there; lengths and tables are older. Asked for in
  // a way that finds what was written last, not what an earlier launch has left in the L1.
  if (a.slots > 0) {
    wait_for_units(UnitTable(a));
  } else {
    wait_for_previous_kernel();
  }
  const int dim = a.g.v.dim, quads = dim / 4;
  const int seq = blockIdx.z, head = blockIdx.y, row = blockIdx.x;
  const int lane = threadIdx.x % 32;
  const TileView v = tile_view(a, seq, row / a.tile_rows);
  const int64_t seq_head = int64_t{seq} * a.g.kv_heads + head;
  const int splits = row < v.rows ? splits_of_sequence(a, seq, v.items) : 0;
  const int64_t first = partial_row(a, seq_head, 0) + row;
  const float2* ml = workspace_at<const float2>(a, a.ws.partial_ml) + first;
  const float* o = workspace_at<const float>(a, a.ws.partial_o) + first * dim;
  const int group = threadIdx.x / quads, quad = threadIdx.x % quads;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (row >= v.rows) return;

  float2 part[2];  // of splits lane and lane + 32, in every warp
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int s = lane + 32 * i;
    part[i] = s < splits ? ml[s * a.ws.rows] : make_float2(-INFINITY, 0);
  }
  float4 x[kMergeSplits];
#pragma unroll
  for (int k = 0; k < kMergeSplits; ++k) {
    const int s = group + k * kMergeGroups;
    x[k] = s < splits
               ? *reinterpret_cast<const float4*>(o + int64_t{s} * a.ws.rows * dim + 4 * quad)
               : make_float4(0, 0, 0, 0);
  }
  const int q_head = head * a.g.group + row % a.g.group;
  const float sink = a.call.sink_logits ? a.call.sink_logits[q_head] * kLog2e : -INFINITY;
  const int64_t token = v.t.first_row + a.first_q + row / a.g.group;
  const int64_t q_heads = int64_t{a.g.kv_heads} * a.g.group;
  if (threadIdx.x / 32 == 1 &&
      a.call.lse_floor != nullptr) {  // while the others wait for their reads
    const float floor = row_floor<32>(a, seq_head, row, q_head);
    if (lane == 0) a.call.lse_floor[token * q_heads + q_head] = floor * kLn2;
  }
  float top = sink;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!(part[i].y > 0)) part[i] = make_float2(-INFINITY, 0);
    top = fmaxf(top, part[i].x);
  }
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  float factor[2], sum = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factor[i] = part[i].y > 0 ? exp2f(part[i].x - top) : 0.0f;
    sum += part[i].y * factor[i];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (sink > -INFINITY) sum += exp2f(sink - top);

  float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int k = 0; k < kMergeSplits; ++k) {
    const float f =
        __shfl_sync(~0u, factor[k * kMergeGroups / 32], (group + k * kMergeGroups) % 32);
    if (f > 0) {  // a split without weight may hold anything
      total.x = fmaf(x[k].x, f, total.x);
      total.y = fmaf(x[k].y, f, total.y);
      total.z = fmaf(x[k].z, f, total.z);
      total.w = fmaf(x[k].w, f, total.w);
    }
  }
  *reinterpret_cast<float4*>(&values[group][4 * quad]) = total;
  __syncthreads();
  const int d = threadIdx.x;
  float value = 0;
  if (d < dim) {
    value = ((values[0][d] + values[1][d]) + (values[2][d] + values[3][d])) +
            ((values[4][d] + values[5][d]) + (values[6][d] + values[7][d]));
    value = sum > 0 ? value / sum : 0.0f;
  }
  if (a.g.v.rotated) value = rotate_back(value, d, dim, a.hadamard_factor, values);
  if (d >= dim) return;
  const int64_t stride = a.call.out_token_stride ? a.call.out_token_stride : q_heads * dim;
  store_out(a.call, token * stride + int64_t{q_head} * dim + d, value);
  if (d == 0 && a.call.lse != nullptr) {
    a.call.lse[token * q_heads + q_head] = sum > 0 ? (top + log2f(sum)) * kLn2 : -INFINITY;
  }
}
static_assert(kMaxSplits <= 64 && kMaxSplits % kMergeGroups == 0 && kMergeGroups == 8,
              "two splits a lane, and the order of the last sum");

}  // namespace

void launch_merge(const AttendArgs& a, cudaStream_t stream) {
  const dim3 grid(a.positions * a.g.group, a.g.kv_heads, static_cast<unsigned>(a.limits.batch));
  launch_after_previous(attend_merge, {grid, dim3(a.g.v.dim / 4 * kMergeGroups), 0}, a, stream,
                        "attend_merge");
}

}  // namespace thriftattn::cuda
