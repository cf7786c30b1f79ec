// One page of one KV head's K or V by one block of threads: the step's tokens in open form, and, if
// the page is full, base, residual, summary and metadata. Byte-equal to src/cache/append.cc and
// src/cache/page_codec.cc; included by append.cu alone (no contraction of products and sums).
//
// A thread has 16 columns of two neighbouring rows: whole blocks for the codec, the first level of
// the mean's tree, and neighbours of the rotation in its registers or in lanes beside it. So a page
// is read once, and nothing of it passes through memory but sums of columns.
#pragma once

#include <cuda_bf16.h>

#include "cuda/append_block.cuh"
#include "cuda/append_groups.cuh"
#include "cuda/device_tables.cuh"

namespace thriftattn::cuda {

struct AppendArgs {
  Geometry g;
  AttendLimits limits;
  AppendCall call;
  float rotation_factor = 1;
  int32_t runs = 1;         // runs that a step's pages are cut into, if none is longer than kMaxRun
  int32_t k_units = 1, v_units = 1;  // blocks for each KV head of each side
};

constexpr int kTokens = kPageTokens;  // 32 bits: lengths have no more
constexpr int kColumns = 16;          // of a thread
constexpr int kPairs = kTokens / 2;   // rows 2 i and 2 i + 1

template <int kDim>
struct PageShape {
  static constexpr int kBlocks = kDim / kColumns;  // of a row
  static constexpr int kThreads = kPairs * kBlocks;
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps == kBlocks && kThreads == 2 * kDim);
};

// Columns lie in shared memory so that threads which hold neighbouring blocks meet no bank twice:
// quarter q of block c, four columns, is at q * 4 * kBlocks + 4 * c.
template <int kDim>
struct PageShared {
  static constexpr int kUpper = 16;  // shift of the upper pairs, against bank conflicts
  alignas(16) float sums[kPairs * kDim + kUpper];  // of each pair of rows
  alignas(16) float reference[kDim];
  alignas(16) float equalizer[kDim];
  alignas(16) float columns[kDim];  // what centring takes off; then the mean of the decoded K'
  alignas(16) ScaleFacts facts[128];
  // Four sums each: of what the base leaves and of what both planes leave, by warp; of that mean,
  // by block.
  double squares[3][4][16];
  uint32_t amax[2][16];   // by warp
  int least;  // of a token that is refused, of a page that must be done again

  __device__ float4* row_sum(int pair, int block, int quarter) {
    return reinterpret_cast<float4*>(&sums[pair * kDim + (pair >= kPairs / 2 ? kUpper : 0)]) +
           quarter * (kDim / kColumns) + block;
  }
};

template <int kDim>
__device__ int column_at(int position) {
  constexpr int kRow = kDim / 4;  // positions of one quarter
  return position % kRow / 4 * kColumns + position / kRow * 4 + position % 4;
}

__device__ inline float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

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

__device__ inline void report(AppendStatus* status, int side, int sequence, int head, int token) {
  if (status == nullptr) return;
  if (atomicAdd(&status->failed, 1) != 0) return;
  status->side = side;
  status->sequence = sequence;
  status->kv_head = head;
  status->token = token;
}

enum class PageWork { whole, reference_only };

// A side of a KV head of a sequence: what is the same for its pages.
template <int kDim>
class PageEncoder {
 public:
  using Shape = PageShape<kDim>;

  __device__ PageEncoder(const AppendArgs& args, PageShared<kDim>& shared, int side, int head, int sequence)
      : a_(args), s_(shared), side_(side), head_(head), sequence_(sequence),
        t_(sequence_tables(args.call.tables, args.limits, args.g, sequence)),
        pair_(threadIdx.x / Shape::kBlocks), block_(threadIdx.x % Shape::kBlocks) {}

  // What all pages share; before the first of them.
  __device__ void begin() {
    if (threadIdx.x < 128) s_.facts[threadIdx.x] = scale_facts(threadIdx.x);
    const float* equalizer = a_.call.memory.equalizer;
    if (side_ == 0 && equalizer != nullptr) {
      for (int i = threadIdx.x; i < kDim; i += Shape::kThreads) {
        s_.equalizer[i] = equalizer[int64_t{head_} * kDim + column_at<kDim>(i)];
      }
    }
    __syncthreads();
  }

  __device__ const SequenceTables& tables() const { return t_; }
  __device__ int length() const { return static_cast<int>(t_.length); }
  __device__ int first_token() const { return static_cast<int>(t_.length - t_.step); }
  __device__ int first_page() const { return first_token() / kTokens; }
  __device__ int pages() const { return (length() + kTokens - 1) / kTokens - first_page(); }

  // K's reference for `page`, from memory: the stored mean of the page before; its own, if the page
  // was open before this step.
  __device__ void load_reference(int page) {
    const uint16_t* from = nullptr;
    if (page * kTokens < first_token()) {
      from = open_reference(page);
    } else if (page > 0) {
      from = stored_mean(page - 1);
    }
    for (int i = threadIdx.x; i < kDim; i += Shape::kThreads) {
      s_.reference[i] = from == nullptr ? 0.0f : bf16_to_f32(from[column_at<kDim>(i)]);
    }
    __syncthreads();
  }
  __device__ void zero_reference() {
    for (int i = threadIdx.x; i < kDim; i += Shape::kThreads) s_.reference[i] = 0.0f;
    __syncthreads();
  }
  // Whether 16 bytes of the page's reference are those of the mean that the page before has stored.
  __device__ bool reference_holds(int page, int vector) const {
    const uint4 used = reinterpret_cast<const uint4*>(open_reference(page))[vector];
    const uint4 mean = reinterpret_cast<const uint4*>(stored_mean(page - 1))[vector];
    return used.x == mean.x && used.y == mean.y && used.z == mean.z && used.w == mean.w;
  }

  // Does one page; of K, shared memory then has the reference of the page behind it. False where a
  // value was refused, and K's references behind it mean nothing. kGroups: with the code for planes in
  // groups of 32.
  template <bool kGroups>
  __device__ bool page(int page, PageWork work, bool reports);

 private:
  __device__ const SideGeometry& side() const { return side_ == 0 ? a_.g.k : a_.g.v; }
  __device__ uint16_t* stored_mean(int page) const {
    return reinterpret_cast<uint16_t*>(side_of(page_slot(a_.call.memory, t_, a_.g, page), side(), head_) +
                                             side().mean);
  }
  __device__ uint16_t* open_reference(uint8_t* open) const {
    return reinterpret_cast<uint16_t*>(open + a_.g.open_reference) + head_ * kDim;
  }
  __device__ uint16_t* open_reference(int page) const {
    return open_reference(open_slot(a_.call.memory, t_, a_.g, page));
  }
  // This thread's words of a row of the open page.
  __device__ uint4* open_row(int row) const {
    return reinterpret_cast<uint4*>(open_ + (side_ == 0 ? 0 : a_.g.open_v) +
                                    ((int64_t{head_} * kTokens + row) * kDim + block_ * kColumns) * 2);
  }

  __device__ int load(int page, float (&x)[2][16]) const;
  __device__ void rotate(float (&x)[16]) const;
  __device__ void stage(int page, PageWork work, float (&x)[2][16]) const;
  __device__ float column_mean() const;
  __device__ void center(int page, PageWork work, float (&x)[2][16]);
  template <bool kGroups>
  __device__ void encode(int page, float (&x)[2][16]);
  __device__ void finish(int page, float scale, float residual_scale);

  const AppendArgs& a_;
  PageShared<kDim>& s_;
  const int side_, head_, sequence_;
  const SequenceTables t_;
  const int pair_, block_;
  uint8_t* open_ = nullptr;  // of the page at hand
};

// Values of the thread's rows that are new in this step, zeros elsewhere. Returns in bit r whether
// row r holds a value that the format does not take.
template <int kDim>
__device__ __forceinline__ int PageEncoder<kDim>::load(int page, float (&x)[2][16]) const {
  const AppendCall& call = a_.call;
  const void* from = side_ == 0 ? call.k : call.v;
  int64_t stride = side_ == 0 ? call.k_token_stride : call.v_token_stride;
  if (stride == 0) stride = int64_t{a_.g.kv_heads} * kDim;
  const int token = page * kTokens + 2 * pair_;
  const int64_t at = (t_.first_row + token - first_token()) * stride + head_ * kDim + block_ * kColumns;
  bool is_new[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) is_new[r] = token + r >= first_token() && token + r < length();
  if (call.element == Element::f32) {
    const auto* p = static_cast<const uint32_t*>(from) + at;
    const bool aligned = ((reinterpret_cast<uint64_t>(from) | stride * 4) & 15) == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t words[16] = {};
      if (is_new[r]) load_words(p + r * stride, aligned, words);
#pragma unroll
      for (int i = 0; i < 16; ++i) x[r][i] = __uint_as_float(words[i]);
    }
  } else {
    const auto* p = static_cast<const uint16_t*>(from) + at;
    const bool aligned = ((reinterpret_cast<uint64_t>(from) | stride * 2) & 15) == 0;
    uint32_t words[2][8] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (is_new[r]) load_words(reinterpret_cast<const uint32_t*>(p + r * stride), aligned, words[r]);
    }
    if (call.element == Element::bf16) {
      unpack_bf16(words[0], x[0]);
      unpack_bf16(words[1], x[1]);
    } else {
      unpack_fp16(words[0], x[0]);
      unpack_fp16(words[1], x[1]);
    }
  }
  float largest[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < 16; ++i) largest[r] = max_nan(largest[r], fabsf(x[r][i]));
  }
  const float limit = side().range_max;
  return (largest[0] <= limit ? 0 : 1) | (largest[1] <= limit ? 0 : 2);
}

// Equalises and rotates 16 columns of a row: butterflies of stride 1, 2, 4, ... as
// hadamard_rows_scalar(); from stride 16 on the partner is another lane.
template <int kDim>
__device__ __forceinline__ void PageEncoder<kDim>::rotate(float (&x)[16]) const {
  constexpr int kRotated = kDim & -kDim;
  if (side_ == 0 && a_.call.memory.equalizer != nullptr) {
    const auto* factors = reinterpret_cast<const float4*>(s_.equalizer) + block_;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 f = factors[q * Shape::kBlocks];
      x[4 * q] *= f.x, x[4 * q + 1] *= f.y, x[4 * q + 2] *= f.z, x[4 * q + 3] *= f.w;
    }
  }
  if (side_ == 0 && !a_.g.rotate) return;
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

// To the open form and back: x is what the open page holds then, rows of earlier steps included.
template <int kDim>
__device__ __forceinline__ void PageEncoder<kDim>::stage(int page, PageWork work, float (&x)[2][16]) const {
  const int first_token = this->first_token();
  const int token = page * kTokens + 2 * pair_;
  if (side_ == 0) {
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
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = pack_bf16(x[r][2 * i], x[r][2 * i + 1]);
    uint4* row = open_row(2 * pair_ + r);
    if (token + r < first_token) {
      const uint4 low = row[0], high = row[1];
      words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
      words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
    } else if (work == PageWork::whole && token + r < length()) {
      row[0] = {words[0], words[1], words[2], words[3]};
      row[1] = {words[4], words[5], words[6], words[7]};
    }
    // V in BF16 is what it was, unless it is rotated.
    if (side_ == 0 || side().rotated || a_.call.element != Element::bf16 || token + r < first_token) {
      unpack_bf16(words, x[r]);
    }
  }
}

// The mean over the page of the column that this pair of threads has, from the sums of pairs of
// rows: the tree of adjacent pairs goes on from there.
template <int kDim>
__device__ __forceinline__ float PageEncoder<kDim>::column_mean() const {
  const int position = threadIdx.x / 2, upper = threadIdx.x % 2;
  const float* sums = &s_.sums[upper * (kPairs / 2 * kDim + PageShared<kDim>::kUpper) + position];
  float v[kPairs / 2];
#pragma unroll
  for (int i = 0; i < kPairs / 2; ++i) v[i] = sums[i * kDim];
  const float half = tree_sum(v);
  return (half + __shfl_xor_sync(0xffffffffu, half, 1)) / static_cast<float>(kPageTokens);
}

// Takes the stored mean off x; the mean becomes K's next reference.
template <int kDim>
__device__ __forceinline__ void PageEncoder<kDim>::center(int page, PageWork work, float (&x)[2][16]) {
  const int position = threadIdx.x / 2;
  float taken = 0;
  uint16_t stored = 0;
  if (a_.g.center) {
    const float reference = side_ == 0 ? s_.reference[position] : 0.0f;
    stored = f32_to_bf16(reference + column_mean());
    taken = bf16_to_f32(stored) - reference;
  }
  __syncwarp();
  if (threadIdx.x % 2 == 0) {
    s_.columns[position] = taken;
    if (side_ == 0) s_.reference[position] = bf16_to_f32(stored);
    if (work == PageWork::whole) {
      auto* mean = stored_mean(page);
      mean[column_at<kDim>(position)] = stored;
    }
  }
  __syncthreads();
  if (work != PageWork::whole) return;
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

// sum_of_squares() of page_codec.cc, for the 16 elements of a row that one thread has.
__device__ __forceinline__ void add_squares(const float (&x)[16], double (&sums)[4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const double v = x[i];
    sums[i % 4] = __fma_rn(v, v, sums[i % 4]);  // the square is exact
  }
}
// Four sums over the warp, each a tree of adjacent pairs of lanes: lanes 0 to 3 get one each.
__device__ __forceinline__ void sum_lanes(double (&sums)[4]) {
  const bool odd = threadIdx.x & 1, second = threadIdx.x & 2;
  for (int i = 0; i < 2; ++i) {
    const double given = odd ? sums[i] : sums[i + 2];
    if (odd) sums[i] = sums[i + 2];
    sums[i] += __shfl_xor_sync(0xffffffffu, given, 1);
  }
  const double given = second ? sums[0] : sums[1];
  if (second) sums[0] = sums[1];
  sums[0] += __shfl_xor_sync(0xffffffffu, given, 2);
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], step);
}
__device__ __forceinline__ int sum_of_lane(int lane) { return lane % 2 * 2 + lane / 2; }

// Base and residual plane of x, and the metadata. Nothing where a value is not finite by now.
template <int kDim>
template <bool kGroups>
__device__ __forceinline__ void PageEncoder<kDim>::encode(int page, float (&x)[2][16]) {
  uint8_t* slot = side_of(page_slot(a_.call.memory, t_, a_.g, page), side(), head_);
  uint8_t* residual = residual_slot(a_.call.memory, t_, a_.g, page, head_);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int at = 2 * pair_ * Shape::kBlocks + block_;  // among the page's blocks of 16
  float scales[2];
#pragma unroll 1
  for (int plane = 0; plane < 2; ++plane) {
    float largest[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 16; ++i) largest[r] = max_nan(largest[r], fabsf(x[r][i]));
    }
    // Magnitudes order as their bits do, with NaN above infinity.
    uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(max_nan(largest[0], largest[1])));
    if (lane == 0) s_.amax[plane][warp] = bits;
    __syncthreads();  // also: the decoded rows' sums are there
    bits = __reduce_max_sync(0xffffffffu, s_.amax[plane][lane % Shape::kWarps]);
    if (bits >= 0x7f800000u) return;
    const bool groups = kGroups && plane == 0 && side().grouped();
    const float scale = groups ? group_page_scale(side().kind, __uint_as_float(bits))
                               : page_scale_of(__uint_as_float(bits));
    (plane == 0 ? scales[0] : scales[1]) = scale;
    const PageDivisor divisor(scale);

    const bool keeps = plane == 0 && side_ == 0;
    if (plane == 1 && side_ == 0) {
      const float mean = column_mean();
      if (threadIdx.x % 2 == 0) s_.columns[threadIdx.x / 2] = mean;
    }
    uint8_t* codes = plane == 0 ? slot + side().codes : residual + side().res_codes;
    uint8_t* block_scales = plane == 0 ? slot + side().scales : residual + side().res_scales;
    const bool stores = plane == 0 || residual != nullptr;
    double sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto keep = [&](int quarter, const float4& v) {
        if (!keeps) return;
        float4& sum = *s_.row_sum(pair_, block_, quarter);
        if (r == 0) {
          sum = v;
        } else {
          const float4 above = sum;
          sum = {above.x + v.x, above.y + v.y, above.z + v.z, above.w + v.w};
        }
      };
      if constexpr (kGroups) {
        if (groups) {
          const SideKind kind = side().kind;
          store_half_group(kind, encode_half_group(kind, x[r], largest[r], scale, s_.facts, keep),
                           at + r * Shape::kBlocks, codes, block_scales);
          add_squares(x[r], sums);
          continue;
        }
      }
      const EncodedBlock out = encode_block(x[r], largest[r], divisor, s_.facts, keep);
      if (stores) {
        reinterpret_cast<uint2*>(codes)[at + r * Shape::kBlocks] = out.codes;
        block_scales[at + r * Shape::kBlocks] = static_cast<uint8_t>(out.scale);
      }
      add_squares(x[r], sums);
    }
    sum_lanes(sums);
    if (lane < 4) s_.squares[plane][sum_of_lane(lane)][warp] = sums[0];
  }
  __syncthreads();
  if (warp == 0) finish(page, scales[0], scales[1]);
}

// The metadata, by the first warp. Lanes 0 to 11 have the four sums of the two errors and of the norm
// of K's mean.
template <int kDim>
__device__ __forceinline__ void PageEncoder<kDim>::finish(int page, float scale, float residual_scale) {
  const int lane = threadIdx.x, kind = lane / 4;
  if (side_ == 0 && lane < Shape::kBlocks) {
    float mean[16];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 m = reinterpret_cast<const float4*>(s_.columns)[q * Shape::kBlocks + lane];
      mean[4 * q] = m.x, mean[4 * q + 1] = m.y, mean[4 * q + 2] = m.z, mean[4 * q + 3] = m.w;
    }
    double sums[4] = {0, 0, 0, 0};
    add_squares(mean, sums);
#pragma unroll
    for (int j = 0; j < 4; ++j) s_.squares[2][j][lane] = sums[j];
  }
  __syncwarp();
  double squares[Shape::kWarps];
#pragma unroll
  for (int i = 0; i < Shape::kWarps; ++i) squares[i] = s_.squares[kind < 3 ? kind : 0][lane % 4][i];
  double sum = tree_sum(squares);
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  const double count = kind < 2 ? static_cast<double>(kPageTokens * kDim) : 1.0;
  const float root = static_cast<float>(sqrt(sum / count));
  PageMeta* meta = meta_of(page_slot(a_.call.memory, t_, a_.g, page), a_.g, head_);
  const bool k = side_ == 0;
  if (lane == 0) {
    (k ? meta->k_scale : meta->v_scale) = scale;
    (k ? meta->k_res_scale : meta->v_res_scale) = residual_scale;
    (k ? meta->k_error : meta->v_error) = root;
    // What the other side would not write.
    if (k && !a_.g.v.layered()) {
      meta->v_scale = meta->v_res_scale = 1;
      meta->v_error = meta->v_error_both = 0;
    }
    if (!k && !a_.g.k.layered()) {
      meta->k_scale = meta->k_res_scale = 1;
      meta->k_error = meta->k_error_both = meta->k_mean_norm = 0;
    }
  } else if (lane == 4) {
    (k ? meta->k_error_both : meta->v_error_both) = root;
  } else if (lane == 8 && k) {
    meta->k_mean_norm = nextafterf(root, INFINITY);  // rounded up, as the CPU does
  }
}

template <int kDim>
template <bool kGroups>
__device__ __forceinline__ bool PageEncoder<kDim>::page(int page, PageWork work, bool reports) {
  float x[2][16];
  open_ = open_slot(a_.call.memory, t_, a_.g, page);
  const int bad = load(page, x);
  const bool full = (page + 1) * kTokens <= length();
  if (side_ == 0 || (kGroups && side().rotated)) {
    rotate(x[0]);
    rotate(x[1]);
  }
  if (side_ == 0) {
    if (work == PageWork::whole && page * kTokens >= first_token()) {
      for (int i = threadIdx.x; i < kDim; i += Shape::kThreads) {
        open_reference(open_)[column_at<kDim>(i)] = f32_to_bf16(s_.reference[i]);
      }
    }
  }
  stage(page, work, x);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    *s_.row_sum(pair_, block_, q) = {x[0][4 * q] + x[1][4 * q], x[0][4 * q + 1] + x[1][4 * q + 1],
                                     x[0][4 * q + 2] + x[1][4 * q + 2], x[0][4 * q + 3] + x[1][4 * q + 3]};
  }
  if (__syncthreads_or(bad)) {
    if (!reports) return false;
    if (threadIdx.x == 0) s_.least = INT32_MAX;
    __syncthreads();
    if (bad) atomicMin(&s_.least, page * kTokens + 2 * pair_ + (bad & 1 ? 0 : 1));
    __syncthreads();
    if (threadIdx.x == 0) report(a_.call.status, side_, sequence_, head_, s_.least);
    return false;
  }
  if (!full) return true;
  center(page, work, x);
  if (work == PageWork::whole) encode<kGroups>(page, x);
  return true;
}

}  // namespace thriftattn::cuda
