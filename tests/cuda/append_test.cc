// append() on the device leaves the bytes that the CPU's append leaves: planes, residuals,
// summaries, metadata, plain rows and open pages, whatever the steps.
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <optional>

#include "cuda/device_case.h"

namespace thriftattn::testing {
namespace {

enum class Data { normal, zeros, denormal, huge, outliers, sticky, blocks, tiny_blocks, ties, group_ties, near };

// BF16 blocks whose two candidates for a scale differ by less than their errors' rounding, in a page
// whose largest value is 3008: whether the order of the sum is kept decides.
constexpr uint16_t kNear[][16] = {
    {0x4028, 0x40a8, 0x3fa9, 0x3fa4, 0x3eec, 0x4140, 0x3fbc, 0x3eda, 0x4006, 0x3f54, 0x3fc6, 0x3fc1, 0x3fca, 0x3fdd, 0x3fe4, 0x4055},
    {0x40de, 0x40a0, 0x3fbd, 0x3fd8, 0x3fb7, 0x4140, 0x3f2c, 0x3e92, 0x4077, 0x4036, 0x3fd3, 0x4060, 0x3ed7, 0x3f8d, 0x3f8d, 0x3eea},
    {0x4024, 0x409f, 0x3faa, 0x3eed, 0x3ea6, 0x4140, 0x4069, 0x3fd4, 0x3ef3, 0x3fb5, 0x4030, 0x3fe9, 0x3fe7, 0x3e8c, 0x3ef1, 0x4012},
    {0x3fbd, 0x40a8, 0x3ecc, 0x3fec, 0x3f23, 0x4140, 0x3ec1, 0x3fb4, 0x3f77, 0x3efe, 0x4034, 0x3fd9, 0x3fb9, 0x3e8a, 0x3fc7, 0x3e8f},
    {0x3fa7, 0x409f, 0x3ff6, 0x3f73, 0x3f9a, 0x4140, 0x4050, 0x3e8c, 0x3fe2, 0x3eb1, 0x3ffa, 0x3fa4, 0x3f50, 0x3fbb, 0x3fb7, 0x4044},
    {0x409d, 0x40ae, 0x3f79, 0x3eda, 0x3fba, 0x4140, 0x3ea9, 0x3edb, 0x3ebd, 0x3eb6, 0x4024, 0x3fb1, 0x3e85, 0x3ece, 0x3fa2, 0x3f63}};

// K or V of `tokens` tokens.
std::vector<float> draw(Data data, int64_t tokens, int64_t width, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(tokens * width));
  float magnitude = 1;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < width; ++d) {
      float v = normal(rng) + (d % 7 == 0 ? 3.0f : 0.0f);
      if (data == Data::zeros && t / kPageTokens % 2 == 0) v = d % 3 == 0 ? -0.0f : 0.0f;
      if (data == Data::denormal) v *= t / kPageTokens % 2 == 0 ? 1e-39f : 3e-38f;
      if (data == Data::huge) v *= 1e35f;
      if (data == Data::outliers && rng() % 50 == 0) v *= 300.0f;
      // A first page with a small mean, then pages of mean 0 whose rounding hides that reference:
      // it is kept for ever, so no run of pages can guess it.
      if (data == Data::sticky) v = t < kPageTokens ? 0x1p-12f : t % 2 == 0 ? 1.0f : -1.0f;
      // Blocks of 16 of every magnitude down to where their scales are the least ones, or zero; the
      // page scale normal, or so small that quotients would lose bits.
      if (data == Data::blocks || data == Data::tiny_blocks) {
        if (d % 16 == 0) magnitude = std::ldexp(data == Data::blocks ? 1.0f : 1e-33f, -static_cast<int>(rng() % 22));
        v *= magnitude;
      }
      // Page scale 1; blocks whose largest is 6 times an E4M3 number, and otherwise the thresholds
      // between codes for it.
      if (data == Data::ties) {
        if (d % 16 == 0) magnitude = std::ldexp(static_cast<float>(8 + rng() % 8), static_cast<int>(rng() % 8) - 6);
        constexpr float kThresholds[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f, 3.0f};
        v = d % 16 == 5 ? 6.0f * magnitude : kThresholds[rng() % 8] * magnitude * (rng() % 2 ? 1.0f : -1.0f);
        if (t % kPageTokens == 0 && d % 64 == 5) v = 2688.0f;
      }
      // The same for groups of 32: of MXFP4, powers of two times the thresholds of E2M1; of INT3, E4M3
      // numbers times the whole ones, and what lies below those.
      if (data == Data::group_ties) {
        const bool mx = (t + d / 32) % 2 == 0;
        if (d % 32 == 0) {
          const int exponent = static_cast<int>(rng() % 8) - 6;
          magnitude = std::ldexp(mx ? 1.0f : static_cast<float>(8 + rng() % 8), exponent);
        }
        constexpr float kE2m1[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f, 3.0f};
        constexpr float kInt3[] = {1.0f, 2.0f, 3.0f, 0.5f};
        v = mx ? kE2m1[rng() % 8] * magnitude : kInt3[rng() % 4] * magnitude;
        if (!mx && rng() % 2) v = std::nextafterf(v, 0.0f);
        if (d % 32 == 5) v = (mx ? 7.0f : 3.5f) * magnitude;
        if (rng() % 2) v = -v;
        if (t % kPageTokens == 0 && d % 64 == 5) v = 1568.0f;
      }
      if (data == Data::near) {
        v = t % kPageTokens == 0 && d % 64 == 5 ? 3008.0f : bf16_to_f32(kNear[(t + d / 16) % 6][d % 16]);
      }
      x[static_cast<size_t>(t * width + d)] = v;
    }
  }
  return x;
}

struct AppendOptions {
  LayerShape shape;
  LayerPolicy policy;
  Data data = Data::normal;
  cuda::Element element = cuda::Element::f32;
  // Of each sequence, the tokens of its steps; 0: idle. All take their n-th step in one call.
  std::vector<std::vector<int64_t>> sequences;
  bool equalizer = true;
};

// Inputs rounded to the element type, and the bytes of that type.
std::vector<uint8_t> as_element(std::vector<float>& x, cuda::Element element) {
  const size_t size = element == cuda::Element::f32 ? 4 : 2;
  std::vector<uint8_t> bytes(x.size() * size);
  for (size_t i = 0; i < x.size(); ++i) {
    if (size == 4) {
      std::memcpy(&bytes[4 * i], &x[i], 4);
    } else {
      const uint16_t b = element == cuda::Element::bf16 ? f32_to_bf16(x[i]) : f32_to_fp16(x[i]);
      x[i] = element == cuda::Element::bf16 ? bf16_to_f32(b) : fp16_to_f32(b);
      std::memcpy(&bytes[2 * i], &b, 2);
    }
  }
  return bytes;
}

// The same steps in a cache on the CPU and through append() into pools on the device.
class AppendCase {
 public:
  explicit AppendCase(const AppendOptions& o);

  // All steps of all sequences, in both.
  void run();
  // What lies in the pools against the CPU's cache, `skip` left out.
  struct Part {
    int64_t sequence, page, head;
    bool v;
  };
  void expect_same_bytes(const std::string& what, std::optional<Part> skip = {});

  cuda::AppendStatus status() { return to_host<cuda::AppendStatus>(status_, 1)[0]; }
  // Replaces one value of the device's input, in FP32 or BF16.
  void poison(bool v, int64_t sequence, int64_t token, int64_t head, int64_t d, float value);
  int64_t page_slot(int64_t sequence, int64_t page) const {
    return pages_ - 1 - page + sequence * pages_;
  }
  std::vector<uint8_t> slots() const {
    return to_host<uint8_t>(slots_, static_cast<size_t>(slots_.bytes()));
  }

 private:
  int64_t batch() const { return static_cast<int64_t>(o_.sequences.size()); }
  int64_t step_of(int64_t s, size_t round) const {
    const auto& steps = o_.sequences[static_cast<size_t>(s)];
    return round < steps.size() ? steps[round] : 0;
  }
  void device_round(size_t round, const std::vector<int64_t>& done);

  AppendOptions o_;
  int64_t kv_, dim_, most_ = 1, pages_ = 0, open_pages_ = 0;
  std::vector<std::vector<float>> k_, v_;
  std::vector<std::vector<uint8_t>> k_bytes_, v_bytes_;
  std::vector<int64_t> total_;
  KvCacheConfig config_;
  std::unique_ptr<KvCache> cache_;
  std::vector<SequenceId> ids_;
  std::optional<cuda::AttendPlan> plan_;
  cuda::SlotSizes sizes_;
  cuda::DeviceMemory slots_, residuals_, open_, workspace_, blocks_, residual_ids_, open_ids_, eq_, status_;
};

AppendCase::AppendCase(const AppendOptions& o)
    : o_(o), kv_(o.shape.kv_heads), dim_(o.shape.head_dim_k) {
  int64_t longest = 0;
  for (const auto& steps : o.sequences) {
    int64_t total = 0;
    for (const int64_t n : steps) total += n, most_ = std::max(most_, n);
    const auto seed = static_cast<uint32_t>(2 * total_.size());
    total_.push_back(total);
    longest = std::max(longest, total);
    k_.push_back(draw(o.data, total, kv_ * dim_, seed + 1));
    v_.push_back(draw(o.data, total, kv_ * dim_, seed + 2));
    k_bytes_.push_back(as_element(k_.back(), o.element));
    v_bytes_.push_back(as_element(v_.back(), o.element));
  }
  config_ = {.layers = {o.shape}, .policy = {o.policy}};
  std::vector<float> eq(static_cast<size_t>(kv_ * dim_));
  for (size_t i = 0; i < eq.size(); ++i) eq[i] = 0.5f + 0.01f * static_cast<float>(i % 97);
  if (o.equalizer) config_.equalizer.layers = {eq};
  cache_ = std::make_unique<KvCache>(config_);
  for (int64_t s = 0; s < batch(); ++s) ids_.push_back(cache_->create());

  sizes_ = cuda::slot_sizes(o.shape, o.policy);
  pages_ = longest / kPageTokens + 1;
  open_pages_ = (most_ + 62) / kPageTokens + 1;
  plan_.emplace(o.shape, o.policy,
                cuda::AttendLimits{.batch = batch(), .max_pages = pages_, .step_tokens = most_,
                                   .open_pages = open_pages_});
  slots_ = cuda::DeviceMemory(batch() * pages_ * sizes_.page);
  residuals_ = cuda::DeviceMemory(std::max<int64_t>(16, batch() * pages_ * kv_ * sizes_.residual));
  open_ = cuda::DeviceMemory(std::max<int64_t>(16, batch() * open_pages_ * sizes_.open));
  workspace_ = cuda::DeviceMemory(plan_->workspace_bytes());
  // Slots as the CPU's pool gives them: zero.
  cuda::fill(slots_.data(), 0, slots_.bytes(), nullptr);
  cuda::fill(residuals_.data(), 0, residuals_.bytes(), nullptr);
  cuda::fill(open_.data(), kPoison, open_.bytes(), nullptr);
  std::vector<int32_t> blocks, residual_ids, open_ids;
  for (int64_t s = 0; s < batch(); ++s) {
    for (int64_t p = 0; p < pages_; ++p) blocks.push_back(static_cast<int32_t>(page_slot(s, p)));
  }
  for (int64_t i = 0; i < batch() * pages_ * kv_; ++i) residual_ids.push_back(static_cast<int32_t>(i));
  for (int64_t i = 0; i < batch() * open_pages_; ++i) open_ids.push_back(static_cast<int32_t>(i));
  blocks_ = to_device(blocks);
  residual_ids_ = to_device(residual_ids);
  open_ids_ = to_device(open_ids);
  eq_ = to_device(eq);
  status_ = to_device(std::vector<cuda::AppendStatus>(1));
}

void AppendCase::poison(bool v, int64_t sequence, int64_t token, int64_t head, int64_t d, float value) {
  auto& bytes = (v ? v_bytes_ : k_bytes_)[static_cast<size_t>(sequence)];
  const auto at = static_cast<size_t>((token * kv_ + head) * dim_ + d);
  if (o_.element == cuda::Element::f32) {
    std::memcpy(&bytes[4 * at], &value, 4);
  } else {
    const uint16_t narrow = f32_to_bf16(value);
    std::memcpy(&bytes[2 * at], &narrow, 2);
  }
}

void AppendCase::device_round(size_t round, const std::vector<int64_t>& done) {
  const size_t row = static_cast<size_t>(kv_ * dim_) * (o_.element == cuda::Element::f32 ? 4 : 2);
  std::vector<uint8_t> k, v;
  std::vector<int32_t> lengths, offsets = {0};
  for (int64_t s = 0; s < batch(); ++s) {
    const size_t i = static_cast<size_t>(s), n = static_cast<size_t>(step_of(s, round));
    const auto take = [&](const std::vector<uint8_t>& from, std::vector<uint8_t>& to) {
      const auto begin = from.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(done[i]) * row);
      to.insert(to.end(), begin, begin + static_cast<ptrdiff_t>(n * row));
    };
    take(k_bytes_[i], k);
    take(v_bytes_[i], v);
    lengths.push_back(n == 0 ? 0 : static_cast<int32_t>(done[i]) + static_cast<int32_t>(n));
    offsets.push_back(offsets.back() + static_cast<int32_t>(n));
  }
  const auto d_k = to_device(k), d_v = to_device(v);
  const auto d_lengths = to_device(lengths), d_offsets = to_device(offsets);
  cuda::AppendCall call;
  call.memory = {.pages = slots_.as<uint8_t>(), .residuals = residuals_.as<uint8_t>(),
                 .open = open_.as<uint8_t>(), .equalizer = o_.equalizer ? eq_.as<float>() : nullptr};
  call.tables = {.lengths = d_lengths.as<int32_t>(), .block_table = blocks_.as<int32_t>(),
                 .residual_table = residual_ids_.as<int32_t>(), .open_table = open_ids_.as<int32_t>(),
                 .step_offsets = d_offsets.as<int32_t>()};
  call.k = d_k.data();
  call.v = d_v.data();
  call.element = o_.element;
  call.status = status_.as<cuda::AppendStatus>();
  call.workspace = workspace_.data();
  cuda::append(*plan_, call, nullptr);
  cuda::synchronize(nullptr);
}

void AppendCase::run() {
  size_t rounds = 0;
  for (const auto& steps : o_.sequences) rounds = std::max(rounds, steps.size());
  std::vector<int64_t> done(o_.sequences.size(), 0);
  for (size_t round = 0; round < rounds; ++round) {
    device_round(round, done);
    for (int64_t s = 0; s < batch(); ++s) {
      const size_t i = static_cast<size_t>(s);
      const int64_t n = step_of(s, round);
      if (n == 0) continue;
      const auto at = static_cast<size_t>(done[i] * kv_ * dim_);
      cache_->begin_step(ids_[i], n);
      cache_->append(ids_[i], 0, TensorView<const float>::dense(&k_[i][at], n, kv_, dim_),
                     TensorView<const float>::dense(&v_[i][at], n, kv_, dim_));
      done[i] += n;
      if (done[i] < total_[i]) cache_->commit(ids_[i]);
    }
  }
}

void AppendCase::expect_same_bytes(const std::string& what, std::optional<Part> skip) {
  const LayerStore& store = cache_->impl().layers[0];
  const auto got = slots();
  const auto got_res = to_host<uint8_t>(residuals_, static_cast<size_t>(residuals_.bytes()));
  const auto got_open = to_host<uint8_t>(open_, static_cast<size_t>(open_.bytes()));
  for (int64_t s = 0; s < batch(); ++s) {
    const SequenceId id = ids_[static_cast<size_t>(s)];
    const LayerView view(store, cache_->impl().sequence(id).layers[0], cache_->length(id));
    const int64_t total = total_[static_cast<size_t>(s)];
    for (int64_t p = 0; p < pages_; ++p) {
      const std::string where =
          what + ": sequence " + std::to_string(s) + ", page " + std::to_string(p);
      const bool skips = skip && skip->sequence == s && skip->page == p;
      // A whole slot, all heads.
      const uint8_t* want = view.head(p, 0).k;
      const uint8_t* have = &got[static_cast<size_t>(page_slot(s, p) * sizes_.page)];
      for (int64_t i = 0; want != nullptr && i < sizes_.page; ++i) {
        const int64_t v_start = kv_ * store.layout.k.head_bytes;
        const auto& side = i < v_start ? store.layout.k : store.layout.v;
        const int64_t in_side = i < v_start ? i : i - v_start;
        if (skips && (i >= v_start) == skip->v && in_side / side.head_bytes == skip->head) continue;
        // V's metadata lies with K's.
        if (skips && in_side / side.head_bytes == skip->head &&
            in_side % side.head_bytes >= store.layout.meta && i < v_start) {
          continue;
        }
        ASSERT_EQ(have[i], want[i]) << where << ", byte " << i;
      }
      for (int64_t h = 0; h < kv_; ++h) {
        const uint8_t* residual = view.residual(p, h);
        if (residual == nullptr || (skips && skip->head == h)) continue;
        ASSERT_EQ(std::memcmp(&got_res[static_cast<size_t>(((s * pages_ + p) * kv_ + h) * sizes_.residual)],
                              residual, static_cast<size_t>(sizes_.residual)), 0)
            << where << ", residual of head " << h;
      }
      const OpenPage* open = view.open(p);
      if (open == nullptr) continue;
      have = &got_open[static_cast<size_t>((s * open_pages_ + p % open_pages_) * sizes_.open)];
      const int64_t held = std::min(kPageTokens, total - p * kPageTokens);
      const auto compare = [&](const std::vector<uint16_t>& rows, bool v) {
        for (int64_t h = 0; h < kv_ && !rows.empty(); ++h) {
          if (skips && skip->v == v && skip->head == h) continue;
          const int64_t at = h * kPageTokens * dim_;
          ASSERT_EQ(std::memcmp(have + 2 * at, &rows[static_cast<size_t>(at)],
                                static_cast<size_t>(held * dim_ * 2)), 0)
              << where << ", open " << (v ? "V" : "K") << " of head " << h;
        }
        have += rows.size() * 2;
      };
      compare(open->k, false);
      compare(open->v, true);
      ASSERT_EQ(std::memcmp(have, open->k_reference.data(), open->k_reference.size() * 2), 0)
          << where << ", reference";
    }
  }
}

void expect_same_bytes(const AppendOptions& o, const std::string& what) {
  AppendCase c(o);
  c.run();
  cuda::throw_if_failed(c.status(), 0, o.policy);
  c.expect_same_bytes(what);
}

std::string describe(const LayerPolicy& policy) {
  return std::string(to_string(policy.k_format)) + " K, " + std::string(to_string(policy.v_format)) + " V";
}

AppendOptions base_options() {
  return {.shape = {.kv_heads = 3, .q_heads = 12, .head_dim_k = 128, .head_dim_v = 128},
          .policy = layered_policy(0.02, 0.0003),
          .sequences = {{100, 1, 27, 64, 1, 130, 5}}};
}

TEST(CudaAppend, ByteEqualOverData) {
  SKIP_WITHOUT_DEVICE();
  for (const Data data : {Data::normal, Data::zeros, Data::denormal, Data::huge, Data::outliers}) {
    AppendOptions o = base_options();
    o.data = data;
    o.equalizer = data != Data::huge;
    expect_same_bytes(o, "data " + std::to_string(static_cast<int>(data)));
  }
}

TEST(CudaAppend, ByteEqualAtEdgesOfTheCodec) {
  SKIP_WITHOUT_DEVICE();
  // As they come, so that blocks keep their magnitudes.
  for (const Data data : {Data::blocks, Data::tiny_blocks, Data::ties, Data::near}) {
    for (const bool center : {false, true}) {
      AppendOptions o = base_options();
      o.policy.rotate = false;
      o.policy.center = center;
      o.equalizer = false;
      o.data = data;
      o.sequences = {{64 * 6}};
      expect_same_bytes(o, "data " + std::to_string(static_cast<int>(data)));
    }
  }
}

TEST(CudaAppend, ByteEqualOverShapesAndTypes) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t dim : {64, 128, 192, 256}) {
    for (const cuda::Element e : {cuda::Element::f32, cuda::Element::bf16, cuda::Element::fp16}) {
      AppendOptions o = base_options();
      o.shape.head_dim_k = o.shape.head_dim_v = dim;
      o.element = e;
      expect_same_bytes(o, "head_dim " + std::to_string(dim));
    }
  }
}

TEST(CudaAppend, ByteEqualOverPolicies) {
  SKIP_WITHOUT_DEVICE();
  const auto mix = [](Format k, Format v) {
    LayerPolicy p = layered_policy(1.0, 0.0);
    p.k_format = k;
    p.v_format = v;
    return p;
  };
  std::vector<LayerPolicy> policies = {plain_policy(Format::bf16), plain_policy(Format::fp8_e4m3),
                                       mix(Format::nvfp4, Format::bf16), mix(Format::fp8_e4m3, Format::nvfp4),
                                       mix(Format::nvfp4x2, Format::nvfp4x2)};
  LayerPolicy bare = layered_policy(1.0, 0.0);
  bare.rotate = bare.center = false;
  policies.push_back(bare);
  for (size_t i = 0; i < policies.size(); ++i) {
    for (const Data data : {Data::normal, Data::denormal}) {
      AppendOptions o = base_options();
      o.policy = policies[i];
      o.data = data;
      expect_same_bytes(o, "policy " + std::to_string(i));
    }
  }
}

// MXFP4 and INT3, V of INT3 rotated: each with itself, with each other and with sides of other formats.
std::vector<LayerPolicy> group_policies() {
  std::vector<LayerPolicy> policies;
  for (const auto& [k, v] : {std::pair{Format::nvfp4, Format::int3}, {Format::mxfp4, Format::int3},
                             {Format::int3, Format::mxfp4}, {Format::int3, Format::int3},
                             {Format::mxfp4, Format::nvfp4}, {Format::bf16, Format::int3},
                             {Format::mxfp4, Format::fp8_e4m3}}) {
    policies.push_back(layered_policy(1.0, 0.0));
    policies.back().k_format = k;
    policies.back().v_format = v;
  }
  return policies;
}

TEST(CudaAppend, GroupsByteEqualOverDataAndTypes) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : group_policies()) {
    for (const Data data : {Data::normal, Data::zeros, Data::denormal, Data::huge, Data::outliers}) {
      AppendOptions o = base_options();
      o.policy = policy;
      o.data = data;
      o.equalizer = data != Data::huge;
      o.element = data == Data::normal ? cuda::Element::bf16 : cuda::Element::f32;
      expect_same_bytes(o, describe(policy) + ", data " + std::to_string(static_cast<int>(data)));
    }
  }
}

TEST(CudaAppend, GroupsByteEqualAtEdgesOfTheCodec) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : group_policies()) {
    for (const Data data : {Data::blocks, Data::tiny_blocks, Data::group_ties}) {
      for (const bool center : {false, true}) {
        AppendOptions o = base_options();
        o.policy = policy;
        o.policy.rotate = false;
        o.policy.center = center;
        o.equalizer = false;
        o.data = data;
        o.sequences = {{64 * 4}};
        expect_same_bytes(o, describe(policy) + ", data " + std::to_string(static_cast<int>(data)));
      }
    }
  }
}

TEST(CudaAppend, GroupsByteEqualOverShapesAndSteps) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : group_policies()) {
    for (const int64_t dim : {64, 128, 192, 256}) {
      AppendOptions o = base_options();
      o.policy = policy;
      o.shape.head_dim_k = o.shape.head_dim_v = dim;
      o.element = dim == 64 ? cuda::Element::fp16 : cuda::Element::f32;
      expect_same_bytes(o, describe(policy) + ", head_dim " + std::to_string(dim));
    }
    // Runs of K's pages, some of which have to be done again.
    AppendOptions o = base_options();
    o.policy = policy;
    o.element = cuda::Element::bf16;
    o.sequences = {{37, 64 * 36 + 50, 1}, {0, 130, 64}};
    expect_same_bytes(o, describe(policy) + ", long steps");
    o.policy.rotate = false;
    o.equalizer = false;
    o.data = Data::sticky;
    o.sequences = {{10, 64 * 34 + 30}};
    expect_same_bytes(o, describe(policy) + ", kept references");
  }
}

TEST(CudaAppend, ByteEqualOverLongSteps) {
  SKIP_WITHOUT_DEVICE();
  // Steps of many pages, that begin and end inside of pages and at their ends; runs of K's pages.
  for (const std::vector<int64_t>& steps : {std::vector<int64_t>{64 * 40}, {37, 64 * 36 + 50, 1, 64 * 3 - 24},
                                            {64, 64 * 20, 63, 900, 2}}) {
    AppendOptions o = base_options();
    o.element = cuda::Element::bf16;
    o.sequences = {steps};
    expect_same_bytes(o, "first step " + std::to_string(steps[0]));
  }
  for (const int64_t dim : {64, 192, 256}) {
    AppendOptions o = base_options();
    o.shape.kv_heads = 1;
    o.shape.q_heads = 4;
    o.shape.head_dim_k = o.shape.head_dim_v = dim;
    o.sequences = {{20, 64 * 18 + 11}};
    expect_same_bytes(o, "head_dim " + std::to_string(dim));
  }
}

TEST(CudaAppend, ByteEqualWhereReferencesAreKept) {
  SKIP_WITHOUT_DEVICE();
  // What runs of pages assume does not hold, so that append_repair has to do almost every page.
  for (const int64_t first : {64, 10}) {
    AppendOptions o = base_options();
    o.policy.rotate = false;
    o.equalizer = false;
    o.data = Data::sticky;
    o.sequences = {{first, 64 * 34 + 30}};
    expect_same_bytes(o, "first step " + std::to_string(first));
  }
}

TEST(CudaAppend, ByteEqualOverRaggedBatches) {
  SKIP_WITHOUT_DEVICE();
  for (const bool plain : {false, true}) {
    AppendOptions o = base_options();
    if (plain) o.policy = plain_policy(Format::fp8_e4m3);
    o.sequences = {{1, 1100, 64}, {130, 3, 0, 200}, {0, 64, 1, 1}, {500, 0, 12, 64}};
    expect_same_bytes(o, plain ? "fp8" : "layered");
  }
}

// One value of one page of K or V is refused, in a step of `pages` pages.
void expect_refused(bool v, int64_t pages, float value) {
  AppendOptions o = base_options();
  // The page is behind those of K that the test compares: what is behind it has no reference.
  o.sequences = {{70}, {64 * pages}};
  AppendCase c(o);
  // Of V the first of those that a block does, where it does several.
  const int64_t page = v ? 4 : pages - 1;
  c.poison(v, 1, page * 64 + 41, 1, 77, value);
  c.poison(v, 1, page * 64 + 60, 1, 3, value);
  c.run();
  const cuda::AppendStatus status = c.status();
  EXPECT_EQ(status.failed, 1);
  EXPECT_EQ(status.side, v ? 1 : 0);
  EXPECT_EQ(status.sequence, 1);
  EXPECT_EQ(status.kv_head, 1);
  EXPECT_EQ(status.token, page * 64 + 41);
  EXPECT_THROW(cuda::throw_if_failed(status, 0, o.policy), Error);
  // Not sealed: codes and scales of the page as they were. All else as the CPU has it.
  const PageLayout layout = make_page_layout(o.shape, o.policy);
  const auto slots = c.slots();
  const auto& side = v ? layout.v : layout.k;
  const int64_t start = c.page_slot(1, page) * layout.slot_bytes + (v ? 3 * layout.k.head_bytes : 0) +
                        side.head_bytes;
  for (int64_t i = 0; i < side.mean + 2 * side.dim; ++i) {
    ASSERT_EQ(slots[static_cast<size_t>(start + i)], 0) << "byte " << i;
  }
  c.expect_same_bytes(v ? "V" : "K", AppendCase::Part{1, page, 1, v});
}

TEST(CudaAppend, OneFailingPageAmongMany) {
  SKIP_WITHOUT_DEVICE();
  // Without append_repair and with it.
  for (const int64_t pages : {6, 14}) {
    for (const bool v : {false, true}) {
      expect_refused(v, pages, std::numeric_limits<float>::quiet_NaN());
      expect_refused(v, pages, std::numeric_limits<float>::infinity());
      expect_refused(v, pages, -0x1.8p127f);
    }
  }
}

// BF16 rows of a plain cache, which are copied.
TEST(CudaAppend, PlainRowsAsTheyCome) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t dim : {64, 128, 192, 256}) {
    AppendOptions o = base_options();
    o.policy = plain_policy(Format::bf16);
    o.shape.head_dim_k = o.shape.head_dim_v = dim;
    o.element = cuda::Element::bf16;
    o.sequences = {{100, 1, 27, 64, 1, 130, 5}, {3, 0, 200}};
    expect_same_bytes(o, "head_dim " + std::to_string(dim));
  }
  for (const float value : {-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    AppendOptions o = base_options();
    o.policy = plain_policy(Format::bf16);
    o.element = cuda::Element::bf16;
    o.sequences = {{70}, {64 * 6}};
    AppendCase c(o);
    c.poison(true, 1, 64 + 41, 2, 127, value);
    c.poison(true, 1, 64 + 60, 2, 3, value);
    c.run();
    EXPECT_EQ(c.status().failed, 1);
    EXPECT_EQ(c.status().side, 1);
    EXPECT_EQ(c.status().sequence, 1);
    EXPECT_EQ(c.status().kv_head, 2);
    EXPECT_EQ(c.status().token, 64 + 41);
  }
}

TEST(CudaAppend, NonFiniteInputIsReported) {
  SKIP_WITHOUT_DEVICE();
  AppendOptions o = base_options();
  o.data = Data::huge;
  // Beyond FP16's range as FP16: infinity.
  o.element = cuda::Element::fp16;
  o.equalizer = false;
  const int64_t kv = o.shape.kv_heads, dim = o.shape.head_dim_k;
  std::vector<float> k = draw(Data::normal, 70, kv * dim, 1), v = k;
  v[static_cast<size_t>((66 * kv + 2) * dim + 5)] = NAN;
  const cuda::AttendPlan plan(o.shape, o.policy, {.batch = 1, .max_pages = 2, .step_tokens = 70, .open_pages = 3});
  const cuda::SlotSizes sizes = cuda::slot_sizes(o.shape, o.policy);
  cuda::DeviceMemory slots(2 * sizes.page), residuals(2 * kv * sizes.residual), open(2 * sizes.open),
      workspace(plan.workspace_bytes());
  cuda::fill(open.data(), 0, open.bytes(), nullptr);
  const auto d_k = to_device(k), d_v = to_device(v);
  const auto blocks = to_device(std::vector<int32_t>{0, 1}), open_ids = to_device(std::vector<int32_t>{0, 1, 0});
  const auto residual_ids = to_device(std::vector<int32_t>{0, 1, 2, 3, 4, 5});
  const auto length = to_device(std::vector<int32_t>{70});
  const auto status = to_device(std::vector<cuda::AppendStatus>(1));
  cuda::AppendCall call;
  call.memory = {slots.as<uint8_t>(), residuals.as<uint8_t>(), open.as<uint8_t>(), nullptr};
  call.tables = {length.as<int32_t>(), blocks.as<int32_t>(), residual_ids.as<int32_t>(),
                 open_ids.as<int32_t>(), nullptr};
  call.k = d_k.data();
  call.v = d_v.data();
  call.element = cuda::Element::f32;
  call.status = status.as<cuda::AppendStatus>();
  call.workspace = workspace.data();
  cuda::append(plan, call, nullptr);
  const auto found = to_host<cuda::AppendStatus>(status, 1)[0];
  EXPECT_EQ(found.failed, 1);
  EXPECT_EQ(found.side, 1);
  EXPECT_EQ(found.kv_head, 2);
  EXPECT_EQ(found.token, 66);
  EXPECT_THROW(cuda::throw_if_failed(found, 4, o.policy), Error);
}

}  // namespace
}  // namespace thriftattn::testing
