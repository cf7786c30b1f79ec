// attend_planes for head_dim 128.
#include "cuda/attend_planes.cuh"

template void thriftattn::cuda::launch_planes<128>(const AttendArgs&, int, cudaStream_t);
