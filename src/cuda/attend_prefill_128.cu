// attend_prefill for head_dim 128.
#include "cuda/attend_prefill.cuh"

template void thriftattn::cuda::launch_prefill<128>(const AttendArgs&, cudaStream_t);
