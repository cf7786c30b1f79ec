// launch_attend(): a step's queries in passes of at most 16 positions; each pass prepares, walks the
// pages and merges. The number of launches depends on the plan alone.
#include <cmath>

#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/launch.h"

namespace thriftattn::cuda {

AttendArgs make_attend_args(const AttendPlan::State& plan, const AttendCall& call) {
  AttendArgs a;
  a.g = plan.geometry;
  a.limits = plan.limits;
  a.call = call;
  a.ws = plan.workspace;
  a.tile_rows = 8 * plan.n_tiles;
  a.row_tiles = plan.row_tiles;
  a.splits = static_cast<int32_t>(plan.splits);
  a.prefill = call.config.mode == AttendMode::prefill;
  a.causal = call.config.causal;
  a.softmax_scale = call.config.softmax_scale;
  a.softcap = call.config.softcap * kLog2e;
  const int block = a.g.k.dim & -a.g.k.dim;
  a.hadamard_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  a.log2_promote = std::log2(a.g.promote);
  a.log2_skip = a.g.skip > 0 ? std::log2(a.g.skip) : -INFINITY;
  a.positions = static_cast<int32_t>(plan.positions);
  return a;
}

void launch_decode(const AttendArgs& a, int n_tiles, cudaStream_t stream) {
  switch (a.g.k.dim) {
    case 64:
      return launch_decode<64>(a, n_tiles, stream);
    case 128:
      return launch_decode<128>(a, n_tiles, stream);
    case 192:
      return launch_decode<192>(a, n_tiles, stream);
    default:
      return launch_decode<256>(a, n_tiles, stream);
  }
}

void launch_attend(const AttendPlan::State& plan, const AttendCall& call, Stream stream) {
  AttendArgs a = make_attend_args(plan, call);
  for (int64_t first = 0; first < plan.limits.step_tokens; first += plan.positions) {
    a.first_q = first;
    a.positions =
        static_cast<int32_t>(std::min(plan.positions, plan.limits.step_tokens - first));
    launch_prepare(a, stream);
    launch_decode(a, plan.n_tiles, stream);
    launch_merge(a, stream);
  }
}

}  // namespace thriftattn::cuda
