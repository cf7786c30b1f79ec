// What a kernel fetches into the caches while it works on the rows before.
#pragma once

#include <cstdint>

#include "base/prefetch.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn {

// What the next call will read: 64 rows of `row_bytes` each (codes, or 16-bit values) and their
// scales, fetched into the caches row by row meanwhile: the hardware does not look beyond the
// system's page. Null = nothing.
struct NextRows {
  const uint8_t* rows = nullptr;
  int64_t row_bytes = 0;
  const uint8_t* scales = nullptr;
  int64_t scale_bytes = 0;  // of all rows
  const uint8_t* mean = nullptr;
  int64_t mean_bytes = 0;
  const void* meta = nullptr;

  // The part that belongs to rows [row, row + count).
  void fetch(int64_t row, int64_t count) const {
    if (row == 0) {
      prefetch_lines(mean, mean_bytes);
      if (meta != nullptr) prefetch_l2(meta);
    }
    if (rows == nullptr) return;
    for (int64_t at = row * row_bytes; at < (row + count) * row_bytes; at += 64) {
      prefetch_l2(rows + at);
    }
    const int64_t lines = (scale_bytes + 63) / 64;
    for (int64_t i = row * lines / kPageTokens; i < (row + count) * lines / kPageTokens; ++i) {
      prefetch_l2(scales + i * 64);
    }
  }
  void fetch_all() const { fetch(0, kPageTokens); }
};

}  // namespace thriftattn
