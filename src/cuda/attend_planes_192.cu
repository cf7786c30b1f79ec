// attend_planes for head_dim 192.
#include "cuda/attend_planes.cuh"

template void thriftattn::cuda::launch_planes<192>(const AttendArgs&, int, cudaStream_t);
