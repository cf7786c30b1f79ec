// Reading lengths, block tables and slots on the device.
#pragma once

#include "cuda/geometry.h"
#include "cuda/plan.h"

namespace thriftattn::cuda {

// One sequence of the batch.
struct SequenceTables {
  int64_t length = 0;     // tokens, the step's included
  int64_t step = 0;       // tokens of the step
  int64_t first_row = 0;  // of the step, in q, k, v and out
  const int32_t* blocks = nullptr;
  const int32_t* residuals = nullptr;
  const int32_t* open = nullptr;
  int64_t open_pages = 1;
};

__device__ inline SequenceTables sequence_tables(const BatchTables& tables,
                                                 const AttendLimits& limits, const Geometry& g,
                                                 int seq) {
  SequenceTables t;
  t.length = tables.lengths[seq];
  if (tables.step_offsets != nullptr) {
    t.first_row = tables.step_offsets[seq];
    t.step = tables.step_offsets[seq + 1] - t.first_row;
  } else {
    t.first_row = seq * limits.step_tokens;
    t.step = limits.step_tokens;
  }
  if (t.step > t.length) t.step = 0;  // an idle row
  t.blocks = tables.block_table + seq * limits.max_pages;
  t.residuals = tables.residual_table == nullptr
                    ? nullptr
                    : tables.residual_table + seq * limits.max_pages * g.kv_heads;
  t.open = tables.open_table == nullptr ? nullptr : tables.open_table + seq * limits.open_pages;
  t.open_pages = limits.open_pages;
  return t;
}

// A page slot; nullptr where the page has none.
__device__ inline uint8_t* page_slot(const LayerMemory& memory, const SequenceTables& t,
                                     const Geometry& g, int64_t page) {
  const int32_t id = t.blocks[page];
  return id < 0 ? nullptr : memory.pages + id * g.slot_bytes;
}
// Where a head's K or V starts in it, and its metadata.
__device__ inline uint8_t* side_of(uint8_t* slot, const SideGeometry& side, int head) {
  return slot + side.start + int64_t{head} * side.head_bytes;
}
__device__ inline PageMeta* meta_of(uint8_t* slot, const Geometry& g, int head) {
  return reinterpret_cast<PageMeta*>(slot + g.meta_start + int64_t{head} * g.meta_stride);
}

__device__ inline uint8_t* residual_slot(const LayerMemory& memory, const SequenceTables& t,
                                         const Geometry& g, int64_t page, int head) {
  if (t.residuals == nullptr) return nullptr;
  const int32_t id = t.residuals[page * g.kv_heads + head];
  if (id < 0) return nullptr;
  return memory.residuals + id * g.residual_bytes;
}

__device__ inline uint8_t* open_slot(const LayerMemory& memory, const SequenceTables& t,
                                     const Geometry& g, int64_t page) {
  if (t.open == nullptr) return nullptr;
  const int32_t id = t.open[page % t.open_pages];
  if (id < 0) return nullptr;
  return memory.open + id * g.open_bytes;
}

}  // namespace thriftattn::cuda
