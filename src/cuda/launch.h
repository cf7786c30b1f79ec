// The launchers behind append() and attend(), in the files that nvcc compiles.
#pragma once

#include "cuda/plan.h"

namespace thriftattn::cuda {

void launch_append(const AttendPlan::State& plan, const AppendCall& call, Stream stream);
void launch_attend(const AttendPlan::State& plan, const AttendCall& call, Stream stream);

}  // namespace thriftattn::cuda
