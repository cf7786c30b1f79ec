// Says in words what a resolved policy does, one line for each group of equal layers.
#include <fmt/format.h>

#include "formats/format_info.h"
#include "policy/fields.h"
#include "thriftattn/policy.h"

namespace thriftattn {
namespace {

// "K rotated, centred and equalised".
std::string transforms(std::string_view side, const std::vector<std::string_view>& done) {
  if (done.empty()) return fmt::format("{} as it is", side);
  std::string text = fmt::format("{} ", side);
  for (size_t i = 0; i < done.size(); ++i) {
    if (i > 0) text += i + 1 == done.size() ? " and " : ", ";
    text += done[i];
  }
  return text;
}

std::string how_stored(const LayerPolicy& p) {
  std::string text =
      p.k_format == p.v_format
          ? fmt::format("K and V {}", format_info(p.k_format).words)
          : fmt::format("K {}, V {}", format_info(p.k_format).words, format_info(p.v_format).words);
  if (is_layered(p.k_format)) {
    std::vector<std::string_view> done;
    if (p.equalize) done.push_back("equalised if the model has an equaliser");
    if (p.rotate) done.push_back("rotated");
    if (p.center) done.push_back("centred by page");
    text += "; " + transforms("K", done);
  }
  if (is_layered(p.v_format)) {
    std::vector<std::string_view> done;
    if (p.rotate && format_info(p.v_format).rotate_v) done.push_back("rotated");
    if (p.center) done.push_back("centred by page");
    text += "; " + transforms("V", done);
  }
  return text;
}

// Reads of pages whose residual the policy decides on.
std::string how_read(const LayerPolicy& p) {
  std::string text;
  if (p.residency == Residency::dropped) {
    text += fmt::format(
        "; sealed: residual kept and read for the first {} and the last {} tokens, then dropped "
        "(mass above {} is reported as wanted)",
        p.sinks, p.recent, p.promote);
  } else if (p.rule == PromoteRule::budget) {
    text += fmt::format("; residual kept, read for the {:.6g} % of the pages with the best {}",
                        100 * p.budget,
                        p.score == BlockScore::mean ? "block mean score" : "true mass (oracle)");
    if (p.sinks > 0 || p.recent > 0) {
      text += fmt::format(" and for the first {} and the last {} tokens", p.sinks, p.recent);
    }
  } else if (p.promote >= 1) {
    text += "; residual kept but never read in decode (promote=1)";
  } else {
    text += fmt::format("; residual kept, read for pages of attention mass above {}", p.promote);
  }
  if (p.residency == Residency::device && p.rule == PromoteRule::mass &&
      (p.sinks > 0 || p.recent > 0)) {
    text += fmt::format(" (sinks={}, recent={} change nothing: no residual is dropped)", p.sinks,
                        p.recent);
  }
  if (is_promotable(p.v_format)) {
    text += p.skip > 0 ? fmt::format("; V codes not read for pages of mass up to {}", p.skip)
                       : "; no page is skipped";
  }
  return text;
}

// "layers 0-4, 6-10", from sorted indices.
std::string layer_list(const std::vector<size_t>& layers) {
  std::string text = layers.size() == 1 ? "layer " : "layers ";
  for (size_t i = 0; i < layers.size();) {
    size_t j = i;
    while (j + 1 < layers.size() && layers[j + 1] == layers[j] + 1) ++j;
    if (i > 0) text += ", ";
    text += i == j ? fmt::format("{}", layers[i]) : fmt::format("{}-{}", layers[i], layers[j]);
    i = j + 1;
  }
  return text;
}

}  // namespace

std::string explain(const std::vector<LayerPolicy>& layers) {
  std::vector<std::vector<size_t>> groups;  // of equal layers, by first appearance
  for (size_t l = 0; l < layers.size(); ++l) {
    bool placed = false;
    for (auto& group : groups) {
      placed = layers[group.front()] == layers[l];
      if (placed) {
        group.push_back(l);
        break;
      }
    }
    if (!placed) groups.push_back({l});
  }
  std::string text;
  for (const auto& group : groups) {
    const LayerPolicy& p = layers[group.front()];
    const bool adaptive = is_promotable(p.k_format) || is_promotable(p.v_format);
    text +=
        fmt::format("{}: {}{}\n", layer_list(group), how_stored(p), adaptive ? how_read(p) : "");
  }
  return text;
}

}  // namespace thriftattn
