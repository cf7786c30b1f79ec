// attend_groups for head_dim 192.
#include "cuda/attend_decode.cuh"

template void thriftattn::cuda::launch_decode<192, true>(const AttendArgs&, int, cudaStream_t);
