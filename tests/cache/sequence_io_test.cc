// Sequences saved and loaded: the same bytes in the pools, the same attention bit for bit, and
// damaged bytes refused.
#include "cache/sequence_io.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cache/kv_cache_impl.h"
#include "thriftattn/attention.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

constexpr int64_t kHeads = 2, kQueryHeads = 4, kDim = 64;

KvCacheConfig config(const char* policy, int64_t window = 0) {
  const LayerShape shape{
      .kv_heads = kHeads, .q_heads = kQueryHeads, .head_dim_k = kDim, .head_dim_v = kDim};
  LayerShape second = shape;
  second.window = window;
  return {
      .layers = {shape, second},
      .policy = resolve(parse_policy(policy), {.layers = 2, .sliding_window = {false, window > 0}}),
      .equalizer = {},
      .poison_free = true};
}

std::vector<float> values(int64_t position, int64_t heads, uint32_t salt) {
  std::mt19937 random(static_cast<uint32_t>(position) * 7919u + salt);
  std::normal_distribution<float> normal(0.3f, 1.0f);
  std::vector<float> x(static_cast<size_t>(heads * kDim));
  for (float& v : x) v = normal(random);
  return x;
}

// Feeds `n` tokens whose values depend on their position alone; returns what the queries read.
std::vector<float> feed(KvCache& cache, SequenceId seq, int64_t n, AttendMode mode) {
  const int64_t first = cache.length(seq);
  std::vector<float> k, v, q, all;
  for (int64_t t = first; t < first + n; ++t) {
    for (auto [to, heads, salt] :
         {std::tuple{&k, kHeads, 1u}, {&v, kHeads, 2u}, {&q, kQueryHeads, 3u}}) {
      const std::vector<float> row = values(t, heads, salt);
      to->insert(to->end(), row.begin(), row.end());
    }
  }
  cache.begin_step(seq, n);
  for (int64_t layer = 0; layer < 2; ++layer) {
    cache.append(seq, layer, TensorView<const float>::dense(k.data(), n, kHeads, kDim),
                 TensorView<const float>::dense(v.data(), n, kHeads, kDim));
    std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());
    attend(cache, {.sequence = seq,
                   .layer = layer,
                   .config = {.mode = mode, .softmax_scale = 0.25f},
                   .q = TensorView<const float>::dense(q.data(), n, kQueryHeads, kDim),
                   .out = TensorView<float>::dense(out.data(), n, kQueryHeads, kDim),
                   .lse = {}});
    all.insert(all.end(), out.begin(), out.end());
  }
  cache.commit(seq);
  return all;
}

void feed_until(KvCache& cache, SequenceId seq, int64_t length) {
  while (cache.length(seq) < length) {
    feed(cache, seq, std::min<int64_t>(128, length - cache.length(seq)), AttendMode::prefill);
  }
}

std::string save(const KvCache& cache, SequenceId seq) {
  std::string bytes;
  save_sequence(cache, seq, [&](const void* data, size_t n) {
    bytes.append(static_cast<const char*>(data), n);
  });
  return bytes;
}

SequenceId load(KvCache& cache, int64_t length, const std::string& bytes) {
  size_t at = 0;
  const SequenceId seq = load_sequence(cache, length, [&](void* data, size_t n) {
    if (n > bytes.size() - at) throw Error(ErrorCode::corrupt, "the bytes end early");
    std::memcpy(data, bytes.data() + at, n);
    at += n;
  });
  EXPECT_EQ(at, bytes.size());
  return seq;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Case {
  const char* policy;
  int64_t window;
};

constexpr Case kCases[] = {{"f32", 0},
                           {"exact", 0},
                           {"fp8", 0},
                           {"q8_0", 0},
                           {"q4_0", 0},
                           {"balanced", 0},
                           {"thrifty", 0},
                           {"thrifty,sinks=0,recent=100", 0},
                           {"swift", 200},
                           {"thrifty", 90},
                           {"k=nvfp4,v=q8_0", 0},
                           {"exact", 130},
                           {"thrifty,v=bf16", 130}};

TEST(SequenceIo, AttentionAfterLoadingIsBitIdentical) {
  for (const Case& c : kCases) {
    for (const int64_t length : {0, 1, 64, 500, 1024}) {
      SCOPED_TRACE(std::string(c.policy) + ", " + std::to_string(length));
      KvCache original(config(c.policy, c.window));
      const SequenceId a = original.create();
      feed_until(original, a, length);
      const std::string bytes = save(original, a);
      const CacheUsage before = original.usage();

      KvCache other(config(c.policy, c.window));
      const SequenceId dummy = other.create();  // other ids in the pools
      feed_until(other, dummy, 130);
      const SequenceId b = load(other, length, bytes);
      other.free(dummy);
      EXPECT_EQ(other.length(b), length);
      EXPECT_EQ(other.usage().total(), before.total());
      EXPECT_EQ(other.usage().residual_pages, before.residual_pages);
      EXPECT_EQ(save(other, b), bytes);

      for (const auto& [n, mode] : {std::pair{int64_t{1}, AttendMode::decode},
                                    {70, AttendMode::prefill},
                                    {3, AttendMode::decode}}) {
        EXPECT_TRUE(same_bits(feed(original, a, n, mode), feed(other, b, n, mode)));
      }
      EXPECT_EQ(save(other, b), save(original, a));
      EXPECT_EQ(other.usage().total(), original.usage().total());
    }
  }
}

TEST(SequenceIo, ForkedAndTruncatedSequences) {
  KvCache cache(config("thrifty"));
  const SequenceId a = cache.create();
  feed_until(cache, a, 900);
  const SequenceId b = cache.fork(a);
  feed_until(cache, b, 1000);
  cache.truncate(a, 800);  // into a sealed page: it is open again
  for (const SequenceId seq : {a, b}) {
    KvCache other(config("thrifty"));
    const SequenceId loaded = load(other, cache.length(seq), save(cache, seq));
    EXPECT_TRUE(same_bits(feed(cache, seq, 64, AttendMode::decode),
                          feed(other, loaded, 64, AttendMode::decode)));
    EXPECT_EQ(other.usage().reencoded_pages, seq == a ? 2 : 0);  // one a layer
  }
}

// Every byte of the heads and tables is changed in turn, and every end is cut off: an Error or a
// sequence that can be used, the cache unharmed either way.
TEST(SequenceIo, DamagedBytesAreRefused) {
  for (const Case& c :
       {Case{"thrifty,sinks=64,recent=64", 0}, Case{"swift", 90}, Case{"k=nvfp4,v=q8_0", 0}}) {
    SCOPED_TRACE(c.policy);
    KvCache source(config(c.policy, c.window));
    const SequenceId a = source.create();
    feed_until(source, a, 300);
    const std::string bytes = save(source, a);

    KvCache cache(config(c.policy, c.window));
    int refused = 0, accepted = 0;
    const auto attempt = [&](const std::string& damaged) {
      size_t at = 0;
      try {
        const SequenceId seq = load_sequence(cache, 300, [&](void* data, size_t n) {
          if (n > damaged.size() - at) throw Error(ErrorCode::corrupt, "the bytes end early");
          std::memcpy(data, damaged.data() + at, n);
          at += n;
        });
        ++accepted;
        for (const AttendMode mode : {AttendMode::prefill, AttendMode::decode}) {
          feed(cache, seq, 3, mode);
        }
        cache.free(seq);
      } catch (const Error& error) {
        ++refused;
        EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      }
      EXPECT_EQ(cache.usage().total(), 0);
    };
    for (const size_t cut :
         {size_t{0}, size_t{7}, size_t{39}, size_t{44}, bytes.size() / 2, bytes.size() - 1}) {
      attempt(bytes.substr(0, cut));
    }
    EXPECT_EQ(refused, 6);
    EXPECT_EQ(accepted, 0);
    for (size_t i = 0; i < 60; ++i) {  // the first layer's head and tables
      std::string damaged = bytes;
      for (const int mask : {0x01, 0x80}) {
        damaged[i] = static_cast<char>(bytes[i] ^ mask);
        attempt(damaged);
      }
    }
    EXPECT_GT(refused, 100);
  }
}

// Consistent in itself, but without a page that queries will read, or without its residual.
TEST(SequenceIo, MissingPagesAreRefused) {
  constexpr size_t kHead = 40, kPages = 5;  // 300 tokens
  const auto refusal = [](const char* policy, const std::string& bytes) {
    KvCache cache(config(policy));
    try {
      load(cache, 300, bytes);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("nothing was thrown");
  };
  const auto saved = [](const char* policy) {
    KvCache source(config(policy));
    const SequenceId a = source.create();
    feed_until(source, a, 300);
    return save(source, a);
  };
  std::string plain = saved("exact");
  const size_t slot = 64 * kHeads * 2 * kDim * 2;
  plain[kHead + 1] = 0;
  plain.erase(kHead + kPages + kPages * kHeads + slot, slot);
  EXPECT_NE(refusal("exact", plain).find("layer 0 lacks page 1"), std::string::npos);

  std::string layered = saved("balanced");
  uint64_t slots[2];
  std::memcpy(slots, layered.data(), sizeof slots);
  const size_t tables = kHead + 4 + 4 * kHeads;
  layered[kHead + 4 + 2] = 0;  // page 1, head 0
  layered.erase(tables + 4 * slots[0] + 2 * slots[1], slots[1]);
  EXPECT_NE(refusal("balanced", layered).find("lacks a residual of page 1"), std::string::npos);
  EXPECT_EQ(refusal("thrifty", layered), "nothing was thrown");  // may be dropped there
}

TEST(SequenceIo, AnotherPolicyOrLengthIsRefused) {
  KvCache source(config("balanced"));
  const SequenceId a = source.create();
  feed_until(source, a, 300);
  const std::string bytes = save(source, a);
  KvCache same(config("balanced"));
  for (const int64_t length : {int64_t{320}, int64_t{64}, int64_t{1} << 40}) {
    EXPECT_THROW(load(same, length, bytes), Error) << length;
  }
  for (const char* policy : {"exact", "q8_0", "k=nvfp4,v=q8_0"}) {
    KvCache other(config(policy));
    EXPECT_THROW(load(other, 300, bytes), Error) << policy;
    EXPECT_EQ(other.usage().total(), 0);
  }
}

TEST(SequenceIo, MisuseAndLimits) {
  KvCache cache(config("balanced"));
  const SequenceId a = cache.create();
  feed_until(cache, a, 200);
  const std::string bytes = save(cache, a);
  cache.begin_step(a, 1);
  EXPECT_THROW(save(cache, a), Error);
  cache.rollback(a);
  EXPECT_THROW(save(cache, a + 1), Error);
  EXPECT_THROW(load(cache, -1, bytes), Error);

  KvCacheConfig limited = config("balanced");
  limited.max_bytes = 20000;
  KvCache small(limited);
  EXPECT_THROW(load(small, 200, bytes), Error);
  EXPECT_EQ(small.usage().total(), 0);
}

}  // namespace
}  // namespace thriftattn
