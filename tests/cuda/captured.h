// A case's step as a graph, for tests of what a replay follows.
#pragma once

#ifdef THRIFTATTN_WITH_CUDA
#include "cuda/device_case.h"
#include "cuda/device_steps.h"

namespace thriftattn::testing {

class Captured {
 public:
  explicit Captured(DeviceCase& c) : case_(c) {
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), cudaSuccess);
    cuda::attend(c.plan(), c.call(), stream_.get());
    EXPECT_EQ(cudaStreamEndCapture(stream_.get(), &graph), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&exec_, graph, 0), cudaSuccess);
    cudaGraphDestroy(graph);
  }
  ~Captured() { cudaGraphExecDestroy(exec_); }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;

  DeviceCase::Result replay() {
    cuda::synchronize(nullptr);
    EXPECT_EQ(cudaGraphLaunch(exec_, stream_.get()), cudaSuccess);
    cuda::synchronize(stream_.get());
    return case_.read();
  }

 private:
  DeviceCase& case_;
  OwnStream stream_;
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace thriftattn::testing
#endif
