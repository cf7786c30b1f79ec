// The threads of a benchmark, each pinned to a core of its own: some hypervisors pack two busy
// threads on one core, which no repetition averages out.
#pragma once

#include <functional>
#include <memory>
#include <vector>

namespace thriftattn::bench {

// One logical CPU of each physical core that this process may run on, ascending.
std::vector<int> distinct_cores();

class PinnedThreads {
 public:
  // 0 threads = one on every distinct core. Error for more threads than cores.
  explicit PinnedThreads(int threads);
  ~PinnedThreads();

  int count() const;
  const std::vector<int>& cores() const;  // of each thread
  // Runs `f` on the calling thread as one of the pinned ones; oneTBB's loops in it use the others.
  // Error if a thread could not be pinned.
  void run(const std::function<void()>& f);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace thriftattn::bench
