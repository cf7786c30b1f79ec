// Words of error messages: what the user gave, quoted so that it stays on one line, and the
// accepted name that is nearest to it.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace thriftattn {

// `text` in single quotes; control and non-ASCII bytes as \xNN, long text cut with "...".
std::string quote(std::string_view text);

// "; did you mean 'NAME'?" for the nearest of `names`, or "" if none is near.
std::string did_you_mean(std::string_view given, std::span<const std::string_view> names);

// "a, b or c".
std::string one_of(std::span<const std::string_view> names);

std::string_view trimmed(std::string_view text);

}  // namespace thriftattn
