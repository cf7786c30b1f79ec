// What `thriftattn run` says after the answer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/session.h"
#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

namespace thriftattn::cli {

struct RunReport {
  std::string model;
  std::string compute;  // how the dense layers run
  std::string policy;   // its name
  std::vector<LayerPolicy> layers;
  std::string answer;
  std::string stop;  // why it ended
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
std::string run_report_json(const RunReport& report);

}  // namespace thriftattn::cli
