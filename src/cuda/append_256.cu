// append for head_dim 256.
#include "cuda/append.cuh"

template void thriftattn::cuda::launch_append_pages<256>(const AppendArgs&, const dim3&, Stream);
