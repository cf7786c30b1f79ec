// Attention over a KvCache: out = softmax(q . K^T * softmax_scale [soft-capped]) V over the
// values as stored in the tier that the policy reads, FP32 accumulation.
#pragma once

#include <cstdint>
#include <span>

#include "thriftattn/kv_cache.h"
#include "thriftattn/tensor_view.h"

namespace thriftattn {

// What the queries of a step see of their own step's tokens, and how pages are read.
enum class AttendMode : uint8_t {
  // Prefill: tokens from the step's first page on are read in open form (16 bits); earlier
  // layered pages with base + residual where the residual is held; nothing is skipped.
  prefill,
  // Decode, for any number of queries: every query reads exactly what it would read if its
  // token were decoded alone: pages complete before it in their tier, by the layer's rule,
  // and its own page in open form. `recent` is relative to the query.
  decode,
};

// How products are computed. The values attended to are the same.
enum class AttendMath : uint8_t {
  // BF16 dot products with FP32 sums where the machine has them: q', P and decoded values are
  // rounded to BF16, as in engines of today. FP32 elsewhere, and where K or V is stored in FP32 or
  // FP16.
  fast,
  // FP32 throughout: what `eval` judges caches with.
  f32,
};

struct AttendConfig {
  AttendMode mode = AttendMode::decode;
  AttendMath math = AttendMath::fast;
  float softmax_scale = 0.0f;  // must be set; usually 1/sqrt(head_dim_k)
  float softcap = 0.0f;        // s = softcap * tanh(s / softcap) before masking; 0 = none
  // false: every query sees all tokens of the sequence, the staged ones included. In decode
  // mode each then reads what the step's last token reads. Not with a sliding window.
  bool causal = true;
};

// What attention read and what its rule guarantees. Accumulates over calls (merge of
// (query, KV head) rows); zero it to start anew.
struct AttendStats {
  int64_t rows = 0;              // (query, KV head) pairs
  double bits_read = 0;          // bits a decode kernel reads, summed over rows
  double elements_visible = 0;   // K and V elements visible, summed over rows
  double bits_per_element_sum = 0;  // sum over rows of bits_read / elements_visible
  int64_t pages_visible = 0;     // complete layered pages, over rows
  int64_t pages_promoted = 0;    // of these, read with the residual by the rule
  int64_t pages_skipped = 0;     // of these, V codes not read
  double max_mass_4bit = 0;      // largest mass (over base scores) read in 4 bits
  double max_mass_skipped = 0;   // largest mass skipped
  double sum_mass_4bit = 0;      // per query head: mass read in 4 bits, summed
  double sum_mass_skipped = 0;   // per query head: mass skipped, summed
  double final_mass_4bit = 0;    // the same two sums over the masses after promotion
  double final_mass_skipped = 0;
  double wanted_mass = 0;        // mass above `promote` that was read in 4 bits: the residual is
                                 // dropped, or the cap `max` raised the threshold
  int64_t rows_capped = 0;       // rows whose threshold the cap raised
  int64_t query_heads = 0;       // (query, query head) pairs: divides the sums above
  bool masses_known = true;      // false: some of it ran on a device, which reports no masses

  void merge(const AttendStats& other);
  double bits_read_per_element() const;  // mean over rows
  double promoted_fraction() const;      // of pages_visible
  double skipped_fraction() const;       // of pages_visible
  double capped_fraction() const;        // of rows
};

struct AttendRequest {
  SequenceId sequence = 0;
  int64_t layer = 0;
  AttendConfig config;
  // The last `q.tokens` tokens of the sequence, the staged ones included: query i is token
  // length + staged - q.tokens + i. [tokens][q_heads][head_dim_k]; after RoPE and QK norm.
  TensorView<const float> q;
  TensorView<float> out;         // [tokens][q_heads][head_dim_v]
  TensorView<float> lse;         // optional: [tokens][q_heads][1], natural log
  const float* sink_logits = nullptr;  // optional: [q_heads] learnable sink logits
  AttendStats* stats = nullptr;  // optional: accumulated into
};

// Threaded with oneTBB inside the caller's arena; results do not depend on the threads. All
// requests are checked before anything is written.
void attend(const KvCache& cache, const AttendRequest& request);

// Many requests at once, of any lengths, modes and layers, their work shared out over the threads
// together. Each result has the bits that attend() gives alone. Outputs may not overlap.
void attend_batch(const KvCache& cache, std::span<const AttendRequest> requests);

// The same for one layer, with the queries of all sequences packed along tokens: those of
// sequences[i] are rows cu_seqlens[i] .. cu_seqlens[i + 1] - 1 of q, out and lse.
struct PackedQueries {
  int64_t layer = 0;
  AttendConfig config;
  std::span<const SequenceId> sequences;
  std::span<const int64_t> cu_seqlens;   // sequences.size() + 1 numbers, from 0 to q.tokens
  std::span<const AttendMode> modes;     // one a sequence, in place of config.mode; empty = none
  TensorView<const float> q;
  TensorView<float> out;
  TensorView<float> lse;                 // optional
  const float* sink_logits = nullptr;    // optional
  std::span<AttendStats> stats;          // one a sequence, accumulated into; empty = none
};
void attend_batch(const KvCache& cache, const PackedQueries& batch);

// The same function in plain FP64 loops over the values as stored: the truth of the tests.
void attend_reference(const KvCache& cache, const AttendRequest& request);

}  // namespace thriftattn
