// How much memory the process may still take, so that a model that is too large is refused
// with an Error instead of being killed half-way: Linux grants memory before it exists.
#pragma once

#include <cstdint>
#include <string>

namespace thriftattn {

// The least of what the machine and its control group have left; INT64_MAX if unknown.
// `root` replaces "/" in tests.
int64_t available_memory(const std::string& root = "/");

}  // namespace thriftattn
