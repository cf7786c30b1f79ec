// attend_prefill and prefill_tiles for head_dim 64.
#include "cuda/attend_prefill.cuh"

template void thriftattn::cuda::launch_prefill<64>(const AttendArgs&, bool, cudaStream_t);
