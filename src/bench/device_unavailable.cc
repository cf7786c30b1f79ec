// The device bench of a build without CUDA (device_kernels.h): the backend's own error, which says
// so.
#ifndef THRIFTATTN_WITH_CUDA
#include "bench/device_kernels.h"

namespace thriftattn::bench {

struct DeviceClock::State {};
DeviceClock::DeviceClock() { cuda::device_info(); }
DeviceClock::~DeviceClock() = default;
cuda::Stream DeviceClock::stream() const { return nullptr; }
std::vector<double> DeviceClock::time(int, const std::function<void(cuda::Stream)>&) {
  cuda::device_info();
  return {};
}
DevicePeaks measure_device_peaks(DeviceClock&) {
  cuda::device_info();
  return {};
}
void draw_rows(const DrawCall&, cuda::Stream stream) { cuda::synchronize(stream); }
void launch_part(DecodePart, const cuda::AttendPlan&, const cuda::AttendCall&,
                 cuda::Stream stream) {
  cuda::synchronize(stream);
}

}  // namespace thriftattn::bench
#endif
