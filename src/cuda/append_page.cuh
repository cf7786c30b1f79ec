// One page of one KV head's K or V by one block of threads: the step's tokens in open form, and, if
// the page is full, base, residual, summary and metadata. Byte-equal to src/cache/append.cc and
// src/cache/page_codec.cc; included by append.cuh alone (no contraction of products and sums).
#pragma once

#include "cuda/append_encoder.cuh"
#include "cuda/append_planes.cuh"
#include "cuda/append_rows.cuh"

namespace thriftattn::cuda {

template <int kDim, bool kIsK>
template <bool kGroups>
__device__ __forceinline__ bool PageEncoder<kDim, kIsK>::page(int page, bool reports) {
  float x[2][16];
  uint32_t words[2][8];
  load(page, words, x);
  const int bad = refused(words, x);
  const bool full = (page + 1) * kTokens <= length();
  const bool rotated = kIsK || (kGroups && side().rotated);
  if (rotated) {
    rotate(x[0]);
    rotate(x[1]);
  }
  if (kIsK) {
    if (page * kTokens >= first_token() && threadIdx.x < kDim) {
      open_reference(open())[column_at<kDim>(threadIdx.x)] = static_cast<uint16_t>(pack_bf16(s_.reference[threadIdx.x], 0.0f));
    }
    take_reference(x);
  }
  if (rotated || a_.call.element != Element::bf16) {
    stage(page, x);
  } else {
    stage_as_it_is(page, words, x);
  }
  if (kIsK) __syncthreads();  // sums of the page before have been read
  sum_pairs(x);
  const bool any_bad = __syncthreads_or(bad);
  finish();
  if (any_bad) {
    if (!reports) return false;
    if (threadIdx.x == 0) s_.least = INT32_MAX;
    __syncthreads();
    if (bad) atomicMin(&s_.least, page * kTokens + 2 * pair_ + (bad & 1 ? 0 : 1));
    __syncthreads();
    if (threadIdx.x == 0) report(a_.call.status, kIsK ? 0 : 1, sequence_, head_, s_.least);
    return false;
  }
  if (full) {
    center(x);
    encode<kGroups>(x);
  }
  return true;
}

template <int kDim, bool kIsK>
__device__ __forceinline__ void PageEncoder<kDim, kIsK>::reference_page(int page) {
  float x[2][16];
  uint32_t words[2][8];
  load(page, words, x);
  rotate(x[0]);
  rotate(x[1]);
  take_reference(x);
  const bool has_old = page * kTokens < first_token();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[r][i] = pack_bf16(x[r][2 * i], x[r][2 * i + 1]);
    if (has_old && page * kTokens + 2 * pair_ + r < first_token()) {
      get_row(open_row(2 * pair_ + r), words[r]);
    }
    unpack_bf16(words[r], x[r]);
  }
  sum_pairs(x);
  __syncthreads();
  uint16_t stored;
  center_column(stored);
  __syncthreads();
}

}  // namespace thriftattn::cuda
