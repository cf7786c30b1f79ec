// Devices, memory, copies and the entry points append() and attend().
#ifdef THRIFTATTN_WITH_CUDA
#include <cuda_runtime.h>
#include <fmt/format.h>

#include <array>
#include <atomic>
#include <utility>

#include "cuda/checks.h"
#include "cuda/launch.h"
#include "thriftattn/cuda.h"
#include "thriftattn/error.h"

namespace thriftattn::cuda {
namespace {

constexpr int kMaxDevices = 64;
// Bytes held by DeviceMemory, a device: what an out-of-memory error names.
std::array<std::atomic<int64_t>, kMaxDevices> g_held{};

}  // namespace

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here; a sticky error returns by itself
  const char* remedy = code == cudaErrorNoKernelImageForDevice
                           ? "; build with this device's target (make cuda-all)"
                       : code == cudaErrorInsufficientDriver ? "; install a newer driver"
                                                             : "";
  throw Error(code == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::unsupported,
              fmt::format("CUDA: {} failed: {} ({}){}", what, cudaGetErrorString(code),
                          cudaGetErrorName(code), remedy));
}

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

bool compiled() { return true; }

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

DeviceInfo device_info(int index) {
  if (device_count() == 0) {
    throw Error(ErrorCode::unsupported,
                "CUDA: no device; required: an NVIDIA GPU of compute capability 8.0 or later and its "
                "driver; use the CPU backend on this machine");
  }
  DeviceInfo info;
  if (index < 0) check(cudaGetDevice(&index), "cudaGetDevice");
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
  info.index = index;
  info.name = p.name;
  info.major = p.major;
  info.minor = p.minor;
  info.multiprocessors = p.multiProcessorCount;
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  check(cudaSetDevice(index), "cudaSetDevice");
  size_t free = 0, total = 0;
  const cudaError_t code = cudaMemGetInfo(&free, &total);
  check(cudaSetDevice(current), "cudaSetDevice");
  check(code, "cudaMemGetInfo");
  info.memory_total = static_cast<int64_t>(total);
  info.memory_free = static_cast<int64_t>(free);
  check(cudaDriverGetVersion(&info.driver_version), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&info.runtime_version), "cudaRuntimeGetVersion");
  return info;
}

DeviceMemory::DeviceMemory(int64_t bytes) {
  check(cudaGetDevice(&device_), "cudaGetDevice");
  if (bytes <= 0) return;
  auto& held = g_held[static_cast<size_t>(device_) % kMaxDevices];
  if (cudaMalloc(&data_, static_cast<size_t>(bytes)) != cudaSuccess) {
    (void)cudaGetLastError();
    data_ = nullptr;
    size_t free = 0, total = 0;
    (void)cudaMemGetInfo(&free, &total);
    throw Error(ErrorCode::out_of_memory,
                fmt::format("CUDA: device {} is out of memory: asked {} bytes, held {}, free {} of {}; "
                            "use a smaller context, batch or a policy of fewer bits",
                            device_, bytes, held.load(), free, total));
  }
  bytes_ = bytes;
  held += bytes;
}

DeviceMemory::~DeviceMemory() {
  if (data_ == nullptr) return;
  (void)cudaFree(data_);
  g_held[static_cast<size_t>(device_) % kMaxDevices] -= bytes_;
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      device_(other.device_) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream),
        "copy to the device");
}
void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream),
        "copy to the host");
}
void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
        "copy on the device");
}
void fill(void* to, uint8_t value, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(to, value, static_cast<size_t>(bytes), stream), "fill");
}
void synchronize(Stream stream) { check(cudaStreamSynchronize(stream), "synchronize"); }

namespace {

void check_call(const AttendPlan& plan, const void* workspace, const BatchTables& tables) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device != plan.state().device) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("CUDA: the plan was made for device {}, device {} is current; call "
                            "cudaSetDevice or make another plan",
                            plan.state().device, device));
  }
  if (workspace == nullptr || tables.lengths == nullptr || tables.block_table == nullptr) {
    throw Error(ErrorCode::invalid_argument,
                "CUDA: workspace, lengths and block_table must be given");
  }
}

}  // namespace

void append(const AttendPlan& plan, const AppendCall& call, Stream stream) {
  check_call(plan, call.workspace, call.tables);
  if (call.k == nullptr || call.v == nullptr) {
    throw Error(ErrorCode::invalid_argument, "CUDA append: k and v must be given");
  }
  launch_append(plan.state(), call, stream);
}

void attend(const AttendPlan& plan, const AttendCall& call, Stream stream) {
  check_call(plan, call.workspace, call.tables);
  if (call.q == nullptr || call.out == nullptr) {
    throw Error(ErrorCode::invalid_argument, "CUDA attend: q and out must be given");
  }
  if (!(call.config.softmax_scale > 0)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("CUDA attend: softmax_scale = {}; usually 1/sqrt(head_dim_k)",
                            call.config.softmax_scale));
  }
  if (!call.config.causal && plan.shape().window > 0) {
    throw Error(ErrorCode::invalid_argument,
                "CUDA attend: a sliding window needs causal attention");
  }
  launch_attend(plan.state(), call, stream);
}

}  // namespace thriftattn::cuda
#endif
