// attend_decode for head_dim 128.
#include "cuda/attend_decode.cuh"

template void thriftattn::cuda::launch_decode<128, false>(const AttendArgs&, int, cudaStream_t);
