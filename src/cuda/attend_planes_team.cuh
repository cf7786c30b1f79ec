// attend_planes for tiles of 16 or 32 query rows: a team of two warps a page.
//
// The scores warp of a team reads K, weighs tokens, decides what each page deserves and passes P
// on; the values warp reads V and holds the output, which needs all of its registers. They meet in
// a ring of slots, each with P, what to do, and V of one plane, which the scores warp has fetched
// once it knows that it is read: so a page's values wait for its decision without anybody waiting
// for them.
//
// A unit of work is a split of the items of one (sequence, KV head, tile of rows); the teams of a
// block take turns in its items, and their sums become one partial. Blocks stay and take unit after
// unit (grid stride). Raising m is told to the values warp by the next slot.
#pragma once

#include "cuda/attend_planes_pages.cuh"

namespace thriftattn::cuda {

inline constexpr int kTeams = 4;  // of a block

// What the values warp does with a slot, in this order.
enum EntryWhat : int32_t {
  kMoveFirst = 1,  // O *= move
  kAddState = 2,   // O += mass * the state in the slot
  kAddMean = 4,    // O += mass * mean(V)
  kAddValues = 8,  // O += scale * V'.P
  kEndUnit = 16,   // mass is l, move is m: O goes to the partial
  kStop = 32,
};

template <int NT>
struct alignas(16) EntryHead {
  float mass[8 * NT];
  float move[8 * NT];
  float scale;
  int32_t what;
  int64_t row;  // of kEndUnit: the partial's first
};

template <int D, int NT>
struct TeamShape {
  static constexpr int kPlaneStages = 2;  // of K
  static constexpr int kSlots = NT <= 2 ? 2 : 4;
  // The sums of a warp, in the places of V.
  static constexpr int kStateSlots = (8 * NT * D * 4 + 38 * D - 1) / (38 * D);
  static constexpr int kBlocks = planes_blocks(D, NT);  // of an SM
  static_assert(kStateSlots == 1 || kStateSlots == kSlots);
};

template <int D, int NT>
struct TeamShared {
  using Shape = TeamShape<D, NT>;
  static constexpr int kRing = 2;
  static constexpr bool kGroups = false;
  alignas(128) uint8_t k[Shape::kPlaneStages][36 * D];
  alignas(128) uint8_t v[Shape::kSlots][38 * D];
  alignas(16) uint2 p[Shape::kSlots][4][NT][32];
  EntryHead<NT> head[Shape::kSlots];
  PageShared<NT> page;
  // DecodeWarp uses k and v as its own rings.
  alignas(16) float record[2][4 + 8 * NT];
  alignas(16) ItemNote notes[kNotes];
  uint64_t k_bar[kRing], v_bar[kRing];
  uint64_t plane_bar[Shape::kPlaneStages];
  uint64_t full[Shape::kSlots], empty[Shape::kSlots];
};

template <int D, int NT>
struct TeamsShared {
  TeamShared<D, NT> team[kTeams];
  int32_t end_slot[kTeams];
};
static_assert(2 * (sizeof(TeamsShared<128, 2>) + 1024) <= 233472);
static_assert(sizeof(TeamsShared<128, 4>) + 1024 <= 233472 &&
              sizeof(TeamsShared<256, 2>) + 1024 <= 233472);

// The team's barriers, by its scores warp. A slot is full when its scores warp says so and its
// copies are there.
template <int D, int NT>
__device__ void init_team(TeamShared<D, NT>& s, int lane) {
  using Shape = TeamShape<D, NT>;
  if (lane == 0) {
    for (int i = 0; i < Shape::kPlaneStages; ++i) barrier_init(&s.plane_bar[i]);
    for (int i = 0; i < Shape::kSlots; ++i) {
      barrier_init(&s.full[i], kStageArrivals);
      barrier_init(&s.empty[i], kWarpArrivals);
    }
  }
  DecodeWarp<D, NT, TeamShared<D, NT>>::init(s, lane);
}

}  // namespace thriftattn::cuda
