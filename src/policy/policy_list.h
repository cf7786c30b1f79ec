// Lists of policies on a command line: "exact,fp8,balanced,promote=0.05,thrifty".
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace thriftattn {

// ';' separates policies; so does ',' where a preset's name, '@' or '{' follows, because such an
// item cannot belong to the policy before it. Texts are not checked: parse_policy does that.
std::vector<std::string> split_policy_list(std::string_view text);

}  // namespace thriftattn
