// attend() on the device against FP64 over the values as stored, read as the device says it did.
// The bound is that of FP16 queries and FP16 weights with FP32 sums.
#include <gtest/gtest.h>

#include "cuda/captured.h"
#include "cuda/device_case.h"

namespace thriftattn::testing {
namespace {

TEST(CudaAttend, MatchesTruthOverPoliciesAndLengths) {
  SKIP_WITHOUT_DEVICE();
  const std::pair<const char*, LayerPolicy> policies[] = {
      {"nvfp4", layered_policy(1.0, 0.0)},
      {"nvfp4x2", mix(Format::nvfp4x2, Format::nvfp4x2)},
      {"bf16", plain_policy(Format::bf16)},
      {"fp8", plain_policy(Format::fp8_e4m3)},
      {"sealed", sealed_policy(64, 192)},
      {"promote", layered_policy(0.03, 0.0)},
      {"promote and skip", layered_policy(0.05, 0.004)},
      {"bf16 K, nvfp4 V", mix(Format::bf16, Format::nvfp4)},
      {"nvfp4 K, fp8 V", mix(Format::nvfp4, Format::fp8_e4m3)},
      {"fp8 K, nvfp4x2 V", mix(Format::fp8_e4m3, Format::nvfp4x2)},
  };
  for (const auto& [name, policy] : policies) {
    for (const int64_t length : {0, 1, 63, 64, 65, 130, 700, 2111}) {
      DeviceCase c({decode_options(policy, length)});
      c.check(std::string(name) + ", length " + std::to_string(length), kTightCuda);
    }
  }
}

TEST(CudaAttend, MatchesTruthOverShapes) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t dim : {64, 128, 192, 256}) {
    for (const int64_t group : {1, 3, 4, 8, 12, 16, 40, 64}) {
      CaseOptions o = decode_options(layered_policy(0.04, 0.003), 1000);
      o.shape = {.kv_heads = 1, .q_heads = group, .head_dim_k = dim, .head_dim_v = dim};
      DeviceCase c({o});
      c.check("head_dim " + std::to_string(dim) + ", group " + std::to_string(group), kTightCuda);
    }
    for (const Format f : {Format::bf16, Format::fp8_e4m3}) {
      CaseOptions o = decode_options(plain_policy(f), 300);
      o.shape = {.kv_heads = 2, .q_heads = 8, .head_dim_k = dim, .head_dim_v = dim};
      DeviceCase c({o});
      c.check("head_dim " + std::to_string(dim) + ", plain " + std::string(to_string(f)), kTightCuda);
    }
  }
}

TEST(CudaAttend, WindowSoftcapSinksOffset) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy :
       {layered_policy(0.05, 0.004), plain_policy(Format::bf16), sealed_policy(64, 128)}) {
    for (const int64_t window : {0, 1, 64, 100, 300}) {
      CaseOptions o = decode_options(policy, 777);
      o.shape.window = window;
      o.sink_logits = window != 100;
      o.softcap = window == 300 ? 20.0f : 0.0f;
      o.k_offset = 3.0f;
      DeviceCase c({o});
      c.check("window " + std::to_string(window), kTightCuda);
    }
  }
}

TEST(CudaAttend, Verify) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(0.04, 0.004), sealed_policy(64, 128),
                                    plain_policy(Format::bf16), mix(Format::nvfp4x2, Format::nvfp4x2)}) {
    for (const int64_t queries : {2, 3, 8, 16}) {
      for (const int64_t length : {0, 60, 120, 505, 640}) {
        CaseOptions o = decode_options(policy, length);
        o.queries = queries;
        DeviceCase c({o});
        c.check(std::to_string(queries) + " queries, length " + std::to_string(length), kTightCuda);
      }
    }
  }
}

TEST(CudaAttend, Prefill) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(0.04, 0.004), sealed_policy(64, 128),
                                    plain_policy(Format::bf16)}) {
    CaseOptions o = decode_options(policy, 300);
    o.queries = 150;
    o.mode = AttendMode::prefill;
    DeviceCase c({o});
    c.check("prefill", kTightCuda);
    o.causal = false;
    DeviceCase all({o});
    all.check("prefill, not causal", kTightCuda);
  }
}

TEST(CudaAttend, RaggedBatchAndTheRule) {
  SKIP_WITHOUT_DEVICE();
  int64_t promoted = 0, skipped = 0;
  for (const float gain : {0.7f, 1.0f}) {
    std::vector<CaseOptions> cases;
    for (const int64_t length : {5, 64, 1111, 3000, 700}) {
      CaseOptions o = decode_options(layered_policy(0.05, 0.04), length);
      o.q_gain = gain;
      o.equalizer = false;  // it belongs to the model, and differs by seed here
      o.seed = static_cast<uint32_t>(length);
      cases.push_back(o);
    }
    DeviceCase c(cases);
    c.check("ragged", kTightCuda);
    c.check_rule("ragged", &promoted, &skipped);
  }
  EXPECT_GT(promoted, 5);
  EXPECT_GT(skipped, 5);
}

// Scores far apart in the walk that every case goes through: a page's are often far above the reference.
TEST(CudaAttend, ReferencesThatRise) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = decode_options(plain_policy(Format::bf16), 2000);
  o.softcap = 1000.0f;
  o.q_gain = 12.0f;
  DeviceCase c({o});
  c.plan_with(0, true);  // walks of eight pages
  c.check("references that rise", kTightCuda);
}

// Of a sealed policy each position reads in full what is within `recent` of its own end, where the
// residual is held: the eight positions do not agree about one page.
TEST(CudaAttend, PositionsAtTheEdgeOfRecent) {
  SKIP_WITHOUT_DEVICE();
  for (const Format v : {Format::nvfp4, Format::int3, Format::bf16}) {
    for (const int64_t queries : {1, 2, 8}) {
      const LayerPolicy policy = mix(Format::nvfp4, v, sealed_policy(64, 128));
      DeviceCase c({decode_options(policy, 64 * 8 - 4 + 127, queries)});
      const std::string what = std::string(to_string(v)) + " V, " + std::to_string(queries) + " positions";
      c.check(what, kTightCuda);
      const auto decisions = c.attend().decisions;
      const int64_t total = c.host(0).total();
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t end = total - queries + i + 1;
        for (int64_t page = 0; page < (end - 1) / kPageTokens; ++page) {
          const bool full = page * kPageTokens < policy.sinks || (page + 1) * kPageTokens > end - policy.recent;
          EXPECT_EQ(decisions[static_cast<size_t>((i * c.max_pages() + page) * 2)] ==
                        static_cast<uint8_t>(cuda::Decision::full), full)
              << what << ": position " << i << ", page " << page;
        }
      }
    }
  }
}

// A row of the batch without tokens: nothing is read of it, and nothing written.
TEST(CudaAttend, IdleRows) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(0.05, 0.004), plain_policy(Format::bf16),
                                    mix(Format::nvfp4, Format::int3)}) {
    for (const int64_t queries : {1, 3, 20}) {
      CaseOptions o = decode_options(policy, 200, queries);
      o.mode = queries > 16 ? AttendMode::prefill : AttendMode::decode;
      DeviceCase c({o, o, o});
      const auto all = c.attend();
      c.lengths()[1] = 0;
      cuda::copy_to_device(c.device_lengths().data(), c.lengths().data(), 12, nullptr);
      const auto got = c.attend();
      const size_t row = all.out.size() / 3;
      for (size_t i = 0; i < row; ++i) ASSERT_TRUE(std::isnan(got.out[row + i])) << i;
      for (const size_t b : {size_t{0}, size_t{2}}) {
        EXPECT_LT(row_error({&got.out[b * row], &got.out[b * row] + row}, {&all.out[b * row], &all.out[b * row] + row}, 128),
                  1e-5) << b;
      }
    }
  }
}

// attend_prepare takes pages in chunks of at least 128, or 256 with more than 16 rows, at most 32 of
// them, and with many sequences several chunks in one block.
TEST(CudaAttend, ChunksOfPages) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = decode_options(layered_policy(0.01, 0.0005), 270000);
  o.shape = {.kv_heads = 1, .q_heads = 4, .head_dim_k = 64, .head_dim_v = 64};
  o.equalizer = false;
  DeviceCase longest({o});
  longest.check("chunks of 256 pages", kTightCuda);
  o.shape.q_heads = 20;
  o.length = 50000;
  DeviceCase rows({o});
  rows.check("20 rows", kTightCuda);
  o.shape = {.kv_heads = 8, .q_heads = 8, .head_dim_k = 64, .head_dim_v = 64};
  o.length = 9000;
  std::vector<CaseOptions> cases{o};
  o.length = 70;
  cases.resize(20, o);
  DeviceCase many(cases);
  many.check("two chunks a block", kTightCuda);
}

TEST(CudaAttend, RunsAreBitwiseEqual) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = decode_options(layered_policy(0.03, 0.003), 5000);
  DeviceCase c({o, o, o});
  c.check_repeats();
}

TEST(CudaAttend, SlotsBeyond2To31Bytes) {
  SKIP_WITHOUT_DEVICE();
  if (cuda::device_info().memory_free < int64_t{8} << 30) GTEST_SKIP() << "needs 8 GiB of device memory";
  for (const LayerPolicy& policy : {layered_policy(0.05, 0.004), plain_policy(Format::bf16)}) {
    DeviceCase c({decode_options(policy, 900)});
    c.move_pages((int64_t{5} << 30) / cuda::slot_sizes(c.shape(), c.policy()).page);
    c.check("slots from 5 GiB on", kTightCuda);
  }
}

#ifdef THRIFTATTN_WITH_CUDA
// The first of the lengths is the case's own.
void replay_lengths(DeviceCase& c, std::vector<int32_t> lengths) {
  const auto longest = c.attend();
  Captured step(c);
  lengths.push_back(lengths.front());
  for (const int32_t length : lengths) {
    c.lengths()[0] = length;
    cuda::copy_to_device(c.device_lengths().data(), c.lengths().data(), 4, nullptr);
    const auto replayed = step.replay();
    const auto direct = c.attend();
    ASSERT_EQ(std::memcmp(replayed.out.data(), direct.out.data(), direct.out.size() * 4), 0) << length;
    const bool same = std::memcmp(direct.out.data(), longest.out.data(), direct.out.size() * 4) == 0;
    EXPECT_EQ(same, length == lengths.front()) << length;
  }
}

// Of every kernel: pages, residuals and open pages lie elsewhere at each replay.
TEST(CudaAttend, GraphReplayFollowsTheTables) {
  SKIP_WITHOUT_DEVICE();
  LayerPolicy int3 = layered_policy(0.05, 0.001);
  int3.k_format = Format::mxfp4;
  int3.v_format = Format::int3;
  const LayerPolicy balanced = layered_policy(0.05, 0.001);
  struct Step {
    const char* name;
    LayerPolicy policy;
    int64_t queries;
    AttendMode mode;
  };
  const Step steps[] = {{"planes", balanced, 1, AttendMode::decode},
                        {"planes, 8 positions", balanced, 8, AttendMode::decode},
                        {"groups", int3, 1, AttendMode::decode},
                        {"BF16 rows", plain_policy(Format::bf16), 1, AttendMode::decode},
                        {"FP8 rows", plain_policy(Format::fp8_e4m3), 1, AttendMode::decode},
                        {"FP8 rows, 3 positions", plain_policy(Format::fp8_e4m3), 3, AttendMode::decode},
                        {"prefill", balanced, 70, AttendMode::prefill},
                        {"prefill of BF16 rows", plain_policy(Format::bf16), 70, AttendMode::prefill}};
  for (const Step& s : steps) {
    SCOPED_TRACE(s.name);
    CaseOptions o = decode_options(s.policy, 700, s.queries);
    o.mode = s.mode;
    DeviceCase c({o, o});
    const auto direct = c.attend();
    Captured step(c);
    for (int i = 0; i < 2; ++i) {
      c.reverse_slots();
      const auto replayed = step.replay();
      EXPECT_EQ(std::memcmp(replayed.out.data(), direct.out.data(), direct.out.size() * 4), 0) << i;
      EXPECT_EQ(std::memcmp(replayed.lse.data(), direct.lse.data(), direct.lse.size() * 4), 0) << i;
      EXPECT_EQ(replayed.decisions, direct.decisions) << i;
    }
    c.check(s.name, kTightCuda);
  }
}

TEST(CudaAttend, GraphReplayFollowsTheLengths) {
  SKIP_WITHOUT_DEVICE();
  // Plain pages: any shorter length is a state of the same cache.
  DeviceCase plain({decode_options(plain_policy(Format::bf16), 700)});
  replay_lengths(plain, {701, 130, 64, 1});
  // Layered ones: where the open page is in the same slot, whatever it holds there. Splits and units change
  // with the length, and there are fewer blocks than multiprocessors.
  for (const LayerPolicy& policy : {layered_policy(0.05, 0.001), sealed_policy(64, 512)}) {
    CaseOptions o = decode_options(policy, 12800);
    o.shape.kv_heads = 1;
    o.shape.q_heads = 4;
    DeviceCase layered({o});
    replay_lengths(layered, {12801, 10241, 1, 2561, 129});
  }
}
#endif

TEST(CudaPlan, RefusesWhatNoKernelServes) {
  SKIP_WITHOUT_DEVICE();
  const auto refused = [](LayerShape shape, LayerPolicy policy, const char* part) {
    try {
      cuda::AttendPlan plan(shape, policy, {.batch = 1, .max_pages = 8});
      ADD_FAILURE() << "accepted: " << part;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  const LayerShape shape{.kv_heads = 2, .q_heads = 8, .head_dim_k = 128, .head_dim_v = 128};
  LayerShape other = shape;
  other.head_dim_k = other.head_dim_v = 96;
  refused(other, layered_policy(1, 0), "head_dim");
  other = shape;
  other.head_dim_v = 64;
  refused(other, layered_policy(1, 0), "two widths");
  other = shape;
  other.q_heads = 256;
  refused(other, layered_policy(1, 0), "query heads");
  refused(shape, plain_policy(Format::q8_0), "q8_0");
}

}  // namespace
}  // namespace thriftattn::testing
