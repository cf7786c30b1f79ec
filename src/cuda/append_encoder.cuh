// One side of a KV head of a sequence, done page by page by a block of threads: what the steps of
// append_rows.cuh, append_planes.cuh and append_page.cuh share. Included by append.cuh alone.
//
// A thread has 16 columns of two neighbouring rows: whole blocks for the codec, the first level of
// the mean's tree, and neighbours of the rotation in its registers or in lanes beside it. So a page
// is read once, and nothing of it passes through memory but sums of columns.
#pragma once

#include "cuda/append_block.cuh"
#include "cuda/device_tables.cuh"

namespace thriftattn::cuda {

struct AppendArgs {
  Geometry g;
  AttendLimits limits;
  AppendCall call;
  float rotation_factor = 1;
  int32_t runs = 1;         // runs that a step's pages are cut into, if none is longer than kMaxRun
  int32_t k_units = 1, v_units = 1;  // blocks for each KV head of each side
  int32_t v_pages = 1;      // of a block of a layered V
  int32_t repairs = 0;      // append_repair follows
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
  alignas(16) float columns[kDim];  // what centring takes off
  alignas(16) float decoded[kDim];  // mean of the decoded K'
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

__device__ inline void report(AppendStatus* status, int side, int sequence, int head, int token) {
  if (status == nullptr) return;
  if (atomicAdd(&status->failed, 1) != 0) return;
  status->side = side;
  status->sequence = sequence;
  status->kv_head = head;
  status->token = token;
}

// A side of a KV head of a sequence, K or V: what is the same for its pages.
template <int kDim, bool kIsK>
class PageEncoder {
 public:
  using Shape = PageShape<kDim>;

  __device__ PageEncoder(const AppendArgs& args, PageShared<kDim>& shared, int head, int sequence)
      : a_(args), s_(shared), head_(head), sequence_(sequence),
        t_(sequence_tables(args.call.tables, args.limits, args.g, sequence)),
        pair_(threadIdx.x / Shape::kBlocks), block_(threadIdx.x % Shape::kBlocks) {
    const AppendCall& call = args.call;
    const int64_t bytes = call.element == Element::f32 ? 4 : 2;
    int64_t stride = kIsK ? call.k_token_stride : call.v_token_stride;
    if (stride == 0) stride = int64_t{args.g.kv_heads} * kDim;
    stride_ = stride * bytes;
    const auto* from = static_cast<const uint8_t*>(kIsK ? call.k : call.v);
    aligned_ = ((reinterpret_cast<uint64_t>(from) | static_cast<uint64_t>(stride_)) & 15) == 0;
    input_ = from + (t_.first_row - first_token() + 2 * pair_) * stride_ +
             (head * kDim + block_ * kColumns) * bytes;
  }

  // What all pages share; before the first of them, and before the barrier of K's first reference. The
  // input of pages up to `last` is asked for ahead.
  __device__ void begin(int last) {
    last_ = last;
    if (threadIdx.x < 128) s_.facts[threadIdx.x] = kScaleTable.facts[threadIdx.x];
    const float* equalizer = a_.call.memory.equalizer;
    if (kIsK && equalizer != nullptr && threadIdx.x < kDim) {
      s_.equalizer[threadIdx.x] = equalizer[head_ * kDim + column_at<kDim>(threadIdx.x)];
    }
  }
  // Behind the last of them.
  __device__ void end() {
    __syncthreads();
    finish();
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
    if (const int i = threadIdx.x; i < kDim) {
      s_.reference[i] = from == nullptr ? 0.0f : bf16_to_f32(from[column_at<kDim>(i)]);
    }
    __syncthreads();
  }
  __device__ void zero_reference() {
    if (threadIdx.x < kDim) s_.reference[threadIdx.x] = 0.0f;
    __syncthreads();
  }
  // Whether 16 bytes of the page's reference are those of the mean that the page before has stored.
  __device__ bool reference_holds(int page, int vector) const {
    const uint4 used = reinterpret_cast<const uint4*>(open_reference(page))[vector];
    const uint4 mean = reinterpret_cast<const uint4*>(stored_mean(page - 1))[vector];
    return used.x == mean.x && used.y == mean.y && used.z == mean.z && used.w == mean.w;
  }

  // Asks for the step's rows of a page.
  __device__ void prefetch(int page) const {
    const int token = page * kTokens + 2 * pair_;
    if (token < first_token() || token + 1 >= length()) return;
    const uint8_t* from = input_ + int64_t{page} * kTokens * stride_;
    prefetch_l2(from);
    prefetch_l2(from + stride_);
  }

  // Does one page; of K, shared memory then has the reference of the page behind it. False where a
  // value was refused, and K's references behind it mean nothing. kGroups: with the code for planes in
  // groups of 32.
  template <bool kGroups>
  __device__ bool page(int page, bool reports);
  // Of K, the reference of the page behind this one alone.
  __device__ void reference_page(int page);

 private:
  __device__ const SideGeometry& side() const { return kIsK ? a_.g.k : a_.g.v; }
  __device__ uint16_t* mean_of(uint8_t* slot) const {
    return reinterpret_cast<uint16_t*>(side_of(slot, side(), head_) + side().mean);
  }
  __device__ uint16_t* stored_mean(int page) const {
    return mean_of(page_slot(a_.call.memory, t_, a_.g, page));
  }
  __device__ uint16_t* open_reference(uint8_t* open) const {
    return reinterpret_cast<uint16_t*>(open + a_.g.open_reference) + head_ * kDim;
  }
  __device__ uint16_t* open_reference(int page) const {
    return open_reference(open_slot(a_.call.memory, t_, a_.g, page));
  }
  // Slots of the page at hand.
  __device__ uint8_t* open() const { return a_.call.memory.open + open_id_ * a_.g.open_bytes; }
  __device__ uint8_t* slot() const { return a_.call.memory.pages + slot_id_ * a_.g.slot_bytes; }
  // This thread's words of a row of the open page.
  __device__ uint4* open_row(int row) const {
    return reinterpret_cast<uint4*>(open() + (kIsK ? 0 : a_.g.open_v) +
                                    ((int64_t{head_} * kTokens + row) * kDim + block_ * kColumns) * 2);
  }

  __device__ bool is_new(int token) const { return token >= first_token() && token < length(); }
  __device__ void load(int page, uint32_t (&words)[2][8], float (&x)[2][16]);
  __device__ int refused(const uint32_t (&words)[2][8], const float (&x)[2][16]) const;
  __device__ void rotate(float (&x)[16]) const;
  __device__ void take_reference(float (&x)[2][16]) const;
  __device__ void stage(int page, float (&x)[2][16]) const;
  __device__ void stage_as_it_is(int page, uint32_t (&words)[2][8], float (&x)[2][16]) const;
  __device__ void sum_pairs(const float (&x)[2][16]);
  __device__ float column_mean() const;
  __device__ float center_column(uint16_t& stored);
  __device__ void center(float (&x)[2][16]);
  template <bool kGroups>
  __device__ void encode(float (&x)[2][16]);
  __device__ void finish();

  const AppendArgs& a_;
  PageShared<kDim>& s_;
  const int head_, sequence_;
  const SequenceTables t_;
  const int pair_, block_;
  const uint8_t* input_;  // the thread's first row and column, of a page 0
  int64_t stride_;        // bytes from token to token
  bool aligned_;
  bool whole_ = false;  // all rows of the page at hand are new
  int last_ = -1;       // page up to which the input is asked for ahead
  int32_t open_id_ = 0, slot_id_ = 0, residual_id_ = -1;  // of the page at hand
  int pending_ = -1;  // slot of the page whose metadata is to be written, with these scales
  float scale_ = 1, residual_scale_ = 1;
};

}  // namespace thriftattn::cuda
