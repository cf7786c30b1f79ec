// Comparing logits: with one another, and with models/demo/goldens.json.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/sampler.h"
#include "engine/session.h"

namespace thriftattn {

inline double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = a.size() == b.size() ? 0.0 : 1e30;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::fabs(static_cast<double>(a[i]) - b[i]);
    worst = d <= worst ? worst : d;  // NaN counts as worst
  }
  return worst;
}

// 64 greedy tokens equal to the goldens, but where the two best logits nearly tie; the logits after
// the prompt within `tolerance`. make_session() gives a new one.
template <class MakeSession>
void compare_goldens(const nlohmann::json& goldens, const char* golden, double tolerance,
                     const MakeSession& make_session) {
  for (const nlohmann::json& prompt : goldens.at("prompts")) {
    const nlohmann::json& want = prompt.at(golden);
    const std::string name = prompt.at("name");
    Session session = make_session();
    session.prefill(prompt.at("prompt_ids").get<std::vector<int32_t>>());
    const std::vector<double> first = want.at("prompt_logits_first_256");
    double worst = 0.0;
    for (size_t i = 0; i < first.size(); ++i) {
      worst = std::max(worst, std::fabs(session.next_logits()[i] - first[i]));
    }
    EXPECT_LT(worst, tolerance) << name;
    const std::vector<int32_t> ids = want.at("greedy_ids");
    const nlohmann::json& top = want.at("top2_logits");
    for (size_t i = 0; i < ids.size(); ++i) {
      const int32_t got = argmax(session.next_logits());
      const double margin = top[i][0].get<double>() - top[i][1].get<double>();
      if (got != ids[i]) {
        EXPECT_LT(margin, 0.02) << name << ": token " << i;
        break;  // the continuations differ from here on
      }
      session.decode(got);
    }
  }
}

}  // namespace thriftattn
