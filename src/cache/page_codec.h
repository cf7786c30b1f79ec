// Encoding one KV head of a full page from its open form, and reading it back: the only place
// where open tokens become planes. The order of operations is part of the page format
// (docs/formats.md).
#pragma once

#include <cstdint>

#include "cache/page_layout.h"

namespace thriftattn {

// The open form of one side of one KV head: BF16 [64][dim], minus `reference` (BF16 [dim], K
// only; nullptr = 0); rotated where the side is.
struct OpenSide {
  const uint16_t* rows = nullptr;
  const uint16_t* reference = nullptr;
};

// Encodes base, residual and summary. `head` is the head's part of a page slot; `residual` is a
// residual slot. Both planes are always written; residency decides later what is kept.
void encode_page_k(const PageLayout& layout, OpenSide open, bool center, MutablePageHead head,
                   uint8_t* residual);
void encode_page_v(const PageLayout& layout, OpenSide open, bool center, MutablePageHead head,
                   uint8_t* residual);

// Base (or residual) plane of a layered side as FP32 [64][dim], page scale included.
void decode_base(const PageLayout& layout, const SideLayout& side, PageHead head, float* out);
void decode_residual(const PageLayout& layout, const SideLayout& side, PageHead head,
                     const uint8_t* residual, float* out);

const PageMeta& page_meta(const PageLayout& layout, PageHead head);
PageMeta& page_meta(const PageLayout& layout, MutablePageHead head);

}  // namespace thriftattn
