// Slots of one pool on a device: address space reserved once, memory mapped behind it as ids are
// taken. For sources that know CUDA.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cache/slot_memory.h"

namespace thriftattn::cuda {

class DevicePool : public SlotMemory {
 public:
  // `reserve` bytes of address space on the current device.
  DevicePool(SlotMemoryOptions options, int64_t reserve, cudaStream_t stream);
  ~DevicePool() override;
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  void place(int32_t id) override;
  void free(int32_t id) noexcept override;
  void copy(int32_t from, int32_t to) override;
  void read(int32_t id, void* to) const override;
  void write(int32_t id, const void* from) override;

  uint8_t* base() const { return reinterpret_cast<uint8_t*>(base_); }
  int64_t mapped() const { return mapped_; }

 private:
  struct Piece {
    CUmemGenericAllocationHandle handle;
    int64_t bytes;
  };
  uint8_t* at(int32_t id) const { return base() + id * options_.slot_bytes; }
  void map_piece();
  void unmap_piece() noexcept;
  void trim() noexcept;

  SlotMemoryOptions options_;
  cudaStream_t stream_;
  int device_ = 0;
  int64_t granule_ = 0, reserved_ = 0, mapped_ = 0;
  CUdeviceptr base_ = 0;
  std::vector<Piece> pieces_;
  std::vector<bool> held_;
  int64_t top_ = 0;  // one past the highest id that is held
};

}  // namespace thriftattn::cuda
