// What `thriftattn run` says after the answer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/session.h"
#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

namespace thriftattn::cli {

// The document of a run: read from the text, or from a file of an earlier run.
struct DocumentReport {
  PhaseStats prefill;  // its own
  int64_t tokens = 0;
  std::string cache_file;  // --prompt-cache; empty = none
  bool loaded = false;     // from cache_file; otherwise kept there
  int64_t cache_bytes = 0;
  double cache_seconds = 0;  // to load or to save
};

struct RunReport {
  std::string model;
  std::string compute;  // how the dense layers run
  std::string device;   // and where, with the kernels of attention; empty = the CPU
  std::string policy;   // its name
  std::vector<LayerPolicy> layers;
  std::string question;  // of an answer in a series
  std::string answer;
  std::string stop;  // why it ended
  int64_t questions = 1;
  DocumentReport document;
  std::string rope_scaling;  // empty = none
  int64_t prompt_tokens = 0;
  int64_t answer_tokens = 0;
  int64_t context = 0;
  int64_t chunk = 0;
  std::string equalizer;
  PhaseStats prefill, decode;
  CacheUsage usage;
  int64_t bf16_bytes = 0;
  double bits_stored_per_element = 0;
};

std::string run_report_text(const RunReport& report);
// One object; on one line if it is one of a series.
std::string run_report_json(const RunReport& report, bool one_line = false);

}  // namespace thriftattn::cli
