// The CUDA backend of a library that was built without it: everything that needs a device says so.
#ifndef THRIFTATTN_WITH_CUDA
#include "thriftattn/cuda.h"
#include "thriftattn/error.h"

namespace thriftattn::cuda {
namespace {

[[noreturn]] void unavailable() {
  throw Error(ErrorCode::unsupported,
              "this library was built without the CUDA backend; required: a build with nvcc 12.8 or "
              "later (THRIFTATTN_CUDA=ON); supported here: the CPU backend");
}

}  // namespace

bool compiled() { return false; }
int device_count() { return 0; }
DeviceInfo device_info(int) { unavailable(); }
DeviceMemory::DeviceMemory(int64_t) { unavailable(); }
DeviceMemory::~DeviceMemory() = default;
DeviceMemory::DeviceMemory(DeviceMemory&&) noexcept = default;
DeviceMemory& DeviceMemory::operator=(DeviceMemory&&) noexcept = default;
void copy_to_device(void*, const void*, int64_t, Stream) { unavailable(); }
void copy_to_host(void*, const void*, int64_t, Stream) { unavailable(); }
void copy_on_device(void*, const void*, int64_t, Stream) { unavailable(); }
void fill(void*, uint8_t, int64_t, Stream) { unavailable(); }
void synchronize(Stream) { unavailable(); }
void append(const AttendPlan&, const AppendCall&, Stream) { unavailable(); }
void attend(const AttendPlan&, const AttendCall&, Stream) { unavailable(); }

}  // namespace thriftattn::cuda
#endif
