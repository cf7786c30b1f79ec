// The part of the CUDA runtime that the library and its tests use, on a CPU: two devices, memory with
// guard pages, streams whose work is done at once, graphs that keep their launches (emulator.h).
#include <cuda.h>
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include "emulator/emulator.h"

using Work = std::vector<std::function<void()>>;

struct CUstream_st {
  bool capturing = false, invalid = false;
  Work captured;
};
struct CUgraph_st {
  Work work;
};
struct CUgraphExec_st {
  Work work;
};
struct CUevent_st {
  std::chrono::steady_clock::time_point at;
};

namespace {

constexpr int kDevices = 2;
constexpr size_t kMemory = size_t{64} << 30;   // address space, a device
constexpr size_t kFilled = size_t{256} << 20;  // larger blocks are left as they come
constexpr size_t kPage = 4096;

thread_local int t_device = 0;
thread_local cudaError_t t_error = cudaSuccess;

struct Allocation {
  void* base = nullptr;
  size_t mapped = 0, bytes = 0;
  int device = 0;
};
std::mutex g_mutex;
std::map<void*, Allocation> g_allocations;
size_t g_held[kDevices];

cudaError_t give(cudaError_t code) {
  if (code != cudaSuccess) t_error = code;
  return code;
}

// What no capture allows.
bool refuses(cudaStream_t stream) {
  if (stream == nullptr || !stream->capturing) return false;
  stream->invalid = true;
  return true;
}

}  // namespace

namespace thriftattn::emulator {

void submit(cudaStream_t stream, std::function<void()> work) {
  if (stream != nullptr && stream->invalid) {
    give(cudaErrorStreamCaptureInvalidated);
  } else if (stream != nullptr && stream->capturing) {
    stream->captured.push_back(std::move(work));
  } else {
    work();
  }
}

void launch(cudaStream_t stream, Launch l) {
  if (l.shared > static_cast<size_t>(kSharedBytes) || l.block.x * l.block.y * l.block.z > 1024) {
    give(cudaErrorInvalidValue);
  } else if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.y > 65535 || l.grid.z > 65535) {
    give(cudaErrorInvalidConfiguration);
  } else {
    submit(stream, [l = std::move(l)] { run(l); });
  }
}

}  // namespace thriftattn::emulator

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(t_error, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    default:
      return "cudaErrorInvalidValue";
  }
}
const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorMemoryAllocation ? "out of memory" : "refused by the emulator";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = t_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return give(cudaErrorInvalidDevice);
  t_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= kDevices) return give(cudaErrorInvalidDevice);
  *p = cudaDeviceProp{};
#ifdef THRIFTATTN_EMULATE_SM80
  std::snprintf(p->name, sizeof p->name, "emulated sm_80");
  p->major = 8;
#else
  std::snprintf(p->name, sizeof p->name, "emulated sm_90");
  p->major = 9;
#endif
  p->multiProcessorCount = 4;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t code = cudaGetDeviceProperties(&p, device); code != cudaSuccess) return code;
  if (attribute == cudaDevAttrComputeCapabilityMajor) {
    *value = p.major;
  } else if (attribute == cudaDevAttrComputeCapabilityMinor) {
    *value = p.minor;
  } else if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = p.multiProcessorCount;
  } else {
    return give(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard lock(g_mutex);
  *total = kMemory;
  *free = kMemory - g_held[t_device];
  return cudaSuccess;
}
// The block's end, rounded up to 256 bytes as its beginning is, lies at a page that faults.
cudaError_t cudaMalloc(void** at, size_t bytes) {
  const std::lock_guard lock(g_mutex);
  if (bytes > kMemory - g_held[t_device]) return give(cudaErrorMemoryAllocation);
  const size_t used = (bytes + 255) / 256 * 256;
  const size_t pages = (used + kPage - 1) / kPage * kPage;
  void* base = mmap(nullptr, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                    -1, 0);
  if (base == MAP_FAILED) return give(cudaErrorMemoryAllocation);
  auto* first = static_cast<uint8_t*>(base) + kPage;
  if (mprotect(first, pages, PROT_READ | PROT_WRITE) != 0) {
    munmap(base, pages + 2 * kPage);
    return give(cudaErrorMemoryAllocation);
  }
  *at = first + pages - used;
  if (used <= kFilled) std::memset(*at, 0xff, used);
  g_allocations[*at] = {base, pages + 2 * kPage, bytes, t_device};
  g_held[t_device] += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* at) {
  if (at == nullptr) return cudaSuccess;
  const std::lock_guard lock(g_mutex);
  const auto found = g_allocations.find(at);
  if (found == g_allocations.end()) return give(cudaErrorInvalidValue);
  munmap(found->second.base, found->second.mapped);
  g_held[found->second.device] -= found->second.bytes;
  g_allocations.erase(found);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t s) {
  if (bytes > 0) thriftattn::emulator::submit(s, [=] { std::memmove(to, from, bytes); });
  return t_error;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t s) {
  if (bytes > 0) thriftattn::emulator::submit(s, [=] { std::memset(to, value, bytes); });
  return t_error;
}
cudaError_t cudaMallocHost(void** at, size_t bytes) {
  *at = std::malloc(bytes);
  return *at == nullptr ? give(cudaErrorMemoryAllocation) : cudaSuccess;
}
cudaError_t cudaFreeHost(void* at) {
  std::free(at);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize &&
      value > thriftattn::emulator::kSharedBytes) {
    return give(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (refuses(stream)) return give(cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->capturing) return give(cudaErrorIllegalState);
  stream->capturing = true;
  stream->invalid = false;
  stream->captured.clear();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream == nullptr || !stream->capturing) return give(cudaErrorIllegalState);
  stream->capturing = false;
  *graph = nullptr;
  if (std::exchange(stream->invalid, false)) return give(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st{std::move(stream->captured)};
  stream->captured.clear();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const auto& work : exec->work) work();
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

// Events of a capture would be the graph's; nobody asks for the time of these.
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st{std::chrono::steady_clock::now()};
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  thriftattn::emulator::submit(stream, [=] { event->at = std::chrono::steady_clock::now(); });
  return t_error;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  *ms = std::chrono::duration<float, std::milli>(to->at - from->at).count();
  return cudaSuccess;
}

}  // extern "C"

// ---- the driver's functions behind device pools: address space, and memory mapped into it

namespace {

constexpr size_t kGranule = size_t{2} << 20;
std::map<CUmemGenericAllocationHandle, Allocation> g_handles;
CUmemGenericAllocationHandle g_next_handle = 1;

CUresult granularity(size_t* granule, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *granule = kGranule;
  return CUDA_SUCCESS;
}
CUresult reserve(CUdeviceptr* at, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  void* base = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *at = reinterpret_cast<CUdeviceptr>(base);
  return CUDA_SUCCESS;
}
CUresult unreserve(CUdeviceptr at, size_t bytes) {
  munmap(reinterpret_cast<void*>(at), bytes);
  return CUDA_SUCCESS;
}
CUresult create(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* p,
                unsigned long long) {
  const std::lock_guard lock(g_mutex);
  if (bytes > kMemory - g_held[p->location.id]) return CUDA_ERROR_OUT_OF_MEMORY;
  g_held[p->location.id] += bytes;
  *handle = g_next_handle++;
  g_handles[*handle] = {nullptr, 0, bytes, p->location.id};
  return CUDA_SUCCESS;
}
CUresult release(CUmemGenericAllocationHandle handle) {
  const std::lock_guard lock(g_mutex);
  g_held[g_handles.at(handle).device] -= g_handles.at(handle).bytes;
  g_handles.erase(handle);
  return CUDA_SUCCESS;
}
CUresult map(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  return CUDA_SUCCESS;
}
CUresult set_access(CUdeviceptr at, size_t bytes, const CUmemAccessDesc*, size_t) {
  auto* first = reinterpret_cast<void*>(at);
  if (mprotect(first, bytes, PROT_READ | PROT_WRITE) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
  std::memset(first, 0xff, bytes);
  return CUDA_SUCCESS;
}
CUresult unmap(CUdeviceptr at, size_t bytes) {
  auto* first = reinterpret_cast<void*>(at);
  if (mprotect(first, bytes, PROT_NONE) != 0) return CUDA_ERROR_INVALID_VALUE;
  madvise(first, bytes, MADV_DONTNEED);
  return CUDA_SUCCESS;
}
CUresult error_name(CUresult, const char** name) {
  *name = "CUDA_ERROR_OUT_OF_MEMORY";
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult*) {
  const std::pair<const char*, void*> known[] = {
      {"cuMemGetAllocationGranularity", reinterpret_cast<void*>(granularity)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(reserve)},
      {"cuMemAddressFree", reinterpret_cast<void*>(unreserve)},
      {"cuMemCreate", reinterpret_cast<void*>(create)},
      {"cuMemRelease", reinterpret_cast<void*>(release)},
      {"cuMemMap", reinterpret_cast<void*>(map)},
      {"cuMemUnmap", reinterpret_cast<void*>(unmap)},
      {"cuMemSetAccess", reinterpret_cast<void*>(set_access)},
      {"cuGetErrorName", reinterpret_cast<void*>(error_name)}};
  *function = nullptr;
  for (const auto& [its_name, its_function] : known) {
    if (std::strcmp(name, its_name) == 0) *function = its_function;
  }
  return cudaSuccess;
}
