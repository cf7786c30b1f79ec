// The bytes that a KvCache will hold, computed from layouts and policies before there is one. The
// figures are the allocator's own: KvCache::usage() after the same steps (tests compare them).
#pragma once

#include <cstdint>
#include <vector>

#include "thriftattn/kv_cache.h"
#include "thriftattn/policy.h"

namespace thriftattn {

// How a sequence is fed: `document` tokens, then `question` tokens, both in steps that end at
// multiples of `chunk`, then `answer` tokens one by one.
struct MemoryRequest {
  int64_t document = 0;
  int64_t question = 0;
  int64_t answer = 0;
  int64_t chunk = 512;
  // The document's sequence stays; the question goes to a fork of it.
  bool forked = false;

  int64_t tokens() const { return document + question + answer; }
};

struct MemoryPlan {
  CacheUsage usage;        // when all is fed (reencoded_pages is 0)
  int64_t peak_bytes = 0;  // the most at any time, steps included: what a limit must allow
};

// Throws Error for shapes and formats that no page can hold.
MemoryPlan plan_memory(const std::vector<LayerShape>& layers,
                       const std::vector<LayerPolicy>& policy, const MemoryRequest& request);

// The most tokens, answer and question included, that stay within `max_bytes` when the document
// is cut (then the question): at most request.tokens(); 0 if not even the answer's first fits.
int64_t tokens_that_fit(const std::vector<LayerShape>& layers,
                        const std::vector<LayerPolicy>& policy, const MemoryRequest& request,
                        int64_t max_bytes);

}  // namespace thriftattn
