// append() on the device leaves the bytes that the CPU's append leaves: planes, residuals,
// summaries, metadata, plain rows and open pages, whatever the steps.
#include <gtest/gtest.h>

#include "cuda/device_case.h"

namespace thriftattn::testing {
namespace {

enum class Data { normal, zeros, denormal, huge, outliers };

// K or V of `tokens` tokens.
std::vector<float> draw(Data data, int64_t tokens, int64_t width, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(tokens * width));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < width; ++d) {
      float v = normal(rng) + (d % 7 == 0 ? 3.0f : 0.0f);
      if (data == Data::zeros && t / kPageTokens % 2 == 0) v = d % 3 == 0 ? -0.0f : 0.0f;
      if (data == Data::denormal) v *= t / kPageTokens % 2 == 0 ? 1e-39f : 3e-38f;
      if (data == Data::huge) v *= 1e35f;
      if (data == Data::outliers && rng() % 50 == 0) v *= 300.0f;
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
  std::vector<int64_t> steps;
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

void expect_same_bytes(const AppendOptions& o, const std::string& what) {
  int64_t total = 0, most = 0;
  for (const int64_t n : o.steps) total += n, most = std::max(most, n);
  const int64_t kv = o.shape.kv_heads, dim = o.shape.head_dim_k;
  std::vector<float> k = draw(o.data, total, kv * dim, 1), v = draw(o.data, total, kv * dim, 2);
  const auto k_bytes = as_element(k, o.element), v_bytes = as_element(v, o.element);
  KvCacheConfig config{.layers = {o.shape}, .policy = {o.policy}};
  std::vector<float> eq(static_cast<size_t>(kv * dim));
  for (size_t i = 0; i < eq.size(); ++i) eq[i] = 0.5f + 0.01f * static_cast<float>(i % 97);
  if (o.equalizer) config.equalizer.layers = {eq};
  KvCache cache(config);
  const SequenceId id = cache.create();

  const cuda::SlotSizes sizes = cuda::slot_sizes(o.shape, o.policy);
  const int64_t pages = total / kPageTokens + 1;
  const int64_t open_pages = (most + 62) / kPageTokens + 1;
  const cuda::AttendPlan plan(o.shape, o.policy,
                              {.batch = 1, .max_pages = pages, .step_tokens = most, .open_pages = open_pages});
  cuda::DeviceMemory slots(pages * sizes.page), residuals(std::max<int64_t>(16, pages * kv * sizes.residual)),
      open(std::max<int64_t>(16, open_pages * sizes.open)), workspace(plan.workspace_bytes());
  // Slots as the CPU's pool gives them: zero.
  cuda::fill(slots.data(), 0, slots.bytes(), nullptr);
  cuda::fill(residuals.data(), 0, residuals.bytes(), nullptr);
  cuda::fill(open.data(), kPoison, open.bytes(), nullptr);
  std::vector<int32_t> blocks, residual_ids, open_ids;
  for (int64_t p = 0; p < pages; ++p) {
    blocks.push_back(static_cast<int32_t>(pages - 1 - p));
    for (int64_t h = 0; h < kv; ++h) residual_ids.push_back(static_cast<int32_t>((p * kv + h) ^ 0));
  }
  for (int64_t p = 0; p < open_pages; ++p) open_ids.push_back(static_cast<int32_t>(p));
  const auto d_blocks = to_device(blocks), d_residuals = to_device(residual_ids),
             d_open = to_device(open_ids), d_eq = to_device(eq), d_k = to_device(k_bytes),
             d_v = to_device(v_bytes);
  const auto d_status = to_device(std::vector<cuda::AppendStatus>(1));
  const int64_t size = o.element == cuda::Element::f32 ? 4 : 2;
  int64_t done = 0;
  for (const int64_t n : o.steps) {
    cache.begin_step(id, n);
    cache.append(id, 0, TensorView<const float>::dense(&k[static_cast<size_t>(done * kv * dim)], n, kv, dim),
                 TensorView<const float>::dense(&v[static_cast<size_t>(done * kv * dim)], n, kv, dim));
    const auto d_length = to_device(std::vector<int32_t>{static_cast<int32_t>(done + n)});
    const auto d_offsets = to_device(std::vector<int32_t>{0, static_cast<int32_t>(n)});
    cuda::AppendCall call;
    call.memory = {.pages = slots.as<uint8_t>(), .residuals = residuals.as<uint8_t>(),
                   .open = open.as<uint8_t>(), .equalizer = o.equalizer ? d_eq.as<float>() : nullptr};
    call.tables = {.lengths = d_length.as<int32_t>(), .block_table = d_blocks.as<int32_t>(),
                   .residual_table = d_residuals.as<int32_t>(), .open_table = d_open.as<int32_t>(),
                   .step_offsets = d_offsets.as<int32_t>()};
    call.k = d_k.as<uint8_t>() + done * kv * dim * size;
    call.v = d_v.as<uint8_t>() + done * kv * dim * size;
    call.element = o.element;
    call.status = d_status.as<cuda::AppendStatus>();
    call.workspace = workspace.data();
    cuda::append(plan, call, nullptr);
    cuda::synchronize(nullptr);
    done += n;
    if (done < total) cache.commit(id);
  }
  cuda::throw_if_failed(to_host<cuda::AppendStatus>(d_status, 1)[0], 0, o.policy);

  const LayerStore& store = cache.impl().layers[0];
  const LayerView view(store, cache.impl().sequence(id).layers[0], cache.length(id));
  const auto got = to_host<uint8_t>(slots, static_cast<size_t>(slots.bytes()));
  const auto got_res = to_host<uint8_t>(residuals, static_cast<size_t>(residuals.bytes()));
  const auto got_open = to_host<uint8_t>(open, static_cast<size_t>(open.bytes()));
  for (int64_t p = 0; p < pages; ++p) {
    // A whole slot, all heads.
    if (const uint8_t* want = view.head(p, 0).k) {
      const uint8_t* have = &got[static_cast<size_t>((pages - 1 - p) * sizes.page)];
      for (int64_t i = 0; i < sizes.page; ++i) {
        ASSERT_EQ(have[i], want[i]) << what << ": page " << p << ", byte " << i;
      }
    }
    for (int64_t h = 0; h < kv; ++h) {
      if (const uint8_t* want = view.residual(p, h)) {
        const uint8_t* have = &got_res[static_cast<size_t>((p * kv + h) * sizes.residual)];
        ASSERT_EQ(std::memcmp(have, want, static_cast<size_t>(sizes.residual)), 0)
            << what << ": residual of page " << p << ", head " << h;
      }
    }
    const OpenPage* want = view.open(p);
    if (want == nullptr) continue;
    const uint8_t* have = &got_open[static_cast<size_t>(p % open_pages * sizes.open)];
    const int64_t held = std::min(kPageTokens, total - p * kPageTokens);
    const auto compare = [&](const std::vector<uint16_t>& rows, const char* side) {
      for (int64_t h = 0; h < kv && !rows.empty(); ++h) {
        ASSERT_EQ(std::memcmp(have + h * kPageTokens * dim * 2, &rows[static_cast<size_t>(h * kPageTokens * dim)],
                              static_cast<size_t>(held * dim * 2)), 0)
            << what << ": open " << side << " of page " << p << ", head " << h;
      }
      have += rows.size() * 2;
    };
    compare(want->k, "K");
    compare(want->v, "V");
    ASSERT_EQ(std::memcmp(have, want->k_reference.data(), want->k_reference.size() * 2), 0)
        << what << ": reference of page " << p;
  }
}

AppendOptions base_options() {
  return {.shape = {.kv_heads = 3, .q_heads = 12, .head_dim_k = 128, .head_dim_v = 128},
          .policy = layered_policy(0.02, 0.0003),
          .steps = {100, 1, 27, 64, 1, 130, 5}};
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

TEST(CudaAppend, NonFiniteInputIsReported) {
  SKIP_WITHOUT_DEVICE();
  AppendOptions o = base_options();
  o.data = Data::huge;
  o.steps = {70};
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
