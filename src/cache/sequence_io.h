// A sequence as bytes and back: pages, residuals and the open page exactly as they lie in the
// pools, so that attention over a loaded sequence is bit-identical to attention over the saved
// one. What the bytes belong to (model, policy, text) is for the caller to record and to compare,
// and so is a checksum; here every count and size is checked against the cache, so that bytes
// which are not a sequence of it are an Error, never a wild read. docs/formats.md has the record.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "thriftattn/kv_cache.h"

namespace thriftattn {

// Takes `bytes` bytes, at least one; throws if it cannot.
using ByteSink = std::function<void(const void* data, size_t bytes)>;
// Delivers exactly `bytes` bytes, at least one; throws Error(corrupt) if there are fewer.
using ByteSource = std::function<void(void* data, size_t bytes)>;

// No step may be open. The cache is not changed.
void save_sequence(const KvCache& cache, SequenceId sequence, const ByteSink& sink);

// A new sequence of `length` tokens in a cache of the same layers and policy. Throws
// Error(corrupt) where the bytes do not fit; the cache is as before then.
SequenceId load_sequence(KvCache& cache, int64_t length, const ByteSource& source);

}  // namespace thriftattn
