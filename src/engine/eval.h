// Measures policies against a reference on the same tokens: what `thriftattn eval` runs.
//
// All caches advance in lockstep, step by step, and every token attends as it would when it is
// decoded (AttendMode::decode). The logits of a block of positions are compared while they are at
// hand; nothing of vocabulary size is kept.
//
// Scored are the positions i with N/2 <= i < N - 1 of a context of N tokens: position i predicts
// token i + 1, so the last token is fed (the caches hold N tokens) and has nothing to predict.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/device_engine.h"
#include "engine/kl_metrics.h"
#include "engine/needles.h"
#include "engine/transformer.h"
#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

namespace thriftattn {

inline constexpr int64_t kMinEvalContext = 4;

struct EvalProgress {
  std::string_view stage;   // "scoring" or "needles"
  std::string_view policy;  // whose needles; empty while scoring
  int64_t done = 0;         // tokens of this stage
  int64_t total = 0;
};

struct EvalOptions {
  int64_t context = 0;  // N; exactly N tokens are fed
  std::vector<Policy> policies;
  Policy reference;
  int64_t needles = 0;       // 0 = no needle pass
  uint64_t seed = 0;         // of the needles
  int64_t chunk = 512;       // tokens a step; without influence on what is read
  int64_t max_kv_bytes = 0;  // of each cache; 0 = no limit
  Equalizer equalizer;
  std::shared_ptr<DeviceEngine> device;  // of the model; none = the CPU
  TextCodec codec;            // for the needles
  int64_t needle_prefix = 0;  // leading tokens of the text that stay first (beginning of text)
  std::function<void(const EvalProgress&)> progress;
};

// A hidden fact that was answered wrongly.
struct NeedleMiss {
  std::string name;      // "Amber Falcon"
  double depth = 0;      // of its line, 0 to 1 of the context
  std::string expected;  // the code
  std::string answer;    // as decoded
};

struct EvalRow {
  std::string policy;
  int64_t tokens = 0;
  MetricsSummary quality;
  std::optional<double> needle_recall;
  std::vector<NeedleMiss> missed;
  double bits_stored_per_element = 0;  // at the end, from the allocator
  double bits_read_per_element = 0;    // mean over scored positions, layers and KV heads
  double promoted_fraction = 0;        // of the complete layered pages, scored positions
  double skipped_fraction = 0;
  int64_t kv_bytes = 0;
  int64_t kv_bytes_bf16 = 0;
  double seconds = 0;  // of this policy alone: its forward passes and its LM head
  AttendStats attend;  // of the scored positions
};

// Throws Error for a context above the model's, fewer than N tokens, or no policies.
std::vector<EvalRow> evaluate(std::shared_ptr<const Model> model, std::span<const int32_t> tokens,
                              const EvalOptions& options);

}  // namespace thriftattn
