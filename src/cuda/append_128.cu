// append for head_dim 128.
#include "cuda/append.cuh"

template void thriftattn::cuda::launch_append_pages<128>(const AppendArgs&, const dim3&, Stream);
