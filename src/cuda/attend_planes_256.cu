// attend_planes for head_dim 256.
#include "cuda/attend_planes.cuh"

template void thriftattn::cuda::launch_planes<256>(const AttendArgs&, int, cudaStream_t);
