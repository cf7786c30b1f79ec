// One conversation with a model: a cache under a policy, the sequence in it, and what was
// measured while feeding it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "cache/sequence_io.h"
#include "engine/device_engine.h"
#include "engine/transformer.h"
#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

namespace thriftattn {

struct SessionOptions {
  int64_t context = 0;       // tokens the session may hold; 0 = the model's context length
  Equalizer equalizer;       // from load_or_measure_equalizer(); empty = none
  int64_t chunk = 512;       // prefill step; part of the result (docs/formats.md)
  int64_t max_kv_bytes = 0;  // 0 = no limit
  // Asked before each layer of each step; true ends it with Error(cancelled). Finished steps stay.
  std::function<bool()> cancelled = {};
  std::shared_ptr<DeviceEngine> device = {};  // of the same model: compute there; none = the CPU
};

struct PhaseStats {
  int64_t tokens = 0;
  ForwardTimes times;  // seconds; times.total is wall clock
  AttendStats attend;  // summed over the layers

  double tokens_per_second() const { return times.total > 0 ? tokens / times.total : 0.0; }
  void merge(const PhaseStats& other);
};

class Session {
 public:
  using Progress = std::function<void(int64_t done, int64_t total)>;

  Session(std::shared_ptr<const Model> model, const Policy& policy, SessionOptions options = {});

  // Feeds tokens in steps that end at multiples of `chunk` tokens of the sequence, in mode
  // prefill. An Error leaves the finished steps in the sequence (see length()).
  void prefill(std::span<const int32_t> tokens, const Progress& progress = {});
  // Feeds one token in mode decode and returns next_logits().
  const std::vector<float>& decode(int32_t token);
  // Feeds tokens as one step in the given mode; `hidden` [tokens][width] (after the final
  // norm) may be null. What eval builds on: mode decode makes each token read as when decoding.
  void step(std::span<const int32_t> tokens, AttendMode mode, float* hidden);
  // Logits after the last token fed. Throws if there is none, or after truncate().
  const std::vector<float>& next_logits();

  // The LM head of activations that step() gave: out [rows][vocab].
  void logits_of(const float* hidden, int64_t rows, float* out, ForwardTimes* times = nullptr) const;

  // A second session with the same past; pages are shared inside one cache, so sessions made
  // by fork() must be used from one thread at a time.
  Session fork() const;
  void truncate(int64_t length);
  // The sequence and its last activations as bytes, and back into a session that is empty and was
  // made with the same model, policy, equaliser and chunk (prompt_cache.h checks that). On an
  // Error the session is as it was.
  void save(const ByteSink& sink) const;
  void load(int64_t length, const ByteSource& source);
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  const Model& model() const { return *model_; }
  const DeviceEngine* device() const { return options_.device.get(); }
  KvCache& cache() { return *cache_; }
  const KvCache& cache() const { return *cache_; }
  SequenceId sequence() const { return sequence_; }
  int64_t length() const;
  int64_t context() const { return options_.context; }
  int64_t chunk() const { return options_.chunk; }
  const std::vector<LayerPolicy>& policy() const;  // resolved, one a layer

  const PhaseStats& prefill_stats() const { return prefill_stats_; }
  const PhaseStats& decode_stats() const {
    return decode_stats_;
  }  // decode() and step()s in mode decode
  void reset_stats();

 private:
  struct ForkTag {};
  Session(const Session& from, ForkTag);
  void require_room(int64_t tokens) const;
  const std::vector<float>& compute_logits(ForwardTimes* times);

  std::shared_ptr<const Model> model_;
  SessionOptions options_;
  std::shared_ptr<KvCache> cache_;  // of options_.device if there is one
  SequenceId sequence_ = 0;
  std::vector<float> last_hidden_;  // of the last token fed; empty = unknown
  std::vector<float> logits_;       // of last_hidden_; empty = not computed
  PhaseStats prefill_stats_, decode_stats_;
};

}  // namespace thriftattn
