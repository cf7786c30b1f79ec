// Says in words what a resolved policy does, one line for each group of equal layers.
#include <fmt/format.h>

#include <algorithm>

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

std::string_view score_words(BlockScore score) {
  switch (score) {
    case BlockScore::mean:
      return "block mean score";
    case BlockScore::oracle:
      return "true mass (oracle)";
    case BlockScore::quest:
      return "bound on q.k (quest; reads all of K for it)";
    case BlockScore::variance:
      return "mean and variance of K (reads all of K for it)";
    case BlockScore::local:
      return "place: the newest";
  }
  return "invalid";
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
    const std::string which = p.budget_pages > 0
                                  ? fmt::format("{} pages", p.budget_pages)
                                  : fmt::format("{:.6g} % of the pages", 100 * p.budget);
    text += fmt::format("; residual kept, read for the {} with the best {}", which,
                        score_words(p.score));
    if (p.sinks > 0 || p.recent > 0) {
      text += fmt::format(" and for the first {} and the last {} tokens", p.sinks, p.recent);
    }
  } else if (p.promote >= 1) {
    text += "; residual kept but never read in decode (promote=1)";
  } else {
    text += fmt::format("; residual kept, read for pages of attention mass above {}", p.promote);
    if (p.max_promoted < 1) {
      text += fmt::format(", at most {:.6g} % of a query's pages", 100 * p.max_promoted);
    }
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
std::string index_list(std::string_view noun, const std::vector<size_t>& layers) {
  std::string text = fmt::format("{}{} ", noun, layers.size() == 1 ? "" : "s");
  for (size_t i = 0; i < layers.size();) {
    size_t j = i;
    while (j + 1 < layers.size() && layers[j + 1] == layers[j] + 1) ++j;
    if (i > 0) text += ", ";
    text += i == j ? fmt::format("{}", layers[i]) : fmt::format("{}-{}", layers[i], layers[j]);
    i = j + 1;
  }
  return text;
}

// Indices of equal policies, by first appearance.
std::vector<std::vector<size_t>> groups_of_equals(const std::vector<LayerPolicy>& policies) {
  std::vector<std::vector<size_t>> groups;
  for (size_t i = 0; i < policies.size(); ++i) {
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const auto& group) {
      return policies[group.front()] == policies[i];
    });
    if (same == groups.end()) {
      groups.push_back({i});
    } else {
      same->push_back(i);
    }
  }
  return groups;
}

}  // namespace

std::string explain(const std::vector<LayerPolicy>& layers) {
  std::string text;
  const auto add = [&](const std::string& where, const LayerPolicy& p) {
    const bool adaptive = is_promotable(p.k_format) || is_promotable(p.v_format);
    text += fmt::format("{}: {}{}\n", where, how_stored(p), adaptive ? how_read(p) : "");
  };
  for (const auto& group : groups_of_equals(layers)) {
    const LayerPolicy& p = layers[group.front()];
    const std::string where = index_list("layer", group);
    if (p.heads.empty()) {
      add(where, p);
      continue;
    }
    for (const auto& heads : groups_of_equals(p.heads)) {
      add(where + ", " + index_list("KV head", heads), p.heads[heads.front()]);
    }
  }
  return text;
}

}  // namespace thriftattn
