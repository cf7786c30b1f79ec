// One layer of a model with 8 query and 2 KV heads: fill a cache, decode one token, print bytes.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "thriftattn/attention.h"
#include "thriftattn/kv_cache.h"
#include "thriftattn/version.h"

using namespace thriftattn;
using View = TensorView<const float>;

int main() {
  const LayerShape shape{.kv_heads = 2, .q_heads = 8, .head_dim_k = 128, .head_dim_v = 128};
  const std::vector<LayerPolicy> policy = resolve(parse_policy("balanced"), {.layers = 1});
  KvCache cache({.layers = {shape}, .policy = policy});

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto noise = [&](int64_t tokens, int64_t heads) {
    std::vector<float> x(tokens * heads * 128);
    for (float& value : x) value = normal(random);
    return x;
  };

  const SequenceId sequence = cache.create();
  const int64_t prompt = 4096;
  for (const int64_t tokens : {prompt, int64_t{1}}) {  // a prompt, then one decoded token
    const auto k = noise(tokens, 2), v = noise(tokens, 2), q = noise(tokens, 8);
    std::vector<float> out(q.size());
    AttendStats stats;
    cache.begin_step(sequence, tokens);
    cache.append(sequence, 0, View::dense(k.data(), tokens, 2, 128),
                 View::dense(v.data(), tokens, 2, 128));
    const AttendMode mode = tokens > 1 ? AttendMode::prefill : AttendMode::decode;
    attend(cache, {.sequence = sequence,
                   .layer = 0,
                   .config = {.mode = mode, .softmax_scale = 1.0f / std::sqrt(128.0f)},
                   .q = View::dense(q.data(), tokens, 8, 128),
                   .out = TensorView<float>::dense(out.data(), tokens, 8, 128),
                   .stats = &stats});
    cache.commit(sequence);
    std::printf("%lld tokens read %.2f bits per element\n", static_cast<long long>(tokens),
                stats.bits_read_per_element());
  }
  std::printf("thriftattn %s holds %lld bytes, BF16 would hold %lld bytes\n", version(),
              static_cast<long long>(cache.usage().total()),
              static_cast<long long>(cache.bf16_bytes()));
}
