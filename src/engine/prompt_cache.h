// A document that was read once, kept in a file: the session's cache after prefill, with all that
// its bytes depend on in front. A file that was made otherwise is refused with the reason, a
// damaged one too (docs/formats.md has the layout).
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "engine/session.h"

namespace thriftattn {

inline constexpr uint32_t kPromptCacheVersion = 1;

// What makes a saved cache the right one: model, weights, RoPE, equaliser, policy, chunk, tokens.
// `policy_name` is for messages; what counts is what the policy does.
struct PromptCacheKey {
  std::string path;
  std::string policy_name;
  std::span<const int32_t> tokens;  // all that the session holds
};

// Fills an empty session. False if there is no such file; Error if it does not fit or is damaged,
// the session being as it was.
bool load_prompt_cache(const PromptCacheKey& key, Session& session);

// Writes beside and renames, so that a reader sees the old file or the new one. The session must
// hold exactly key.tokens. Returns the bytes of the file.
int64_t save_prompt_cache(const PromptCacheKey& key, const Session& session);

}  // namespace thriftattn
