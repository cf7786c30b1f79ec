// The checks of attention requests (request.h): every refusal names the values.
#include "attend/request.h"

#include <fmt/format.h>

#include <cmath>

#include "base/tensor_check.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, "attend: " + message);
}

void check_config(const AttendConfig& config) {
  if (config.mode != AttendMode::prefill && config.mode != AttendMode::decode) {
    fail(fmt::format("mode {} is neither prefill nor decode", static_cast<int>(config.mode)));
  }
  if (!(std::isfinite(config.softmax_scale) && config.softmax_scale > 0)) {
    fail(fmt::format("softmax_scale = {}; it is usually 1/sqrt(head_dim)", config.softmax_scale));
  }
  if (!(std::isfinite(config.softcap) && config.softcap >= 0)) {
    fail(fmt::format("softcap = {}; it is a positive number, or 0 for none", config.softcap));
  }
}

void check_tensors(const AttendRequest& r, const LayerShape& shape) {
  const int64_t n = r.q.tokens;
  if (n < 0) fail(fmt::format("{} queries", n));
  check_view("attend", named("q", r.q), {n, shape.q_heads, shape.head_dim_k});
  check_view("attend", named("out", r.out), {n, shape.q_heads, shape.head_dim_v});
  if (r.lse.data != nullptr) {
    // Only whether rows are apart depends on head_dim, so a view without one is one number wide.
    TensorView<float> lse = r.lse;
    if (lse.head_dim == 0) lse.head_dim = 1;
    check_view("attend", named("lse", lse), {n, shape.q_heads, 1});
  }
  if (r.sink_logits != nullptr) {
    for (int64_t h = 0; h < shape.q_heads; ++h) {
      if (std::isfinite(r.sink_logits[h])) continue;
      fail(fmt::format("sink_logits[{}] = {}; they are numbers, and a null pointer means none", h,
                       r.sink_logits[h]));
    }
  }
}

// The queries' tokens, and the pages that must still be open for them.
void check_positions(const AttendRequest& r, const LayerView& view) {
  const int64_t n = r.q.tokens;
  if (n > view.length()) {
    fail(fmt::format("{} queries, but the sequence holds {} tokens", n, view.length()));
  }
  const int64_t first = view.length() - n;
  if (r.config.mode == AttendMode::prefill && first < view.committed()) {
    fail(fmt::format("prefill of {} queries, but the open step has {} tokens", n,
                     view.length() - view.committed()));
  }
  const int64_t window = view.store().shape.window;
  if (!r.config.causal && window > 0) {
    throw Error(ErrorCode::unsupported,
                fmt::format("attend: causal = false on layer {}, which has a sliding window of {}; "
                            "required: a layer without a window; supported: causal = true with any "
                            "window; missing: windows around a query that sees later tokens",
                            r.layer, window));
  }
  if (!view.store().layout.any_layered() || n == 0) return;
  for (int64_t page = Visibility(view, r).open_from(first); page * kPageTokens < view.length();
       ++page) {
    if (view.open(page) != nullptr) continue;
    fail(
        fmt::format("the page of token {} is sealed; attend before commit, within the step that "
                    "appended the queries' tokens",
                    page * kPageTokens));
  }
}

void check_queries(const AttendRequest& r, int64_t first_token) {
  for (int64_t t = 0; t < r.q.tokens; ++t) {
    for (int64_t h = 0; h < r.q.heads; ++h) {
      const float* row = r.q.row(t, h);
      bool finite = true;
      for (int64_t d = 0; d < r.q.head_dim; ++d) finite &= std::isfinite(row[d]);
      if (finite) continue;
      throw Error(
          ErrorCode::non_finite,
          fmt::format("q of layer {}, head {}, token {} holds NaN or Inf: check the model's "
                      "weights",
                      r.layer, h, first_token + t));
    }
  }
}

std::vector<LayerView> views_of(const KvCache& cache, const AttendRequest& r) {
  const KvCache::Impl& impl = cache.impl();
  if (impl.device != nullptr) {
    throw Error(ErrorCode::unsupported,
                "attend: this cache is on a device, whose kernels attend to it; make a cache without "
                "a device for queries in CPU memory");
  }
  const Sequence& seq = impl.sequence(r.sequence);
  const auto layers = static_cast<int64_t>(impl.config.layers.size());
  if (r.layer < 0 || r.layer >= layers) {
    fail(fmt::format("layer {} is not in 0..{}", r.layer, layers - 1));
  }
  std::vector<LayerView> views;
  for (const size_t s : impl.stores_of(r.layer)) {
    views.emplace_back(impl.layers[s], seq.layers[s], seq.length);
  }
  return views;
}

std::vector<LayerView> checked_request(const KvCache& cache, const AttendRequest& r) {
  std::vector<LayerView> views = views_of(cache, r);
  check_config(r.config);
  check_tensors(r, cache.config().layers[static_cast<size_t>(r.layer)]);
  for (const LayerView& view : views) check_positions(r, view);
  check_queries(r, views.front().length() - r.q.tokens);
  return views;
}

}  // namespace

std::vector<std::vector<LayerView>> checked_views(const KvCache& cache,
                                                  std::span<const AttendRequest> requests) {
  std::vector<std::vector<LayerView>> all;
  std::vector<NamedView> tensors;
  for (size_t i = 0; i < requests.size(); ++i) {
    const AttendRequest& r = requests[i];
    try {
      all.push_back(checked_request(cache, r));
    } catch (const Error& error) {
      if (requests.size() == 1) throw;
      throw Error(error.code(), fmt::format("request {}: {}", i, error.what()));
    }
    const std::string of = requests.size() > 1 ? fmt::format(" of request {}", i) : "";
    tensors.push_back(named("q" + of, r.q));
    tensors.push_back(named("out" + of, r.out));
    TensorView<float> lse = r.lse;
    lse.head_dim = 1;
    if (lse.data != nullptr) tensors.push_back(named("lse" + of, lse));
    if (r.sink_logits != nullptr) {
      const int64_t heads = r.q.heads;
      tensors.push_back(
          named("sink_logits" + of, TensorView<const float>::dense(r.sink_logits, 1, heads, 1)));
    }
  }
  check_disjoint("attend", tensors);
  return all;
}

std::vector<AttendRequest> requests_of(const KvCache& cache, const PackedQueries& batch) {
  const auto fail_batch = [](const std::string& message) { fail("packed batch: " + message); };
  const size_t n = batch.sequences.size();
  const auto& cu = batch.cu_seqlens;
  if (cu.size() != n + 1) {
    fail_batch(fmt::format("{} sequences need {} cu_seqlens, there are {}", n, n + 1, cu.size()));
  }
  if (cu.front() != 0 || cu.back() != batch.q.tokens) {
    fail_batch(fmt::format("cu_seqlens run from {} to {}, they must run from 0 to q's {} tokens",
                           cu.front(), cu.back(), batch.q.tokens));
  }
  for (size_t i = 0; i < n; ++i) {
    if (cu[i] <= cu[i + 1]) continue;
    fail_batch(fmt::format("cu_seqlens[{}] = {} is more than cu_seqlens[{}] = {}", i, cu[i], i + 1,
                           cu[i + 1]));
  }
  const auto check_count = [&](const char* name, size_t count) {
    if (count == 0 || count == n) return;
    fail_batch(fmt::format("{} has {} entries for {} sequences: give one a sequence, or none", name,
                           count, n));
  };
  check_count("modes", batch.modes.size());
  check_count("stats", batch.stats.size());
  const auto layers = static_cast<int64_t>(cache.config().layers.size());
  if (batch.layer < 0 || batch.layer >= layers) {
    fail_batch(fmt::format("layer {} is not in 0..{}", batch.layer, layers - 1));
  }
  // Before rows are taken of them: the whole tensors.
  const LayerShape& shape = cache.config().layers[static_cast<size_t>(batch.layer)];
  check_tensors({.layer = batch.layer,
                 .q = batch.q,
                 .out = batch.out,
                 .lse = batch.lse,
                 .sink_logits = batch.sink_logits},
                shape);

  std::vector<AttendRequest> requests;
  for (size_t i = 0; i < n; ++i) {
    const auto rows = [&](auto view) {
      if (view.data != nullptr) view.data += cu[i] * view.token_stride;
      view.tokens = cu[i + 1] - cu[i];
      return view;
    };
    AttendRequest r{.sequence = batch.sequences[i], .layer = batch.layer, .config = batch.config};
    if (!batch.modes.empty()) r.config.mode = batch.modes[i];
    r.q = rows(batch.q);
    r.out = rows(batch.out);
    if (batch.lse.data != nullptr) r.lse = rows(batch.lse);
    r.sink_logits = batch.sink_logits;
    if (!batch.stats.empty()) r.stats = &batch.stats[i];
    requests.push_back(r);
  }
  return requests;
}

}  // namespace thriftattn
