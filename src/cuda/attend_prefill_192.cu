// attend_prefill for head_dim 192.
#include "cuda/attend_prefill.cuh"

template void thriftattn::cuda::launch_prefill<192>(const AttendArgs&, cudaStream_t);
