// What the device bench needs of CUDA itself: a clock, the device's peaks, random K and V, and the
// kernels of a decode step apart. Without CUDA in the build every one of them throws Error.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "thriftattn/cuda.h"

namespace thriftattn::bench {

// A stream of its own, and times of CUDA graphs between events.
class DeviceClock {
 public:
  DeviceClock();
  ~DeviceClock();

  cuda::Stream stream() const;
  // Milliseconds of each of `rounds` replays of what `body` puts on the stream.
  std::vector<double> time(int rounds, const std::function<void(cuda::Stream)>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// GB/s; a copy counts both ways and is the better of the driver's and a kernel's.
struct DevicePeaks {
  double copy = 0, read = 0;
};
DevicePeaks measure_device_peaks(DeviceClock& clock);

// BF16 rows [n][width] of K and V, width = kv_heads * head_dim: normal noise, to which K adds its
// page's row of `means` [pages][width].
struct DrawCall {
  uint16_t* k = nullptr;
  uint16_t* v = nullptr;
  const float* means = nullptr;
  int64_t first_token = 0, n = 0, width = 0;
  uint32_t seed = 0;
};
void draw_rows(const DrawCall& call, cuda::Stream stream);

// Of a decode step of at most 16 positions. The walk needs what prepare has left (and, of a budget,
// select, which is part of it here).
enum class DecodePart : uint8_t { prepare, walk, merge };
void launch_part(DecodePart part, const cuda::AttendPlan& plan, const cuda::AttendCall& call,
                 cuda::Stream stream);

}  // namespace thriftattn::bench
