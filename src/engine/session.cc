// Session: feeding tokens in steps, and what was measured meanwhile.
#include "engine/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "thriftattn/error.h"

namespace thriftattn {

void PhaseStats::merge(const PhaseStats& other) {
  tokens += other.tokens;
  times.merge(other.times);
  attend.merge(other.attend);
}

Session::Session(std::shared_ptr<const Model> model, const Policy& policy, SessionOptions options)
    : model_(std::move(model)), options_(std::move(options)) {
  const ModelConfig& config = model_->config();
  if (options_.context == 0) options_.context = config.context;
  if (options_.context < 1 || options_.context > config.context) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("context {} is not possible: {} was made for 1 to {} tokens; lower the "
                            "context (-c)",
                            options_.context, config.name, config.context));
  }
  if (options_.chunk < 1) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("chunk is {}, required: at least 1 token", options_.chunk));
  }
  if (options_.device != nullptr && &options_.device->model() != model_.get()) {
    throw Error(ErrorCode::invalid_argument,
                "the device has the weights of another model; load a DeviceEngine from this one");
  }
  KvCacheConfig cache{.layers = layer_shapes(config),
                      .policy = resolve(policy, policy_context(config, options_.context)),
                      .equalizer = std::move(options_.equalizer),
                      .max_bytes = options_.max_kv_bytes};
  cache_ = options_.device != nullptr ? options_.device->make_cache(std::move(cache))
                                      : std::make_unique<KvCache>(std::move(cache));
  options_.equalizer = {};  // the cache has it now
  sequence_ = cache_->create();
}

Session::Session(const Session& from, ForkTag)
    : model_(from.model_),
      options_(from.options_),
      cache_(from.cache_),
      sequence_(cache_->fork(from.sequence_)),
      last_hidden_(from.last_hidden_),
      logits_(from.logits_) {}

Session::Session(Session&&) noexcept = default;

Session& Session::operator=(Session&& other) noexcept {
  std::swap(model_, other.model_);
  std::swap(options_, other.options_);
  std::swap(cache_, other.cache_);
  std::swap(sequence_, other.sequence_);
  std::swap(last_hidden_, other.last_hidden_);
  std::swap(logits_, other.logits_);
  std::swap(prefill_stats_, other.prefill_stats_);
  std::swap(decode_stats_, other.decode_stats_);
  return *this;
}

Session::~Session() {
  if (cache_ != nullptr) cache_->free(sequence_);
}

Session Session::fork() const { return Session(*this, ForkTag{}); }

void Session::truncate(int64_t length) {
  if (length == this->length()) return;
  cache_->truncate(sequence_, length);
  last_hidden_.clear();
  logits_.clear();
}

void Session::save(const ByteSink& sink) const {
  // Zeros where they are not known; load() forgets them again.
  std::vector<float> hidden = last_hidden_;
  const uint64_t known = hidden.empty() ? 0 : 1;
  hidden.resize(static_cast<size_t>(model_->config().width));
  sink(&known, sizeof known);
  sink(hidden.data(), hidden.size() * sizeof(float));
  save_sequence(*cache_, sequence_, sink);
}

void Session::load(int64_t length, const ByteSource& source) {
  if (this->length() != 0) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("load: the session holds {} tokens already; load into a new one",
                            this->length()));
  }
  require_room(length);
  uint64_t known = 0;
  std::vector<float> hidden(static_cast<size_t>(model_->config().width));
  source(&known, sizeof known);
  source(hidden.data(), hidden.size() * sizeof(float));
  if (known > 1) {
    throw Error(ErrorCode::corrupt,
                "the saved session does not say whether it has activations; "
                "it is damaged");
  }
  const SequenceId loaded = load_sequence(*cache_, length, source);
  cache_->free(sequence_);
  sequence_ = loaded;
  last_hidden_ = known != 0 ? std::move(hidden) : std::vector<float>();
  logits_.clear();
}

int64_t Session::length() const { return cache_->length(sequence_); }

const std::vector<LayerPolicy>& Session::policy() const { return cache_->config().policy; }

void Session::reset_stats() {
  prefill_stats_ = {};
  decode_stats_ = {};
}

void Session::require_room(int64_t tokens) const {
  if (length() + tokens <= options_.context) return;
  throw Error(ErrorCode::invalid_argument,
              fmt::format("{} tokens do not fit: the context is {} and {} are in use; raise the "
                          "context (-c, at most {} for {}) or shorten the text",
                          tokens, options_.context, length(), model_->config().context,
                          model_->config().name));
}

void Session::step(std::span<const int32_t> tokens, AttendMode mode, float* hidden) {
  if (tokens.empty()) return;
  const auto count = static_cast<int64_t>(tokens.size());
  const int64_t width = model_->config().width;
  require_room(count);
  PhaseStats phase;
  ForwardOptions options;
  options.mode = mode;
  options.stats = &phase.attend;
  options.times = &phase.times;
  options.cancelled = options_.cancelled;
  std::vector<float> last(static_cast<size_t>(width));
  if (options_.device != nullptr) {
    options_.device->forward(*cache_, sequence_, tokens, options,
                             {.hidden = hidden, .last = last.data()});
  } else {
    std::vector<float> own;
    if (hidden == nullptr) {
      own.resize(static_cast<size_t>(count * width));
      hidden = own.data();
    }
    forward(*model_, *cache_, sequence_, tokens, options, hidden);
    std::copy_n(hidden + (count - 1) * width, width, last.data());
  }
  last_hidden_ = std::move(last);
  logits_.clear();

  PhaseStats& sum = mode == AttendMode::prefill ? prefill_stats_ : decode_stats_;
  phase.tokens = count;
  sum.merge(phase);
}

void Session::prefill(std::span<const int32_t> tokens, const Progress& progress) {
  const auto total = static_cast<int64_t>(tokens.size());
  require_room(total);
  for (int64_t done = 0; done < total;) {
    // Steps end at multiples of the chunk, so that a text fed in two calls which meet at such a
    // multiple gives the same result as in one.
    const int64_t room = options_.chunk - length() % options_.chunk;
    const int64_t count = std::min(room, total - done);
    step(tokens.subspan(static_cast<size_t>(done), static_cast<size_t>(count)), AttendMode::prefill,
         nullptr);
    done += count;
    if (progress) progress(done, total);
  }
}

const std::vector<float>& Session::decode(int32_t token) {
  step({&token, 1}, AttendMode::decode, nullptr);
  return compute_logits(&decode_stats_.times);
}

const std::vector<float>& Session::next_logits() { return compute_logits(nullptr); }

const std::vector<float>& Session::compute_logits(ForwardTimes* times) {
  if (!logits_.empty()) return logits_;
  if (last_hidden_.empty()) {
    throw Error(ErrorCode::invalid_argument,
                "there are no logits: no token was fed, or the sequence was truncated since; feed "
                "a token first");
  }
  std::vector<float> out(static_cast<size_t>(model_->config().vocab));
  logits_of(last_hidden_.data(), 1, out.data(), times);
  logits_ = std::move(out);
  return logits_;
}

void Session::logits_of(const float* hidden, int64_t rows, float* out, ForwardTimes* times) const {
  if (options_.device != nullptr) {
    options_.device->logits(hidden, rows, out, times);
  } else {
    logits(*model_, hidden, rows, out, times);
  }
}

}  // namespace thriftattn
