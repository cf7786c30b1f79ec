// attend_groups for head_dim 256.
#include "cuda/attend_decode.cuh"

template void thriftattn::cuda::launch_decode<256, true>(const AttendArgs&, int, cudaStream_t);
