// The lines of --version (version_text.h).
#include "cli/version_text.h"

#include <dnnl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/cpu_info.h"
#include "engine/dense.h"
#include "engine/prompt_cache.h"
#include "formats/format_info.h"
#include "thriftattn/version.h"

namespace thriftattn::cli {

std::string version_text() {
  const SimdTargets simd = simd_targets();
  const dnnl_version_t* dnnl = dnnl_version();
  return fmt::format(
      "thriftattn {} ({})\n"
      "SIMD         {} runs; available: {}\n"
      "BF16         {}\n"
      "oneDNN       {}.{}.{}\n"
      "page format  {}\n"
      "prompt cache {}",
      version(), git_commit(), simd.chosen, fmt::join(simd.available, ", "),
      bf16_is_native() ? "native products of the CPU" : "not native: widened, products in FP32",
      dnnl->major, dnnl->minor, dnnl->patch, kPageFormatVersion, kPromptCacheVersion);
}

}  // namespace thriftattn::cli
