// The mixed-precision KV cache: sequences of 64-token pages in planes (docs/formats.md).
//
// One step adds tokens to one sequence in every layer:
//
//   cache.begin_step(seq, n);                  // n new tokens
//   for each layer: cache.append(seq, layer, k, v);   // FP32, after RoPE and QK norm
//                   attend(cache, {...});      // sees the staged tokens of this layer
//   cache.commit(seq);                         // or rollback(seq): nothing is left behind
//
// A cache is externally synchronised: attend() may run beside attend(), not beside the
// functions that change it. Distinct caches are independent.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "thriftattn/policy.h"
#include "thriftattn/tensor_view.h"

namespace thriftattn {

inline constexpr int64_t kPageTokens = 64;

struct LayerShape {
  int64_t kv_heads = 0;
  int64_t q_heads = 0;     // a multiple of kv_heads
  int64_t head_dim_k = 0;  // multiple of 16 (q8_0 and q4_0: of 32), 32 to 256
  int64_t head_dim_v = 0;  // the same; need not equal head_dim_k
  int64_t window = 0;      // sliding window in tokens, the query's own included; 0 = none

  bool operator==(const LayerShape&) const = default;
};

// Per layer: s[kv_head * head_dim_k + d] > 0, FP32, geometric mean 1 per head (DESIGN
// section 2). Empty = 1 everywhere.
struct Equalizer {
  std::vector<std::vector<float>> layers;
};

struct KvCacheConfig {
  std::vector<LayerShape> layers;
  std::vector<LayerPolicy> policy;  // one per layer, from resolve()
  Equalizer equalizer;
  int64_t max_bytes = 0;       // limit on what the allocator holds; 0 = none
  bool poison_free = false;    // fill freed pages with NaN patterns (tests)
};

using SequenceId = int64_t;

// From the allocator: what is held now, over all sequences; a shared page counts once.
struct CacheUsage {
  int64_t base_bytes = 0;      // codes and scales of base planes
  int64_t residual_bytes = 0;  // codes and scales of residual planes
  int64_t summary_bytes = 0;   // means, norms, page scales
  int64_t plain_bytes = 0;     // pages of f32, bf16, fp16, fp8, q8_0, q4_0
  int64_t open_bytes = 0;      // open pages and tokens staged by a step
  int64_t table_bytes = 0;     // block tables
  int64_t pages = 0;
  int64_t residual_pages = 0;  // (page, KV head) pairs whose residual is held
  int64_t reencoded_pages = 0; // pages encoded again after a truncation into them
  int64_t total() const {
    return base_bytes + residual_bytes + summary_bytes + plain_bytes + open_bytes + table_bytes;
  }
};

class KvCache {
 public:
  explicit KvCache(KvCacheConfig config);
  ~KvCache();
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;

  const KvCacheConfig& config() const;

  SequenceId create();
  SequenceId fork(SequenceId seq);  // shares full pages; no step may be open
  void free(SequenceId seq);
  void truncate(SequenceId seq, int64_t length);  // 0 <= length <= length(seq)
  int64_t length(SequenceId seq) const;           // committed tokens

  // One step at a time per sequence. append() takes [n][kv_heads][head_dim] FP32; the error
  // for a NaN or Inf names layer, head and token, and leaves the step open for rollback().
  void begin_step(SequenceId seq, int64_t tokens);
  void append(SequenceId seq, int64_t layer, TensorView<const float> k, TensorView<const float> v);
  void commit(SequenceId seq);             // every layer must have been appended
  void commit(SequenceId seq, int64_t n);  // keep only the first n tokens of the step
  void rollback(SequenceId seq);

  CacheUsage usage() const;
  // Bytes a BF16 cache of the same sequences would hold.
  int64_t bf16_bytes() const;
  // 8 * usage().total() over the number of K and V elements held.
  double bits_stored_per_element() const;

  struct Impl;
  explicit KvCache(std::unique_ptr<Impl> impl);  // for the backends
  const Impl& impl() const { return *impl_; }
  Impl& impl() { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace thriftattn
