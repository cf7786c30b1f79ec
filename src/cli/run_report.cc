// The summary of a run as text and as JSON (run_report.h).
#include "cli/run_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "engine/eval_report.h"

namespace thriftattn::cli {
namespace {

using nlohmann::ordered_json;

struct Plane {
  std::string_view name;
  int64_t bytes;
};

std::vector<Plane> planes(const CacheUsage& u) {
  return {{"base", u.base_bytes},   {"residual", u.residual_bytes}, {"summary", u.summary_bytes},
          {"plain", u.plain_bytes}, {"open", u.open_bytes},         {"table", u.table_bytes}};
}

bool has_layered(const RunReport& r) {
  const auto layered = [](const LayerPolicy& p) { return is_layered(p.k_format); };
  return std::any_of(r.layers.begin(), r.layers.end(), [&](const LayerPolicy& layer) {
    return layered(layer) || std::any_of(layer.heads.begin(), layer.heads.end(), layered);
  });
}

double per_head(double sum, const AttendStats& a) {
  return a.query_heads > 0 ? sum / static_cast<double>(a.query_heads) : 0.0;
}

// Three digits, rounded up: a bound must not look tighter than it is.
std::string mass(double x) {
  if (!(x > 0)) return "0";
  const double unit = std::pow(10.0, std::floor(std::log10(x)) - 2);
  return fmt::format("{:.3g}", std::ceil(x / unit * (1 - 1e-12)) * unit);
}

std::string phase_text(std::string_view name, const PhaseStats& p) {
  return fmt::format("{} {:.1f} tokens/s ({} in {:.2f} s: attention {:.2f}, dense {:.2f})", name,
                     p.tokens_per_second(), p.tokens, p.times.total, p.times.attention,
                     p.times.dense);
}

std::string guarantee_text(const RunReport& r) {
  const AttendStats& a = r.decode.attend;
  if (!a.masses_known) {
    return "what the rule says: a skipped page held at most `skip` of a query head's attention, a page "
           "read in 4 bits at most `promote` if its residual is held (rule=budget promises nothing of "
           "it); the masses themselves are measured by --device cpu alone";
  }
  std::string text = fmt::format(
      "a page read in 4 bits held at most {} of a query head's attention, a skipped one at most "
      "{}; together they held {} and {} on average",
      mass(a.max_mass_4bit), mass(a.max_mass_skipped), mass(per_head(a.sum_mass_4bit, a)),
      mass(per_head(a.sum_mass_skipped, a)));
  if (a.wanted_mass > 0) {
    text += fmt::format(
        "; {} of it lay in pages whose residual is dropped{}, so the bound on promotion does not "
        "hold there",
        mass(per_head(a.wanted_mass, a)), a.rows_capped > 0 ? " or that the cap leaves out" : "");
  }
  if (a.rows_capped > 0) {
    text += fmt::format("; the cap (max) raised the threshold of {:.1f} % of the queries and heads",
                        100 * a.capped_fraction());
  }
  return text;
}

std::string document_text(const DocumentReport& d) {
  if (d.cache_file.empty()) return fmt::format("{} tokens", d.tokens);
  return d.loaded ? fmt::format("{} tokens loaded from {} in {:.2f} s ({})", d.tokens, d.cache_file,
                                d.cache_seconds, human_bytes(d.cache_bytes))
                  : fmt::format("{} tokens read in {:.2f} s, kept in {} ({}, {:.2f} s)", d.tokens,
                                d.prefill.times.total, d.cache_file, human_bytes(d.cache_bytes),
                                d.cache_seconds);
}

ordered_json document_json(const DocumentReport& d) {
  ordered_json all = {{"tokens", d.tokens}, {"seconds", d.prefill.times.total}};
  if (!d.cache_file.empty()) {
    all["prompt_cache"] = {{"file", d.cache_file},
                           {"loaded", d.loaded},
                           {"bytes", d.cache_bytes},
                           {"seconds", d.cache_seconds}};
  }
  return all;
}

ordered_json phase_json(const PhaseStats& p) {
  return {{"tokens", p.tokens},
          {"seconds", p.times.total},
          {"tokens_per_second", p.tokens_per_second()},
          {"attention_seconds", p.times.attention},
          {"dense_seconds", p.times.dense}};
}

}  // namespace

std::string run_report_text(const RunReport& r) {
  std::string text;
  const auto line = [&](std::string_view name, const std::string& value) {
    text += fmt::format("{:<10}{}\n", name, value);
  };
  const std::string why =
      r.questions == 1 ? r.stop : fmt::format("{} questions; the last: {}", r.questions, r.stop);
  line("tokens", fmt::format("{} prompt, {} answer ({}); context {}, chunk {}", r.prompt_tokens,
                             r.answer_tokens, why, r.context, r.chunk));
  if (r.document.tokens > 0) line("document", document_text(r.document));
  line("prefill", phase_text("", r.prefill).substr(1));
  if (r.decode.tokens > 0) line("decode", phase_text("", r.decode).substr(1));
  std::string held;
  for (const Plane& plane : planes(r.usage)) {
    if (plane.bytes == 0) continue;
    held += (held.empty() ? "" : ", ") + std::string(plane.name) + " " + human_bytes(plane.bytes);
  }
  line("KV cache", fmt::format("{} held, {:.1f} % of BF16's {} ({})", human_bytes(r.usage.total()),
                               100 * static_cast<double>(r.usage.total()) /
                                   static_cast<double>(std::max<int64_t>(r.bf16_bytes, 1)),
                               human_bytes(r.bf16_bytes), held));
  const AttendStats& a = r.decode.attend;
  std::string bits = fmt::format("{:.2f} stored per K/V element", r.bits_stored_per_element);
  if (a.rows > 0)
    bits += fmt::format(", {:.2f} read by a decoded token", a.bits_read_per_element());
  line("bits", bits + " (BF16: 16)");
  if (a.rows > 0 && has_layered(r)) {
    line("pages", fmt::format("{:.1f} % promoted, {:.1f} % skipped while decoding",
                              100 * a.promoted_fraction(), 100 * a.skipped_fraction()));
    line("guarantee", guarantee_text(r));
  }
  line("equaliser", r.equalizer);
  if (!r.rope_scaling.empty()) line("RoPE", r.rope_scaling);
  line("policy", fmt::format("{}: {}", r.policy, explain(r.layers)));
  while (text.ends_with("\n\n")) text.pop_back();
  line("model", r.model + "; " + r.compute);
  if (!r.device.empty()) line("device", r.device);
  return text;
}

std::string run_report_json(const RunReport& r, bool one_line) {
  const AttendStats& a = r.decode.attend;
  const bool decoded = a.rows > 0;
  const auto if_decoded = [&](double x) { return decoded ? ordered_json(x) : ordered_json(); };
  const auto if_known = [&](double x) {
    return decoded && a.masses_known ? ordered_json(x) : ordered_json();
  };
  ordered_json kv = ordered_json::object();
  for (const Plane& plane : planes(r.usage)) kv[std::string(plane.name) + "_bytes"] = plane.bytes;
  ordered_json all = ordered_json::object();
  if (!r.question.empty()) all["question"] = r.question;
  all.update({
      {"answer", r.answer},
      {"stop", r.stop},
      {"policy", r.policy},
      {"model", r.model},
      {"compute", r.compute},
      {"device", r.device.empty() ? "cpu" : r.device},
      {"prompt_tokens", r.prompt_tokens},
      {"answer_tokens", r.answer_tokens},
      {"context", r.context},
      {"chunk", r.chunk},
      {"equalizer", r.equalizer},
      {"rope_scaling", r.rope_scaling.empty() ? "none" : r.rope_scaling},
      {"document", document_json(r.document)},
      {"prefill", phase_json(r.prefill)},
      {"decode", phase_json(r.decode)},
      {"kv_bytes", r.usage.total()},
      {"kv_bytes_bf16", r.bf16_bytes},
      {"kv_planes", kv},
      {"bits_stored_per_element", r.bits_stored_per_element},
      {"bits_read_per_element", if_decoded(a.bits_read_per_element())},
      {"promoted_fraction", if_decoded(a.promoted_fraction())},
      {"skipped_fraction", if_decoded(a.skipped_fraction())},
      {"guarantee",
       {{"max_mass_4bit", if_known(a.max_mass_4bit)},
        {"max_mass_skipped", if_known(a.max_mass_skipped)},
        {"mean_mass_4bit", if_known(per_head(a.sum_mass_4bit, a))},
        {"mean_mass_skipped", if_known(per_head(a.sum_mass_skipped, a))},
        {"mean_final_mass_4bit", if_known(per_head(a.final_mass_4bit, a))},
        {"mean_final_mass_skipped", if_known(per_head(a.final_mass_skipped, a))},
        {"mean_wanted_mass", if_known(per_head(a.wanted_mass, a))},
        {"capped_fraction", if_decoded(a.capped_fraction())}}},
  });
  // A model can emit bytes that are not UTF-8.
  return all.dump(one_line ? -1 : 2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace thriftattn::cli
