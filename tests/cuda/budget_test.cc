// PromoteRule::budget on the device: which pages each position promotes, against FP64 scores of the
// pages as stored and against select_by_budget(), the CPU's own choice; and attention that reads
// them so, against FP64.
//
// Scores are FP32 on the device, so two pages may only be taken in the wrong order if their FP64
// scores are within the rounding of both; where no page is that near the edge, or is exactly equal,
// the choice must be the CPU's to the page.
#include <gtest/gtest.h>

#include "cuda/captured.h"
#include "cuda/device_case.h"
#include "precision/budget_rule.h"

namespace thriftattn::testing {
namespace {

// Of the sum of |q'_d mean_d|: FP32 sums of head_dim products (16 at a time in up to 16 steps, by
// tensor cores, which cut off rather than round) and of the heads.
constexpr double kRounding = 0x1p-18;

LayerPolicy budget_policy(double fraction, int64_t pages = 0, int64_t sinks = 0, int64_t recent = 0) {
  LayerPolicy p = layered_policy(1.0, 0.0);
  p.rule = PromoteRule::budget;
  p.budget = fraction;
  p.budget_pages = pages;
  p.sinks = sinks;
  p.recent = recent;
  return p;
}

// H q / s in FP64.
std::vector<double> transformed(const LayerStore& store, const float* q, int64_t kv_head) {
  const int64_t dim = store.layout.k.dim;
  std::vector<double> x(q, q + dim);
  if (!store.layout.k.layered) return x;
  for (int64_t d = 0; d < dim && !store.equalizer.empty(); ++d) {
    x[static_cast<size_t>(d)] /= store.equalizer[static_cast<size_t>(kv_head * dim + d)];
  }
  if (!store.layout.k.rotated) return x;
  const int64_t n = dim & -dim;
  for (int64_t step = 1; step < n; step *= 2) {
    for (int64_t d = 0; d < dim; ++d) {
      if (d & step) continue;
      const auto i = static_cast<size_t>(d), j = static_cast<size_t>(d + step);
      const double a = x[i], b = x[j];
      x[i] = a + b;
      x[j] = a - b;
    }
  }
  for (double& y : x) y /= std::sqrt(static_cast<double>(n));
  return x;
}

// Pages of one sequence for one position and KV head.
struct Pages {
  std::vector<double> score, slack;
  std::vector<uint8_t> candidate, always;
};

Pages pages_of(DeviceCase& c, size_t b, int64_t i, int64_t kv_head,
               const std::vector<int32_t>& residuals) {
  AttentionCase& host = c.host(b);
  const LayerStore& store = host.cache().impl().layers[0];
  const Sequence& seq = host.cache().impl().sequence(host.sequence());
  const LayerView view(store, seq.layers[0], seq.length);
  std::vector<float> scratch;
  const AttendRequest r = host.request(scratch);
  const LayerShape& shape = c.shape();
  const LayerPolicy& policy = c.policy();
  const int64_t group = shape.q_heads / shape.kv_heads, dim = store.layout.k.dim;
  const int64_t position = view.length() - c.queries() + i;
  const int64_t end = r.config.causal ? position + 1 : view.length();
  const int64_t begin = shape.window > 0 ? std::max<int64_t>(0, position + 1 - shape.window) : 0;
  std::vector<std::vector<double>> q;
  for (int64_t g = 0; g < group; ++g) {
    q.push_back(transformed(store, r.q.row(i, kv_head * group + g), kv_head));
  }
  const auto n = static_cast<size_t>(c.max_pages());
  Pages pages{std::vector<double>(n, 0.0), std::vector<double>(n, 0.0), std::vector<uint8_t>(n, 0),
              std::vector<uint8_t>(n, 0)};
  for (int64_t p = begin / kPageTokens; p < (end - 1) / kPageTokens; ++p) {
    const auto at = static_cast<size_t>(p);
    const bool held =
        residuals[(b * n + at) * static_cast<size_t>(shape.kv_heads) + static_cast<size_t>(kv_head)] >= 0;
    const bool sinks = p * kPageTokens < policy.sinks;
    const bool recent = policy.recent > 0 && (p + 1) * kPageTokens > end - policy.recent;
    pages.candidate[at] = held && !sinks && !recent;
    pages.always[at] = held && (sinks || recent);
    if (!store.layout.k.layered) continue;
    const auto* mean = reinterpret_cast<const uint16_t*>(
        store.layout.start(store.layout.k, view.head(p, kv_head)) + store.layout.k.mean);
    double sum = 0, size = 0;
    for (const auto& row : q) {
      for (int64_t d = 0; d < dim; ++d) {
        const double x = row[static_cast<size_t>(d)] * bf16_to_f32(mean[d]);
        sum += x;
        size += std::fabs(x);
      }
    }
    const double scale = r.config.softmax_scale / static_cast<double>(group);
    pages.score[at] = sum * scale;
    pages.slack[at] = size * scale * kRounding;
  }
  return pages;
}

struct Tally {
  int64_t choices = 0;   // of a position and KV head
  int64_t certain = 0;   // of them, those without a page near the edge
  int64_t tied = 0;      // with pages of the same score on both sides of it
  int64_t promoted = 0;  // pages
};

Tally check_choice(DeviceCase& c, const DeviceCase::Result& result, const std::string& what) {
  Tally tally;
  const LayerShape& shape = c.shape();
  const auto n = static_cast<size_t>(c.max_pages()), heads = static_cast<size_t>(shape.kv_heads),
             queries = static_cast<size_t>(c.queries());
  const size_t batch = c.lengths().size();
  std::vector<int32_t> residuals(batch * n * heads);
  cuda::copy_to_host(residuals.data(), c.call().tables.residual_table,
                     static_cast<int64_t>(residuals.size() * 4), nullptr);
  cuda::synchronize(nullptr);
  const PageBudget budget{c.policy().budget, c.policy().budget_pages};
  for (size_t b = 0; b < batch; ++b) {
    for (size_t i = 0; i < queries; ++i) {
      for (size_t h = 0; h < heads; ++h) {
        const std::string where = what + ", sequence " + std::to_string(b) + ", position " +
                                  std::to_string(i) + ", head " + std::to_string(h);
        const Pages pages = pages_of(c, b, static_cast<int64_t>(i), static_cast<int64_t>(h), residuals);
        const std::vector<uint8_t> wanted = select_by_budget(
            std::vector<float>(pages.score.begin(), pages.score.end()), pages.candidate, budget);
        int64_t count = 0, chosen = 0;
        double lowest = INFINITY, highest = -INFINITY;    // of those in, of those out, by the device
        double edge = INFINITY, slack = 0;                // the lowest wanted score
        std::vector<uint8_t> got(n, 0);
        for (size_t p = 0; p < n; ++p) {
          const uint8_t d = result.decisions[((b * queries + i) * n + p) * heads + h];
          const bool full = d == static_cast<uint8_t>(cuda::Decision::full);
          tally.promoted += full;
          if (pages.always[p]) {
            EXPECT_TRUE(full) << where << ": page " << p << " is always in";
          } else if (pages.candidate[p]) {
            got[p] = full;
            count += wanted[p];
            chosen += full;
            if (full) lowest = std::min(lowest, pages.score[p] + pages.slack[p]);
            if (!full) highest = std::max(highest, pages.score[p] - pages.slack[p]);
            if (wanted[p] && pages.score[p] < edge) edge = pages.score[p], slack = pages.slack[p];
          } else {
            EXPECT_FALSE(full) << where << ": page " << p << " is no candidate";
          }
        }
        EXPECT_EQ(chosen, count) << where;
        EXPECT_GE(lowest, highest) << where << ": a better page is left out";
        bool certain = true, tied = false;
        for (size_t p = 0; p < n; ++p) {
          if (!pages.candidate[p] || count == 0) continue;
          const double apart = std::fabs(pages.score[p] - edge);
          if (apart != 0 && apart <= pages.slack[p] + slack) certain = false;
          if (apart == 0 && !wanted[p]) tied = true;
        }
        ++tally.choices;
        tally.certain += certain;
        tally.tied += tied;
        if (certain) {
          EXPECT_EQ(got, wanted) << where;
        }
      }
    }
  }
  return tally;
}

// Attention as decided, the decisions, and that most of them are certain.
Tally check(DeviceCase& c, const std::string& what) {
  c.check(what, kTightCuda);
  const Tally tally = check_choice(c, c.attend(), what);
  EXPECT_GE(tally.certain * 10, tally.choices * 9) << what;
  return tally;
}
Tally check(const CaseOptions& o, const std::string& what) {
  DeviceCase c({o});
  return check(c, what);
}

TEST(CudaBudget, FractionsCountsSinksAndRecent) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t length : {0, 63, 64, 130, 700, 2111}) {
    for (const double fraction : {0.0, 0.05, 0.2, 0.5, 1.0}) {
      const Tally t = check(decode_options(budget_policy(fraction), length),
                            std::to_string(fraction) + " of length " + std::to_string(length));
      // Rounded up, of the complete pages.
      EXPECT_EQ(t.promoted, 2 * static_cast<int64_t>(std::ceil(fraction * (length / 64) - 1e-9)));
    }
    for (const int64_t pages : {1, 7, 1000}) {
      const Tally t = check(decode_options(budget_policy(0, pages), length),
                            std::to_string(pages) + " pages of length " + std::to_string(length));
      EXPECT_EQ(t.promoted, 2 * std::min(pages, length / 64));
    }
    for (const auto& [sinks, recent] : {std::pair<int64_t, int64_t>{64, 0}, {0, 192}, {100, 130}}) {
      check(decode_options(budget_policy(0.1, 0, sinks, recent), length),
            "sinks " + std::to_string(sinks) + ", recent " + std::to_string(recent) + ", length " +
                std::to_string(length));
    }
  }
}

TEST(CudaBudget, Shapes) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t dim : {64, 128, 192, 256}) {
    for (const int64_t group : {1, 3, 8, 12, 16, 40, 64}) {
      CaseOptions o = decode_options(budget_policy(0.1), 1500);
      o.shape = {.kv_heads = 1, .q_heads = group, .head_dim_k = dim, .head_dim_v = dim};
      check(o, "head_dim " + std::to_string(dim) + ", group " + std::to_string(group));
    }
  }
}

// Each position chooses for itself; pages that only some of a tile's positions promote.
TEST(CudaBudget, VerifyAndLongerSteps) {
  SKIP_WITHOUT_DEVICE();
  int64_t shared = 0, apart = 0;
  for (const int64_t queries : {2, 3, 8, 16, 40}) {
    for (const int64_t length : {0, 60, 505, 1000}) {
      for (const int64_t group : {1, 4, 16}) {
        if (group == 16 && queries != 3 && queries != 16) continue;
        // Without `recent`, a page that later positions alone read sealed would be a candidate.
        CaseOptions o = decode_options(budget_policy(0.15, 0, 0, group == 1 ? 0 : 100), length, queries);
        o.shape.q_heads = 2 * group;
        const std::string what = std::to_string(queries) + " queries, length " +
                                 std::to_string(length) + ", group " + std::to_string(group);
        DeviceCase c({o});
        check(c, what);
        const auto decisions = c.attend().decisions;
        for (int64_t page = 0; page < length / kPageTokens; ++page) {
          int64_t full = 0;
          for (int64_t i = 0; i < queries; ++i) {
            full += decisions[static_cast<size_t>((i * c.max_pages() + page) * 2)] ==
                    static_cast<uint8_t>(cuda::Decision::full);
          }
          shared += full == queries;
          apart += full > 0 && full < queries;
        }
      }
    }
  }
  EXPECT_GT(shared, 5);
  EXPECT_GT(apart, 30);
}

// Two positions, most of whose pages differ; and eight, of which the first read a page in open form
// that the last ones read sealed, and may promote.
TEST(CudaBudget, PositionsChooseForThemselves) {
  SKIP_WITHOUT_DEVICE();
  for (const double fraction : {0.3, 1.0}) {
    check(decode_options(budget_policy(fraction), 700, 2), "two positions");
    check(decode_options(budget_policy(fraction), 64 * 5 + 60, 8), "a page that the step fills");
  }
}

TEST(CudaBudget, SkipsByMassBesideTheBudget) {
  SKIP_WITHOUT_DEVICE();
  int64_t skipped = 0;
  for (const int64_t queries : {1, 6}) {
    CaseOptions o = decode_options(budget_policy(0.1), 3000, queries);
    o.policy.skip = 0.04;
    o.q_gain = 0.7f;
    DeviceCase c({o});
    check(c, "skip");
    for (const uint8_t d : c.attend().decisions) skipped += d == static_cast<uint8_t>(cuda::Decision::skip);
  }
  EXPECT_GT(skipped, 5);
}

TEST(CudaBudget, WindowSoftcapSinksOffsetNotCausal) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t window : {0, 1, 100, 300, 640}) {
    for (const int64_t queries : {1, 5}) {
      CaseOptions o = decode_options(budget_policy(0.3), 777, queries);
      o.shape.window = window;
      o.sink_logits = window != 100;
      o.softcap = window == 300 ? 20.0f : 0.0f;
      o.k_offset = 3.0f;
      check(o, "window " + std::to_string(window));
    }
  }
  // The third position's window is behind page 2, which the first two see.
  for (const double fraction : {0.3, 1.0}) {
    CaseOptions o = decode_options(budget_policy(fraction), 777, 5);
    o.shape.window = 588;
    check(o, "windows that begin in two pages");
  }
  CaseOptions o = decode_options(budget_policy(0.3), 500, 5);
  o.causal = false;
  check(o, "not causal");
}

TEST(CudaBudget, OtherSidesOfThePage) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [k, v] : {std::pair{Format::nvfp4, Format::bf16}, {Format::nvfp4, Format::fp8_e4m3},
                             {Format::bf16, Format::nvfp4}, {Format::fp8_e4m3, Format::nvfp4},
                             {Format::nvfp4, Format::int3}, {Format::mxfp4, Format::int3},
                             {Format::int3, Format::nvfp4}, {Format::int3, Format::mxfp4}}) {
    for (const int64_t queries : {1, 5}) {
      CaseOptions o = decode_options(budget_policy(0.2), 1300, queries);
      o.policy.k_format = k;
      o.policy.v_format = v;
      // Without means of K all pages are equal.
      const Tally t = check(o, std::string(to_string(k)) + " and " + std::string(to_string(v)));
      EXPECT_EQ(t.tied > 0, !is_layered(k));
    }
  }
  CaseOptions o = decode_options(budget_policy(0.2), 600);
  o.policy.k_format = o.policy.v_format = Format::nvfp4x2;  // a budget has nothing to choose there
  DeviceCase c({o});
  c.check("nvfp4x2", kTightCuda);
  const auto decisions = c.attend().decisions;
  EXPECT_EQ(std::count(decisions.begin(), decisions.end(), static_cast<uint8_t>(cuda::Decision::full)),
            2 * (600 / 64));
}

// q = 0: every score is 0, the lowest pages are in. Then pages that repeat: of equal ones the lower.
TEST(CudaBudget, TiesGoToTheLowerPage) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t length : {2000, 140000}) {
    CaseOptions o = decode_options(budget_policy(0, length / 64 / 2 + 3), length);
    o.shape = {.kv_heads = 1, .q_heads = 2, .head_dim_k = 64, .head_dim_v = 64};
    o.q_gain = 0.0f;
    DeviceCase c({o});
    EXPECT_EQ(check_choice(c, c.attend(), "q = 0").tied, 1);
  }
  int64_t tied = 0;
  for (const int64_t pages : {1, 5, 12, 37}) {
    for (const int64_t queries : {1, 3}) {
      CaseOptions o = decode_options(budget_policy(0, pages), 64 * 100, queries);
      o.k_period = 64 * 10;
      DeviceCase c({o});
      const std::string what = std::to_string(pages) + " of pages that repeat";
      if (queries == 1) c.check(what, kTightCuda);
      tied += check_choice(c, c.attend(), what).tied;
    }
  }
  EXPECT_GT(tied, 15);
}

// More pages than attend_select holds in shared memory; without and with ties at the edge.
TEST(CudaBudget, ManyPages) {
  SKIP_WITHOUT_DEVICE();
  CaseOptions o = decode_options(budget_policy(0.05), 265000);
  o.shape = {.kv_heads = 2, .q_heads = 4, .head_dim_k = 64, .head_dim_v = 64};
  for (const int64_t period : {0, 64 * 7}) {
    o.k_period = period;
    DeviceCase c({o});
    const Tally t = check_choice(c, c.attend(), "period " + std::to_string(period));
    EXPECT_GE(t.certain, 1) << period;
    EXPECT_EQ(t.tied, period != 0 ? 2 : 0) << period;
  }
}

// Scores of a narrow range share their upper bits, and means of both signs have none in common.
TEST(CudaBudget, ScoresOfEveryRange) {
  SKIP_WITHOUT_DEVICE();
  for (const float offset : {0.0f, 0.5f, 30.0f}) {
    for (const float gain : {1e-6f, 1.0f, 1e3f}) {
      CaseOptions o = decode_options(budget_policy(0.1), 9000, 2);
      o.k_offset = offset;
      o.q_gain = gain;
      DeviceCase c({o});
      check_choice(c, c.attend(), "offset " + std::to_string(offset) + ", gain " + std::to_string(gain));
    }
  }
}

// The CPU on the same pages: as many pages promoted, and the same output.
TEST(CudaBudget, AgreesWithTheCpu) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t queries : {1, 7, 33}) {
    for (const AttendMode mode : {AttendMode::decode, AttendMode::prefill}) {
      CaseOptions o = decode_options(budget_policy(0.2, 0, 64, 64), 1000, queries);
      o.mode = mode;
      DeviceCase c({o});
      const auto result = c.attend();
      if (mode == AttendMode::decode) {
        const Tally t = check_choice(c, result, "cpu");
        ASSERT_EQ(t.certain, t.choices) << "take another seed";
      }
      AttendStats stats;
      const std::vector<float> expected = c.host(0).attend(&stats);
      EXPECT_LT(row_error(result.out, expected, 128), kTightCuda);
      EXPECT_EQ(std::count(result.decisions.begin(), result.decisions.end(),
                           static_cast<uint8_t>(cuda::Decision::full)),
                stats.pages_promoted);
    }
  }
}

TEST(CudaBudget, RaggedBatchAndRepeats) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t queries : {1, 4}) {
    std::vector<CaseOptions> cases;
    for (const int64_t length : {5, 64, 1111, 3000, 700}) {
      CaseOptions o = decode_options(budget_policy(0.1), length, queries);
      o.equalizer = false;  // it belongs to the model, and differs by seed here
      o.seed = static_cast<uint32_t>(length);
      cases.push_back(o);
    }
    DeviceCase c(cases);
    check(c, "ragged");
    CaseOptions o = decode_options(budget_policy(0.1), 5000, queries);
    DeviceCase equal({o, o, o});
    equal.check_repeats();
  }
}

TEST(CudaBudget, PagesWithoutResidualAreNoCandidates) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t queries : {1, 3}) {
    DeviceCase c({decode_options(budget_policy(0.3), 2000, queries)});
    const int64_t all = check(c, "all").promoted;
    drop_residuals(c, 3);
    EXPECT_LT(check(c, "two thirds").promoted, all);
    drop_residuals(c, 1);
    EXPECT_EQ(check(c, "none").promoted, 0);
  }
}

#ifdef THRIFTATTN_WITH_CUDA
TEST(CudaBudget, GraphReplayFollowsTheTables) {
  SKIP_WITHOUT_DEVICE();
  DeviceCase c({decode_options(budget_policy(0.2), 64 * 12 + 30)});
  Captured step(c);
  std::vector<uint8_t> before;
  for (const int64_t every : {0, 5, 3}) {
    for (const int32_t length : {64 * 12 + 31, 64 * 12 + 2}) {  // the same open page
      if (every != 0) drop_residuals(c, every);
      c.lengths()[0] = length;
      cuda::copy_to_device(c.device_lengths().data(), c.lengths().data(), 4, nullptr);
      const auto replayed = step.replay();
      const auto direct = c.attend();
      ASSERT_EQ(std::memcmp(replayed.out.data(), direct.out.data(), direct.out.size() * 4), 0) << length;
      EXPECT_EQ(replayed.decisions, direct.decisions);
      if (length == 64 * 12 + 31) {
        check_choice(c, replayed, "replay");
        EXPECT_NE(replayed.decisions, before);
        before = replayed.decisions;
      }
    }
  }
}
#endif

TEST(CudaBudget, RefusesOtherScoresAndTheCap) {
  SKIP_WITHOUT_DEVICE();
  const auto refused = [](const LayerPolicy& policy, const char* part) {
    const LayerShape shape{.kv_heads = 2, .q_heads = 8, .head_dim_k = 128, .head_dim_v = 128};
    try {
      cuda::AttendPlan plan(shape, policy, {.batch = 1, .max_pages = 8});
      ADD_FAILURE() << "accepted: " << part;
    } catch (const Error& e) {
      for (const char* word : {part, "required:", "supported:", "missing:"}) {
        EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
      }
    }
  };
  for (const BlockScore score : {BlockScore::oracle, BlockScore::quest, BlockScore::variance, BlockScore::local}) {
    LayerPolicy policy = budget_policy(0.1);
    policy.score = score;
    refused(policy, "score");
  }
  LayerPolicy capped = layered_policy(0.02, 0.0003);
  capped.max_promoted = 0.1;
  refused(capped, "max");
  const LayerShape shape{.kv_heads = 2, .q_heads = 8, .head_dim_k = 128, .head_dim_v = 128};
  const cuda::AttendPlan plan(shape, budget_policy(0.05), {.batch = 1, .max_pages = 8});
  EXPECT_NE(plan.explain().find("attend_select"), std::string::npos) << plan.explain();
}

}  // namespace
}  // namespace thriftattn::testing
