// The bits that a page costs by how it is read, from the CPU's own formula (device_ops.h).
#include <cmath>

#include "engine/device_ops.h"

namespace thriftattn::device {

ReadCosts read_costs(const PageLayout& layout) {
  ReadCosts costs;
  const auto set = [&](cuda::Decision decision, const auto& bits) {
    const auto heads = static_cast<double>(layout.kv_heads);
    const auto at = static_cast<size_t>(decision);
    costs.fixed[at] = std::llround(heads * bits(0));
    costs.per_token[at] = std::llround(heads * (bits(1) - bits(0)));
  };
  const auto page = [&](PageRead how) {
    return [&layout, how](int64_t tokens) { return page_read_bits(layout, how, tokens); };
  };
  set(cuda::Decision::base, page(PageRead::base));
  set(cuda::Decision::full, page(PageRead::full));
  set(cuda::Decision::skip, page(PageRead::skip));
  set(cuda::Decision::plain, page(PageRead::base));
  set(cuda::Decision::open, [&](int64_t tokens) { return open_read_bits(layout, tokens); });
  return costs;
}

}  // namespace thriftattn::device
