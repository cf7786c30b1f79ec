// Errors of the public API: every failure is thrown as thriftattn::Error.
#pragma once

#include <stdexcept>
#include <string>

namespace thriftattn {

enum class ErrorCode {
  invalid_argument,  // a value the caller passed is wrong; nothing was changed
  unsupported,       // valid, but this build or machine cannot do it
  not_found,         // a file, tensor or name does not exist
  io,                // reading or writing failed
  corrupt,           // a file's content contradicts its own format
  out_of_memory,     // an allocation or a configured limit failed
  non_finite,        // NaN or Inf where numbers are required
  cancelled,         // the caller asked to stop; what was finished before stays
};

// One line: the cause, then the remedy. Values and names are in the text.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace thriftattn
