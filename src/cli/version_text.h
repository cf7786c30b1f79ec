// `thriftattn --version`: what runs here, for reports of problems.
#pragma once

#include <string>

namespace thriftattn::cli {

std::string version_text();

}  // namespace thriftattn::cli
