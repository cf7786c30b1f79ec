// attend_decode for head_dim 64.
#include "cuda/attend_decode.cuh"

template void thriftattn::cuda::launch_decode<64, false>(const AttendArgs&, int, cudaStream_t);
