// The scores warp of a team (attend_planes_team.cuh).
#pragma once

#include "cuda/attend_planes_team.cuh"

namespace thriftattn::cuda {

// Where a scores warp stands in its rings, from unit to unit.
struct TeamCursor {
  int k_issued = 0, k_used = 0;  // planes of K
  int entry = 0;                 // next slot to be filled
  int rest_k = 0, rest_v = 0;    // of DecodeWarp
};

template <int D, int NT>
class ScoreWarp : PageScores<D, NT, TeamShared<D, NT>> {
  using Shape = TeamShape<D, NT>;
  using Shared = TeamShared<D, NT>;
  using Walk = ItemWalk<D, NT>;
  using Pages = PageScores<D, NT, Shared>;
  using Pages::a_, Pages::s_, Pages::lane_, Pages::g_, Pages::j_, Pages::items_, Pages::l_,
      Pages::noted_;
  using Pages::residual_of;
  using typename Pages::Batch, typename Pages::Share;

 public:
  __device__ ScoreWarp(const Walk& walk, Shared& shared, TeamCursor& cursor)
      : Pages(walk, shared), at_(cursor) {}

  // The unit; `row` is where its partial goes.
  __device__ void run(int64_t row) {
    uint32_t other = 0;
    this->start();
    for (int first = 0; first < items_; first += kBatch) {
      Batch b = this->batch(first);
      this->take_rest(b, other);
      this->load_records(b);
      __syncwarp();
      noted_ = 0;
      // Then what they promoted.
      for (int again = 0; again < 2; ++again) {
        if (again) b.pages = b.full = noted_;
        if (b.pages != 0) walk(b, again);
      }
    }
    if (__any_sync(~0u, other != 0)) add_rest(other);
    end_unit(row);
  }
  // No more units.
  __device__ static void stop(Shared& s, TeamCursor& at, int lane) {
    acquire(s, at.entry);
    if (lane == 0) s.head[at.entry % Shape::kSlots].what = kStop;
    commit(s, at, lane, nullptr, 0, 0);
  }

 private:
  // ---- slots

  __device__ static void acquire(Shared& s, int entry) {
    const int round = entry / Shape::kSlots;
    if (round > 0) barrier_wait(&s.empty[entry % Shape::kSlots], (round - 1) & 1);
  }
  // The slot is filled; V's bytes from `skipped` on go to the same place in it.
  __device__ static void commit(Shared& s, TeamCursor& at, int lane, const uint8_t* from,
                                int skipped, int bytes) {
    const int slot = at.entry % Shape::kSlots;
    __syncwarp();
    const StageCopy copy{&s.full[slot], lane};
    copy.begin(bytes);
    if (bytes != 0) copy.copy(s.v[slot] + skipped, 0, from + skipped, 0, bytes, 1);
    copy.end();
    barrier_arrive_rest(&s.full[slot], lane);
    ++at.entry;
  }
  // Each row's numbers, from the lanes that hold its columns.
  __device__ void write_head(int32_t what, float scale, const float (&mass)[2 * NT],
                             const float (&move)[2 * NT], int64_t row) {
    EntryHead<NT>& head = s_.head[at_.entry % Shape::kSlots];
    if (g_ == 0) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        *reinterpret_cast<float2*>(&head.mass[8 * n + 2 * j_]) =
            make_float2(mass[2 * n], mass[2 * n + 1]);
        *reinterpret_cast<float2*>(&head.move[8 * n + 2 * j_]) =
            make_float2(move[2 * n], move[2 * n + 1]);
      }
    }
    if (lane_ == 0) {
      head.what = what;
      head.scale = scale;
      head.row = row;
    }
  }
  // P of the slot that is being filled.
  __device__ uint2* weights() { return &s_.p[at_.entry % Shape::kSlots][0][0][lane_]; }

  // ---- pages

  __device__ void pass_on(int bit, bool full, const Share& share, const float (&mass)[2 * NT]) {
    float move[2 * NT] = {};
    int32_t what = kAddMean | (this->take_move(move) ? kMoveFirst : 0);
    if (!share.mean_only()) what |= kAddValues;
    const float* record = s_.page.record[bit];
    write_head(what, record[1] * 0.5f, mass, move, 0);
    const int bytes = share.mean_only() ? 2 * D : 38 * D;
    const uint8_t* v = s_.page.item[bit].v;
    if (!full) {
      commit(s_, at_, lane_, v, 38 * D - bytes, bytes);
      return;
    }
    uint2 p[4 * NT];
#pragma unroll
    for (int i = 0; i < 4 * NT; ++i) p[i] = weights()[i * 32];
    commit(s_, at_, lane_, v, 0, bytes);
    acquire(s_, at_.entry);
#pragma unroll
    for (int i = 0; i < 4 * NT; ++i) weights()[i * 32] = p[i];
    if (lane_ == 0) {
      s_.head[at_.entry % Shape::kSlots].what = kAddValues;
      s_.head[at_.entry % Shape::kSlots].scale = record[3] * 0.5f;
    }
    commit(s_, at_, lane_, residual_of(bit) + a_.g.v.res_codes, 0, 36 * D);
  }

  // The pages of a batch; `again` with residuals, for the rows noted.
  __device__ void walk(const Batch& b, bool again) {
    uint32_t ahead = b.pages;
    bool second = false;
    const auto fetch = [&] {
      while (ahead != 0 && at_.k_issued - at_.k_used < Shape::kPlaneStages) {
        const int bit = __ffs(static_cast<int>(ahead)) - 1;
        const uint8_t* from = second ? residual_of(bit) + a_.g.k.res_codes : s_.page.item[bit].k;
        const int stage = at_.k_issued % Shape::kPlaneStages;
        const StageCopy copy{&s_.plane_bar[stage], lane_};
        copy.begin(36 * D);
        copy.copy(s_.k[stage], 0, from, 0, 36 * D, 1);
        copy.end();
        ++at_.k_issued;
        second = !second && (b.full >> bit & 1);
        if (!second) ahead &= ahead - 1;
      }
    };
    fetch();
    for (uint32_t left = b.pages; left != 0; left &= left - 1) {
      const int bit = __ffs(static_cast<int>(left)) - 1;
      const bool full = b.full >> bit & 1;
      float sum[2 * NT];
      acquire(s_, at_.entry);
      const uint8_t* plane[2] = {nullptr, nullptr};
      for (int u = 0; u < (full ? 2 : 1); ++u, ++at_.k_used) {
        const int stage = at_.k_used % Shape::kPlaneStages;
        barrier_wait(&s_.plane_bar[stage], at_.k_used / Shape::kPlaneStages & 1);
        plane[u] = s_.k[stage];
      }
      const uint2* q = this->query_nvfp4();
      const auto query = [&](int n, int step) { return q[(n * (D / 16) + step) * 32]; };
      if (full) {
        this->template weigh<true>(plane[0], plane[1], query, bit, weights(), sum);
      } else {
        this->template weigh<false>(plane[0], nullptr, query, bit, weights(), sum);
      }
      __syncwarp();
      fetch();
      const Share share = this->settle(b, bit, full, again, weights(), sum);
      if (share.rows != 0) pass_on(bit, full, share, sum);
    }
    __syncwarp();
  }

  // ---- what is not whole pages alike for all rows, and the end

  // By DecodeWarp, whose sums are left in the slot; a function of its own, so that it takes no
  // registers from the loops above.
  __device__ static __noinline__ void walk_rest(Walk walk, Shared* s, uint32_t other,
                                                TeamCursor* at) {
    DecodeWarp<D, NT, Shared> rest(walk, *s);
    rest.walk_others(other, at->rest_k, at->rest_v);
    const int slot = at->entry % Shape::kSlots;
    fence_stores_before_copies();
    __syncwarp();
    rest.leave_state(s->v[Shape::kStateSlots == 1 ? slot : 0], s->head[slot].mass,
                     s->head[slot].move);
    fence_stores_before_copies();
    __syncwarp();
  }
  __device__ void add_rest(uint32_t other) {
    for (int i = 0; i < Shape::kSlots; ++i) acquire(s_, at_.entry + i);
    TeamCursor cursor = at_;
    walk_rest(*this, &s_, other, &cursor);
    at_.rest_k = cursor.rest_k;
    at_.rest_v = cursor.rest_v;
    const EntryHead<NT>& head = s_.head[at_.entry % Shape::kSlots];
    float own[2 * NT], state[2 * NT], move[2 * NT];
    const bool moves = this->take_move(move);
    this->merge(head.mass, head.move, own, state);
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) own[c] *= moves ? move[c] : 1.0f;
    write_head(kMoveFirst | kAddState, 0, state, own, 0);
    commit_state();
  }
  __device__ void end_unit(int64_t row) {
    float move[2 * NT] = {}, m[2 * NT] = {};
    if (this->take_move(move)) {
      acquire(s_, at_.entry);
      write_head(kMoveFirst, 0, m, move, 0);
      commit(s_, at_, lane_, nullptr, 0, 0);
    }
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) m[c] = this->reference(c);
    for (int i = 0; i < Shape::kStateSlots; ++i) acquire(s_, at_.entry + i);
    write_head(kEndUnit, 0, l_, m, row);
    commit_state();
  }
  // The slot, and those that its state needs beside it.
  __device__ void commit_state() {
    for (int i = 0; i < Shape::kStateSlots; ++i) commit(s_, at_, lane_, nullptr, 0, 0);
  }

  TeamCursor& at_;
};

}  // namespace thriftattn::cuda
