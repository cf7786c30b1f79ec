// The fibers of a block and everything they wait for (emulator.h).
#include "emulator/emulator.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>

#include <sys/mman.h>
#include <ucontext.h>

#include "emulator/races.h"

namespace thriftattn::emulator {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr int kMaxThreads = 1024;

// Dynamic shared memory. Static, so that it lies near the kernels' static shared variables and one
// 32-bit difference reaches both.
alignas(1024) uint8_t g_shared[kSharedBytes];

}  // namespace

struct Fiber {
  Thread thread;
  std::jmp_buf context;
  ucontext_t first{};
  bool begun = false, done = false;
};

struct Meeting {
  uint32_t generation = 0, mask = 0;
  int arrived = 0, op = 0;
  alignas(64) uint8_t slots[2][32][kMeetStride];
};

struct Warp {
  std::unique_ptr<Meeting> meetings[32];  // by the lowest lane of their mask
  int first = 0, lanes = 0;
};

struct Gathering {
  uint32_t generation = 0;
  int arrived = 0, wanted = 0;
  bool value = false, result = false;
};

struct GroupMeeting {
  uint32_t generation = 0;
  int arrived = 0;
  void* given[128];
};

struct Block {
  std::vector<Warp> warps;
  Gathering named[16];
  GroupMeeting groups[kMaxThreads / 128];
  std::vector<Pending> bulk;  // bulk copies on their way
  int running = 0;
};

namespace {

struct Machine {
  std::mutex mutex;  // one launch at a time
  std::vector<std::unique_ptr<Fiber>> fibers;
  uint8_t* stacks = nullptr;
  std::jmp_buf scheduler;
  ucontext_t first_scheduler{};
  Fiber* running = nullptr;
  const Launch* launch = nullptr;
  Block* block = nullptr;
  uint64_t moves = 0;
  std::minstd_rand random;
};
Machine& machine() {
  static Machine m;
  return m;
}

// The running thread's number in its block.
int number(const Thread& t) { return t.warp->first + t.lane; }

uint32_t seed() {
  const char* text = std::getenv("THRIFTATTN_EMULATOR_SEED");
  return text == nullptr ? 1 : static_cast<uint32_t>(std::strtoul(text, nullptr, 10)) + 1;
}

void moved() { ++machine().moves; }

void run_thread() {
  Machine& m = machine();
  m.launch->kernel();
  m.running->done = true;
  --m.block->running;
  moved();
  std::longjmp(m.scheduler, 1);
}

// Until the fiber yields or ends.
void resume(Machine& m, Fiber& f) {
  m.running = &f;
  if constexpr (races::kOn) races::now_runs(number(f.thread));
  if (setjmp(m.scheduler) != 0) {
    if constexpr (races::kOn) races::now_runs(-1);
    return;
  }
  if (f.begun) std::longjmp(f.context, 1);
  f.begun = true;
  swapcontext(&m.first_scheduler, &f.first);
}

void run_block(Machine& m, const Launch& l, uint3 index) {
  const auto threads = static_cast<int>(l.block.x * l.block.y * l.block.z);
  Block block;
  block.warps = std::vector<Warp>(static_cast<size_t>((threads + 31) / 32));
  block.running = threads;
  m.block = &block;
  std::memset(g_shared, 0xff, sizeof g_shared);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = *m.fibers[static_cast<size_t>(i)];
    f.begun = f.done = false;
    Thread& t = f.thread;
    t = Thread{};
    const auto u = static_cast<unsigned>(i);
    t.index = {u % l.block.x, u / l.block.x % l.block.y, u / (l.block.x * l.block.y)};
    t.block_index = index;
    t.block_dim = l.block;
    t.grid_dim = l.grid;
    t.lane = i % 32;
    t.warp = &block.warps[static_cast<size_t>(i / 32)];
    if (t.lane == 0) t.warp->first = i;
    ++t.warp->lanes;
    getcontext(&f.first);
    f.first.uc_stack.ss_sp = m.stacks + static_cast<size_t>(i) * kStackBytes;
    f.first.uc_stack.ss_size = kStackBytes;
    f.first.uc_link = nullptr;
    makecontext(&f.first, run_thread, 0);
  }
  if constexpr (races::kOn) races::begin_block(threads);
  const size_t warps = block.warps.size();
  size_t asleep = warps;  // a warp; none
  for (int turns = 0; block.running > 0; --turns) {
    if (turns <= 0) {
      asleep = m.random() % (2 * warps);
      turns = static_cast<int>(m.random() % (m.random() % 4 == 0 ? 1024 : 64));
    }
    const uint64_t before = m.moves;
    const size_t start = m.random() % warps, step = m.random() % 2 == 0 ? 1 : warps - 1;
    for (size_t i = 0; i < warps; ++i) {
      const size_t index = (start + i * step) % warps;
      if (index == asleep) continue;
      const Warp& w = block.warps[index];
      // Who relies on warps keeping step with each other is seen: one is often left out for a while,
      // and one in four goes on for as long as it can without the others.
      const bool ahead = m.random() % 4 == 0;
      uint64_t moves;
      do {
        moves = m.moves;
        for (int lane = 0; lane < w.lanes; ++lane) {
          Fiber& f = *m.fibers[static_cast<size_t>(w.first + lane)];
          if (!f.done) resume(m, f);
        }
      } while (ahead && m.moves != moves);
    }
    if (m.moves != before || block.running == 0) continue;
    if (asleep >= warps) fail("its threads wait for ever");
    asleep = warps;
  }
  if constexpr (races::kOn) races::end_block();
  if (!block.bulk.empty()) fail("a block ended before its bulk copies");
}

// [0, 20) arrivals still awaited, [20, 40) of a phase, [40, 63) bytes + 2^22, 63 the phase's parity.
struct BarrierBits {
  static constexpr uint64_t kCount = (1u << 20) - 1;
  int64_t awaited, count, bytes;
  uint64_t parity;
  bool completed = false;  // by word(): a phase
  explicit BarrierBits(uint64_t x)
      : awaited(static_cast<int64_t>(x & kCount)),
        count(static_cast<int64_t>(x >> 20 & kCount)),
        bytes(static_cast<int64_t>(x >> 40 & ((1u << 23) - 1)) - (1 << 22)),
        parity(x >> 63) {}
  uint64_t word() {
    if (awaited < 0) fail("a barrier got more arrivals than it counts");
    if (awaited == 0 && bytes == 0) {
      awaited = count;
      parity ^= 1;
      completed = true;
    }
    return static_cast<uint64_t>(awaited) | static_cast<uint64_t>(count) << 20 |
           static_cast<uint64_t>(bytes + (1 << 22)) << 40 | parity << 63;
  }
};

void tell(uint64_t* bar, int arrivals, int64_t bytes) {
  BarrierBits b(*bar);
  b.awaited -= arrivals;
  b.bytes += bytes;
  *bar = b.word();
  if (races::kOn && b.completed) races::complete(bar);
  moved();
}

void finish(const Pending& p) {
  moved();
  if (p.to != nullptr) {
    std::memcpy(p.to, p.from, static_cast<size_t>(p.bytes));
    std::memset(p.to + p.bytes, 0, static_cast<size_t>(p.zeros));
  }
  if (p.tells == Pending::kArrival) tell(p.bar, 1, 0);
  if (p.tells == Pending::kBytes) tell(p.bar, 0, -p.bytes);
}

// What is on its way to the barrier.
void finish_for(const uint64_t* bar) {
  auto& bulk = machine().block->bulk;
  const auto first = std::stable_partition(bulk.begin(), bulk.end(),
                                           [&](const Pending& p) { return p.bar != bar; });
  std::for_each(first, bulk.end(), finish);
  bulk.erase(first, bulk.end());
}

void poison(uint8_t* to, int bytes) { std::memset(to, 0xff, static_cast<size_t>(bytes)); }

bool in_shared(const void* p, int bytes) {
  const auto* at = static_cast<const uint8_t*>(p);
  const size_t size = machine().launch->shared;
  return at >= g_shared && at + bytes <= g_shared + size;
}

}  // namespace

Thread& here() { return machine().running->thread; }

void fail(const char* what) {
  const Machine& m = machine();
  std::fprintf(stderr, "emulator: kernel %s: %s\n", m.launch == nullptr ? "?" : m.launch->name, what);
  if (m.running != nullptr) {
    const Thread& t = m.running->thread;
    std::fprintf(stderr, "emulator: thread %u of block (%u, %u, %u)\n", t.index.x, t.block_index.x,
                 t.block_index.y, t.block_index.z);
  }
  std::abort();
}

void yield() {
  Machine& m = machine();
  if (setjmp(m.running->context) == 0) std::longjmp(m.scheduler, 1);
}

const uint8_t* meet(uint32_t mask, int op, const void* mine, size_t bytes, bool orders) {
  Thread& t = here();
  if ((mask >> t.lane & 1) == 0) fail("a lane that its own mask leaves out");
  auto& place = t.warp->meetings[__builtin_ctz(mask)];
  if (place == nullptr) place = std::make_unique<Meeting>();
  Meeting& m = *place;
  if (m.arrived == 0) {
    m.mask = mask;
    m.op = op;
  } else if (m.mask != mask || m.op != op) {
    fail("lanes of a warp meet in different instructions");
  }
  const uint32_t generation = m.generation;
  auto* slots = m.slots[generation & 1];
  std::memcpy(slots[t.lane], mine, bytes);
  const uint64_t meeting = reinterpret_cast<uintptr_t>(&m) + (generation & 1);
  if (races::kOn && orders) {
    if (m.arrived == 0) races::open(meeting);
    races::join(meeting, number(t));
  }
  if (++m.arrived == __builtin_popcount(mask)) {
    m.arrived = 0;
    ++m.generation;
    moved();
  } else {
    while (m.generation == generation) yield();
  }
  if (races::kOn && orders) races::take(meeting, number(t));
  return slots[0];
}

bool block_barrier(int id, int threads, bool value) {
  Block& b = *machine().block;
  Gathering& g = b.named[id];
  if (g.arrived == 0) {
    g.value = false;
    g.wanted = threads;
  } else if (g.wanted != threads) {
    fail("a barrier of two sizes");
  }
  const uint32_t generation = g.generation;
  g.value |= value;
  const uint64_t meeting = reinterpret_cast<uintptr_t>(&g) + (generation & 1);
  if constexpr (races::kOn) {
    if (g.arrived == 0) races::open(meeting);
    races::join(meeting, number(here()));
  }
  ++g.arrived;
  while (g.generation == generation) {
    if (g.arrived >= (threads < 0 ? b.running : threads)) {
      g.arrived = 0;
      g.result = g.value;
      ++g.generation;
      moved();
      break;
    }
    yield();
  }
  if constexpr (races::kOn) races::take(meeting, number(here()));
  return g.result;
}

void warpgroup_meet(void* mine, const std::function<void(void* const*)>& work) {
  const Thread& t = here();
  GroupMeeting& g = machine().block->groups[t.index.x / 128];
  const uint32_t generation = g.generation;
  g.given[t.index.x % 128] = mine;
  if (++g.arrived == 128) {
    work(g.given);
    g.arrived = 0;
    ++g.generation;
    moved();
  } else {
    while (g.generation == generation) yield();
  }
}

uint8_t* dynamic_shared() { return g_shared; }
uint32_t shared_address(const void* p) {
  const int64_t difference = static_cast<const uint8_t*>(p) - g_shared;
  if (difference != static_cast<int32_t>(difference)) fail("an address that is not shared memory's");
  return static_cast<uint32_t>(difference);
}
uint8_t* shared_pointer(uint32_t address) { return g_shared + static_cast<int32_t>(address); }

void barrier_init(uint64_t* bar, int count) {
  BarrierBits b(0);
  b.awaited = b.count = count;
  b.bytes = 0;
  *bar = b.word();
}
void barrier_arrive(uint64_t* bar) {
  if constexpr (races::kOn) races::give(bar, number(here()));
  tell(bar, 1, 0);
}
void barrier_expect(uint64_t* bar, int bytes) { tell(bar, 0, bytes); }
void barrier_wait(uint64_t* bar, uint32_t parity) {
  for (;;) {
    finish_for(bar);
    if (BarrierBits(*bar).parity != (parity & 1)) {
      if constexpr (races::kOn) races::acquire(bar, number(here()));
      return;
    }
    yield();
  }
}

void bulk_load(uint8_t* to, const uint8_t* from, int bytes, uint64_t* bar) {
  if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("a bulk copy that is not aligned to 16 bytes");
  }
  if (!in_shared(to, bytes)) fail("a bulk copy outside of shared memory");
  if constexpr (races::kOn) {
    races::copy_writes(to, static_cast<size_t>(bytes));
    races::give(bar, number(here()));
  }
  poison(to, bytes);
  machine().block->bulk.push_back({to, from, bytes, 0, bar, Pending::kBytes});
  moved();
}
void bulk_store(uint8_t* to, const uint8_t* from, int bytes) {
  here().stores.push_back({to, from, bytes, 0, nullptr, Pending::kNothing});
}
void bulk_stores_done() {
  for (const Pending& p : here().stores) finish(p);
  here().stores.clear();
}

void copy_async(uint8_t* to, const uint8_t* from, int bytes, int zeros) {
  if (!in_shared(to, bytes + zeros)) fail("an asynchronous copy outside of shared memory");
  if constexpr (races::kOn) races::copy_writes(to, static_cast<size_t>(bytes + zeros));
  poison(to, bytes + zeros);
  here().groups.back().push_back({to, from, bytes, zeros, nullptr, Pending::kNothing});
}
void copies_commit() { here().groups.emplace_back(); }
void copies_wait(int groups) {
  auto& all = here().groups;
  // The last one is not committed.
  while (static_cast<int>(all.size()) > groups) {
    for (const Pending& p : all.front()) finish(p);
    all.erase(all.begin());
  }
}
void arrive_after_copies(uint64_t* bar) {
  auto& bulk = machine().block->bulk;
  auto& all = here().groups;
  for (auto& group : all) {
    for (Pending p : group) {
      p.bar = bar;
      p.tells = Pending::kNothing;
      bulk.push_back(p);
    }
  }
  all.assign(1, {});
  if constexpr (races::kOn) races::give(bar, number(here()));
  bulk.push_back({nullptr, nullptr, 0, 0, bar, Pending::kArrival});
  moved();
}

void run(const Launch& l) {
  Machine& m = machine();
  const std::lock_guard lock(m.mutex);
  const auto threads = static_cast<size_t>(l.block.x * l.block.y * l.block.z);
  if (m.stacks == nullptr) {
    m.stacks = static_cast<uint8_t*>(mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m.stacks == MAP_FAILED) fail("no memory for stacks");
    m.random.seed(seed());
  }
  while (m.fibers.size() < threads) m.fibers.push_back(std::make_unique<Fiber>());
  m.launch = &l;
  for (unsigned z = 0; z < l.grid.z; ++z) {
    for (unsigned y = 0; y < l.grid.y; ++y) {
      for (unsigned x = 0; x < l.grid.x; ++x) run_block(m, l, {x, y, z});
    }
  }
  m.launch = nullptr;
}

}  // namespace thriftattn::emulator
