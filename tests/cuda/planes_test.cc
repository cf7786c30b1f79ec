// What attend_planes alone can get wrong: walks with whole pages and other items, rows of a tile
// that decide differently, more units of work than blocks, and masses between the thresholds.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/device_case.h"

namespace thriftattn::testing {
namespace {

CaseOptions options(LayerPolicy policy, int64_t length) {
  CaseOptions o;
  o.shape = {.kv_heads = 1, .q_heads = 4, .head_dim_k = 128, .head_dim_v = 128};
  o.policy = policy;
  o.length = length;
  o.q_gain = 1.0f;
  return o;
}

// Long enough that the walk with the open page has whole pages too; with a window, one has the page
// that it cuts, which is now and then the one with most of the attention.
TEST(CudaPlanes, WalksWithPagesAndOtherItems) {
  SKIP_WITHOUT_DEVICE();
  DeviceCase open({options(layered_policy(0.004, 0.0005), 50000)});
  open.check("open page", kTightCuda);
  DeviceCase sealed({options(sealed_policy(64, 512), 50000)});
  sealed.check("sealed", kTightCuda);
  for (int64_t length = 2100; length < 2500; length += 13) {
    CaseOptions o = options(layered_policy(0.05, 0.01), length);
    o.shape.q_heads = 8;
    o.shape.window = 2000;
    o.q_gain = 2.5f;
    DeviceCase c({o});
    c.check("window, length " + std::to_string(length), kTightCuda);
  }
}

TEST(CudaPlanes, PositionsThatDecideDifferently) {
  SKIP_WITHOUT_DEVICE();
  int64_t promoted = 0, skipped = 0;
  for (const int64_t queries : {2, 4, 8, 16}) {
    CaseOptions o = options(layered_policy(0.05, 0.03), 3000);
    o.queries = queries;
    DeviceCase c({o});
    c.check(std::to_string(queries) + " positions", kTightCuda);
    // Pages that some positions promote and others do not; some skip and others do not.
    const auto decisions = c.attend().decisions;
    for (int64_t page = 0; page < c.max_pages(); ++page) {
      int64_t full = 0, skip = 0;
      for (int64_t i = 0; i < queries; ++i) {
        const auto d =
            static_cast<cuda::Decision>(decisions[static_cast<size_t>(i * c.max_pages() + page)]);
        full += d == cuda::Decision::full ? 1 : 0;
        skip += d == cuda::Decision::skip ? 1 : 0;
      }
      promoted += full > 0 && full < queries ? 1 : 0;
      skipped += skip > 0 && skip < queries ? 1 : 0;
    }
  }
  EXPECT_GT(promoted, 5);
  EXPECT_GT(skipped, 0);
}

// 40 sequences, 2 KV heads and 6 splits: 480 units, of which an H100 holds 396 at a time.
TEST(CudaPlanes, MoreUnitsThanBlocks) {
  SKIP_WITHOUT_DEVICE();
  std::vector<CaseOptions> cases;
  for (uint32_t seed = 1; seed <= 40; ++seed) {
    CaseOptions o = options(layered_policy(0.05, 0.01), 2600);
    o.shape = {.kv_heads = 2, .q_heads = 4, .head_dim_k = 128, .head_dim_v = 128};
    o.seed = seed;
    cases.push_back(o);
  }
  DeviceCase c(cases);
  c.check("first call", kTightCuda);
  const auto second = c.attend(), third = c.attend();
  EXPECT_EQ(std::memcmp(second.out.data(), third.out.data(), second.out.size() * 4), 0);
  c.check("fourth call", kTightCuda);
}

// 70 sequences from less than a page to 300 of them: units of sequence after sequence, looked up 32
// sequences at a time; and the units of one sequence are not those that it has by itself.
std::vector<CaseOptions> ragged(LayerPolicy policy, int64_t queries) {
  std::vector<CaseOptions> cases;
  for (int i = 0; i < 70; ++i) {
    CaseOptions o = options(policy, i % 7 == 3 ? 19200 - 100 * i : 40 + 37 * i);
    o.shape = {.kv_heads = 2, .q_heads = 8, .head_dim_k = 64, .head_dim_v = 64};
    o.equalizer = false;  // it belongs to the model, and differs by seed here
    o.queries = queries;
    o.seed = static_cast<uint32_t>(i + 1);
    cases.push_back(o);
  }
  return cases;
}

TEST(CudaPlanes, UnitsOfARaggedBatch) {
  SKIP_WITHOUT_DEVICE();
  DeviceCase decode(ragged(sealed_policy(64, 512), 1));
  decode.check("decode", kTightCuda);
  DeviceCase verify(ragged(layered_policy(0.05, 0.001), 3));
  verify.check("three positions", kTightCuda);
}

// Of every kernel: attend_planes, attend_decode, attend_groups.
TEST(CudaPlanes, BatchInvariantResultsAreThoseOfOneAlone) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [policy, queries] :
       {std::pair{sealed_policy(64, 512), int64_t{1}}, {sealed_policy(64, 512), 3},
        {plain_policy(Format::bf16), 1}, {mix(Format::nvfp4, Format::int3), 1}}) {
    const std::vector<CaseOptions> cases = ragged(policy, queries);
    DeviceCase batch(cases);
    const auto shared = batch.attend();
    batch.plan_with(0, true);
    batch.check("by its own length", kTightCuda);
    const auto all = batch.attend();
    const bool differs =
        std::memcmp(all.out.data(), shared.out.data(), all.out.size() * 4) != 0;
    for (size_t b = 0; b < cases.size(); b += b < 40 ? 3 : 13) {
      DeviceCase one({cases[b]});
      one.plan_with(0, true);
      const auto alone = one.attend();
      const size_t n = alone.out.size();
      EXPECT_EQ(std::memcmp(alone.out.data(), all.out.data() + b * n, n * 4), 0) << b;
      EXPECT_EQ(std::memcmp(alone.lse.data(), all.lse.data() + b * alone.lse.size(),
                            alone.lse.size() * 4), 0) << b;
    }
    // What is asked for is not what happens anyway, but where an emulated device has so few
    // multiprocessors that every plan has the same splits.
    EXPECT_TRUE(differs || cuda::device_info().multiprocessors < 64) << queries;
  }
}

// The open page is shared by four warps, 16 tokens each: every way to begin or end within a share,
// with and without a window that cuts it, beside pages that count twice, and without a floor.
TEST(CudaPlanes, OpenPagesEndAnywhere) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t dim : {64, 128, 192, 256}) {
    for (const int64_t held : {1, 2, 8, 15, 16, 17, 32, 33, 49, 63, 64}) {
      CaseOptions o = options(held % 2 == 0 ? layered_policy(0.05, 0.01) : sealed_policy(64, 512),
                              64 * 21 + held - 1);
      o.shape = {.kv_heads = 2, .q_heads = held % 3 == 0 ? 6 : 16, .head_dim_k = dim,
                 .head_dim_v = dim};
      o.q_gain = 2.5f;
      const std::string what = std::to_string(dim) + " dims, " + std::to_string(held) + " tokens";
      DeviceCase({o}).check(what, kTightCuda);
      for (const int64_t window : {5, 20, 60}) {
        o.shape.window = window;
        DeviceCase({o}).check(what + ", window " + std::to_string(window), kTightCuda);
      }
      o.shape.window = 0;
      o.mode = AttendMode::prefill;
      o.q_gain = 6.0f;
      DeviceCase({o}).check(what + ", prefill", kTightCuda);
    }
  }
}

// A query head that is not a number, or whose scores FP32 cannot tell apart, spoils at most its own
// output, and the kernel ends.
TEST(CudaPlanes, QueriesBeyondReason) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy : {layered_policy(0.05, 0.01), sealed_policy(64, 512)}) {
    for (const int64_t queries : {1, 3}) {
      for (const float value : {NAN, INFINITY, 1e9f, 1e30f, 3e38f}) {
        CaseOptions o = options(policy, 1500);
        o.queries = queries;
        DeviceCase c({o});
        const int64_t dim = c.shape().head_dim_k;
        auto* head = static_cast<float*>(const_cast<void*>(c.call().q)) + dim;
        const std::vector<float> values(static_cast<size_t>(dim), value);
        cuda::copy_to_device(head, values.data(), dim * 4, nullptr);
        const auto got = c.attend();
        for (size_t i = 0; i < got.out.size(); ++i) {
          const bool own = static_cast<int64_t>(i) / dim == 1;
          ASSERT_TRUE(own || std::isfinite(got.out[i])) << value;
        }
      }
    }
  }
}

// Groups of which a tile of rows holds no whole number: positions decide as one all the same.
TEST(CudaPlanes, GroupsThatDoNotDivideATile) {
  SKIP_WITHOUT_DEVICE();
  int64_t promoted = 0, skipped = 0;
  for (const int64_t dim : {128, 192}) {
    for (const int64_t group : {3, 5, 6, 7, 12}) {
      for (const int64_t queries : {11, 16}) {
        CaseOptions o = options(layered_policy(0.05, 0.02), 1500 + 64 * group + queries);
        o.shape = {.kv_heads = 2, .q_heads = 2 * group, .head_dim_k = dim, .head_dim_v = dim};
        o.queries = queries;
        o.seed = static_cast<uint32_t>(10 * group + queries);
        DeviceCase c({o});
        const std::string what = "group " + std::to_string(group) + ", " + std::to_string(queries) +
                                 " positions, head_dim " + std::to_string(dim);
        c.check(what, kTightCuda);
        c.check_rule(what, &promoted, &skipped);
      }
    }
  }
  EXPECT_GT(promoted, 5);
}

// One of them by itself: 11 positions of 6 rows are 66 of at most 32 a tile.
TEST(CudaPlanes, AGroupThatDoesNotDivideATile) {
  SKIP_WITHOUT_DEVICE();
  int64_t promoted = 0, skipped = 0;
  CaseOptions o = options(layered_policy(0.05, 0.02), 1900);
  o.shape.q_heads = 6;
  o.queries = 11;
  DeviceCase c({o});
  c.check("group 6", kTightCuda);
  c.check_rule("group 6", &promoted, &skipped);
  EXPECT_GT(promoted, 5);
}

// Scores far apart: a later page's are often far above the reference that the floor or the first page
// set. By one warp a page and by two, which tell each other; without a floor the first page sets it.
TEST(CudaPlanes, ReferencesThatRise) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t queries : {1, 4, 8}) {
    for (const AttendMode mode : {AttendMode::decode, AttendMode::prefill}) {
      CaseOptions o = options(layered_policy(1.0, 0.0), 64 * 40 + 13);
      o.queries = queries;
      o.mode = mode;
      o.q_gain = 6.0f;
      DeviceCase c({o});
      c.plan_with(0, true);  // walks of ten pages and more
      c.check(std::to_string(queries) + " positions", kTightCuda);
    }
  }
}

TEST(CudaPlanes, PagesWithoutResidualAreNotPromoted) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t queries : {1, 4}) {
    CaseOptions o = options(layered_policy(0.02, 0.0), 1500);
    o.queries = queries;
    o.q_gain = 2.5f;
    DeviceCase c({o});
    const auto promoted = [&] {
      const auto decisions = c.attend().decisions;
      return std::count(decisions.begin(), decisions.end(), static_cast<uint8_t>(cuda::Decision::full));
    };
    const auto all = promoted();
    drop_residuals(c, 2);
    c.check("half of them", kTightCuda);
    EXPECT_LT(promoted(), all);
    drop_residuals(c, 1);
    c.check("none", kTightCuda);
    EXPECT_EQ(promoted(), 0);
  }
}

// Sizes of units follow from the lengths alone, in whatever order warps come.
TEST(CudaPlanes, UnitsAreDecidedAlike) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = options(layered_policy(1.0, 0.0), 4000);
  o.shape = {.kv_heads = 1, .q_heads = 2, .head_dim_k = 64, .head_dim_v = 64};
  DeviceCase c({o, o, o});
  c.check_repeats();
}

// Masses of 0.02 or so, thresholds well below and above.
TEST(CudaPlanes, NothingIsDoneBetweenTheThresholds) {
  SKIP_WITHOUT_DEVICE();
  int64_t promoted = 0, skipped = 0;
  DeviceCase c({options(layered_policy(0.1, 0.01), 3000)});
  c.check_rule("far apart", &promoted, &skipped);
  EXPECT_EQ(promoted, 0);
  EXPECT_EQ(skipped, 0);
  const auto decisions = c.attend().decisions;
  EXPECT_GT(
      std::count(decisions.begin(), decisions.end(), static_cast<uint8_t>(cuda::Decision::base)),
      40);
}

}  // namespace
}  // namespace thriftattn::testing
