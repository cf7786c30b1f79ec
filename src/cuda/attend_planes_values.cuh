// The values warp of a team (attend_planes_team.cuh).
#pragma once

#include "cuda/attend_planes_team.cuh"

namespace thriftattn::cuda {

template <int D, int NT>
class ValueWarp {
  using Shape = TeamShape<D, NT>;

 public:
  __device__ ValueWarp(const AttendArgs& a, TeamsShared<D, NT>& shared, int team)
      : a_(a), block_(shared), s_(shared.team[team]), team_(team), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    clear(o_);
    for (int entry = 0;; ++entry) {
      const int slot = entry % Shape::kSlots;
      barrier_wait(&s_.full[slot], entry / Shape::kSlots & 1);
      const EntryHead<NT>& head = s_.head[slot];
      const int32_t what = head.what;
      if (what & (kMoveFirst | kAddState | kEndUnit | kStop)) {
        if (what & kStop) return;
        rarely(what, slot, entry);
      }
      if (what & kAddMean) {
        float mass[2 * NT];
        columns(head.mass, mass);
        add_mean<D, NT>(s_.v[slot] + 36 * D, lane_, mass, o_);
      }
      if (what & kAddValues) {
        float factor[2 * NT];
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) factor[c] = head.scale;
        const uint2* p = &s_.p[slot][0][0][lane_];
        add_values<D, NT, 1>(
            s_.v[slot], lane_, [&](int i, int n) { return p[(i * NT + n) * 32]; }, factor, o_);
      }
      release(slot);
    }
  }

 private:
  __device__ void release(int slot) {
    barrier_arrive_warp(&s_.empty[slot], lane_);
  }
  // A lane's columns of what is given a row.
  __device__ void columns(const float* rows, float (&to)[2 * NT]) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float2 x = *reinterpret_cast<const float2*>(rows + 8 * n + 2 * (lane_ % 4));
      to[2 * n] = x.x;
      to[2 * n + 1] = x.y;
    }
  }

  __device__ void rarely(int32_t what, int slot, int& entry) {
    const EntryHead<NT>& head = s_.head[slot];
    if (what & kMoveFirst) {
      float move[2 * NT];
      columns(head.move, move);
      scale_output<D, NT>(move, o_);
    }
    if (!(what & (kAddState | kEndUnit))) return;
    uint8_t* state = s_.v[Shape::kStateSlots == 1 ? slot : 0];
    if (what & kAddState) {
      float mass[2 * NT];
      columns(head.mass, mass);
      add_state<D, NT>(state, lane_, mass, o_);
    } else {
      store_state<D, NT>(state, lane_, o_);
      clear(o_);
      if (lane_ == 0) block_.end_slot[team_] = slot;
      values_warps_sync();
      write_partial(head.row);
      values_warps_sync();
    }
    // The copies of later pages go where a state was.
    fence_stores_before_copies();
    for (int i = 1; i < Shape::kStateSlots; ++i) {
      ++entry;
      barrier_wait(&s_.full[entry % Shape::kSlots], entry / Shape::kSlots & 1);
      release(entry % Shape::kSlots);
    }
  }

  // The values warps of the block, which come to the end of the same unit.
  __device__ static void values_warps_sync() { named_barrier_sync(1, 32 * kTeams); }

  // The sums of all teams, a part by each values warp.
  __device__ void write_partial(int64_t first_row) const {
    WarpSums from[kTeams];
#pragma unroll
    for (int t = 0; t < kTeams; ++t) {
      TeamShared<D, NT>& team = block_.team[t];
      const int slot = block_.end_slot[t];
      from[t] = {team.v[Shape::kStateSlots == 1 ? slot : 0], team.head[slot].mass,
                 team.head[slot].move};
    }
    add_up<D, NT, kTeams>(a_, from, team_, lane_, first_row);
  }

  const AttendArgs& a_;
  TeamsShared<D, NT>& block_;
  TeamShared<D, NT>& s_;
  int team_, lane_;
  float o_[D / 16][NT][4];
};

}  // namespace thriftattn::cuda
