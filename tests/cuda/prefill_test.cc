// attend_prefill against FP64 over the values as stored, read as the device says it did: steps of more
// than 16 positions. Lengths and steps cross the boundaries of pages (64 tokens) and of tiles (128
// query rows).
#include <gtest/gtest.h>

#include "cuda/attend_prefill_shape.h"
#include "cuda/device_case.h"

namespace thriftattn::testing {
namespace {

CaseOptions options(LayerPolicy policy, int64_t length, int64_t queries) {
  CaseOptions o = decode_options(policy, length, queries);
  o.mode = AttendMode::prefill;
  return o;
}

// A plan that quietly falls back to passes of 16 positions is seen.
void expect_prefill(const DeviceCase& c) {
  const cuda::DeviceInfo device = cuda::device_info();
  const int stages = cuda::prefill_stages(static_cast<int>(c.shape().head_dim_k),
                                          is_layered(c.policy().k_format), device.major, device.minor);
  EXPECT_EQ(c.plan().explain().rfind("attend_prefill: ", 0) == 0, stages > 0) << c.plan().explain();
}

// Against the truth with FP32 and with BF16 queries, each with tiles made beforehand and with pages
// expanded where they are used: the tiles are the same, so the outputs are.
void check(CaseOptions o, const std::string& what) {
  for (const bool narrow : {false, true}) {
    o.bf16_queries = narrow;
    DeviceCase c({o});
    expect_prefill(c);
    if (narrow) c.narrow_queries();
    const std::string which = what + ", length " + std::to_string(o.length) + ", " +
                              std::to_string(o.queries) + (narrow ? " BF16 queries" : " FP32 queries");
    const DeviceCase::Result made = c.attend();
    c.compare(made, c.truth(made), which, kTightCuda);
    c.plan_with(0);
    const DeviceCase::Result in_place = c.attend();
    EXPECT_EQ(std::memcmp(made.out.data(), in_place.out.data(), made.out.size() * 4), 0) << which;
    EXPECT_EQ(std::memcmp(made.lse.data(), in_place.lse.data(), made.lse.size() * 4), 0) << which;
    EXPECT_EQ(made.decisions, in_place.decisions) << which;
  }
}

TEST(CudaPrefillShape, StagesFitTheDevice) {
  using cuda::prefill_shared_bytes;
  using cuda::prefill_stages;
  for (const bool layered : {false, true}) {
    for (const int dim : {64, 128, 192, 256}) {
      const int stages = prefill_stages(dim, layered, 9, 0);
      EXPECT_GE(stages, 1) << dim;
      EXPECT_LE(prefill_shared_bytes(dim, layered, stages) + 1024, 232448) << dim;
    }
    EXPECT_GE(prefill_stages(128, layered, 8, 0), 2);
    EXPECT_EQ(prefill_stages(256, layered, 8, 0), 0);
    EXPECT_GE(prefill_stages(64, layered, 12, 0), 1);
  }
  EXPECT_EQ(prefill_stages(128, true, 8, 9), 0);
}

TEST(CudaPrefill, PoliciesAndLengths) {
  SKIP_WITHOUT_DEVICE();
  const std::pair<const char*, LayerPolicy> policies[] = {
      {"bf16", plain_policy(Format::bf16)},
      {"nvfp4", layered_policy(1.0, 0.0)},
      {"sealed", sealed_policy(64, 192)},
      {"nvfp4x2", mix(Format::nvfp4x2, Format::nvfp4x2)},
      {"fp8", plain_policy(Format::fp8_e4m3)},
      {"promote and skip", layered_policy(0.05, 0.004)},
      {"bf16 K, nvfp4 V", mix(Format::bf16, Format::nvfp4)},
      {"nvfp4 K, bf16 V", mix(Format::nvfp4, Format::bf16)},
      {"nvfp4 K, fp8 V", mix(Format::nvfp4, Format::fp8_e4m3)},
      {"fp8 K, nvfp4x2 V", mix(Format::fp8_e4m3, Format::nvfp4x2)},
      {"sealed, nothing held", sealed_policy(0, 0)},
  };
  const std::pair<int64_t, int64_t> steps[] = {{0, 17}, {0, 64}, {37, 100}, {64, 33}, {300, 70}};
  for (const auto& [name, policy] : policies) {
    for (const auto& [length, queries] : steps) check(options(policy, length, queries), name);
  }
}

TEST(CudaPrefill, Shapes) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t dim : {64, 128, 192, 256}) {
    for (const int64_t group : {1, 3, 4, 8, 16, 64}) {
      CaseOptions o = options(layered_policy(1.0, 0.0), 130, group > 8 ? 20 : 80);
      o.shape = {.kv_heads = 1, .q_heads = group, .head_dim_k = dim, .head_dim_v = dim};
      check(o, "head_dim " + std::to_string(dim) + ", group " + std::to_string(group));
    }
    for (const LayerPolicy& policy : {plain_policy(Format::bf16), plain_policy(Format::fp8_e4m3),
                                      sealed_policy(0, 0)}) {
      CaseOptions o = options(policy, 150, 40);
      o.shape = {.kv_heads = 2, .q_heads = 8, .head_dim_k = dim, .head_dim_v = dim};
      check(o, "head_dim " + std::to_string(dim) + ", " + std::string(to_string(policy.k_format)));
    }
  }
}

// More pages than a batch of means and than the ring's stages, several times over.
TEST(CudaPrefill, ManyPages) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {sealed_policy(64, 256), plain_policy(Format::bf16)}) {
    CaseOptions o = options(policy, 2400, 20);
    o.shape.q_heads = 4;
    check(o, "many pages");
  }
}

// So many rows of a KV head that tiles made beforehand pay on devices of a few multiprocessors too.
TEST(CudaPrefill, ManyRows) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {sealed_policy(64, 256), plain_policy(Format::bf16)}) {
    CaseOptions o = options(policy, 600, 17);
    o.shape = {.kv_heads = 1, .q_heads = 32, .head_dim_k = 64, .head_dim_v = 64};
    if (const cuda::DeviceInfo device = cuda::device_info(); device.major == 9) {
      DeviceCase c({o});
      EXPECT_NE(c.plan().explain().find("pages expanded before it"), std::string::npos) << c.plan().explain();
    }
    check(o, "many rows");
  }
}

TEST(CudaPrefill, WindowSoftcapSinksOffset) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy :
       {layered_policy(0.05, 0.004), plain_policy(Format::bf16), sealed_policy(64, 128)}) {
    for (const int64_t window : {0, 1, 64, 100, 300}) {
      CaseOptions o = options(policy, 333, 90);
      o.shape.window = window;
      o.sink_logits = window != 100;
      o.softcap = window == 300 ? 20.0f : 0.0f;
      o.k_offset = 3.0f;
      check(o, "window " + std::to_string(window));
    }
  }
}

// Keys far from 0: q' has more digits than FP16 in scores and in q'.mean(K), or the LSE is off.
TEST(CudaPrefill, KeysWithALargeMean) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(1.0, 0.0), plain_policy(Format::bf16)}) {
    CaseOptions o = options(policy, 300, 40);
    o.k_offset = 100.0f;
    check(o, "offset 100");
  }
}

// KV heads take turns in a small workspace; in none they do not.
TEST(CudaPrefill, PassesOverHeads) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(1.0, 0.0), plain_policy(Format::bf16)}) {
    CaseOptions o = options(policy, 300, 40);
    o.shape = {.kv_heads = 5, .q_heads = 320, .head_dim_k = 128, .head_dim_v = 128};
    DeviceCase c({o, o, o});
    const DeviceCase::Result one = c.attend();
    const int64_t all = c.plan().workspace_bytes();
    // Of layered pages a head has 3 tiles a page, of plain ones 2.
    const int64_t head = c.max_pages() * 3 * cuda::prefill_tile_bytes(128);
    for (const int64_t bytes : {8 * head, 4 * head, head / 4}) {
      c.plan_with(bytes);
      EXPECT_LT(c.plan().workspace_bytes(), all);
      const DeviceCase::Result r = c.attend();
      EXPECT_EQ(std::memcmp(one.out.data(), r.out.data(), r.out.size() * 4), 0) << bytes;
    }
  }
}

TEST(CudaPrefillShape, TilesAreMadeWhereThatPays) {
  using cuda::prefill_pass_heads;
  constexpr int64_t kHead = int64_t{512} * 2 * cuda::prefill_tile_bytes(128), kSms = 132;
  const auto heads = [&](int64_t all, int64_t row_tiles, int64_t bytes) {
    return prefill_pass_heads({all, row_tiles, kHead, bytes, kSms});
  };
  EXPECT_EQ(heads(8, 64, 8 * kHead), 8);
  EXPECT_EQ(heads(8, 64, 8 * kHead - 1), 4);  // two passes alike
  EXPECT_EQ(heads(8, 64, kHead - 1), 0);
  EXPECT_EQ(heads(8, 64, 0), 0);
  EXPECT_EQ(heads(8, 1, 8 * kHead), 8);      // processors that would be idle make tiles
  EXPECT_EQ(heads(64, 1, 64 * kHead), 0);    // one row tile a head pays for no tiles
  EXPECT_EQ(heads(1024, 1, 1024 * kHead), 0);
  EXPECT_EQ(heads(64, 64, 64 * kHead), 64);
  EXPECT_EQ(heads(8, 8, kHead), 0);          // turns would leave processors idle
}

TEST(CudaPrefill, NotCausal) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(0.04, 0.004), plain_policy(Format::bf16)}) {
    for (const int64_t length : {0, 200}) {
      CaseOptions o = options(policy, length, 77);
      o.causal = false;
      check(o, "not causal");
    }
  }
}

// V of neighbouring pages differs by 2^27: O changes its units from page to page.
TEST(CudaPrefill, ValuesOfEverySize) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(1.0, 0.0), plain_policy(Format::bf16),
                                    sealed_policy(0, 0)}) {
    for (const int64_t length : {400, 64 * 7 - 20}) {  // the last page is a small one, or a large one
      CaseOptions o = options(policy, length, 40);
      o.v_spread = 9.0f;
      check(o, "V of every size");
    }
  }
}

// Rows of FP8 have scales of their own, which FP16 does not hold: a score would be off by as much as it
// is large.
TEST(CudaPrefill, Fp8RowsAndLargeScores) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = options(plain_policy(Format::fp8_e4m3), 300, 40);
  o.q_gain = 6.0f;
  check(o, "large scores");
}

// Scores far apart: later pages' are often far above the reference that the first one set.
TEST(CudaPrefill, ReferencesThatRise) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(1.0, 0.0), plain_policy(Format::bf16)}) {
    CaseOptions o = options(policy, 700, 30);
    o.q_gain = 4.0f;
    check(o, "references that rise");
  }
}

TEST(CudaPrefill, PlainPagesInDecodeMode) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = options(plain_policy(Format::bf16), 100, 50);
  o.mode = AttendMode::decode;
  check(o, "decode mode");
}

TEST(CudaPrefill, LayeredPagesInDecodeModeKeepTheRule) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = options(layered_policy(0.05, 0.04), 700, 40);
  o.mode = AttendMode::decode;
  o.equalizer = false;
  DeviceCase c({o});
  c.check("decode mode, 40 queries", kTightCuda);
  int64_t promoted = 0, skipped = 0;
  c.check_rule("decode mode, 40 queries", &promoted, &skipped);
  EXPECT_GT(promoted + skipped, 0);
}

TEST(CudaPrefill, RaggedBatch) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {sealed_policy(64, 64), plain_policy(Format::bf16)}) {
    std::vector<CaseOptions> cases;
    for (const int64_t length : {5, 64, 411, 130}) {
      CaseOptions o = options(policy, length, 50);
      o.equalizer = false;  // it belongs to the model, and differs by seed here
      o.seed = static_cast<uint32_t>(length);
      cases.push_back(o);
    }
    DeviceCase c(cases);
    expect_prefill(c);
    c.check("ragged", kTightCuda);
  }
}

// Steps of 50, 0, 17 and 3 tokens in one call: of plain pages a shorter step is the end of a longer
// one, row by row the same numbers.
TEST(CudaPrefill, StepOffsets) {
  SKIP_WITHOUT_DEVICE();
  constexpr int64_t kQueries = 50;
  std::vector<CaseOptions> cases;
  for (const int64_t length : {5, 64, 411, 130}) {
    CaseOptions o = options(plain_policy(Format::bf16), length, kQueries);
    o.seed = static_cast<uint32_t>(length);
    cases.push_back(o);
  }
  DeviceCase c(cases);
  const auto whole = c.attend();
  const std::vector<int32_t> offsets = {0, 50, 50, 67, 70};
  const int64_t row = c.shape().q_heads * c.shape().head_dim_k;
  std::vector<float> q;
  for (size_t b = 0; b < 4; ++b) {
    const TensorView<const float> all = c.host(b).q_view();
    const int64_t n = offsets[b + 1] - offsets[b];
    q.insert(q.end(), all.data + (kQueries - n) * row, all.data + kQueries * row);
  }
  const cuda::DeviceMemory d_q = to_device(q), d_offsets = to_device(offsets);
  cuda::DeviceMemory out(static_cast<int64_t>(q.size()) * 4);
  cuda::AttendCall call = c.call();
  call.q = d_q.data();
  call.out = out.data();
  call.lse = call.lse_floor = nullptr;
  call.decisions = nullptr;
  call.tables.step_offsets = d_offsets.as<int32_t>();
  cuda::attend(c.plan(), call, nullptr);
  const std::vector<float> got = to_host<float>(out, q.size());
  for (size_t b = 0; b < 4; ++b) {
    const int64_t n = offsets[b + 1] - offsets[b];
    const float* want = whole.out.data() + (static_cast<int64_t>(b + 1) * kQueries - n) * row;
    EXPECT_EQ(std::memcmp(got.data() + offsets[b] * row, want, static_cast<size_t>(n * row * 4)), 0)
        << "sequence " << b;
  }
}

// BF16 queries: of plain pages the bits of the same numbers in FP32, of layered ones, whose q' is
// rotated and rounded to FP16, the truth within the bound. Then the types of the output.
TEST(CudaPrefill, ElementTypes) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {plain_policy(Format::bf16), plain_policy(Format::fp8_e4m3),
                                    sealed_policy(64, 64)}) {
    CaseOptions o = options(policy, 100, 40);
    o.bf16_queries = true;
    DeviceCase c({o});
    const std::string what(to_string(policy.k_format));
    const auto wide = c.attend();
    const TensorView<const float> q = c.host(0).q_view();
    std::vector<uint16_t> narrow(wide.out.size());
    for (size_t i = 0; i < narrow.size(); ++i) narrow[i] = f32_to_bf16(q.data[i]);
    const cuda::DeviceMemory d_q = to_device(narrow);
    cuda::AttendCall call = c.call();
    call.q = d_q.data();
    call.q_element = cuda::Element::bf16;
    cuda::fill(call.out, kPoison, static_cast<int64_t>(narrow.size()) * 4, nullptr);
    cuda::attend(c.plan(), call, nullptr);
    const auto want = c.read();
    EXPECT_LT(row_error(want.out, c.truth(want).out, c.shape().head_dim_v), kTightCuda) << what;
    // K in FP8 has more digits beside FP32 queries.
    if (policy.k_format == Format::bf16) {
      EXPECT_EQ(std::memcmp(want.out.data(), wide.out.data(), wide.out.size() * 4), 0) << what;
    }
    cuda::DeviceMemory out(static_cast<int64_t>(narrow.size()) * 2);
    call.out = out.data();
    for (const cuda::Element element : {cuda::Element::bf16, cuda::Element::fp16}) {
      call.out_element = element;
      cuda::attend(c.plan(), call, nullptr);
      const std::vector<uint16_t> got = to_host<uint16_t>(out, narrow.size());
      for (size_t i = 0; i < got.size(); ++i) {
        const uint16_t expected = element == cuda::Element::bf16 ? f32_to_bf16(want.out[i])
                                                                 : f32_to_fp16(want.out[i]);
        ASSERT_EQ(got[i], expected) << what << ' ' << i;
      }
    }
  }
}

TEST(CudaPrefill, RunsAreBitwiseEqual) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = options(layered_policy(1.0, 0.0), 1500, 70);
  DeviceCase c({o, o, o});
  c.check_repeats();
}

}  // namespace
}  // namespace thriftattn::testing
