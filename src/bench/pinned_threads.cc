// Pinning through an observer of a private oneTBB arena (pinned_threads.h).
#include "bench/pinned_threads.h"

#include <fmt/format.h>
#include <pthread.h>
#include <sched.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>
#include <tbb/task_scheduler_observer.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#include "thriftattn/error.h"

namespace thriftattn::bench {
namespace {

// Hardware threads of one core share this text; without it every CPU is a core of its own.
std::string siblings(int cpu) {
  std::ifstream file(
      fmt::format("/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list", cpu));
  std::string text;
  return std::getline(file, text) ? text : fmt::to_string(cpu);
}

class Pin : public tbb::task_scheduler_observer {
 public:
  Pin(tbb::task_arena& arena, const std::vector<int>& cores)
      : task_scheduler_observer(arena), cores_(cores) {
    observe(true);
  }
  // Workers leave an arena some time after its last task, and one that leaves unobserved would stay
  // on its core in whatever arena comes next. Until then it also holds oneTBB's record of this
  // observer, in memory that LeakSanitizer does not search: a leak, if the process ends first.
  ~Pin() override {
    closing_ = true;
    while (inside_ != 0) std::this_thread::yield();
    observe(false);
  }

  void on_scheduler_entry(bool) override {
    CPU_ZERO(&before_);
    ++inside_;
    if (closing_) return;  // late: it may have been too late to be waited for
    const int slot = tbb::this_task_arena::current_thread_index();
    if (slot < 0 || slot >= static_cast<int>(cores_.size())) return;
    pthread_getaffinity_np(pthread_self(), sizeof before_, &before_);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cores_[static_cast<size_t>(slot)], &one);
    const int error = pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    if (error != 0) error_ = error;
  }
  void on_scheduler_exit(bool) override {
    if (CPU_COUNT(&before_) > 0) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
    --inside_;
  }

  int error() const { return error_; }

 private:
  const std::vector<int>& cores_;
  std::atomic<int> error_{0};
  std::atomic<int> inside_{0};  // threads in the arena
  std::atomic<bool> closing_{false};
  static thread_local cpu_set_t before_;
};

thread_local cpu_set_t Pin::before_{};

std::vector<int> chosen_cores(int threads) {
  std::vector<int> cores = distinct_cores();
  if (threads < 0 || threads > static_cast<int>(cores.size())) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} threads, but this process may run on {} distinct cores: threads "
                            "that share one measure nothing; give at most -t {}",
                            threads, cores.size(), cores.size()));
  }
  if (threads > 0) cores.resize(static_cast<size_t>(threads));
  return cores;
}

}  // namespace

std::vector<int> distinct_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
    throw Error(ErrorCode::unsupported,
                fmt::format("the CPUs of this process are not known ({}): the benchmark pins its "
                            "threads and cannot do without",
                            std::strerror(errno)));
  }
  std::vector<int> cores;
  std::set<std::string> seen;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && seen.insert(siblings(cpu)).second) cores.push_back(cpu);
  }
  return cores;
}

struct PinnedThreads::State {
  explicit State(int threads)
      : cores(chosen_cores(threads)),
        control(tbb::global_control::max_allowed_parallelism, cores.size()),
        arena(static_cast<int>(cores.size()), 1),
        pin(arena, cores) {}

  std::vector<int> cores;
  tbb::global_control control;
  tbb::task_arena arena;
  Pin pin;
};

PinnedThreads::PinnedThreads(int threads) : state_(std::make_unique<State>(threads)) {}
PinnedThreads::~PinnedThreads() = default;

int PinnedThreads::count() const { return static_cast<int>(state_->cores.size()); }
const std::vector<int>& PinnedThreads::cores() const { return state_->cores; }

void PinnedThreads::run(const std::function<void()>& f) {
  state_->arena.execute(f);
  if (const int error = state_->pin.error(); error != 0) {
    throw Error(ErrorCode::unsupported,
                fmt::format("a thread could not be pinned to its core ({}): allow "
                            "sched_setaffinity to this process",
                            std::strerror(error)));
  }
}

}  // namespace thriftattn::bench
