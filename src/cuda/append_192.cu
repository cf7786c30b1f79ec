// append for head_dim 192.
#include "cuda/append.cuh"

template void thriftattn::cuda::launch_append_pages<192>(const AppendArgs&, const dim3&, Stream);
