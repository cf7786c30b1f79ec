// Reads /proc/meminfo and the limits of the control group (version 2, then 1).
#include "engine/memory_limit.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>

namespace thriftattn {
namespace {

std::optional<int64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;  // "max" is not a number: no limit
  return std::nullopt;
}

std::optional<int64_t> mem_available(const std::string& path) {
  std::ifstream file(path);
  std::string key;
  int64_t kibibytes = 0;
  std::string unit;
  while (file >> key >> kibibytes) {
    if (key == "MemAvailable:") return kibibytes * 1024;
    std::getline(file, unit);
  }
  return std::nullopt;
}

}  // namespace

int64_t available_memory(const std::string& root) {
  int64_t least = std::numeric_limits<int64_t>::max();
  if (const auto bytes = mem_available(root + "proc/meminfo")) least = *bytes;
  const std::string group = root + "sys/fs/cgroup/";
  // The limit alone: what the group uses now counts the page cache, which gives way.
  for (const char* name : {"memory.max", "memory/memory.limit_in_bytes"}) {
    least = std::min(least, read_number(group + name).value_or(least));
  }
  return least;
}

}  // namespace thriftattn
