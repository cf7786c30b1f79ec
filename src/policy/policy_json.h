// Policies as JSON (docs/policy.md has the schema).
#pragma once

#include <string>
#include <string_view>

#include "thriftattn/policy.h"

namespace thriftattn {

// `default_name` is the name of a policy whose JSON gives none.
Policy policy_from_json(std::string_view text, const std::string& default_name);

}  // namespace thriftattn
