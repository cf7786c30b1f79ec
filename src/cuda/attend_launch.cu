// launch_attend(): steps of more than 16 positions by attend_prefill, where no rule of decode asks
// for more; others in passes of at most 16 positions, each of which prepares, walks the pages and
// merges. The number of launches depends on the plan and the mode alone.
#include <cmath>

#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/attend_prefill_shape.h"
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
  a.split_rule = plan.split_rule;
  a.multiprocessors = plan.multiprocessors;
  a.slots = plan.slots;
  a.resident = plan.resident;
  a.batch_invariant = plan.limits.batch_invariant;
  a.open_by_block = plan.planes && plan.n_tiles == 1 && call.config.softcap == 0;
  a.prefill = call.config.mode == AttendMode::prefill;
  a.causal = call.config.causal;
  a.softmax_scale = call.config.softmax_scale;
  a.softcap = call.config.softcap * kLog2e;
  const int block = a.g.k.dim & -a.g.k.dim;
  a.hadamard_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  a.log2_promote =
      a.g.promote < 1 ? std::log2(a.g.promote) : INFINITY;  // never, whatever the floor
  a.log2_skip = a.g.skip > 0 ? std::log2(a.g.skip) : -INFINITY;
  a.positions = static_cast<int32_t>(a.prefill ? plan.positions : plan.rule_positions);
  if (a.positions < plan.positions) a.row_tiles = 1;
  return a;
}

void launch_walk(const AttendPlan::State& plan, const AttendArgs& args, cudaStream_t stream) {
  AttendArgs a = args;
  if (a.g.budget != 0 && a.prefill == 0) {  // every residual of attend_select's table is read
    a.call.tables.residual_table = reinterpret_cast<const int32_t*>(
        static_cast<const uint8_t*>(a.call.workspace) + a.ws.chosen_residuals);
    a.g.k.always_full = 1;
  }
  for_head_dim(a.g.k.dim, [&](auto dim) {
    if (plan.planes) return launch_planes<dim.value>(a, plan.n_tiles, stream);
    if (a.g.any_grouped()) return launch_decode<dim.value, true>(a, plan.n_tiles, stream);
    launch_decode<dim.value, false>(a, plan.n_tiles, stream);
  });
}

void launch_attend(const AttendPlan::State& plan, const AttendCall& call, Stream stream) {
  AttendArgs a = make_attend_args(plan, call);
  // In decode mode a position reads its earlier pages sealed and by the mass rule.
  const bool two_terms = call.q_element == Element::f32;
  const int stages =
      prefill_stages(a.g.k.dim, a.g.k.layered() || two_terms, plan.major, plan.minor);
  if (plan.prefill_stages > 0 && stages > 0 && (a.prefill != 0 || !a.g.any_layered())) {
    a.positions = static_cast<int32_t>(plan.limits.step_tokens);
    a.tile_rows = kPrefillRows;
    a.row_tiles = static_cast<int32_t>((plan.limits.step_tokens * a.g.group + kPrefillRows - 1) /
                                       kPrefillRows);
    a.stages = stages;
    a.two_terms = two_terms;
    launch_prefill_facts(a, stream);
    const auto heads = static_cast<int32_t>(plan.limits.batch * a.g.kv_heads);
    const int32_t made = plan.prefill_pass_heads[prefill_k_tiles(a) - 1];
    const int32_t each = made > 0 ? made : heads;
    for (a.first_head = 0; a.first_head < heads; a.first_head += each) {
      a.pass_heads = std::min(each, heads - a.first_head);
      for_head_dim(a.g.k.dim, [&](auto dim) { launch_prefill<dim.value>(a, made > 0, stream); });
    }
    return;
  }
  const int64_t each = a.positions;
  for (int64_t first = 0; first < plan.limits.step_tokens; first += each) {
    a.first_q = first;
    a.positions = static_cast<int32_t>(std::min(each, plan.limits.step_tokens - first));
    launch_prepare(a, stream);
    if (a.g.budget != 0 && a.prefill == 0) launch_select(a, stream);
    launch_walk(plan, a, stream);
    launch_merge(a, stream);
  }
}

}  // namespace thriftattn::cuda
