// The cache's life cycle: steps and rollback, sealing, residency, forks with copy on write,
// truncation, accounting from the allocator, and what it refuses.
#include "thriftattn/kv_cache.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/float_convert.h"
#include "cache/kv_cache_impl.h"
#include "cache/page_codec.h"
#include "formats/k_transform.h"
#include "formats/nvfp4.h"
#include "support/attention_case.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

using namespace testing;

constexpr LayerShape kShape{.kv_heads = 2, .q_heads = 8, .head_dim_k = 64, .head_dim_v = 64};

struct Tokens {
  std::vector<float> k, v;
  explicit Tokens(int64_t n, uint32_t seed = 1, const LayerShape& s = kShape) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0.5f, 1.0f);
    k.resize(static_cast<size_t>(n * s.kv_heads * s.head_dim_k));
    v.resize(static_cast<size_t>(n * s.kv_heads * s.head_dim_v));
    for (float& x : k) x = normal(rng);
    for (float& x : v) x = normal(rng);
  }
};

TensorView<const float> rows(const std::vector<float>& x, int64_t first, int64_t n) {
  return TensorView<const float>::dense(x.data() + first * 2 * 64, n, 2, 64);
}

KvCacheConfig config(const LayerPolicy& policy, int64_t layers = 2) {
  return {.layers = std::vector<LayerShape>(static_cast<size_t>(layers), kShape),
          .policy = std::vector<LayerPolicy>(static_cast<size_t>(layers), policy),
          .poison_free = true};
}

void feed(KvCache& cache, SequenceId seq, const Tokens& x, int64_t first, int64_t n) {
  cache.begin_step(seq, n);
  for (size_t l = 0; l < cache.config().layers.size(); ++l) {
    cache.append(seq, static_cast<int64_t>(l), rows(x.k, first, n), rows(x.v, first, n));
  }
  cache.commit(seq);
}

LayerView view_of(const KvCache& cache, SequenceId seq, size_t layer = 0) {
  const auto& s = cache.impl().sequence(seq);
  return {cache.impl().layers[layer], s.layers[layer], s.length};
}

// Every byte that the pages and open pages of a sequence hold.
std::vector<uint8_t> content(const KvCache& cache, SequenceId seq) {
  std::vector<uint8_t> bytes;
  const LayerView view = view_of(cache, seq);
  const PageLayout& layout = view.store().layout;
  for (int64_t page = 0; page * kPageTokens < view.length(); ++page) {
    for (int64_t h = 0; h < layout.kv_heads; ++h) {
      if (const PageHead head = view.head(page, h)) {
        bytes.insert(bytes.end(), head.k, head.k + layout.k.head_bytes);
        bytes.insert(bytes.end(), head.v, head.v + layout.v.head_bytes);
      }
      if (const uint8_t* res = view.residual(page, h)) {
        bytes.insert(bytes.end(), res, res + layout.residual_bytes);
      }
    }
    if (const OpenPage* open = view.open(page)) {
      const int64_t held = view.length() - page * kPageTokens;
      for (int64_t h = 0; h < layout.kv_heads; ++h) {
        const auto* k = reinterpret_cast<const uint8_t*>(&open->k[static_cast<size_t>(h * 64 * 64)]);
        bytes.insert(bytes.end(), k, k + held * 64 * 2);
      }
    }
  }
  return bytes;
}

template <typename F>
void expect_error(ErrorCode code, const char* part, F&& f) {
  try {
    f();
    ADD_FAILURE() << "no error; expected one about " << part;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
  }
}

// The stored bytes depend neither on how tokens were chunked nor on rolled-back steps.
TEST(KvCache, BytesDoNotDependOnChunking) {
  const Tokens x(300);
  KvCache cache(config(layered_policy(0.02, 0.0003)));
  const SequenceId whole = cache.create(), pieces = cache.create(), stutter = cache.create();
  feed(cache, whole, x, 0, 300);
  for (int64_t at = 0, n = 1; at < 300; at += n) {
    n = std::min<int64_t>(1 + at % 97, 300 - at);
    feed(cache, pieces, x, at, n);
  }
  const Tokens junk(200, 9);
  for (int64_t at = 0; at < 300; at += 60) {
    feed(cache, stutter, x, at, 60);
    cache.begin_step(stutter, 150);  // a draft that is rejected
    for (int64_t l = 0; l < 2; ++l) cache.append(stutter, l, rows(junk.k, 0, 150), rows(junk.v, 0, 150));
    cache.rollback(stutter);
  }
  EXPECT_EQ(content(cache, whole), content(cache, pieces));
  EXPECT_EQ(content(cache, whole), content(cache, stutter));
}

TEST(KvCache, PartialCommitKeepsOnlyTheAcceptedTokens) {
  const Tokens x(300), junk(300, 5);
  KvCache cache(config(layered_policy(0.02, 0)));
  const SequenceId a = cache.create(), b = cache.create();
  feed(cache, a, x, 0, 130);
  feed(cache, b, x, 0, 100);
  Tokens draft = junk;  // 30 right tokens, then wrong ones over a page boundary
  std::copy_n(x.k.begin() + 100 * 128, 30 * 128, draft.k.begin());
  std::copy_n(x.v.begin() + 100 * 128, 30 * 128, draft.v.begin());
  cache.begin_step(b, 80);
  for (int64_t l = 0; l < 2; ++l) cache.append(b, l, rows(draft.k, 0, 80), rows(draft.v, 0, 80));
  cache.commit(b, 30);
  EXPECT_EQ(cache.length(b), 130);
  EXPECT_EQ(content(cache, a), content(cache, b));
}

// Encoded pages follow the definition: means in FP32 before rounding, residual of what the
// base left, for both sides; the reference of an open page is the previous page's mean.
TEST(KvCache, SealedPageHoldsBaseResidualAndSummary) {
  const Tokens x(130);
  LayerPolicy policy = layered_policy(0.02, 0);
  policy.rotate = false;
  KvCache cache(config(policy, 1));
  const SequenceId seq = cache.create();
  feed(cache, seq, x, 0, 130);
  const LayerView view = view_of(cache, seq);
  const PageLayout& layout = view.store().layout;
  for (int64_t page : {0, 1}) {
    const PageHead head = view.head(page, 1);
    std::vector<float> base(64 * 64), res(64 * 64);
    for (bool is_k : {true, false}) {
      const SideLayout& side = is_k ? layout.k : layout.v;
      decode_base(layout, side, head, base.data());
      decode_residual(layout, side, head, view.residual(page, 1), res.data());
      const auto* mean = reinterpret_cast<const uint16_t*>(layout.start(side, head) + side.mean);
      double err_base = 0, err_both = 0, norm = 0;
      for (int64_t d = 0; d < 64; ++d) {
        double sum = 0;
        for (int64_t t = 0; t < 64; ++t) {
          sum += (is_k ? x.k : x.v)[static_cast<size_t>(((page * 64 + t) * 2 + 1) * 64 + d)];
        }
        EXPECT_NEAR(bf16_to_f32(mean[d]), sum / 64, 0.01);
        for (int64_t t = 0; t < 64; ++t) {
          const double want = (is_k ? x.k : x.v)[static_cast<size_t>(((page * 64 + t) * 2 + 1) * 64 + d)] -
                              bf16_to_f32(mean[d]);
          const size_t at = static_cast<size_t>(t * 64 + d);
          err_base += (base[at] - want) * (base[at] - want);
          err_both += (base[at] + res[at] - want) * (base[at] + res[at] - want);
          norm += want * want;
        }
      }
      EXPECT_LT(std::sqrt(err_base / norm), 0.13);
      EXPECT_GT(std::sqrt(err_base / norm), 0.05);
      EXPECT_LT(std::sqrt(err_both / norm), 0.012);
      EXPECT_GT(std::sqrt(err_both / norm), 0.002);
      const PageMeta& meta = page_meta(layout, head);
      EXPECT_NEAR(is_k ? meta.k_error : meta.v_error, std::sqrt(err_base / 4096), 0.01);
    }
  }
  ASSERT_NE(view.open(2), nullptr);
  const auto* mean1 = reinterpret_cast<const uint16_t*>(view.head(1, 1).k + layout.k.mean);
  for (size_t d = 0; d < 64; ++d) EXPECT_EQ(view.open(2)->k_reference[64 + d], mean1[d]);
}

TEST(KvCache, DroppedResidualsFollowSinksAndRecent) {
  const Tokens x(1000);
  KvCache cache(config(sealed_policy(70, 200), 1));
  const SequenceId seq = cache.create();
  for (int64_t at = 0; at < 1000; at += 50) feed(cache, seq, x, at, 50);
  const LayerView view = view_of(cache, seq);
  for (int64_t page = 0; page < 15; ++page) {
    // sinks 70 reach into page 1; recent 200 of the next query's 1001 tokens begin at 801.
    const bool kept = page <= 1 || (page + 1) * 64 > 801;
    EXPECT_EQ(view.residual(page, 0) != nullptr, kept) << page;
    EXPECT_TRUE(view.head(page, 1));
  }
}

TEST(KvCache, WindowFreesPagesBehindIt) {
  const Tokens x(1000);
  KvCacheConfig c = config(layered_policy(0.02, 0), 1);
  c.layers[0].window = 100;
  KvCache cache(c);
  const SequenceId seq = cache.create();
  for (int64_t at = 0; at < 1000; at += 100) feed(cache, seq, x, at, 100);
  EXPECT_LE(cache.usage().pages, 4);
  const LayerView view = view_of(cache, seq);
  for (int64_t page = 901 / 64; page < 15; ++page) EXPECT_TRUE(view.head(page, 0));
  expect_error(ErrorCode::unsupported, "sliding window", [&] { cache.truncate(seq, 300); });
  EXPECT_EQ(cache.length(seq), 1000);
}

TEST(KvCache, ForkSharesPagesAndFreesThemOnce) {
  const Tokens x(400);
  for (const LayerPolicy& policy : {layered_policy(0.02, 0), plain_policy(Format::q8_0)}) {
    KvCache cache(config(policy));
    const SequenceId parent = cache.create();
    feed(cache, parent, x, 0, 200);
    const CacheUsage before = cache.usage();
    const auto bytes = content(cache, parent);
    const SequenceId child = cache.fork(parent);
    EXPECT_EQ(cache.usage().pages, before.pages);
    feed(cache, child, x, 200, 150);
    EXPECT_EQ(content(cache, parent), bytes);  // copy on write of a shared partial page
    cache.free(parent);
    feed(cache, child, x, 350, 50);
    const SequenceId again = cache.create();
    feed(cache, again, x, 0, 400);
    EXPECT_EQ(content(cache, child), content(cache, again));
    cache.free(child);
    cache.free(again);
    EXPECT_EQ(cache.usage().total(), 0);
    EXPECT_EQ(cache.impl().budget.held(), 0);
  }
}

TEST(KvCache, SharerKeepsItsOwnResiduals) {
  const Tokens x(900);
  KvCache cache(config(sealed_policy(0, 128), 1));
  const SequenceId parent = cache.create();
  feed(cache, parent, x, 0, 300);
  const SequenceId child = cache.fork(parent);
  feed(cache, parent, x, 300, 600);
  EXPECT_EQ(view_of(cache, parent).residual(3, 0), nullptr);
  EXPECT_NE(view_of(cache, child).residual(3, 0), nullptr);
}

TEST(KvCache, TruncateInsideTheOpenPageIsLossless) {
  const Tokens x(200), junk(30, 3);
  KvCache cache(config(layered_policy(0.02, 0)));
  const SequenceId a = cache.create(), b = cache.create();
  feed(cache, a, x, 0, 140);
  feed(cache, b, x, 0, 140);
  feed(cache, b, junk, 0, 30);
  cache.truncate(b, 140);
  EXPECT_EQ(content(cache, a), content(cache, b));
  EXPECT_EQ(cache.usage().reencoded_pages, 0);
}

TEST(KvCache, TruncateIntoASealedPageReopensIt) {
  const Tokens x(300);
  KvCache cache(config(layered_policy(0.02, 0), 1));
  const SequenceId seq = cache.create();
  feed(cache, seq, x, 0, 300);
  const LayerView before = view_of(cache, seq);
  const PageLayout& layout = before.store().layout;
  std::vector<float> base(64 * 64), res(64 * 64);
  decode_base(layout, layout.v, before.head(2, 0), base.data());
  decode_residual(layout, layout.v, before.head(2, 0), before.residual(2, 0), res.data());
  const auto* stored = reinterpret_cast<const uint16_t*>(before.head(2, 0).v + layout.v.mean);
  std::vector<float> mean(64);
  for (size_t d = 0; d < 64; ++d) mean[d] = bf16_to_f32(stored[d]);

  cache.truncate(seq, 150);
  EXPECT_EQ(cache.length(seq), 150);
  const LayerView view = view_of(cache, seq);
  ASSERT_NE(view.open(2), nullptr);
  EXPECT_FALSE(view.head(2, 0));
  for (size_t i = 0; i < 22 * 64; ++i) {
    EXPECT_EQ(view.open(2)->v[i], f32_to_bf16(base[i] + res[i] + mean[i % 64]));
  }
  feed(cache, seq, x, 150, 150);
  EXPECT_EQ(cache.usage().reencoded_pages, 1);
  // The page encoded again still stands for the same tokens.
  std::vector<float> base2(64 * 64), res2(64 * 64);
  const LayerView after = view_of(cache, seq);
  decode_base(layout, layout.v, after.head(2, 0), base2.data());
  decode_residual(layout, layout.v, after.head(2, 0), after.residual(2, 0), res2.data());
  for (size_t i = 0; i < 22 * 64; ++i) {
    const float mean2 = bf16_to_f32(
        reinterpret_cast<const uint16_t*>(after.head(2, 0).v + layout.v.mean)[i % 64]);
    EXPECT_NEAR(base2[i] + res2[i] + mean2, base[i] + res[i] + mean[i % 64], 0.05);
  }
  cache.truncate(seq, 0);
  EXPECT_EQ(cache.usage().total(), 0);
}

TEST(KvCache, AStepIsAllOrNothing) {
  const Tokens x(200);
  Tokens bad(64, 2);
  bad.v[(40 * 2 + 1) * 64 + 7] = std::numeric_limits<float>::quiet_NaN();
  KvCache cache(config(layered_policy(0.02, 0), 3));
  const SequenceId seq = cache.create();
  feed(cache, seq, x, 0, 100);
  const auto bytes = content(cache, seq);
  const CacheUsage usage = cache.usage();
  cache.begin_step(seq, 64);
  cache.append(seq, 0, rows(x.k, 0, 64), rows(x.v, 0, 64));
  cache.append(seq, 1, rows(x.k, 0, 64), rows(x.v, 0, 64));
  expect_error(ErrorCode::non_finite, "V of layer 2, KV head 1, token 140",
               [&] { cache.append(seq, 2, rows(bad.k, 0, 64), rows(bad.v, 0, 64)); });
  cache.rollback(seq);
  EXPECT_EQ(cache.length(seq), 100);
  EXPECT_EQ(content(cache, seq), bytes);
  EXPECT_EQ(cache.usage().total(), usage.total());
  feed(cache, seq, x, 100, 100);
  const SequenceId fresh = cache.create();
  feed(cache, fresh, x, 0, 200);
  EXPECT_EQ(content(cache, seq), content(cache, fresh));
}

TEST(KvCache, RefusesValuesBeyondTheFormat) {
  Tokens x(1);
  x.k[3] = 1e5f;
  KvCache fp16(config(plain_policy(Format::fp16), 1));
  const SequenceId seq = fp16.create();
  fp16.begin_step(seq, 1);
  expect_error(ErrorCode::non_finite, "fp16",
               [&] { fp16.append(seq, 0, rows(x.k, 0, 1), rows(x.v, 0, 1)); });
}

TEST(KvCache, LimitIsAnErrorWithTheBytesAndLosesNothing) {
  const Tokens x(2000);
  KvCacheConfig c = config(layered_policy(0.02, 0), 2);
  c.max_bytes = 300'000;
  KvCache cache(c);
  const SequenceId seq = cache.create();
  int64_t fed = 0;
  try {
    for (; fed < 2000; fed += 100) feed(cache, seq, x, fed, 100);
    FAIL() << "the limit was not kept";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::out_of_memory);
    EXPECT_NE(std::string(e.what()).find("300000"), std::string::npos) << e.what();
  }
  cache.rollback(seq);
  EXPECT_GT(fed, 0);
  EXPECT_EQ(cache.length(seq), fed);
  EXPECT_LE(cache.usage().total(), c.max_bytes + cache.usage().table_bytes);
  const SequenceId fresh_of_same = cache.fork(seq);
  EXPECT_EQ(content(cache, seq), content(cache, fresh_of_same));
}

// The residual of an int3 or mxfp4 side is NVFP4 of what that base leaves; V in int3 is stored
// rotated.
TEST(KvCache, EveryLayeredBaseKeepsItsResidual) {
  const Tokens x(200);
  for (const auto& [k, v] : {std::pair{Format::nvfp4, Format::int3},
                             {Format::mxfp4, Format::int3},
                             {Format::int3, Format::mxfp4}}) {
    LayerPolicy policy = layered_policy(0.02, 0);
    policy.k_format = k;
    policy.v_format = v;
    KvCache cache(config(policy, 1));
    const SequenceId seq = cache.create();
    feed(cache, seq, x, 0, 200);
    const LayerView view = view_of(cache, seq);
    const PageLayout& layout = view.store().layout;
    EXPECT_EQ(layout.v.rotated, v == Format::int3);
    EXPECT_EQ(layout.residual_bytes, 2 * 64 * (32 + 4));
    const PageHead head = view.head(1, 0);
    std::vector<float> base(64 * 64), res(64 * 64), want(64 * 64);
    for (bool is_k : {true, false}) {
      const SideLayout& side = is_k ? layout.k : layout.v;
      decode_base(layout, side, head, base.data());
      decode_residual(layout, side, head, view.residual(1, 0), res.data());
      const auto* mean = reinterpret_cast<const uint16_t*>(layout.start(side, head) + side.mean);
      equalize_rotate_rows(rows(is_k ? x.k : x.v, 64, 64).row(0, 0), 2 * 64, 64, 64, nullptr, false,
                           side.rotated, want.data(), 64);
      double err_base = 0, err_both = 0, norm = 0;
      for (size_t i = 0; i < want.size(); ++i) {
        const double w = static_cast<double>(want[i]) - bf16_to_f32(mean[i % 64]);
        err_base += (base[i] - w) * (base[i] - w);
        err_both += (base[i] + res[i] - w) * (base[i] + res[i] - w);
        norm += w * w;
      }
      const double relative = std::sqrt(err_base / norm);
      const bool int3 = side.format == Format::int3;
      EXPECT_GT(relative, int3 ? 0.15 : 0.06) << to_string(side.format);
      EXPECT_LT(relative, int3 ? 0.24 : 0.15) << to_string(side.format);
      EXPECT_LT(std::sqrt(err_both / norm), int3 ? 0.03 : 0.015) << to_string(side.format);
      const PageMeta& meta = page_meta(layout, head);
      EXPECT_NEAR(is_k ? meta.k_error : meta.v_error, std::sqrt(err_base / 4096), 0.02);
    }
  }
}

TEST(KvCache, GroupsNeedTheirMultipleOfHeadDim) {
  for (const Format f : {Format::mxfp4, Format::int3, Format::q8_0}) {
    KvCacheConfig c = config(plain_policy(f), 1);
    c.layers[0].head_dim_k = 80;
    expect_error(ErrorCode::unsupported, "head_dim_k = 80; required: a multiple of 32", [&] { KvCache cache(c); });
  }
}

// What `max-savings` and its MX variant promise at 128 K, head_dim 128, everything counted, from
// the allocator: one KV head here, whose share of the tables is the largest there can be.
TEST(KvCache, MaxSavingsStoresUnder4And1Quarter) {
  constexpr int64_t kContext = 131072, kStep = 8192;
  const LayerShape shape{.kv_heads = 1, .q_heads = 4, .head_dim_k = 128, .head_dim_v = 128};
  std::vector<float> x(static_cast<size_t>(kStep * 128));
  std::mt19937 rng(1);
  for (float& v : x) v = static_cast<float>(rng() % 2001) / 1000.0f - 1.0f;
  const auto step = TensorView<const float>::dense(x.data(), kStep, 1, 128);
  for (const auto& [name, bits] : {std::pair{"max-savings", 4.25}, {"max-savings-mx", 4.125}}) {
    KvCache cache({.layers = {shape}, .policy = resolve(preset(name), {.layers = 1})});
    const SequenceId seq = cache.create();
    for (int64_t at = 0; at < kContext; at += kStep) {
      cache.begin_step(seq, kStep);
      cache.append(seq, 0, step, step);
      cache.commit(seq);
    }
    EXPECT_LE(cache.bits_stored_per_element(), bits) << name;
    EXPECT_GE(cache.bits_stored_per_element(), bits - 0.1) << name;
    // Sinks and recent keep their residuals: 1 + 8 pages.
    EXPECT_EQ(cache.usage().residual_pages, 9);
    // With eight KV heads nothing but the tables' share changes, and that shrinks.
    LayerShape eight = shape;
    eight.kv_heads = eight.q_heads = 8;
    const PageLayout layout = make_page_layout(eight, cache.config().policy[0]);
    EXPECT_EQ(layout.head_bytes * (kContext / kPageTokens),
              cache.usage().base_bytes + cache.usage().summary_bytes);
  }
}

// Stored bits from the allocator, everything counted, against the formats' arithmetic.
TEST(KvCache, UsageAddsUp) {
  const Tokens x(64 * 20);
  KvCache sealed(config(sealed_policy(64, 128)));
  const SequenceId seq = sealed.create();
  feed(sealed, seq, x, 0, 64 * 20);
  const CacheUsage u = sealed.usage();
  const int64_t page_heads = 2 * 2 * 20;  // layers, heads, pages
  EXPECT_EQ(u.base_bytes, page_heads * 2 * 64 * (32 + 4));
  EXPECT_EQ(u.summary_bytes, page_heads * (2 * 128 + 64));  // means; metadata on its own line
  EXPECT_EQ(u.residual_pages, 2 * 2 * 3);                   // the sink page and 2 recent ones
  EXPECT_EQ(u.residual_bytes, u.residual_pages * 2 * 64 * (32 + 4));
  EXPECT_EQ(u.open_bytes, 0);
  EXPECT_EQ(u.plain_bytes, 0);
  EXPECT_EQ(u.table_bytes, 2 * 20 * (4 + 2 * 4));
  EXPECT_EQ(sealed.bf16_bytes(), 2 * 2 * 2 * 64 * 20 * 64 * 2);
  EXPECT_NEAR(sealed.bits_stored_per_element(), 8.0 * u.total() / (sealed.bf16_bytes() / 2), 1e-12);
  EXPECT_EQ(sealed.impl().budget.held(), u.total() - u.table_bytes);

  KvCache bf16(config(plain_policy(Format::bf16)));
  const SequenceId b = bf16.create();
  feed(bf16, b, x, 0, 64 * 20);
  EXPECT_EQ(bf16.usage().plain_bytes, bf16.bf16_bytes());
}

TEST(KvCache, RefusesMisuse) {
  const Tokens x(64);
  KvCache cache(config(layered_policy(0.02, 0), 1));
  const SequenceId seq = cache.create();
  const auto invalid = ErrorCode::invalid_argument;
  expect_error(invalid, "sequence 42", [&] { cache.length(42); });
  expect_error(invalid, "no step", [&] { cache.append(seq, 0, rows(x.k, 0, 1), rows(x.v, 0, 1)); });
  expect_error(invalid, "no step", [&] { cache.commit(seq); });
  expect_error(invalid, "0 tokens", [&] { cache.begin_step(seq, 0); });
  expect_error(invalid, "tokens after", [&] { cache.begin_step(seq, int64_t{1} << 60); });
  cache.begin_step(seq, 4);
  expect_error(invalid, "already open", [&] { cache.begin_step(seq, 4); });
  expect_error(invalid, "step is open", [&] { cache.fork(seq); });
  expect_error(invalid, "step is open", [&] { cache.truncate(seq, 0); });
  expect_error(invalid, "k is [3]", [&] { cache.append(seq, 0, rows(x.k, 0, 3), rows(x.v, 0, 4)); });
  expect_error(invalid, "layer 1", [&] { cache.append(seq, 1, rows(x.k, 0, 4), rows(x.v, 0, 4)); });
  expect_error(invalid, "layer 0 was not appended", [&] { cache.commit(seq); });
  cache.append(seq, 0, rows(x.k, 0, 4), rows(x.v, 0, 4));
  expect_error(invalid, "already has", [&] { cache.append(seq, 0, rows(x.k, 0, 4), rows(x.v, 0, 4)); });
  expect_error(invalid, "5 of 4", [&] { cache.commit(seq, 5); });
  cache.commit(seq);
  expect_error(invalid, "not in 0..4", [&] { cache.truncate(seq, 5); });

  KvCacheConfig bad = config(layered_policy(0.02, 0), 1);
  bad.layers[0].q_heads = 7;
  expect_error(invalid, "q_heads = 7", [&] { KvCache c(bad); });
  bad = config(layered_policy(0.02, 0), 1);
  bad.layers[0].head_dim_k = 72;
  expect_error(ErrorCode::unsupported, "head_dim_k = 72", [&] { KvCache c(bad); });
  bad = config(layered_policy(0.02, 0), 1);
  bad.equalizer.layers = {{1.0f, 2.0f}};
  expect_error(invalid, "2 numbers", [&] { KvCache c(bad); });
  bad.equalizer.layers = {std::vector<float>(128, -1.0f)};
  expect_error(invalid, "-1", [&] { KvCache c(bad); });
  bad = config(plain_policy(Format::q8_0), 1);
  bad.layers[0].head_dim_k = 80;
  expect_error(ErrorCode::unsupported, "q8_0", [&] { KvCache c(bad); });
}

}  // namespace
}  // namespace thriftattn
