// libFuzzer target: whatever the bytes, load_sequence() either throws Error and leaves the cache
// as it was, or gives a sequence that can be read, written, forked, truncated and saved again.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "cache/sequence_io.h"
#include "thriftattn/attention.h"
#include "thriftattn/error.h"

namespace {

using namespace thriftattn;

constexpr int64_t kDim = 32, kQueryHeads = 2;

KvCache make_cache(const char* policy, int64_t window) {
  const LayerShape shape{.kv_heads = 1,
                         .q_heads = kQueryHeads,
                         .head_dim_k = kDim,
                         .head_dim_v = kDim,
                         .window = window};
  return KvCache(
      {.layers = {shape},
       .policy = resolve(parse_policy(policy), {.layers = 1, .sliding_window = {window > 0}}),
       .equalizer = {}});
}

// One step; NaN in the pages' scales may make numbers of it that the cache refuses.
void use(KvCache& cache, SequenceId seq, int64_t tokens, AttendMode mode) {
  const std::vector<float> x(static_cast<size_t>(tokens * kQueryHeads * kDim), 0.5f);
  std::vector<float> out(x.size());
  cache.begin_step(seq, tokens);
  const auto rows = TensorView<const float>::dense(x.data(), tokens, 1, kDim);
  cache.append(seq, 0, rows, rows);
  attend(cache, {.sequence = seq,
                 .layer = 0,
                 .config = {.mode = mode, .softmax_scale = 0.2f},
                 .q = TensorView<const float>::dense(x.data(), tokens, kQueryHeads, kDim),
                 .out = TensorView<float>::dense(out.data(), tokens, kQueryHeads, kDim),
                 .lse = {}});
  cache.commit(seq);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  struct Kind {
    const char* policy;
    int64_t window;
  };
  constexpr Kind kKinds[] = {{"balanced", 0},
                             {"thrifty,sinks=64,recent=64", 0},
                             {"k=nvfp4,v=q8_0", 0},
                             {"swift", 70},
                             {"q8_0", 100}};
  const Kind& kind = kKinds[data[0] % std::size(kKinds)];
  const int64_t length = data[1];
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 2, size - 2);
  KvCache cache = make_cache(kind.policy, kind.window);
  size_t at = 0;
  // The input goes on with zeros for a while, so that short ones reach the pages.
  const ByteSource source = [&](void* to, size_t n) {
    if (at + n > bytes.size() + (1 << 16)) throw Error(ErrorCode::corrupt, "the end");
    std::memset(to, 0, n);
    if (at < bytes.size()) std::memcpy(to, bytes.data() + at, std::min(n, bytes.size() - at));
    at += n;
  };
  try {
    const SequenceId seq = load_sequence(cache, length, source);
    if (cache.length(seq) != length) std::abort();
    std::string again;
    save_sequence(cache, seq, [&](const void* from, size_t n) {
      again.append(static_cast<const char*>(from), n);
    });
    if (again.size() != at || again.compare(0, std::min(at, bytes.size()),
                                            bytes.substr(0, std::min(at, bytes.size()))) != 0) {
      std::abort();  // not what was loaded
    }
    const SequenceId fork = cache.fork(seq);
    use(cache, seq, 3, AttendMode::prefill);
    use(cache, fork, 70, AttendMode::decode);
    cache.truncate(seq, length);
    use(cache, seq, 1, AttendMode::decode);
    cache.free(seq);
    cache.free(fork);
  } catch (const Error& e) {
    if (std::string_view(e.what()).find('\n') != std::string_view::npos) std::abort();
    return 0;
  }
  if (cache.usage().total() != 0) std::abort();
  return 0;
}
