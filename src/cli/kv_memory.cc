// What fits into --kv-memory (kv_memory.h).
#include "cli/kv_memory.h"

#include <fmt/format.h>

#include "engine/eval_report.h"
#include "thriftattn/error.h"

namespace thriftattn::cli {
namespace {

std::string presets_that_fit(const KvMemoryCheck& check) {
  std::string fitting;
  for (const std::string& name : preset_names()) {
    try {
      const auto policy = resolve(preset(name), policy_context(check.config));
      if (policy == check.policy) continue;
      const int64_t bytes =
          plan_memory(layer_shapes(check.config), policy, check.request).peak_bytes;
      if (bytes > check.max_bytes) continue;
      fitting += fmt::format("{}{} ({})", fitting.empty() ? "" : ", ", name, human_bytes(bytes));
    } catch (const Error&) {
      continue;  // a preset that this model's heads cannot have
    }
  }
  return fitting.empty() ? "no preset holds all" : "all fits under " + fitting;
}

}  // namespace

void require_kv_memory(const KvMemoryCheck& check) {
  if (check.max_bytes == 0) return;
  const std::vector<LayerShape> shapes = layer_shapes(check.config);
  const MemoryPlan plan = plan_memory(shapes, check.policy, check.request);
  if (plan.peak_bytes <= check.max_bytes) return;
  const MemoryRequest& r = check.request;
  throw Error(
      ErrorCode::out_of_memory,
      fmt::format("the KV cache of {} tokens ({} of the prompt, {} of the answer) takes {} "
                  "under {}, --kv-memory allows {} ({} bytes): {} tokens fit under this "
                  "policy, and {}; shorten the document, lower -n or raise --kv-memory",
                  r.tokens(), r.document + r.question, r.answer, human_bytes(plan.peak_bytes),
                  check.policy_name, human_bytes(check.max_bytes), check.max_bytes,
                  tokens_that_fit(shapes, check.policy, r, check.max_bytes),
                  presets_that_fit(check)));
}

}  // namespace thriftattn::cli
