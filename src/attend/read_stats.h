// How one (query, KV head) row read its pages: the one place where AttendStats are counted.
#pragma once

#include <algorithm>
#include <cstdint>

#include "precision/mass_rule.h"
#include "thriftattn/attention.h"

namespace thriftattn {

class RowStats {
 public:
  RowStats(AttendStats& stats, const PageLayout& layout, double promote)
      : stats_(stats), layout_(layout), promote_(promote) {}

  // A page without tiers: plain, or open.
  void add_plain(int64_t tokens, bool open) {
    bits_ += open ? open_read_bits(layout_, tokens)
                  : page_read_bits(layout_, PageRead::base, tokens);
    tokens_ += tokens;
  }
  // A sealed layered page.
  void add_page(PageRead how, int64_t tokens) {
    bits_ += page_read_bits(layout_, how, tokens);
    tokens_ += tokens;
    ++stats_.pages_visible;
    stats_.pages_promoted += how == PageRead::full;
    stats_.pages_skipped += how == PageRead::skip;
  }
  // What one query head of the group held in that page: over base scores, and in the end.
  void add_mass(PageRead how, double mass, double final_mass) {
    if (how == PageRead::base) {
      stats_.max_mass_4bit = std::max(stats_.max_mass_4bit, mass);
      stats_.sum_mass_4bit += mass;
      stats_.final_mass_4bit += final_mass;
      if (mass > promote_) stats_.wanted_mass += mass;
    } else if (how == PageRead::skip) {
      stats_.max_mass_skipped = std::max(stats_.max_mass_skipped, mass);
      stats_.sum_mass_skipped += mass;
      stats_.final_mass_skipped += final_mass;
    }
  }
  void finish(int64_t group) {
    const auto elements = static_cast<double>(tokens_ * (layout_.k.dim + layout_.v.dim));
    ++stats_.rows;
    stats_.query_heads += group;
    stats_.bits_read += bits_;
    stats_.elements_visible += elements;
    stats_.bits_per_element_sum += bits_ / elements;
  }

 private:
  AttendStats& stats_;
  const PageLayout& layout_;
  double promote_;
  double bits_ = 0;
  int64_t tokens_ = 0;
};

}  // namespace thriftattn
