// The launchers behind append() and attend(), in the files that nvcc compiles.
#pragma once

#include <type_traits>

#include "cuda/plan.h"

namespace thriftattn::cuda {

// Calls body(std::integral_constant<int, head_dim>) for the head_dims that kernels are made for,
// which make_geometry() has checked.
template <class Body>
void for_head_dim(int dim, const Body& body) {
  if (dim == 64) return body(std::integral_constant<int, 64>());
  if (dim == 128) return body(std::integral_constant<int, 128>());
  if (dim == 192) return body(std::integral_constant<int, 192>());
  body(std::integral_constant<int, 256>());
}

void launch_append(const AttendPlan::State& plan, const AppendCall& call, Stream stream);
void launch_attend(const AttendPlan::State& plan, const AttendCall& call, Stream stream);

}  // namespace thriftattn::cuda
