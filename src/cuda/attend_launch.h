// The launchers of the attend kernels; one stem a kernel.
#pragma once

#include <cuda_runtime.h>

#include "cuda/plan.h"

namespace thriftattn::cuda {

struct AttendArgs;

AttendArgs make_attend_args(const AttendPlan::State& plan, const AttendCall& call);
void launch_prepare(const AttendArgs& a, cudaStream_t stream);
// Of a budget, between attend_prepare and the walk.
void launch_select(const AttendArgs& a, cudaStream_t stream);
void launch_merge(const AttendArgs& a, cudaStream_t stream);

// The kernel of the plan between the two.
void launch_walk(const AttendPlan::State& plan, const AttendArgs& a, cudaStream_t stream);
// attend_decode<dim, n_tiles>, instantiated in attend_decode_<dim>.cu; with the code for planes in
// groups of 32 it is attend_groups, instantiated in attend_groups_<dim>.cu.
template <int Dim, bool kGroups>
void launch_decode(const AttendArgs& a, int n_tiles, cudaStream_t stream);
// attend_planes<dim, n_tiles>, instantiated in attend_planes_<dim>.cu.
template <int Dim>
void launch_planes(const AttendArgs& a, int n_tiles, cudaStream_t stream);

// attend_prefill<dim>, instantiated in attend_prefill_<dim>.cu, and what it reads of each page. `made`:
// with tiles that prefill_tiles<dim> makes before it.
void launch_prefill_facts(const AttendArgs& a, cudaStream_t stream);
template <int Dim>
void launch_prefill(const AttendArgs& a, bool made, cudaStream_t stream);

}  // namespace thriftattn::cuda
