// Mapping memory behind the slots of a device pool (device_pool.h).
#ifdef THRIFTATTN_WITH_CUDA
#include "cuda/device_pool.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "cuda/checks.h"
#include "thriftattn/error.h"

namespace thriftattn::cuda {
namespace {

// The driver's functions, found at run time: nothing links to the driver, which machines without a
// GPU do not have.
struct Driver {
  decltype(&cuMemGetAllocationGranularity) granularity;
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) unreserve;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuGetErrorName) error_name;
};

template <typename Function>
void find(const char* name, Function& function) {
  void* found = nullptr;
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, nullptr), name);
  if (found == nullptr) {
    throw Error(ErrorCode::unsupported,
                fmt::format("CUDA: the driver has no {}; required: a driver of CUDA 12.0 or later",
                            name));
  }
  function = reinterpret_cast<Function>(found);
}

const Driver& driver() {
  static const Driver functions = [] {
    check(cudaFree(nullptr), "the first call of the device");
    Driver d;
    find("cuMemGetAllocationGranularity", d.granularity);
    find("cuMemAddressReserve", d.reserve);
    find("cuMemAddressFree", d.unreserve);
    find("cuMemCreate", d.create);
    find("cuMemRelease", d.release);
    find("cuMemMap", d.map);
    find("cuMemUnmap", d.unmap);
    find("cuMemSetAccess", d.set_access);
    find("cuGetErrorName", d.error_name);
    return d;
  }();
  return functions;
}

std::string error_name(CUresult code) {
  const char* name = nullptr;
  driver().error_name(code, &name);
  return name == nullptr ? fmt::format("error {}", static_cast<int>(code)) : name;
}

CUmemAllocationProp properties(int device) {
  CUmemAllocationProp p = {};
  p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  p.location.id = device;
  return p;
}

constexpr int64_t kSmallPool = int64_t{32} << 20;  // up to here a pool grows by one granule

}  // namespace

DevicePool::DevicePool(SlotMemoryOptions options, int64_t reserve, cudaStream_t stream)
    : options_(std::move(options)), stream_(stream) {
  check(cudaGetDevice(&device_), "cudaGetDevice");
  const CUmemAllocationProp p = properties(device_);
  size_t granule = 0;
  CUresult code = driver().granularity(&granule, &p, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  if (code == CUDA_SUCCESS) {
    granule_ = static_cast<int64_t>(granule);
    reserved_ = (std::max(reserve, granule_) + granule_ - 1) / granule_ * granule_;
    code = driver().reserve(&base_, static_cast<size_t>(reserved_), 0, 0, 0);
  }
  if (code != CUDA_SUCCESS) {
    throw Error(ErrorCode::out_of_memory,
                fmt::format("CUDA: no address space for {} ({} bytes): {}; close other caches",
                            options_.name, reserved_, error_name(code)));
  }
}

DevicePool::~DevicePool() {
  (void)cudaStreamSynchronize(stream_);  // kernels may still read what is unmapped here
  while (!pieces_.empty()) unmap_piece();
  (void)driver().unreserve(base_, static_cast<size_t>(reserved_));
}

void DevicePool::map_piece() {
  const int64_t bytes =
      std::min(mapped_ < kSmallPool ? granule_ : 8 * granule_, reserved_ - mapped_);
  const auto fail = [&](CUresult code) {
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) != cudaSuccess) (void)cudaGetLastError();
    throw Error(ErrorCode::out_of_memory,
                fmt::format("CUDA: no memory for {}: asked for {} bytes, {} are held by its pool, {} "
                            "of {} are free on the device ({}); shorten the context or choose a "
                            "policy that stores less",
                            options_.name, bytes, mapped_, free, total, error_name(code)));
  };
  if (bytes <= 0) fail(CUDA_ERROR_OUT_OF_MEMORY);
  const CUmemAllocationProp p = properties(device_);
  Piece piece{0, bytes};
  pieces_.reserve(pieces_.size() + 1);
  CUresult code = driver().create(&piece.handle, static_cast<size_t>(bytes), &p, 0);
  if (code != CUDA_SUCCESS) fail(code);
  const CUdeviceptr at = base_ + static_cast<CUdeviceptr>(mapped_);
  code = driver().map(at, static_cast<size_t>(bytes), 0, piece.handle, 0);
  if (code != CUDA_SUCCESS) {
    (void)driver().release(piece.handle);
    fail(code);
  }
  CUmemAccessDesc access = {};
  access.location = p.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  code = driver().set_access(at, static_cast<size_t>(bytes), &access, 1);
  if (code != CUDA_SUCCESS) {
    (void)driver().unmap(at, static_cast<size_t>(bytes));
    (void)driver().release(piece.handle);
    fail(code);
  }
  pieces_.push_back(piece);
  mapped_ += bytes;
}

void DevicePool::unmap_piece() noexcept {
  const Piece piece = pieces_.back();
  pieces_.pop_back();
  mapped_ -= piece.bytes;
  (void)driver().unmap(base_ + static_cast<CUdeviceptr>(mapped_), static_cast<size_t>(piece.bytes));
  (void)driver().release(piece.handle);
}

void DevicePool::place(int32_t id) {
  const int64_t end = (int64_t{id} + 1) * options_.slot_bytes;
  while (mapped_ < end) map_piece();
  if (static_cast<int64_t>(held_.size()) <= id) held_.resize(static_cast<size_t>(id) + 1);
  if (options_.zeroed) {
    check(cudaMemsetAsync(at(id), 0, static_cast<size_t>(options_.slot_bytes), stream_), "clear a slot");
  }
  held_[static_cast<size_t>(id)] = true;
  top_ = std::max(top_, int64_t{id} + 1);
}

void DevicePool::free(int32_t id) noexcept {
  held_[static_cast<size_t>(id)] = false;
  if (options_.poison) {
    (void)cudaMemsetAsync(at(id), 0xFF, static_cast<size_t>(options_.slot_bytes), stream_);
  }
  if (id + 1 != top_) return;
  while (top_ > 0 && !held_[static_cast<size_t>(top_ - 1)]) --top_;
  trim();
}

// Gives pieces behind the last slot back, but for one that the next step may want again.
void DevicePool::trim() noexcept {
  if (options_.poison) return;
  const int64_t used = top_ * options_.slot_bytes;
  const auto spare = [&] {
    return pieces_.size() > 1 && mapped_ - pieces_.back().bytes - pieces_[pieces_.size() - 2].bytes >= used;
  };
  if (!spare()) return;
  (void)cudaStreamSynchronize(stream_);
  while (spare()) unmap_piece();
}

void DevicePool::copy(int32_t from, int32_t to) {
  check(cudaMemcpyAsync(at(to), at(from), static_cast<size_t>(options_.slot_bytes),
                        cudaMemcpyDeviceToDevice, stream_),
        "copy a slot");
}

void DevicePool::read(int32_t id, void* to) const {
  check(cudaMemcpyAsync(to, at(id), static_cast<size_t>(options_.slot_bytes), cudaMemcpyDeviceToHost,
                        stream_),
        "read a slot");
  check(cudaStreamSynchronize(stream_), "read a slot");
}

void DevicePool::write(int32_t id, const void* from) {
  check(cudaMemcpyAsync(at(id), from, static_cast<size_t>(options_.slot_bytes), cudaMemcpyHostToDevice,
                        stream_),
        "write a slot");
  check(cudaStreamSynchronize(stream_), "write a slot");
}

}  // namespace thriftattn::cuda
#endif
