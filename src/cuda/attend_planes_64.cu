// attend_planes for head_dim 64.
#include "cuda/attend_planes.cuh"

template void thriftattn::cuda::launch_planes<64>(const AttendArgs&, int, cudaStream_t);
