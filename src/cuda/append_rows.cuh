// A page's rows: their input, equalised, rotated and in open form, and the mean that is taken off them.
// Byte-equal to src/cache/append.cc; included by append.cuh alone (no contraction of products and sums).
#pragma once

#include <cuda_bf16.h>

#include "cuda/append_encoder.cuh"

namespace thriftattn::cuda {

__device__ inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ void unpack_bf16(const uint32_t (&words)[8], float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack_fp16(const uint32_t (&words)[8], float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const half2*>(&words[i]));
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// The largest magnitude of BF16 pairs.
template <int kWords>
__device__ __forceinline__ float largest_bf16(const uint32_t (&words)[kWords]) {
  __nv_bfloat162 pair = __habs2(reinterpret_cast<const __nv_bfloat162&>(words[0]));
#pragma unroll
  for (int i = 1; i < kWords; ++i) {
    pair = __hmax2_nan(pair, __habs2(reinterpret_cast<const __nv_bfloat162&>(words[i])));
  }
  return max_nan(__low2float(pair), __high2float(pair));
}

// Words at `from`; by halves where rows are not on 16-byte lines.
template <int kWords>
__device__ __forceinline__ void load_words(const uint32_t* from, bool aligned, uint32_t (&words)[kWords]) {
  if (aligned) {
#pragma unroll
    for (int q = 0; q < kWords / 4; ++q) {
      const uint4 w = reinterpret_cast<const uint4*>(from)[q];
      words[4 * q] = w.x, words[4 * q + 1] = w.y, words[4 * q + 2] = w.z, words[4 * q + 3] = w.w;
    }
    return;
  }
  const auto* halves = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = halves[2 * i] | uint32_t{halves[2 * i + 1]} << 16;
}

// 16 numbers of 16 bits.
__device__ __forceinline__ void get_row(const uint4* row, uint32_t (&words)[8]) {
  const uint4 low = row[0], high = row[1];
  words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
  words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
}
__device__ __forceinline__ void put_row(uint4* row, const uint32_t (&words)[8]) {
  row[0] = {words[0], words[1], words[2], words[3]};
  row[1] = {words[4], words[5], words[6], words[7]};
}

// Values of the thread's rows that are new in this step, zeros elsewhere; words: as they come, of 16
// bits each.
template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::load(int page, uint32_t (&words)[2][8],
                                                        float (&x)[2][16]) {
  whole_ = page * kTokens >= first_token() && (page + 1) * kTokens <= length();
  open_id_ = t_.open[static_cast<uint32_t>(page) % static_cast<uint32_t>(t_.open_pages)];
  slot_id_ = t_.blocks[page];
  residual_id_ = t_.residuals == nullptr ? -1 : t_.residuals[int64_t{page} * a_.g.kv_heads + head_];
  const int token = page * kTokens + 2 * pair_;
  const uint8_t* from = input_ + int64_t{page} * kTokens * stride_;
  if (a_.call.element == Element::f32) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t wide[16] = {};
      if (is_new(token + r)) {
        load_words(reinterpret_cast<const uint32_t*>(from + r * stride_), aligned_, wide);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) x[r][i] = __uint_as_float(wide[i]);
    }
    return;
  }
  if (aligned_ && whole_) {
#pragma unroll
    for (int r = 0; r < 2; ++r) get_row(reinterpret_cast<const uint4*>(from + r * stride_), words[r]);
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) words[r][i] = 0;
      if (is_new(token + r)) {
        load_words(reinterpret_cast<const uint32_t*>(from + r * stride_), aligned_, words[r]);
      }
    }
  }
  if (page < last_) prefetch(page + 1);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (a_.call.element == Element::bf16) {
      unpack_bf16(words[r], x[r]);
    } else {
      unpack_fp16(words[r], x[r]);
    }
  }
}

// In bit r whether row r, as load() has it, holds a value that the format does not take.
template <int kDim, bool kIsK>
__device__ __forceinline__ int PageEncoder<kDim, kIsK>::refused(const uint32_t (&words)[2][8],
                                                          const float (&x)[2][16]) const {
  float largest[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (a_.call.element == Element::bf16) {
      largest[r] = largest_bf16(words[r]);
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) largest[r] = max_nan(largest[r], fabsf(x[r][i]));
    }
  }
  const float limit = side().range_max;
  return (largest[0] <= limit ? 0 : 1) | (largest[1] <= limit ? 0 : 2);
}

// Equalises and rotates 16 columns of a row: butterflies of stride 1, 2, 4, ... as
// hadamard_rows_scalar(); from stride 16 on the partner is another lane.
template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::rotate(float (&x)[16]) const {
  constexpr int kRotated = kDim & -kDim;
  if (kIsK && a_.call.memory.equalizer != nullptr) {
    const auto* factors = reinterpret_cast<const float4*>(s_.equalizer) + block_;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 f = factors[q * Shape::kBlocks];
      x[4 * q] *= f.x, x[4 * q + 1] *= f.y, x[4 * q + 2] *= f.z, x[4 * q + 3] *= f.w;
    }
  }
  if (kIsK && !a_.g.rotate) return;
#pragma unroll
  for (int step = 1; step < 16; step *= 2) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i & step) continue;
      const float left = x[i], right = x[i + step];
      x[i] = left + right;
      x[i + step] = left - right;
    }
  }
#pragma unroll
  for (int step = 1; step < kRotated / kColumns; step *= 2) {
    const float sign = block_ & step ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(0xffffffffu, x[i], step));
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] *= a_.rotation_factor;
}

template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::take_reference(float (&x)[2][16]) const {
  const auto* reference = reinterpret_cast<const float4*>(s_.reference) + block_;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float4 f = reference[q * Shape::kBlocks];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r][4 * q] -= f.x, x[r][4 * q + 1] -= f.y, x[r][4 * q + 2] -= f.z, x[r][4 * q + 3] -= f.w;
    }
  }
}

// To the open form and back: x is what the open page holds then, rows of earlier steps included.
template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::stage(int page, float (&x)[2][16]) const {
  const int token = page * kTokens + 2 * pair_;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t words[8];
    uint4* row = open_row(2 * pair_ + r);
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = pack_bf16(x[r][2 * i], x[r][2 * i + 1]);
    if (whole_ || is_new(token + r)) {
      put_row(row, words);
    } else if (token + r < first_token()) {
      get_row(row, words);
    }
    unpack_bf16(words, x[r]);
  }
}

// The same of V in BF16 that is not rotated.
template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::stage_as_it_is(int page, uint32_t (&words)[2][8],
                                                                  float (&x)[2][16]) const {
  const int token = page * kTokens + 2 * pair_;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint4* row = open_row(2 * pair_ + r);
    if (whole_ || is_new(token + r)) {
      put_row(row, words[r]);
    } else if (token + r < first_token()) {
      get_row(row, words[r]);
      unpack_bf16(words[r], x[r]);
    }
  }
}

template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::sum_pairs(const float (&x)[2][16]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    *s_.row_sum(pair_, block_, q) = {x[0][4 * q] + x[1][4 * q], x[0][4 * q + 1] + x[1][4 * q + 1],
                                     x[0][4 * q + 2] + x[1][4 * q + 2], x[0][4 * q + 3] + x[1][4 * q + 3]};
  }
}

// The mean over the page of the column that this pair of threads has, from the sums of pairs of
// rows: the tree of adjacent pairs goes on from there.
template <int kDim, bool kIsK>
__device__ __forceinline__ float PageEncoder<kDim, kIsK>::column_mean() const {
  const int position = threadIdx.x / 2, upper = threadIdx.x % 2;
  const float* sums = &s_.sums[upper * (kPairs / 2 * kDim + PageShared<kDim>::kUpper) + position];
  float v[kPairs / 2];
#pragma unroll
  for (int i = 0; i < kPairs / 2; ++i) v[i] = sums[i * kDim];
  const float half = tree_sum(v);
  return (half + __shfl_xor_sync(0xffffffffu, half, 1)) / static_cast<float>(kPageTokens);
}

// What is to be taken off the column, and its mean as it is stored, which becomes K's next reference.
template <int kDim, bool kIsK>
__device__ __forceinline__ float PageEncoder<kDim, kIsK>::center_column(uint16_t& stored) {
  const int position = threadIdx.x / 2;
  float taken = 0;
  stored = 0;
  if (a_.g.center) {
    const float reference = kIsK ? s_.reference[position] : 0.0f;
    stored = static_cast<uint16_t>(pack_bf16(reference + column_mean(), 0.0f));
    taken = bf16_to_f32(stored) - reference;
  }
  __syncwarp();
  if (kIsK && threadIdx.x % 2 == 0) s_.reference[position] = bf16_to_f32(stored);
  return taken;
}

// Takes the stored mean off x.
template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::center(float (&x)[2][16]) {
  const int position = threadIdx.x / 2;
  uint16_t stored;
  const float taken = center_column(stored);
  if (threadIdx.x % 2 == 0) {
    s_.columns[position] = taken;
    mean_of(slot())[column_at<kDim>(position)] = stored;
  }
  __syncthreads();
  const auto* columns = reinterpret_cast<const float4*>(s_.columns) + block_;
#pragma unroll
  for (int q = 0; q < 4 && a_.g.center; ++q) {
    const float4 f = columns[q * Shape::kBlocks];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r][4 * q] -= f.x, x[r][4 * q + 1] -= f.y, x[r][4 * q + 2] -= f.z, x[r][4 * q + 3] -= f.w;
    }
  }
}

}  // namespace thriftattn::cuda
