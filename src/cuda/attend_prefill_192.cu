// attend_prefill and prefill_tiles for head_dim 192.
#include "cuda/attend_prefill.cuh"

template void thriftattn::cuda::launch_prefill<192>(const AttendArgs&, bool, cudaStream_t);
