// The CUDA backend's low level: append and attention over device memory that the caller owns, on
// the caller's stream. No CUDA header is needed to include this one.
//
// Pages are byte-equal to the CPU's (docs/formats.md), so slots may be copied between a KvCache
// and a device pool as they are. Everything that changes from step to step - lengths, block
// tables, residual ids - is read on the device when the kernels run: a captured graph stays valid
// while they change, within the limits that the plan was made for.
//
//   AttendPlan plan(shape, policy, limits);            // host only: sizes, splits, checks
//   DeviceMemory workspace(plan.workspace_bytes());
//   append(plan, append_call, stream);                 // the step's tokens: staged, full pages sealed
//   attend(plan, attend_call, stream);                 // sees them
//
// append() and attend() allocate nothing, do not synchronise and use no stream but the caller's.
// A launch that fails is thrown as Error by that call. Calls on different workspaces are
// independent, also from several host threads; each call runs on the device that is current in
// its thread, which must be the plan's.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "thriftattn/attention.h"
#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

struct CUstream_st;

namespace thriftattn::cuda {

using Stream = CUstream_st*;  // what cudaStream_t is

// Element type of q, k, v and out.
enum class Element : uint8_t { f32, bf16, fp16 };

struct DeviceInfo {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t memory_total = 0, memory_free = 0;
  int driver_version = 0, runtime_version = 0;  // 1000 * major + 10 * minor
};

// Whether this library was built with the CUDA backend; without, everything below that needs a
// device throws Error(unsupported) saying so.
bool compiled();
// 0 where there is no device or no driver.
int device_count();
// Throws Error(unsupported) without the backend or the device. index -1: the current one.
DeviceInfo device_info(int index = -1);

// Device memory with one owner. Throws Error(out_of_memory) with the bytes asked, held by all
// DeviceMemory of the process on that device, and free on it; nothing is changed then.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(int64_t bytes);  // not initialised
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;

  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  [[maybe_unused]] int device_ = 0;  // without the backend nothing reads it
};

// Asynchronous with respect to the host where the host memory is pinned. stream nullptr is the
// legacy default stream, which only the caller may choose.
void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream);
void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream);
void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream);
void fill(void* to, uint8_t value, int64_t bytes, Stream stream);
void synchronize(Stream stream);

// Bytes of the slots of a layer. Slot i of a pool starts at base + i * bytes (int64).
struct SlotSizes {
  int64_t page = 0;      // all KV heads: base planes, summaries, plain rows; PageLayout::slot_bytes
  int64_t residual = 0;  // of one (page, KV head); 0 = the policy has no residual plane
  int64_t open = 0;      // all KV heads of one open page; 0 = no layered side
};
// Open slot: K rows BF16 [kv_heads][64][head_dim_k], V rows BF16 [kv_heads][64][head_dim_v], K
// reference BF16 [kv_heads][head_dim_k], each only where that side is layered (OpenPage of
// src/cache/sequence_state.h, in this order).
SlotSizes slot_sizes(const LayerShape& shape, const LayerPolicy& policy);

// Device pointers of one layer. Pools are aligned to 64 bytes at least.
struct LayerMemory {
  uint8_t* pages = nullptr;
  uint8_t* residuals = nullptr;      // may be nullptr where no residual id is >= 0
  uint8_t* open = nullptr;           // may be nullptr without layered sides
  const float* equalizer = nullptr;  // [kv_heads][head_dim_k]; nullptr = 1
};

// Device pointers; all may change between graph replays. An id of -1 is "none".
struct BatchTables {
  const int32_t* lengths = nullptr;         // [batch] tokens, this step's included; 0 = idle row
  const int32_t* block_table = nullptr;     // [batch][max_pages] page slots
  const int32_t* residual_table = nullptr;  // [batch][max_pages][kv_heads] residual slots, < 2^30
  const int32_t* open_table = nullptr;      // [batch][open_pages]: page p is open in p % open_pages
  // [batch + 1] first row of each sequence's step in q, k, v and out; nullptr: limits.step_tokens
  // each. A sequence's step holds its last offsets[b + 1] - offsets[b] tokens.
  const int32_t* step_offsets = nullptr;
};

// The largest shapes that a plan serves; the workspace and the grids are sized by them.
struct AttendLimits {
  int64_t batch = 1;
  int64_t max_pages = 0;    // row length of block_table; 64 tokens each
  int64_t step_tokens = 1;  // most tokens of one sequence's step
  int64_t open_pages = 2;   // row length of open_table; >= pages that a step touches
  // How a sequence's pages are shared among blocks depends on the whole batch, so that all are busy;
  // with true on its own length alone, and results are bitwise those of the sequence by itself.
  bool batch_invariant = false;
  // Workspace that prefill may take for pages as FP16 tiles, made once for all query rows; KV heads
  // take turns in it. 0: every tile of query rows expands the pages that it reads.
  int64_t tile_bytes = int64_t{256} << 20;
};

// Launch shapes and workspace for one layer's shape and policy. Immutable; copies are cheap.
class AttendPlan {
 public:
  // Throws Error(unsupported), naming what is required, supported and missing, for a device,
  // head_dim, group or format that no kernel serves. Needs no device memory.
  AttendPlan(const LayerShape& shape, const LayerPolicy& policy, const AttendLimits& limits);

  int64_t workspace_bytes() const;
  // "decode: sm_90a, tile 8 rows x head_dim 128, 4 warps, 48 splits of >= 32 pages, ..."
  std::string explain() const;

  const LayerShape& shape() const;
  const LayerPolicy& policy() const;
  const AttendLimits& limits() const;

  struct State;
  const State& state() const { return *state_; }

 private:
  std::shared_ptr<const State> state_;
};

// Written on the device by append() where an input holds NaN, Inf or a value beyond its format's
// range: the page is not sealed and the step must be rolled back. Copy it back when convenient.
struct AppendStatus {
  int32_t failed = 0;     // how many (sequence, KV head, page) segments
  int32_t side = 0;       // of one of them: 0 = K, 1 = V
  int32_t sequence = 0;   // index in the batch
  int32_t kv_head = 0;
  int32_t token = 0;      // position in the sequence
  int32_t reserved[3] = {};
};
// Throws Error(non_finite) with layer, head and token where `status` says so.
void throw_if_failed(const AppendStatus& status, int64_t layer, const LayerPolicy& policy);

// Stages the last tokens of every sequence: transforms and stores them in the open pages (layered
// sides) or rows (plain sides), and encodes each page that became full: base, residual, summary
// and metadata, the same bytes as the CPU. Needs a block table id for every full page and, where
// the layer has plain sides, for the last page; a residual id for every full page and KV head.
struct AppendCall {
  LayerMemory memory;
  BatchTables tables;
  const void* k = nullptr;  // [rows][kv_heads][head_dim_k], after RoPE and QK norm
  const void* v = nullptr;  // [rows][kv_heads][head_dim_v]
  Element element = Element::bf16;
  int64_t k_token_stride = 0, v_token_stride = 0;  // in elements; 0 = dense; heads are dense
  AppendStatus* status = nullptr;  // device, zeroed by the caller before the first step
  void* workspace = nullptr;       // device, plan.workspace_bytes()
};
void append(const AttendPlan& plan, const AppendCall& call, Stream stream);

// What attend() decided for one (query position, page, KV head): for tests and statistics.
enum class Decision : uint8_t { none = 0, base = 1, full = 2, skip = 3, open = 4, plain = 5 };

struct AttendCall {
  LayerMemory memory;
  BatchTables tables;
  AttendConfig config;      // math is ignored: q', P in FP16 (or BF16 pairs), sums in FP32
  const void* q = nullptr;  // [rows][q_heads][head_dim_k]
  Element q_element = Element::bf16;
  void* out = nullptr;      // [rows][q_heads][head_dim_v]; every row of the step is written
  Element out_element = Element::bf16;
  int64_t q_token_stride = 0, out_token_stride = 0;  // in elements; 0 = dense; heads are dense
  float* lse = nullptr;                // optional: [rows][q_heads], natural log
  const float* sink_logits = nullptr;  // optional: [q_heads], device
  void* workspace = nullptr;           // device, plan.workspace_bytes(); undefined content is fine
  // Optional, device: [batch][step_tokens][max_pages][kv_heads] Decision, and the floor of the LSE
  // (natural log, base scores) that the decisions used: [batch][step_tokens][q_heads]. Where nothing is
  // decided by mass (prefill mode; plain pages in steps of more than 16 tokens) no floor is written.
  uint8_t* decisions = nullptr;
  float* lse_floor = nullptr;
};
void attend(const AttendPlan& plan, const AttendCall& call, Stream stream);

}  // namespace thriftattn::cuda
