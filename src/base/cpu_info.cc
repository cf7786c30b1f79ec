// SIMD targets (cpu_info.h).
#include "base/cpu_info.h"

#include <hwy/targets.h>

#include <cstdint>

namespace thriftattn {

SimdTargets simd_targets() {
  // As HWY_DYNAMIC_DISPATCH chooses: the lowest bit is the best target.
  SimdTargets targets;
  const auto usable = static_cast<uint64_t>(hwy::SupportedTargets()) & uint64_t{HWY_TARGETS};
  for (uint64_t left = usable; left != 0; left &= left - 1) {
    const uint64_t lowest = left & (~left + 1);
    targets.available.emplace_back(hwy::TargetName(static_cast<int64_t>(lowest)));
  }
  targets.chosen = targets.available.empty() ? "none" : targets.available.front();
  return targets;
}

}  // namespace thriftattn
