// CPU caches copied to device pools, attention there, and FP64 attention over the values as stored
// that reads every page as the device says it did.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/float_convert.h"
#include "cache/kv_cache_impl.h"
#include "cache/page_codec.h"
#include "formats/row_codec.h"
#include "support/attention_case.h"
#include "thriftattn/cuda.h"
#include "thriftattn/error.h"

namespace thriftattn::testing {

#define SKIP_WITHOUT_DEVICE()                                                               \
  if (!cuda::compiled()) GTEST_SKIP() << "this build has no CUDA backend";                  \
  if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device: run `make gpu-test` on a GPU machine"

inline constexpr uint8_t kPoison = 0xff;  // NaN in FP32, BF16, E4M3

template <class T>
cuda::DeviceMemory to_device(const std::vector<T>& host) {
  cuda::DeviceMemory memory(std::max<int64_t>(16, static_cast<int64_t>(host.size() * sizeof(T))));
  if (!host.empty()) {
    cuda::copy_to_device(memory.data(), host.data(), static_cast<int64_t>(host.size() * sizeof(T)),
                         nullptr);
  }
  return memory;
}

template <class T>
std::vector<T> to_host(const cuda::DeviceMemory& memory, size_t count) {
  std::vector<T> host(count);
  cuda::copy_to_host(host.data(), memory.data(), static_cast<int64_t>(count * sizeof(T)), nullptr);
  cuda::synchronize(nullptr);
  return host;
}

// Of a row's error against FP64 over the values as stored: q and P are FP16 on a device.
inline constexpr double kTightCuda = 2.5e-3;

inline LayerPolicy mix(Format k, Format v, LayerPolicy base = layered_policy(1.0, 0.0)) {
  base.k_format = k;
  base.v_format = v;
  return base;
}

inline CaseOptions decode_options(LayerPolicy policy, int64_t length, int64_t queries = 1) {
  CaseOptions o;
  o.shape = {.kv_heads = 2, .q_heads = 8, .head_dim_k = 128, .head_dim_v = 128};
  o.policy = policy;
  o.length = length;
  o.queries = queries;
  o.equalizer = true;
  return o;
}

// One layer of several sequences on the device.
class DeviceCase {
 public:
  // All cases have the shape and policy of the first; each has an open step.
  explicit DeviceCase(std::vector<CaseOptions> options, int64_t spare_pages = 3);

  struct Result {
    std::vector<float> out, lse, floor;
    std::vector<uint8_t> decisions;
  };
  Result attend();
  // For the timing and graph tests: everything but q and the outputs.
  cuda::AttendCall call();
  // Another plan: workspace for prefill's tiles, 0 for none.
  void plan_with(int64_t tile_bytes, bool batch_invariant = false);
  // Queries go to the device in BF16 from here on, without loss: for cases whose queries are BF16 numbers.
  void narrow_queries();
  // Moves the pages `slots` slots up in a pool as much larger.
  void move_pages(int64_t slots);
  // Puts every page, residual and open page into another slot, where the pools and tables are: what a
  // captured graph has to follow.
  void reverse_slots();
  Result read() const;

  // FP64 over the values as stored, with the device's decisions; out and natural-log LSE of the
  // scores as read, and of base scores; and the floor of the latter that the kernels compute.
  struct Truth {
    std::vector<float> out, lse, base_lse, floor;
    std::vector<std::vector<double>> mass;  // [sequence][((i * pages) + page) * kv_heads + head]
  };
  Truth truth(const Result& result) const;
  void check(const std::string& what, double bound);
  void compare(const Result& result, const Truth& truth, const std::string& what, double bound) const;
  // 20 runs give the same bits, and equal sequences of the batch too: all cases must be equal.
  void check_repeats();
  // Decisions against the rule: what they follow from, and the guarantee.
  void check_rule(const std::string& what, int64_t* promoted, int64_t* skipped);

  const LayerShape& shape() const { return options_.front().shape; }
  const LayerPolicy& policy() const { return options_.front().policy; }
  AttentionCase& host(size_t i) { return *cases_[i]; }
  const cuda::AttendPlan& plan() const { return *plan_; }
  std::vector<int32_t>& lengths() { return lengths_; }
  cuda::DeviceMemory& device_lengths() { return d_lengths_; }
  int64_t max_pages() const { return max_pages_; }
  int64_t queries() const { return options_.front().queries; }
  bool has_rule() const { return options_.front().mode == AttendMode::decode; }

 private:
  std::vector<CaseOptions> options_;
  std::vector<std::unique_ptr<AttentionCase>> cases_;
  int64_t max_pages_ = 0, open_pages_ = 2;
  std::unique_ptr<cuda::AttendPlan> plan_;
  cuda::Element q_element_ = cuda::Element::f32;
  std::vector<int32_t> lengths_, host_blocks_;
  cuda::DeviceMemory pages_, residuals_, open_, equalizer_, blocks_, residual_ids_, open_ids_,
      d_lengths_, q_, out_, lse_, floor_, decisions_, sinks_, workspace_;
};

inline DeviceCase::DeviceCase(std::vector<CaseOptions> options, int64_t spare_pages)
    : options_(std::move(options)) {
  const CaseOptions& first = options_.front();
  std::vector<float> q, sinks;
  for (const CaseOptions& o : options_) {
    cases_.push_back(std::make_unique<AttentionCase>(o));
    max_pages_ = std::max(max_pages_, (o.length + o.queries - 1) / kPageTokens + 1);
    std::vector<float> out;
    const AttendRequest r = cases_.back()->request(out);
    q.insert(q.end(), r.q.data, r.q.data + o.queries * o.shape.q_heads * o.shape.head_dim_k);
    if (r.sink_logits) sinks.assign(r.sink_logits, r.sink_logits + o.shape.q_heads);
  }
  max_pages_ += 2;  // rows of the tables are longer than any sequence
  open_pages_ = (first.queries + 62) / kPageTokens + 1;
  const auto batch = static_cast<int64_t>(options_.size());
  const cuda::SlotSizes sizes = cuda::slot_sizes(first.shape, first.policy);
  const int64_t heads = first.shape.kv_heads;
  // Shuffled ids, unused slots poisoned, ids of what is not there -1.
  std::mt19937 rng(7);
  const int64_t slots = batch * max_pages_ + spare_pages;
  const auto shuffled = [&](int64_t n) {
    std::vector<int32_t> ids(static_cast<size_t>(n));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    std::shuffle(ids.begin(), ids.end(), rng);
    return ids;
  };
  const auto page_ids = shuffled(slots), residual_ids = shuffled(slots * heads),
             open_ids = shuffled(batch * open_pages_ + 2);
  std::vector<uint8_t> pages(static_cast<size_t>(slots * sizes.page), kPoison);
  std::vector<uint8_t> residuals(static_cast<size_t>(slots * heads * sizes.residual), kPoison);
  std::vector<uint8_t> open(open_ids.size() * static_cast<size_t>(sizes.open), kPoison);
  std::vector<int32_t> blocks(static_cast<size_t>(batch * max_pages_), -1);
  std::vector<int32_t> residual_table(blocks.size() * static_cast<size_t>(heads), -1);
  std::vector<int32_t> open_table(static_cast<size_t>(batch * open_pages_), -1);
  size_t next_page = 0, next_residual = 0, next_open = 0;
  std::vector<float> equalizer;
  for (int64_t b = 0; b < batch; ++b) {
    AttentionCase& c = *cases_[static_cast<size_t>(b)];
    const LayerStore& store = c.cache().impl().layers[0];
    const Sequence& seq = c.cache().impl().sequence(c.sequence());
    const LayerView view(store, seq.layers[0], seq.length);
    equalizer = store.equalizer;
    lengths_.push_back(static_cast<int32_t>(view.length()));
    const int64_t count = (view.length() + kPageTokens - 1) / kPageTokens;
    for (int64_t p = 0; p < count; ++p) {
      if (const uint8_t* from = view.head(p, 0).k) {
        const int32_t id = page_ids[next_page++];
        blocks[static_cast<size_t>(b * max_pages_ + p)] = id;
        std::memcpy(&pages[static_cast<size_t>(id * sizes.page)], from,
                    static_cast<size_t>(sizes.page));
      }
      for (int64_t h = 0; h < heads; ++h) {
        if (const uint8_t* from = view.residual(p, h)) {
          const int32_t id = residual_ids[next_residual++];
          residual_table[static_cast<size_t>((b * max_pages_ + p) * heads + h)] = id;
          std::memcpy(&residuals[static_cast<size_t>(id * sizes.residual)], from,
                      static_cast<size_t>(sizes.residual));
        }
      }
      if (const OpenPage* o = view.open(p)) {
        const int32_t id = open_ids[next_open++];
        open_table[static_cast<size_t>(b * open_pages_ + p % open_pages_)] = id;
        uint8_t* to = &open[static_cast<size_t>(id * sizes.open)];
        const int64_t held = std::min(kPageTokens, view.length() - p * kPageTokens);
        // Rows that do not exist yet stay poisoned.
        const auto copy = [&](const std::vector<uint16_t>& from, int64_t dim) {
          for (int64_t h = 0; h < heads && !from.empty(); ++h) {
            std::memcpy(to + h * kPageTokens * dim * 2, &from[static_cast<size_t>(h * kPageTokens * dim)],
                        static_cast<size_t>(held * dim * 2));
          }
          to += from.size() * 2;
        };
        copy(o->k, first.shape.head_dim_k);
        copy(o->v, first.shape.head_dim_v);
        std::memcpy(to, o->k_reference.data(), o->k_reference.size() * 2);
      }
    }
  }
  pages_ = to_device(pages);
  residuals_ = to_device(residuals);
  open_ = to_device(open);
  if (!equalizer.empty()) equalizer_ = to_device(equalizer);
  if (!sinks.empty()) sinks_ = to_device(sinks);
  blocks_ = to_device(blocks);
  host_blocks_ = blocks;
  residual_ids_ = to_device(residual_table);
  open_ids_ = to_device(open_table);
  d_lengths_ = to_device(lengths_);
  q_ = to_device(q);
  const int64_t rows = batch * first.queries * first.shape.q_heads;
  out_ = cuda::DeviceMemory(rows * first.shape.head_dim_v * 4);
  lse_ = cuda::DeviceMemory(rows * 4);
  floor_ = cuda::DeviceMemory(rows * 4);
  decisions_ = cuda::DeviceMemory(batch * first.queries * max_pages_ * heads);
  cuda::fill(decisions_.data(), 0, decisions_.bytes(), nullptr);  // pages that no query sees stay so
  plan_with(cuda::AttendLimits{}.tile_bytes);
}

inline void DeviceCase::plan_with(int64_t tile_bytes, bool batch_invariant) {
  plan_ = std::make_unique<cuda::AttendPlan>(
      shape(), policy(),
      cuda::AttendLimits{.batch = static_cast<int64_t>(cases_.size()), .max_pages = max_pages_,
                         .step_tokens = queries(), .open_pages = open_pages_,
                         .batch_invariant = batch_invariant, .tile_bytes = tile_bytes});
  workspace_ = cuda::DeviceMemory(plan_->workspace_bytes());
  cuda::fill(workspace_.data(), kPoison, workspace_.bytes(), nullptr);
  cuda::synchronize(nullptr);
}

inline void DeviceCase::narrow_queries() {
  const std::vector<float> wide = to_host<float>(q_, static_cast<size_t>(q_.bytes() / 4));
  std::vector<uint16_t> narrow(wide.size());
  for (size_t i = 0; i < narrow.size(); ++i) {
    narrow[i] = f32_to_bf16(wide[i]);
    ASSERT_EQ(bf16_to_f32(narrow[i]), wide[i]) << i;
  }
  q_ = to_device(narrow);
  q_element_ = cuda::Element::bf16;
}

inline void DeviceCase::move_pages(int64_t slots) {
  const int64_t bytes = slots * cuda::slot_sizes(shape(), policy()).page;
  cuda::DeviceMemory larger(pages_.bytes() + bytes);
  cuda::copy_on_device(larger.as<uint8_t>() + bytes, pages_.data(), pages_.bytes(), nullptr);
  cuda::synchronize(nullptr);
  pages_ = std::move(larger);
  for (int32_t& id : host_blocks_) id += id >= 0 ? static_cast<int32_t>(slots) : 0;
  blocks_ = to_device(host_blocks_);
}

inline void DeviceCase::reverse_slots() {
  const cuda::SlotSizes sizes = cuda::slot_sizes(shape(), policy());
  const auto reverse = [](cuda::DeviceMemory& pool, int64_t slot, cuda::DeviceMemory& table) {
    if (slot == 0) return;
    const int64_t slots = pool.bytes() / slot;
    const auto from = to_host<uint8_t>(pool, static_cast<size_t>(slots * slot));
    std::vector<uint8_t> to(from.size());
    for (int64_t i = 0; i < slots; ++i) {
      std::copy_n(from.begin() + i * slot, slot, to.begin() + (slots - 1 - i) * slot);
    }
    auto ids = to_host<int32_t>(table, static_cast<size_t>(table.bytes() / 4));
    for (int32_t& id : ids) id = id < 0 ? id : static_cast<int32_t>(slots) - 1 - id;
    cuda::copy_to_device(pool.data(), to.data(), static_cast<int64_t>(to.size()), nullptr);
    cuda::copy_to_device(table.data(), ids.data(), table.bytes(), nullptr);
    cuda::synchronize(nullptr);
  };
  reverse(pages_, sizes.page, blocks_);
  reverse(residuals_, sizes.residual, residual_ids_);
  reverse(open_, sizes.open, open_ids_);
}

inline cuda::AttendCall DeviceCase::call() {
  cuda::AttendCall c;
  c.memory = {.pages = pages_.as<uint8_t>(), .residuals = residuals_.as<uint8_t>(),
              .open = open_.as<uint8_t>(), .equalizer = equalizer_.as<float>()};
  c.tables = {.lengths = d_lengths_.as<int32_t>(), .block_table = blocks_.as<int32_t>(),
              .residual_table = residual_ids_.as<int32_t>(), .open_table = open_ids_.as<int32_t>()};
  std::vector<float> out;
  c.config = cases_.front()->request(out).config;
  c.q = q_.data();
  c.q_element = q_element_;
  c.out = out_.data();
  c.out_element = cuda::Element::f32;
  c.lse = lse_.as<float>();
  c.sink_logits = sinks_.as<float>();
  c.workspace = workspace_.data();
  c.decisions = decisions_.as<uint8_t>();
  c.lse_floor = floor_.as<float>();
  return c;
}

inline DeviceCase::Result DeviceCase::attend() {
  cuda::fill(out_.data(), kPoison, out_.bytes(), nullptr);
  cuda::fill(lse_.data(), kPoison, lse_.bytes(), nullptr);
  cuda::fill(decisions_.data(), 0, decisions_.bytes(), nullptr);
  cuda::attend(*plan_, call(), nullptr);
  return read();
}

inline DeviceCase::Result DeviceCase::read() const {
  Result r;
  r.out = to_host<float>(out_, static_cast<size_t>(out_.bytes() / 4));
  r.lse = to_host<float>(lse_, static_cast<size_t>(lse_.bytes() / 4));
  r.floor = to_host<float>(floor_, static_cast<size_t>(floor_.bytes() / 4));
  r.decisions = to_host<uint8_t>(decisions_, static_cast<size_t>(decisions_.bytes()));
  return r;
}

// K or V of one page for one KV head.
struct PageTruth {
  std::vector<float> base, residual;
  std::vector<double> mean;
};

inline PageTruth load_page(const LayerView& view, bool is_k, int64_t page, int64_t head, bool open) {
  const LayerStore& store = view.store();
  const SideLayout& side = is_k ? store.layout.k : store.layout.v;
  const int64_t dim = side.dim, held = std::min(kPageTokens, view.length() - page * kPageTokens);
  PageTruth t;
  t.base.assign(static_cast<size_t>(kPageTokens * dim), 0.0f);
  t.mean.assign(static_cast<size_t>(dim), 0.0);
  const PageHead at = view.head(page, head);
  if (!side.layered) {
    decode_rows_scalar(side.format, store.layout.start(side, at) + side.rows, side.row_bytes, held, dim, t.base.data(), dim);
  } else if (open) {
    const OpenPage& o = *view.open(page);
    const uint16_t* rows = (is_k ? o.k : o.v).data() + head * kPageTokens * dim;
    for (int64_t i = 0; i < held * dim; ++i) t.base[static_cast<size_t>(i)] = bf16_to_f32(rows[i]);
    for (int64_t d = 0; d < dim && is_k; ++d) {
      t.mean[static_cast<size_t>(d)] = bf16_to_f32(o.k_reference[static_cast<size_t>(head * dim + d)]);
    }
  } else {
    decode_base(store.layout, side, at, t.base.data());
    const auto* mean = reinterpret_cast<const uint16_t*>(store.layout.start(side, at) + side.mean);
    for (int64_t d = 0; d < dim; ++d) t.mean[static_cast<size_t>(d)] = bf16_to_f32(mean[d]);
    t.residual.assign(t.base.size(), 0.0f);
    if (const uint8_t* residual = view.residual(page, head)) {
      decode_residual(store.layout, side, at, residual, t.residual.data());
    }
  }
  return t;
}

// The normalised transform, block by block.
inline std::vector<double> hadamard(const std::vector<double>& x) {
  const auto dim = static_cast<int64_t>(x.size()), n = dim & -dim;
  std::vector<double> y(x.size(), 0.0);
  for (int64_t u = 0; u < dim; ++u) {
    for (int64_t w = 0; w < n; ++w) {
      const bool minus = __builtin_popcountll(static_cast<uint64_t>((u % n) & w)) % 2 == 1;
      y[static_cast<size_t>(u)] += (minus ? -1.0 : 1.0) * x[static_cast<size_t>(u / n * n + w)];
    }
    y[static_cast<size_t>(u)] /= std::sqrt(static_cast<double>(n));
  }
  return y;
}

inline DeviceCase::Truth DeviceCase::truth(const Result& result) const {
  Truth truth;
  const LayerShape& shape = options_.front().shape;
  const int64_t group = shape.q_heads / shape.kv_heads;
  for (size_t b = 0; b < cases_.size(); ++b) {
    AttentionCase& c = *cases_[b];
    const LayerStore& store = c.cache().impl().layers[0];
    const Sequence& seq = c.cache().impl().sequence(c.sequence());
    const LayerView view(store, seq.layers[0], seq.length);
    std::vector<float> scratch;
    const AttendRequest r = c.request(scratch);
    const int64_t dim = store.layout.k.dim, queries = r.q.tokens;
    truth.mass.emplace_back(static_cast<size_t>(queries * max_pages_ * shape.kv_heads), 0.0);
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t position = view.length() - queries + i;
      const int64_t begin = shape.window > 0 ? std::max<int64_t>(0, position + 1 - shape.window) : 0;
      const int64_t end = r.config.causal ? position + 1 : view.length();
      const int64_t first = begin / kPageTokens, last = (end - 1) / kPageTokens;
      for (int64_t h = 0; h < shape.q_heads; ++h) {
        const int64_t kv = h / group;
        std::vector<float> q(r.q.row(i, h), r.q.row(i, h) + dim);
        if (store.layout.k.layered) {
          std::vector<double> x(q.begin(), q.end());
          for (int64_t d = 0; d < dim && !store.equalizer.empty(); ++d) {
            x[static_cast<size_t>(d)] /= store.equalizer[static_cast<size_t>(kv * dim + d)];
          }
          if (store.layout.k.rotated) x = hadamard(x);
          q.assign(x.begin(), x.end());
        }
        // Scores as read, and over base planes.
        std::vector<double> s, s_base, s_floor;
        double norm = 0;
        for (float x : q) norm += static_cast<double>(x) * x;
        norm = std::sqrt(norm);
        const auto cap = [&](double v) {
          return r.config.softcap > 0 ? r.config.softcap * std::tanh(v / r.config.softcap) : v;
        };
        std::vector<PageTruth> v;
        std::vector<cuda::Decision> how;
        for (int64_t p = first; p <= last; ++p) {
          const auto d = static_cast<cuda::Decision>(
              result.decisions[(((b * static_cast<size_t>(queries)) + static_cast<size_t>(i)) *
                                    static_cast<size_t>(max_pages_) +
                                static_cast<size_t>(p)) *
                                   static_cast<size_t>(shape.kv_heads) +
                               static_cast<size_t>(kv)]);
          EXPECT_NE(d, cuda::Decision::none) << "page " << p << " was not visited";
          how.push_back(d);
          const bool open = d == cuda::Decision::open;
          const PageTruth k = load_page(view, true, p, kv, open);
          v.push_back(load_page(view, false, p, kv, open));
          double offset = 0;
          for (int64_t e = 0; e < dim; ++e) offset += static_cast<double>(q[static_cast<size_t>(e)]) * k.mean[static_cast<size_t>(e)];
          const bool exact = p == first || p == last;
          if (!exact && store.layout.k.layered && r.config.softcap == 0) {
            const auto* meta = reinterpret_cast<const PageMeta*>(view.head(p, kv).k + store.layout.meta);
            s_floor.push_back(std::log(64.0) + r.config.softmax_scale * (offset - norm * meta->k_mean_norm));
          }
          for (int64_t t = 0; t < kPageTokens; ++t) {
            const int64_t token = p * kPageTokens + t;
            double dot = offset, res = 0;
            for (int64_t e = 0; e < dim; ++e) {
              const auto at = static_cast<size_t>(t * dim + e);
              dot += static_cast<double>(q[static_cast<size_t>(e)]) * k.base[at];
              if (!k.residual.empty()) res += static_cast<double>(q[static_cast<size_t>(e)]) * k.residual[at];
            }
            const bool visible = token >= begin && token < end;
            s_base.push_back(visible ? cap(dot * r.config.softmax_scale) : -INFINITY);
            if (exact) s_floor.push_back(s_base.back());
            if (d == cuda::Decision::full) dot += res;
            s.push_back(visible ? cap(dot * r.config.softmax_scale) : -INFINITY);
          }
        }
        const auto lse_of = [&](const std::vector<double>& x) {
          double top = r.sink_logits ? r.sink_logits[h] : -INFINITY, sum = 0;
          for (double y : x) top = std::max(top, y);
          for (double y : x) sum += std::exp(y - top);
          if (r.sink_logits) sum += std::exp(r.sink_logits[h] - top);
          return top + std::log(sum);
        };
        const double lse = lse_of(s), base_lse = lse_of(s_base);
        truth.lse.push_back(static_cast<float>(lse));
        truth.base_lse.push_back(static_cast<float>(base_lse));
        truth.floor.push_back(static_cast<float>(lse_of(s_floor)));
        const int64_t dv = store.layout.v.dim;
        std::vector<double> out(static_cast<size_t>(dv), 0.0);
        for (size_t p = 0; p < v.size(); ++p) {
          double mass = 0;
          for (int64_t t = 0; t < kPageTokens; ++t) {
            const size_t at = p * kPageTokens + static_cast<size_t>(t);
            mass += std::exp(s_base[at] - base_lse);
            const double weight = std::exp(s[at] - lse);
            if (weight == 0) continue;
            for (int64_t e = 0; e < dv; ++e) {
              const auto x = static_cast<size_t>(t * dv + e);
              double value = v[p].mean[static_cast<size_t>(e)];
              if (how[p] != cuda::Decision::skip) value += v[p].base[x];
              if (how[p] == cuda::Decision::full && !v[p].residual.empty()) value += v[p].residual[x];
              out[static_cast<size_t>(e)] += weight * value;
            }
          }
          double& m = truth.mass[b][static_cast<size_t>(
              (i * max_pages_ + first + static_cast<int64_t>(p)) * shape.kv_heads + kv)];
          m = std::max(m, mass);
        }
        if (store.layout.v.rotated) out = hadamard(out);
        for (double x : out) truth.out.push_back(static_cast<float>(x));
      }
    }
  }
  return truth;
}

inline void DeviceCase::check(const std::string& what, double bound) {
  const Result r = attend();
  compare(r, truth(r), what, bound);
}

inline void DeviceCase::compare(const Result& r, const Truth& t, const std::string& what,
                                double bound) const {
  EXPECT_LT(row_error(r.out, t.out, shape().head_dim_v), bound) << what;
  ASSERT_EQ(r.lse.size(), t.lse.size());
  double worst = 0;
  for (size_t i = 0; i < r.lse.size(); ++i) {
    worst = std::max(worst, std::fabs(static_cast<double>(r.lse[i]) - t.lse[i]) /
                                (1.0 + std::fabs(t.lse[i]) * 0.1));
  }
  EXPECT_LT(worst, bound) << what << ": LSE";
  // Plain pages are read by attend_prefill in long steps of decode mode too, which makes no floor.
  const bool layered = is_layered(policy().k_format) || is_layered(policy().v_format);
  if (!has_rule() || (!layered && queries() > 16)) return;
  ASSERT_EQ(r.floor.size(), t.floor.size());
  double worst_floor = 0;
  for (size_t i = 0; i < r.floor.size(); ++i) {
    // NaN is no small difference.
    const double difference = std::fabs(static_cast<double>(r.floor[i]) - t.floor[i]) /
                              (1.0 + std::fabs(static_cast<double>(t.floor[i])) * 0.1);
    if (!(difference <= worst_floor)) worst_floor = difference;
  }
  EXPECT_LT(worst_floor, 2e-4) << what << ": the floor of the LSE";
}

inline void DeviceCase::check_repeats() {
  const Result first = attend();
  for (int run = 1; run < 20; ++run) {
    const Result again = attend();
    ASSERT_EQ(std::memcmp(first.out.data(), again.out.data(), first.out.size() * 4), 0) << run;
    ASSERT_EQ(std::memcmp(first.lse.data(), again.lse.data(), first.lse.size() * 4), 0) << run;
  }
  const size_t last = cases_.size() - 1, row = first.out.size() / cases_.size();
  EXPECT_EQ(std::memcmp(&first.out[0], &first.out[last * row], row * 4), 0);
}

inline void DeviceCase::check_rule(const std::string& what, int64_t* promoted, int64_t* skipped) {
  const Result r = attend();
  const Truth t = truth(r);
  const LayerShape& s = shape();
  for (size_t i = 0; i < r.floor.size(); ++i) {
    EXPECT_LE(r.floor[i], t.base_lse[i] + 2e-3) << what << ": the floor is above the LSE, row " << i;
  }
  for (size_t b = 0; b < cases_.size(); ++b) {
    for (int64_t i = 0; i < queries(); ++i) {
      for (int64_t p = 0; p < max_pages_; ++p) {
        for (int64_t h = 0; h < s.kv_heads; ++h) {
          const auto at = static_cast<size_t>((i * max_pages_ + p) * s.kv_heads + h);
          const auto d = static_cast<cuda::Decision>(
              r.decisions[b * static_cast<size_t>(queries() * max_pages_ * s.kv_heads) + at]);
          const double mass = t.mass[b][at];
          // By the floor the mass is only larger.
          if (d == cuda::Decision::base || d == cuda::Decision::skip) {
            EXPECT_LE(mass, policy().promote * 1.01) << what << ": page " << p << " is not promoted";
          }
          if (d == cuda::Decision::skip) {
            ++*skipped;
            EXPECT_LE(mass, policy().skip * 1.01) << what << ": page " << p << " is skipped";
          }
          if (d == cuda::Decision::full) ++*promoted;
        }
      }
    }
  }
}

// Every so manieth page and KV head loses its residual: the table is read on the device.
inline void drop_residuals(DeviceCase& c, int64_t every) {
  std::vector<int32_t> ids(static_cast<size_t>(c.max_pages() * c.shape().kv_heads));
  auto* table = const_cast<int32_t*>(c.call().tables.residual_table);
  const auto bytes = static_cast<int64_t>(ids.size() * 4);
  cuda::copy_to_host(ids.data(), table, bytes, nullptr);
  cuda::synchronize(nullptr);
  for (size_t i = 0; i < ids.size(); i += static_cast<size_t>(every)) ids[i] = -1;
  cuda::copy_to_device(table, ids.data(), bytes, nullptr);
  cuda::synchronize(nullptr);
}

}  // namespace thriftattn::testing
