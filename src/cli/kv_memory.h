// --kv-memory: whether a prompt and its answer fit, before anything is read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cache/memory_plan.h"
#include "engine/model_config.h"
#include "thriftattn/policy.h"

namespace thriftattn::cli {

struct KvMemoryCheck {
  const ModelConfig& config;
  const std::vector<LayerPolicy>& policy;
  std::string policy_name;
  MemoryRequest request;
  int64_t max_bytes = 0;  // 0 = no limit
};

// Error that says what is needed, what is allowed, and what would fit: how many tokens under this
// policy, and which presets.
void require_kv_memory(const KvMemoryCheck& check);

}  // namespace thriftattn::cli
