// Short ways to parse, resolve and look at errors in the policy tests.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "thriftattn/error.h"
#include "thriftattn/policy.h"

namespace thriftattn {

inline std::vector<LayerPolicy> layers_of(std::string_view text, int64_t layers = 4,
                                          std::vector<bool> sliding = {}) {
  return resolve(parse_policy(text), {.layers = layers, .sliding_window = std::move(sliding)});
}

// The message of the Error that `f` throws; "" and a failure if it throws none.
template <typename F>
std::string error_of(F&& f, ErrorCode code = ErrorCode::invalid_argument) {
  try {
    f();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    const std::string what = error.what();
    for (const char c : what) {
      const bool printable = c >= 0x20 && c < 0x7f;
      EXPECT_TRUE(printable) << "not one printable line: " << what;
      if (!printable) break;
    }
    return what;
  }
  ADD_FAILURE() << "no error";
  return "";
}

inline std::string parse_error(std::string_view text) {
  return error_of([&] { parse_policy(text); });
}

inline std::string resolve_error(std::string_view text,
                                 ErrorCode code = ErrorCode::invalid_argument,
                                 std::vector<bool> sliding = {}) {
  return error_of([&] { layers_of(text, 4, std::move(sliding)); }, code);
}

}  // namespace thriftattn
