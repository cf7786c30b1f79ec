// attend_decode for head_dim 256.
#include "cuda/attend_decode.cuh"

template void thriftattn::cuda::launch_decode<256, false>(const AttendArgs&, int, cudaStream_t);
