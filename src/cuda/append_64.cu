// append for head_dim 64.
#include "cuda/append.cuh"

template void thriftattn::cuda::launch_append_pages<64>(const AppendArgs&, const dim3&, Stream);
