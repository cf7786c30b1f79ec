// Many sequences in one call, bit-equal to one by one; verify of draft tokens, bit-equal to
// decoding them, with rejected drafts leaving nothing behind.
#include <gtest/gtest.h>
#include <tbb/global_control.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "attend/attend_test_util.h"

namespace thriftattn {
namespace {

using namespace testing;

// Sequences with an open step each, of ragged lengths, in one cache.
class Ragged {
 public:
  struct Member {
    int64_t length, queries;
    AttendMode mode;
  };

  Ragged(const LayerPolicy& policy, std::vector<Member> members, AttendMath math = AttendMath::f32)
      : shape_{.kv_heads = 2, .q_heads = 6, .head_dim_k = 64, .head_dim_v = 96},
        members_(std::move(members)),
        cache_({.layers = {shape_}, .policy = {policy}, .poison_free = true}) {
    std::mt19937 rng(5);
    std::normal_distribution<float> normal;
    const auto random = [&](int64_t n, float gain) {
      std::vector<float> x(static_cast<size_t>(n));
      for (float& v : x) v = gain * normal(rng);
      return x;
    };
    cu_.push_back(0);
    for (const Member& m : members_) {
      const int64_t total = m.length + m.queries;
      const auto k = random(total * 2 * 64, 1), v = random(total * 2 * 96, 1);
      const SequenceId seq = cache_.create();
      for (const auto& [first, n] : {std::pair{int64_t{0}, m.length}, {m.length, m.queries}}) {
        if (n == 0) continue;
        cache_.begin_step(seq, n);
        cache_.append(
            seq, 0, TensorView<const float>::dense(&k[static_cast<size_t>(first * 128)], n, 2, 64),
            TensorView<const float>::dense(&v[static_cast<size_t>(first * 192)], n, 2, 96));
        if (first == 0 && m.length > 0) cache_.commit(seq);
      }
      sequences_.push_back(seq);
      modes_.push_back(m.mode);
      cu_.push_back(cu_.back() + m.queries);
    }
    q_ = random(cu_.back() * 6 * 64, 2.5f);
    sinks_ = random(6, 2);
    config_ = {.math = math, .softmax_scale = 0.125f, .softcap = 20.0f};
  }

  struct Result {
    std::vector<float> out, lse;
    std::vector<AttendStats> stats;
  };

  // One call, the sequences in the given order.
  Result together(const std::vector<size_t>& order) {
    Result r = empty();
    std::vector<AttendRequest> requests;
    for (size_t i : order) requests.push_back(request(i, r));
    attend_batch(cache_, requests);
    return r;
  }

  Result one_by_one() {
    Result r = empty();
    for (size_t i = 0; i < members_.size(); ++i) attend(cache_, request(i, r));
    return r;
  }

  PackedQueries packed(Result& r) {
    const int64_t n = cu_.back();
    return {.config = config_,
            .sequences = sequences_,
            .cu_seqlens = cu_,
            .modes = modes_,
            .q = TensorView<const float>::dense(q_.data(), n, 6, 64),
            .out = TensorView<float>::dense(r.out.data(), n, 6, 96),
            .lse = TensorView<float>::dense(r.lse.data(), n, 6, 1),
            .sink_logits = sinks_.data(),
            .stats = r.stats};
  }

  Result empty() const {
    const auto rows = static_cast<size_t>(cu_.back() * 6);
    return {std::vector<float>(rows * 96, NAN), std::vector<float>(rows, NAN),
            std::vector<AttendStats>(members_.size())};
  }

  AttendRequest request(size_t i, Result& r) {
    PackedQueries all = packed(r);
    AttendRequest one{.sequence = sequences_[i],
                      .config = config_,
                      .q = all.q,
                      .out = all.out,
                      .lse = all.lse,
                      .sink_logits = sinks_.data()};
    one.config.mode = members_[i].mode;
    one = rows_of(one, cu_[i], members_[i].queries);
    one.stats = &r.stats[i];
    return one;
  }

  KvCache& cache() { return cache_; }
  size_t size() const { return members_.size(); }

  std::vector<int64_t> cu_;
  std::vector<AttendMode> modes_;

 private:
  LayerShape shape_;
  std::vector<Member> members_;
  KvCache cache_;
  std::vector<SequenceId> sequences_;
  std::vector<float> q_, sinks_;
  AttendConfig config_;
};

void expect_same(const Ragged::Result& a, const Ragged::Result& b, const char* what) {
  EXPECT_TRUE(same_bits(a.out, b.out)) << what;
  EXPECT_TRUE(same_bits(a.lse, b.lse)) << what;
  for (size_t i = 0; i < a.stats.size(); ++i) {
    EXPECT_EQ(a.stats[i].bits_read, b.stats[i].bits_read) << what;
    EXPECT_EQ(a.stats[i].pages_promoted, b.stats[i].pages_promoted) << what;
    EXPECT_EQ(a.stats[i].sum_mass_4bit, b.stats[i].sum_mass_4bit) << what;
    EXPECT_EQ(a.stats[i].rows, b.stats[i].rows) << what;
  }
}

const std::vector<Ragged::Member> kMixed = {
    {700, 1, AttendMode::decode},         {0, 130, AttendMode::prefill},
    {64 * 40 + 3, 1, AttendMode::decode}, {333, 40, AttendMode::prefill},
    {0, 1, AttendMode::decode},           {511, 7, AttendMode::decode},
    {100, 0, AttendMode::decode},         {63, 2, AttendMode::decode},
    {64, 64, AttendMode::prefill}};

TEST(AttendBatch, MixedBatchEqualsOneByOneBitwise) {
  for (const LayerPolicy& policy :
       {layered_policy(0.1, 0.02), sealed_policy(64, 128), plain_policy(Format::q8_0),
        by_head({layered_policy(0.1, 0.02), plain_policy(Format::bf16)})}) {
    for (const AttendMath math : {AttendMath::f32, AttendMath::fast}) {
      Ragged batch(policy, kMixed, math);
      const auto alone = batch.one_by_one();
      std::vector<size_t> order(batch.size());
      std::iota(order.begin(), order.end(), size_t{0});
      expect_same(batch.together(order), alone, "in order");
      std::reverse(order.begin(), order.end());
      expect_same(batch.together(order), alone, "reversed");
      auto packed = batch.empty();
      attend_batch(batch.cache(), batch.packed(packed));
      expect_same(packed, alone, "packed");
      tbb::global_control limit(tbb::global_control::max_allowed_parallelism, 1);
      auto one_thread = batch.empty();
      attend_batch(batch.cache(), batch.packed(one_thread));
      expect_same(one_thread, alone, "one thread");
    }
  }
}

// What else is in the batch does not change a result, and what is not asked for is not written.
TEST(AttendBatch, SubsetsGiveTheSameBits) {
  Ragged batch(layered_policy(0.05, 0.01), kMixed);
  const auto alone = batch.one_by_one();
  const auto some = batch.together({5, 1, 0});
  for (size_t i = 0; i < batch.size(); ++i) {
    const bool in = i == 5 || i == 1 || i == 0;
    for (size_t at = static_cast<size_t>(batch.cu_[i] * 6 * 96);
         at < static_cast<size_t>(batch.cu_[i + 1] * 6 * 96); ++at) {
      if (in) {
        ASSERT_EQ(some.out[at], alone.out[at]) << i;
      } else {
        ASSERT_TRUE(std::isnan(some.out[at])) << i;
      }
    }
  }
}

TEST(AttendBatch, EveryMemberMatchesTheReference) {
  Ragged batch(layered_policy(0.1, 0.02), kMixed);
  const auto got = batch.one_by_one();
  auto want = batch.empty();
  for (size_t i = 0; i < batch.size(); ++i) attend_reference(batch.cache(), batch.request(i, want));
  EXPECT_LT(row_error(got.out, want.out, 96), kTight);
  expect_near_lse(got.lse, want.lse, "batch");
}

TEST(AttendBatch, RefusesBeforeAnythingIsWritten) {
  Ragged batch(layered_policy(0.1, 0.02), kMixed);
  const auto refuses = [&](const char* part, auto&& change) {
    auto r = batch.empty();
    PackedQueries p = batch.packed(r);
    change(p);
    expect_refusal(ErrorCode::invalid_argument, part, [&] { attend_batch(batch.cache(), p); });
    EXPECT_TRUE(std::all_of(r.out.begin(), r.out.end(), [](float x) { return std::isnan(x); }))
        << part;
  };
  const auto cu = batch.cu_;
  std::vector<int64_t> changed;
  const auto with_cu = [&](size_t at, int64_t value) {
    changed = cu;
    changed[at] = value;
    return std::span<const int64_t>(changed);
  };
  refuses("9 sequences need 10 cu_seqlens", [&](auto& p) { p.cu_seqlens = p.cu_seqlens.first(9); });
  refuses("9 sequences need 10 cu_seqlens", [&](auto& p) { p.cu_seqlens = {}; });
  refuses("run from 1", [&](auto& p) { p.cu_seqlens = with_cu(0, 1); });
  refuses("run from 0 to 245", [&](auto& p) { p.cu_seqlens = with_cu(9, 245); });
  refuses("cu_seqlens[3] = 500 is more than", [&](auto& p) { p.cu_seqlens = with_cu(3, 500); });
  refuses("cu_seqlens[2] = ", [&](auto& p) { p.cu_seqlens = with_cu(3, int64_t{-1} << 62); });
  refuses("modes has 2 entries", [&](auto& p) { p.modes = p.modes.first(2); });
  refuses("stats has 3 entries", [&](auto& p) { p.stats = p.stats.first(3); });
  refuses("layer 1 is not in 0..0", [](auto& p) { p.layer = 1; });
  refuses("null pointer", [](auto& p) { p.q.data = nullptr; });
  refuses("must be [246][6][96]", [](auto& p) { p.out.heads = 5; });
  // The last member is wrong: the first ones are not computed either.
  refuses("request 8: attend: prefill of 65",
          [&](auto& p) { p.cu_seqlens = with_cu(8, cu[8] - 1); });
  auto r = batch.empty();
  std::vector<AttendRequest> twice = {batch.request(0, r), batch.request(1, r),
                                      batch.request(0, r)};
  expect_refusal(ErrorCode::invalid_argument, "of request 0 at 0x",
                 [&] { attend_batch(batch.cache(), twice); });
  attend_batch(batch.cache(), std::span<const AttendRequest>());  // nothing to do
}

// Requests may interleave in one buffer as long as no element is shared: [heads][tokens][dim].
TEST(AttendBatch, HeadMajorOutputsInterleave) {
  Ragged batch(layered_policy(0.1, 0.02),
               {{200, 3, AttendMode::decode}, {300, 4, AttendMode::decode}});
  const auto alone = batch.one_by_one();
  auto r = batch.empty();
  PackedQueries p = batch.packed(r);
  p.out.token_stride = 96;
  p.out.head_stride = 7 * 96;
  attend_batch(batch.cache(), p);
  for (int64_t t = 0; t < 7; ++t) {
    for (int64_t h = 0; h < 6; ++h) {
      for (int64_t d = 0; d < 96; ++d) {
        ASSERT_EQ(p.out.row(t, h)[d], alone.out[static_cast<size_t>((t * 6 + h) * 96 + d)]);
      }
    }
  }
}

// Everything that pages, residuals and open pages of two caches hold is seen by usage and by what
// decode reads next.
struct Verified {
  std::vector<float> out, lse;
};

Verified decode_rows(KvCache& cache, SequenceId seq, const AttentionCase& source, int64_t first,
                     int64_t n, std::vector<float>& buffer) {
  const AttendRequest whole = source.request(buffer);
  const auto row = static_cast<size_t>(whole.out.token_stride);
  Verified v{std::vector<float>(static_cast<size_t>(n) * row, NAN),
             std::vector<float>(static_cast<size_t>(n * whole.q.heads), NAN)};
  AttendRequest r = rows_of(whole, first, n);
  r.sequence = seq;
  r.out = TensorView<float>::dense(v.out.data(), n, whole.out.heads, whole.out.head_dim);
  r.lse = TensorView<float>::dense(v.lse.data(), n, whole.q.heads, 1);
  attend(cache, r);
  return v;
}

TEST(Verify, DraftsEqualDecodeAndRejectedOnesLeaveNothing) {
  for (const LayerPolicy& policy :
       {layered_policy(0.05, 0.005), sealed_policy(64, 128),
        mixed(Format::nvfp4x2, Format::nvfp4x2), plain_policy(Format::bf16),
        mixed(Format::nvfp4, Format::fp8_e4m3),
        by_head({sealed_policy(0, 64), layered_policy(0.1, 0.01)})}) {
    for (const AttendMath math : {AttendMath::f32, AttendMath::fast}) {
      // Long enough for two splits; the drafts cross page boundaries at every offset.
      CaseOptions o{.policy = policy, .length = 64 * 33 - 20, .queries = 150, .sink_logits = true};
      o.math = math;
      AttentionCase source(o);
      std::vector<float> buffer;
      CaseOptions wrong_options = o;
      wrong_options.seed = 77;
      AttentionCase wrong(wrong_options);
      KvCache drafted(source.cache().config()), plain(source.cache().config());
      const SequenceId a = drafted.create(), b = plain.create();
      for (auto [cache, seq] : {std::pair{&drafted, a}, {&plain, b}}) {
        cache->begin_step(seq, o.length);
        cache->append(seq, 0, source.k_view(0, o.length), source.v_view(0, o.length));
        cache->commit(seq);
      }
      std::mt19937 rng(3);
      for (int64_t done = 0; done + 16 <= o.queries;) {
        const int64_t n = 2 + static_cast<int64_t>(rng() % 15),
                      accepted = static_cast<int64_t>(rng() % (n + 1));
        // A draft that is thrown away whole, then one of which `accepted` tokens are right.
        drafted.begin_step(a, n);
        drafted.append(a, 0, wrong.k_view(o.length + done, n), wrong.v_view(o.length + done, n));
        const Verified junk = decode_rows(drafted, a, wrong, done, n, buffer);
        drafted.rollback(a);
        drafted.begin_step(a, n);
        drafted.append(a, 0, source.k_view(o.length + done, n), source.v_view(o.length + done, n));
        const Verified verify = decode_rows(drafted, a, source, done, n, buffer);
        EXPECT_FALSE(same_bits(verify.out, junk.out));
        drafted.commit(a, accepted);
        for (int64_t i = 0; i < accepted; ++i) {
          plain.begin_step(b, 1);
          plain.append(b, 0, source.k_view(o.length + done + i, 1),
                       source.v_view(o.length + done + i, 1));
          const Verified one = decode_rows(plain, b, source, done + i, 1, buffer);
          plain.commit(b);
          const auto row = one.out.size();
          ASSERT_EQ(std::memcmp(one.out.data(), &verify.out[static_cast<size_t>(i) * row], row * 4),
                    0)
              << "token " << done + i << " of a draft of " << n;
          ASSERT_EQ(
              std::memcmp(one.lse.data(), &verify.lse[static_cast<size_t>(i) * one.lse.size()],
                          one.lse.size() * 4),
              0);
        }
        done += accepted;
        EXPECT_EQ(drafted.length(a), plain.length(b));
        const CacheUsage ua = drafted.usage(), ub = plain.usage();
        EXPECT_EQ(ua.total(), ub.total());
        EXPECT_EQ(ua.residual_pages, ub.residual_pages);
        EXPECT_EQ(ua.reencoded_pages, 0);
      }
    }
  }
}

}  // namespace
}  // namespace thriftattn
