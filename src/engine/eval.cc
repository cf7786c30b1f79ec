// The lockstep evaluation (eval.h).
#include "engine/eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "engine/session.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

// A block of logits: large enough for a matrix product, small enough to keep nothing large.
constexpr int64_t kBlockRows = 64;

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// One cache under one policy, and what was measured of it.
struct Contender {
  Contender(std::shared_ptr<const Model> model, const Policy& policy, const SessionOptions& options)
      : session(std::move(model), policy, options) {}

  Session session;
  std::vector<float> hidden;
  MetricsCollector metrics;
  AttendStats attend;
  double seconds = 0;
};

// Where the next step ends: at multiples of the chunk, where scoring begins, and before the last
// token, so that every step is scored as a whole or not at all.
int64_t step_end(int64_t begin, int64_t chunk, int64_t scored_from, int64_t context) {
  int64_t end = std::min(context, (begin / chunk + 1) * chunk);
  if (begin < scored_from) end = std::min(end, scored_from);
  if (begin < context - 1) end = std::min(end, context - 1);
  return end;
}

void check(const Model& model, std::span<const int32_t> tokens, const EvalOptions& options) {
  const int64_t limit = model.config().context;
  const auto fail = [](const std::string& message) {
    throw Error(ErrorCode::invalid_argument, message);
  };
  if (options.context < kMinEvalContext) {
    fail(fmt::format("a context of {} tokens cannot be evaluated: at least {} are needed",
                     options.context, kMinEvalContext));
  }
  if (options.context > limit) {
    fail(fmt::format("a context of {} tokens is more than the model's {}: ask for at most {}",
                     options.context, limit, limit));
  }
  if (static_cast<int64_t>(tokens.size()) < options.context) {
    fail(
        fmt::format("the text has {} tokens and {} are needed: use a longer text or a context of "
                    "at most {}",
                    tokens.size(), options.context, tokens.size()));
  }
  if (options.policies.empty()) fail("no policies to evaluate: name at least one");
  if (options.chunk < 1) fail(fmt::format("chunk = {}: at least 1 token", options.chunk));
  if (options.needles < 0) fail(fmt::format("{} needles: at least 0", options.needles));
}

class Evaluation {
 public:
  Evaluation(std::shared_ptr<const Model> model, std::span<const int32_t> tokens,
             const EvalOptions& options)
      : model_(std::move(model)),
        tokens_(tokens.first(static_cast<size_t>(options.context))),
        options_(options),
        scored_from_(options.context / 2) {
    // Planned now: an error after the hour of scoring would come late.
    if (options.needles > 0) {
      needles_ = plan_needles(options.codec, tokens_,
                              {.context = options.context,
                               .facts = options.needles,
                               .seed = options.seed,
                               .prefix = options.needle_prefix});
    }
    // [0] is the reference. A policy with the same rules is the same run: it reports from [0].
    contenders_.push_back(make(options.reference));
    for (const Policy& policy : options.policies) {
      if (policy.rules == options.reference.rules) {
        slot_.push_back(0);
        reference_reported_ = true;
        continue;
      }
      slot_.push_back(contenders_.size());
      contenders_.push_back(make(policy));
    }
  }

  std::vector<EvalRow> run() {
    for (int64_t begin = 0; begin < options_.context;) {
      const int64_t end = step_end(begin, options_.chunk, scored_from_, options_.context);
      step(begin, end);
      report("scoring", {}, end, options_.context);
      begin = end;
    }
    std::vector<EvalRow> rows;
    for (size_t i = 0; i < options_.policies.size(); ++i) {
      rows.push_back(row_of(*contenders_[slot_[i]], options_.policies[i].name));
    }
    // The caches are done with; the needle test fills its own.
    contenders_.clear();
    if (options_.needles > 0) run_all_needles(rows);
    return rows;
  }

 private:
  SessionOptions session_options() const {
    return {.context = options_.context,
            .equalizer = options_.equalizer,
            .chunk = options_.chunk,
            .max_kv_bytes = options_.max_kv_bytes,
            .device = options_.device};
  }

  std::unique_ptr<Contender> make(const Policy& policy) const {
    return std::make_unique<Contender>(model_, policy, session_options());
  }

  void report(std::string_view stage, std::string_view policy, int64_t done, int64_t total) const {
    if (options_.progress) options_.progress({stage, policy, done, total});
  }

  void step(int64_t begin, int64_t end) {
    const bool scored = begin >= scored_from_ && begin < options_.context - 1;
    const int64_t width = model_->config().width;
    const auto part = tokens_.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
    for (const auto& c : contenders_) {
      const Stopwatch watch;
      if (scored) c->hidden.resize(static_cast<size_t>((end - begin) * width));
      c->session.reset_stats();
      c->session.step(part, AttendMode::decode, scored ? c->hidden.data() : nullptr);
      c->seconds += watch.seconds();
      if (scored) c->attend.merge(c->session.decode_stats().attend);
    }
    if (!scored) return;
    for (int64_t at = begin; at < end; at += kBlockRows) {
      score_block(at - begin, std::min(kBlockRows, end - at), at);
    }
  }

  // Rows [first, first + rows) of the step's hidden states, which are positions [position, ...).
  void score_block(int64_t first, int64_t rows, int64_t position) {
    const int64_t vocab = model_->config().vocab;
    const auto count = static_cast<size_t>(rows * vocab);
    reference_logits_.resize(count);
    logits_.resize(count);
    metrics_.resize(static_cast<size_t>(rows));
    const auto targets =
        tokens_.subspan(static_cast<size_t>(position) + 1, static_cast<size_t>(rows));
    for (size_t i = 0; i < contenders_.size(); ++i) {
      Contender& c = *contenders_[i];
      std::vector<float>& out = i == 0 ? reference_logits_ : logits_;
      const Stopwatch watch;
      c.session.logits_of(c.hidden.data() + first * model_->config().width, rows, out.data());
      c.seconds += watch.seconds();
      if (i == 0) {
        block_.set(out, targets, vocab);
        if (!reference_reported_) continue;
      }
      block_.compare(out, metrics_);
      c.metrics.add(metrics_);
    }
  }

  EvalRow row_of(const Contender& c, const std::string& name) const {
    const KvCache& cache = c.session.cache();
    EvalRow row;
    row.policy = name;
    row.tokens = options_.context;
    row.quality = c.metrics.summary();
    row.bits_stored_per_element = cache.bits_stored_per_element();
    row.bits_read_per_element = c.attend.bits_read_per_element();
    row.promoted_fraction = c.attend.promoted_fraction();
    row.skipped_fraction = c.attend.skipped_fraction();
    row.kv_bytes = cache.usage().total();
    row.kv_bytes_bf16 = cache.bf16_bytes();
    row.seconds = c.seconds;
    row.attend = c.attend;
    return row;
  }

  void run_all_needles(std::vector<EvalRow>& rows) const {
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::string& name = options_.policies[i].name;
      Session session(model_, options_.policies[i], session_options());
      const NeedleResult result =
          run_needles(session, needles_, options_.codec,
                      [&](int64_t done, int64_t total) { report("needles", name, done, total); });
      rows[i].needle_recall = static_cast<double>(result.found) / static_cast<double>(result.asked);
      for (size_t f = 0; f < needles_.facts.size(); ++f) {
        const NeedleFact& fact = needles_.facts[f];
        if (first_number(result.answers[f]) == fact.code) continue;
        const double depth =
            static_cast<double>(fact.at) / static_cast<double>(needles_.context.size());
        rows[i].missed.push_back({fact.name, depth, fact.code, result.answers[f]});
      }
    }
  }

  std::shared_ptr<const Model> model_;
  std::span<const int32_t> tokens_;
  const EvalOptions& options_;
  int64_t scored_from_;
  std::vector<std::unique_ptr<Contender>> contenders_;
  std::vector<size_t> slot_;  // of each policy in contenders_
  bool reference_reported_ = false;
  NeedlePlan needles_;
  ReferenceBlock block_;
  std::vector<float> reference_logits_, logits_;
  std::vector<PositionMetrics> metrics_;
};

}  // namespace

std::vector<EvalRow> evaluate(std::shared_ptr<const Model> model, std::span<const int32_t> tokens,
                              const EvalOptions& options) {
  check(*model, tokens, options);
  return Evaluation(std::move(model), tokens, options).run();
}

}  // namespace thriftattn
