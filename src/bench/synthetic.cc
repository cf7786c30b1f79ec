// Drawing attention masses and the data that has them (synthetic.h).
#include "bench/synthetic.h"

#include <fmt/format.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>

#include "precision/mass_rule.h"
#include "thriftattn/error.h"

namespace thriftattn::bench {
namespace {

// |q| * scale: the standard deviation of a score over a page's noise. Small, so that the sum over
// 64 tokens lies within 7 % of its mean and masses hit their targets.
constexpr double kQueryGain = 0.5;
constexpr size_t kNoise = size_t{1} << 18;  // numbers that all rows draw from
constexpr size_t kNoiseStep = 16;           // rows start on vector boundaries

// Distances to the thresholds, in factors of mass.
constexpr double kHeavyMargins[] = {1.6, 1.4, 1.25};
constexpr double kBaseBelowPromote = 1.5;
constexpr double kBaseAboveSkip = 1.4;
constexpr double kLowBelowSkip = 4.0;
constexpr double kLowTotal = 0.05;   // at most, of all pages that a head does not care for
constexpr double kOpenLeast = 0.01;  // of the open page

// How far the fractions found may be from those asked for, relative.
constexpr double kTolerance = 0.2;

enum class Kind : uint8_t { heavy, base, low };

struct PageTarget {
  Kind kind = Kind::base;
  int32_t direction = 0;  // of the heads that hold the page's mass; the others hold `low`
};

struct Masses {
  double heavy = 0, base = 0, low = 0;
};

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Counts of one KV head's pages.
struct Counts {
  int64_t pages = 0, directions = 1, heavy = 0, base = 0;
};

std::optional<Masses> solve(const Counts& n, double promote, double skip) {
  const int64_t heavy_each = ceil_div(n.heavy, n.directions);
  const int64_t base_each = std::max<int64_t>(1, ceil_div(n.base, n.directions));
  Masses m;
  m.low = kLowTotal / static_cast<double>(std::max<int64_t>(1, n.pages));
  if (skip > 0) m.low = std::min(m.low, skip / kLowBelowSkip);
  for (const double margin : kHeavyMargins) {
    m.heavy = n.heavy > 0 ? promote * margin : 0.0;
    const double left = 1.0 - kOpenLeast - m.heavy * static_cast<double>(heavy_each) -
                        m.low * static_cast<double>(n.pages);
    m.base = std::min(promote / kBaseBelowPromote, left / static_cast<double>(base_each));
    if (m.base >= std::max(skip * kBaseAboveSkip, m.low)) return m;
  }
  return std::nullopt;
}

}  // namespace

bool can_promote(const LayerPolicy& p) {
  return p.rule == PromoteRule::mass && p.residency == Residency::device && p.promote < 1.0 &&
         (p.k_format == Format::nvfp4 || p.v_format == Format::nvfp4) &&
         p.k_format != Format::nvfp4x2 && p.v_format != Format::nvfp4x2;
}

bool can_skip(const LayerPolicy& p) {
  return p.v_format == Format::nvfp4 && p.k_format != Format::nvfp4x2 && p.center && p.skip > 0;
}

struct SyntheticData::State {
  SyntheticSpec spec;
  int64_t group = 1, directions = 1;
  int64_t pages = 0;   // complete before the first query
  int64_t forced = 0;  // of these, read in full whatever their mass
  int64_t promoted = 0, skipped = 0;
  Masses masses;
  std::vector<float> noise;
  std::vector<float> unit;          // [kv_heads][directions][head_dim_k], orthonormal in a head
  std::vector<float> open;          // [kv_heads][directions]: a_r of the tokens after the pages
  std::vector<PageTarget> targets;  // [kv_heads][pages]

  void draw_units(std::mt19937_64& rng);
  void draw_targets(int64_t head, std::mt19937_64& rng);
  bool reads_in_full(int64_t page) const;
  float rise(double mass) const {  // a_r that lifts a page from `low` to `mass`
    return static_cast<float>(std::log(mass / masses.low) / kQueryGain);
  }
  // sum_r a_r * u_r of a page, or of the open tokens.
  void mean_of(int64_t head, int64_t page, float* out) const;
};

bool SyntheticData::State::reads_in_full(int64_t page) const {
  const LayerPolicy& p = spec.policy;
  if (p.k_format == Format::nvfp4x2 || p.v_format == Format::nvfp4x2) return true;
  if (!is_layered(p.k_format) && !is_layered(p.v_format)) return false;
  return p.residency == Residency::dropped && residual_in_reach(p, page, spec.tokens);
}

// Gram-Schmidt over Gaussian vectors.
void SyntheticData::State::draw_units(std::mt19937_64& rng) {
  const int64_t dim = spec.shape.head_dim_k;
  std::normal_distribution<double> normal;
  unit.resize(static_cast<size_t>(spec.shape.kv_heads * directions * dim));
  for (int64_t h = 0; h < spec.shape.kv_heads; ++h) {
    float* first = &unit[static_cast<size_t>(h * directions * dim)];
    for (int64_t r = 0; r < directions; ++r) {
      std::vector<double> x(static_cast<size_t>(dim));
      for (double& v : x) v = normal(rng);
      for (int64_t s = 0; s < r; ++s) {
        const double dot = std::inner_product(x.begin(), x.end(), first + s * dim, 0.0);
        for (int64_t d = 0; d < dim; ++d) x[static_cast<size_t>(d)] -= dot * first[s * dim + d];
      }
      const double norm = std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
      for (int64_t d = 0; d < dim; ++d) {
        first[r * dim + d] = static_cast<float>(x[static_cast<size_t>(d)] / norm);
      }
    }
  }
}

void SyntheticData::State::draw_targets(int64_t head, std::mt19937_64& rng) {
  std::vector<PageTarget> drawn;
  const auto add = [&](Kind kind, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      drawn.push_back({kind, static_cast<int32_t>(i % directions)});
    }
  };
  add(Kind::heavy, promoted);
  add(Kind::low, skipped);
  add(Kind::base, pages - forced - promoted - skipped);
  std::shuffle(drawn.begin(), drawn.end(), rng);

  size_t next = 0;
  std::vector<double> mass(static_cast<size_t>(directions),
                           masses.low * static_cast<double>(pages));
  int32_t turn = 0;
  for (int64_t page = 0; page < pages; ++page) {
    PageTarget& target = targets[static_cast<size_t>(head * pages + page)];
    if (reads_in_full(page)) {
      target = {Kind::base, turn};
      turn = (turn + 1) % static_cast<int32_t>(directions);
    } else {
      target = drawn[next++];
    }
    if (target.kind == Kind::low) continue;
    mass[static_cast<size_t>(target.direction)] +=
        (target.kind == Kind::heavy ? masses.heavy : masses.base) - masses.low;
  }
  // What is left goes to the open tokens, as many as the middle query sees.
  const double seen = static_cast<double>(spec.tokens - pages * kPageTokens) -
                      0.5 * static_cast<double>(spec.queries - 1);
  for (int64_t r = 0; r < directions; ++r) {
    const double left = std::max(0.1 * kOpenLeast, 1.0 - mass[static_cast<size_t>(r)]);
    open[static_cast<size_t>(head * directions + r)] =
        rise(left * static_cast<double>(kPageTokens) / seen);
  }
}

void SyntheticData::State::mean_of(int64_t head, int64_t page, float* out) const {
  const int64_t dim = spec.shape.head_dim_k;
  const float* u = &unit[static_cast<size_t>(head * directions * dim)];
  std::fill_n(out, dim, 0.0f);
  const auto add = [&](int64_t r, float a) {
    for (int64_t d = 0; d < dim; ++d) out[d] += a * u[r * dim + d];
  };
  if (page >= pages) {
    for (int64_t r = 0; r < directions; ++r) {
      add(r, open[static_cast<size_t>(head * directions + r)]);
    }
    return;
  }
  const PageTarget& target = targets[static_cast<size_t>(head * pages + page)];
  if (target.kind == Kind::low) return;
  add(target.direction, rise(target.kind == Kind::heavy ? masses.heavy : masses.base));
}

SyntheticData::SyntheticData(const SyntheticSpec& spec) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.spec = spec;
  const LayerShape& shape = spec.shape;
  const LayerPolicy& policy = spec.policy;
  s.group = shape.q_heads / shape.kv_heads;
  s.directions = std::min(s.group, shape.head_dim_k / 2);
  s.pages = (spec.tokens - spec.queries) / kPageTokens;
  for (int64_t page = 0; page < s.pages; ++page) s.forced += s.reads_in_full(page);
  const auto share = [&](double fraction) {
    return static_cast<int64_t>(std::llround(fraction * static_cast<double>(s.pages)));
  };
  if (can_promote(policy)) s.promoted = share(spec.promoted);
  if (can_skip(policy)) s.skipped = share(spec.skipped);

  const double promote = can_promote(policy) ? policy.promote : 1.0;
  const double skip = can_skip(policy) ? policy.skip : 0.0;
  const int64_t base = s.pages - s.promoted - s.skipped;
  std::optional<Masses> masses;
  if (base >= s.forced) {
    masses =
        solve({.pages = s.pages, .directions = s.directions, .heavy = s.promoted, .base = base},
              promote, skip);
  }
  if (!masses) {
    throw Error(
        ErrorCode::invalid_argument,
        fmt::format("no attention has {} of {} pages above promote = {} and {} more above skip = "
                    "{}: the {} query heads of a KV head have a mass of 1 each; ask for fewer "
                    "promoted or more skipped pages, or change the policy's thresholds",
                    s.promoted, s.pages, promote, base, skip, s.group));
  }
  s.masses = *masses;

  std::mt19937_64 rng(spec.seed);
  std::normal_distribution<float> normal;
  s.noise.resize(kNoise);
  for (float& x : s.noise) x = normal(rng);
  s.draw_units(rng);
  s.open.resize(static_cast<size_t>(shape.kv_heads * s.directions));
  s.targets.resize(static_cast<size_t>(shape.kv_heads * s.pages));
  for (int64_t h = 0; h < shape.kv_heads; ++h) s.draw_targets(h, rng);
}

SyntheticData::~SyntheticData() = default;
SyntheticData::SyntheticData(SyntheticData&&) noexcept = default;

void SyntheticData::fill(int64_t sequence, int64_t first, int64_t n, float* k, float* v) const {
  const State& s = *state_;
  const LayerShape& shape = s.spec.shape;
  const int64_t dim_k = shape.head_dim_k, dim_v = shape.head_dim_v;
  const auto noise_at = [&](int64_t token, int64_t head, uint64_t side) {
    const auto row = static_cast<uint64_t>((token * shape.kv_heads + head) * 2) + side;
    const uint64_t key = mix(row ^ mix(s.spec.seed + static_cast<uint64_t>(sequence)));
    const size_t starts = (kNoise - 256) / kNoiseStep;  // head_dim is at most 256
    return s.noise.data() + key % starts * kNoiseStep;
  };
  tbb::parallel_for(first / kPageTokens, (first + n - 1) / kPageTokens + 1, [&](int64_t page) {
    const int64_t begin = std::max(first, page * kPageTokens);
    const int64_t end = std::min(first + n, (page + 1) * kPageTokens);
    std::vector<float> mean(static_cast<size_t>(dim_k));
    for (int64_t h = 0; h < shape.kv_heads; ++h) {
      s.mean_of(h, page, mean.data());
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = (t - first) * shape.kv_heads + h;
        const float* noise = noise_at(t, h, 0);
        for (int64_t d = 0; d < dim_k; ++d) {
          k[row * dim_k + d] = noise[d] + mean[static_cast<size_t>(d)];
        }
        std::copy_n(noise_at(t, h, 1), dim_v, v + row * dim_v);
      }
    }
  });
}

void SyntheticData::page_mean(int64_t page, float* out) const {
  const LayerShape& shape = state_->spec.shape;
  for (int64_t h = 0; h < shape.kv_heads; ++h) state_->mean_of(h, page, out + h * shape.head_dim_k);
}

std::vector<float> SyntheticData::queries() const {
  const State& s = *state_;
  const LayerShape& shape = s.spec.shape;
  const int64_t dim = shape.head_dim_k;
  const auto length = static_cast<float>(kQueryGain * std::sqrt(static_cast<double>(dim)));
  std::vector<float> q(static_cast<size_t>(s.spec.queries * shape.q_heads * dim));
  for (int64_t i = 0; i < s.spec.queries; ++i) {
    for (int64_t head = 0; head < shape.q_heads; ++head) {
      const int64_t direction = head % s.group % s.directions;
      const float* u =
          &s.unit[static_cast<size_t>((head / s.group * s.directions + direction) * dim)];
      float* out = &q[static_cast<size_t>((i * shape.q_heads + head) * dim)];
      for (int64_t d = 0; d < dim; ++d) out[d] = length * u[d];
    }
  }
  return q;
}

void SyntheticData::check(const AttendStats& found, double slack) const {
  const State& s = *state_;
  const LayerPolicy& policy = s.spec.policy;
  if (s.pages == 0 && (s.spec.promoted > 0 || s.spec.skipped > 0)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} tokens hold no complete page of {} before the query: choose a "
                            "longer context (-c)",
                            s.spec.tokens, kPageTokens));
  }
  if (s.pages == 0) return;
  const auto pages = static_cast<double>(s.pages);
  // `forced` pages come on top of what was asked for. Several queries may straddle two pages.
  const auto compare = [&](const char* what, double asked, double forced, double seen) {
    const double straddling = s.spec.queries > 1 ? 1.0 / pages : 1e-9;
    const double allowed = std::max(kTolerance * asked, slack) + straddling;
    if (std::fabs(seen - asked - forced) <= allowed) return;
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{:.2f} % of {} pages were {} where {:.2f} % were asked for: choose a "
                            "longer context (-c) or another fraction",
                            100 * seen, s.pages, what, 100 * (asked + forced)));
  };
  if (policy.rule == PromoteRule::mass) {
    compare("promoted", can_promote(policy) ? s.spec.promoted : 0.0,
            static_cast<double>(s.forced) / pages, found.promoted_fraction());
  }
  compare("skipped", can_skip(policy) ? s.spec.skipped : 0.0, 0.0, found.skipped_fraction());
}

}  // namespace thriftattn::bench
