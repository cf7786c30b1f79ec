// launch_append(): how a step's pages are shared out among blocks. The kernels are append.cuh's, one file
// a head_dim.
#include "cuda/append.cuh"

namespace thriftattn::cuda {

extern template void launch_append_pages<64>(const AppendArgs&, const dim3&, Stream);
extern template void launch_append_pages<128>(const AppendArgs&, const dim3&, Stream);
extern template void launch_append_pages<192>(const AppendArgs&, const dim3&, Stream);
extern template void launch_append_pages<256>(const AppendArgs&, const dim3&, Stream);

void launch_append(const AttendPlan::State& plan, const AppendCall& call, Stream stream) {
  const Geometry& g = plan.geometry;
  const int block = g.k.dim & -g.k.dim;
  const int64_t pages = pages_touched(plan.limits);
  AppendArgs args{plan.geometry, plan.limits, call};
  args.rotation_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  // Short runs: a block walks its run page by page, and the other blocks of an SM fill the gaps.
  args.runs = static_cast<int32_t>(
      std::max<int64_t>(1, plan.multiprocessors * 3 / 2 / (g.kv_heads * plan.limits.batch)));
  args.v_units = static_cast<int32_t>(pages);
  args.k_units = args.v_units;
  if (g.v.layered()) {
    // Four rounds of blocks at least.
    const int64_t all = pages * g.kv_heads * plan.limits.batch;
    args.v_pages = static_cast<int32_t>(
        std::clamp<int64_t>(all / (int64_t{8} * plan.multiprocessors), 1, kMaxVPages));
    args.v_units = static_cast<int32_t>((pages + args.v_pages - 1) / args.v_pages);
  }
  if (g.k.layered()) {
    args.k_units = static_cast<int32_t>(
        std::min(pages, std::max<int64_t>(args.runs, (pages + kMaxRun - 1) / kMaxRun)));
  }
  const dim3 grid(static_cast<unsigned>(g.kv_heads * (args.k_units + args.v_units)),
                  static_cast<unsigned>(plan.limits.batch));
  // A run that begins within kWarmup pages of the step's first walks from there.
  args.repairs = g.k.layered() && g.center && pages > kWarmup + 1;
  for_head_dim(g.k.dim, [&](auto dim) { launch_append_pages<dim.value>(args, grid, stream); });
}

}  // namespace thriftattn::cuda
