// Any text is a policy or an Error; a policy survives the round trip through JSON and resolves,
// or is refused, for any model.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "policy/policy_list.h"
#include "thriftattn/error.h"
#include "thriftattn/policy.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void check_message(const thriftattn::Error& error) {
  const std::string_view text = error.what();
  require(!text.empty() && text.find('\n') == std::string_view::npos);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace thriftattn;
  if (size < 2) return 0;
  // The first two bytes are the model; files are out of the fuzzer's reach.
  const PolicyContext context = {
      .layers = data[0] % 50,
      .sliding_window = std::vector<bool>(data[0] % 50, data[1] & 1),
      .kv_heads = std::vector<int64_t>(data[1] & 2 ? 0 : data[0] % 50, 1 + (data[1] >> 4)),
      .context_tokens = data[1] & 4 ? 0 : 100'000};
  const std::string_view text(reinterpret_cast<const char*>(data + 2), size - 2);
  require(!split_policy_list(text).empty());
  if (text.find('@') != std::string_view::npos) return 0;

  Policy policy;
  try {
    policy = parse_policy(text);
  } catch (const Error& error) {
    check_message(error);
    return 0;
  }
  require(parse_policy(policy_to_json(policy)) == policy);
  try {
    const auto layers = resolve(policy, context);
    require(layers.size() == static_cast<size_t>(context.layers));
    const auto require_sense = [](const LayerPolicy& p) {
      require(p.promote > 0 && p.promote <= 1 && p.skip >= 0 && p.skip < p.promote);
      require(p.budget >= 0 && p.budget <= 1 && p.sinks >= 0 && p.recent >= 0);
      require(p.max_promoted >= 0 && p.max_promoted <= 1 && p.budget_pages >= 0);
      require(p.budget == 0 || p.budget_pages == 0);
    };
    for (size_t l = 0; l < layers.size(); ++l) {
      require_sense(layers[l]);
      for (const LayerPolicy& p : layers[l].heads) require_sense(p);
      require(layers[l].heads.empty() ||
              layers[l].heads.size() == static_cast<size_t>(context.kv_heads[l]));
    }
    require(!explain(layers).empty());
  } catch (const Error& error) {
    check_message(error);
  }
  return 0;
}
