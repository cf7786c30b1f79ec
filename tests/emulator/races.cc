// Vector clocks and what each word of shared memory remembers (races.h).
#include "emulator/races.h"

#include <algorithm>
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "emulator/emulator.h"

#ifdef THRIFTATTN_EMULATE_RACES

extern "C" char __executable_start, __bss_start, _end;  // shared memory lies between the latter two

namespace thriftattn::emulator::races {
namespace {

using Clock = std::vector<uint32_t>;

struct Read {
  int thread;
  uint32_t when;
  unsigned bytes;  // of the word, one a bit
};
struct Word {
  int writer[4] = {-1, -1, -1, -1};  // of each byte
  uint32_t written[4] = {};
  const void* code[4] = {};
  std::vector<Read> reads;  // since a byte of theirs was written
};

struct Block {
  std::vector<Clock> clocks;  // of each thread
  std::unordered_map<uint64_t, Clock> meetings;
  struct Barrier {
    Clock given, complete;
  };
  std::unordered_map<const void*, Barrier> barriers;
  std::unordered_map<uintptr_t, Word> words;
  int running = -1;
  bool on = false;
};
Block g_block;

void merge(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void tick(int thread) { ++g_block.clocks[static_cast<size_t>(thread)][static_cast<size_t>(thread)]; }

[[noreturn]] void report(const char* what, uintptr_t at, int other, const void* code,
                         const void* other_code) {
  const auto place = [](const void* p) {  // for addr2line -e PROGRAM
    return p == nullptr ? 0 : static_cast<const char*>(p) - &__executable_start - 1;
  };
  std::fprintf(stderr, "emulator: race at shared address %u: %s by thread %d (0x%zx), %d before (0x%zx)\n",
               shared_address(reinterpret_cast<const void*>(at)), what, g_block.running,
               static_cast<size_t>(place(code)), other, static_cast<size_t>(place(other_code)));
  fail("a race in shared memory");
}

void access(uintptr_t at, size_t bytes, bool write, const void* code) {
  Block& b = g_block;
  if (!b.on || b.running < 0) return;
  if (at < reinterpret_cast<uintptr_t>(&__bss_start) || at >= reinterpret_cast<uintptr_t>(&_end)) return;
  const int self = b.running;
  const Clock& mine = b.clocks[static_cast<size_t>(self)];
  const uint32_t now = mine[static_cast<size_t>(self)];
  for (uintptr_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    Word& w = b.words[word];
    unsigned mask = 0;
    for (unsigned i = 0; i < 4; ++i) {
      const uintptr_t byte = 4 * word + i;
      if (byte < at || byte >= at + bytes) continue;
      mask |= 1u << i;
      const int writer = w.writer[i];
      if (writer >= 0 && writer != self && w.written[i] > mine[static_cast<size_t>(writer)]) {
        report(write ? "written, and written" : "read, and written", byte, writer, code, w.code[i]);
      }
      if (!write) continue;
      w.writer[i] = self;
      w.written[i] = now;
      w.code[i] = code;
    }
    if (!write) {
      const auto found = std::find_if(w.reads.begin(), w.reads.end(), [&](const Read& r) {
        return r.thread == self && r.bytes == mask;
      });
      if (found == w.reads.end()) {
        w.reads.push_back({self, now, mask});
      } else {
        found->when = now;
      }
      continue;
    }
    for (const Read& r : w.reads) {
      if ((r.bytes & mask) != 0 && r.thread != self && r.when > mine[static_cast<size_t>(r.thread)]) {
        report("written, and read", word * 4, r.thread, code, nullptr);
      }
    }
    std::erase_if(w.reads, [&](const Read& r) { return (r.bytes & ~mask) == 0; });
  }
}

}  // namespace

void begin_block(int threads) {
  const auto n = static_cast<size_t>(threads);
  g_block.clocks.assign(n, Clock(n, 0));
  for (size_t i = 0; i < n; ++i) g_block.clocks[i][i] = 1;
  g_block.meetings.clear();
  g_block.barriers.clear();
  g_block.words.clear();
  g_block.on = true;
}
void end_block() { g_block.on = false; }
void now_runs(int thread) { g_block.running = thread; }

void open(uint64_t meeting) { g_block.meetings[meeting].clear(); }
void join(uint64_t meeting, int thread) {
  merge(g_block.meetings[meeting], g_block.clocks[static_cast<size_t>(thread)]);
}
void take(uint64_t meeting, int thread) {
  merge(g_block.clocks[static_cast<size_t>(thread)], g_block.meetings[meeting]);
  tick(thread);
}

void give(const void* bar, int thread) {
  merge(g_block.barriers[bar].given, g_block.clocks[static_cast<size_t>(thread)]);
  tick(thread);
}
void complete(const void* bar) {
  Block::Barrier& b = g_block.barriers[bar];
  merge(b.complete, b.given);
}
void acquire(const void* bar, int thread) {
  merge(g_block.clocks[static_cast<size_t>(thread)], g_block.barriers[bar].complete);
}

void copy_writes(const void* at, size_t bytes) {
  access(reinterpret_cast<uintptr_t>(at), bytes, true, __builtin_return_address(0));
}

}  // namespace thriftattn::emulator::races

// What GCC calls where it would call ThreadSanitizer's library.
using thriftattn::emulator::races::access;
#define THRIFTATTN_ACCESS(name, bytes, write)                                               \
  void name(void* at) {                                                                     \
    access(reinterpret_cast<uintptr_t>(at), bytes, write, __builtin_return_address(0));     \
  }
#define THRIFTATTN_ACCESSES(bytes)                                   \
  THRIFTATTN_ACCESS(__tsan_read##bytes, bytes, false)                \
  THRIFTATTN_ACCESS(__tsan_write##bytes, bytes, true)                \
  THRIFTATTN_ACCESS(__tsan_unaligned_read##bytes, bytes, false)      \
  THRIFTATTN_ACCESS(__tsan_unaligned_write##bytes, bytes, true)      \
  THRIFTATTN_ACCESS(__tsan_volatile_read##bytes, bytes, false)       \
  THRIFTATTN_ACCESS(__tsan_volatile_write##bytes, bytes, true)
extern "C" {
THRIFTATTN_ACCESSES(1)
THRIFTATTN_ACCESSES(2)
THRIFTATTN_ACCESSES(4)
THRIFTATTN_ACCESSES(8)
THRIFTATTN_ACCESSES(16)
void __tsan_read_range(void* at, size_t bytes) {
  if (bytes > 0) access(reinterpret_cast<uintptr_t>(at), bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  if (bytes > 0) access(reinterpret_cast<uintptr_t>(at), bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}

#endif
