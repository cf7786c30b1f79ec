// Races in shared memory, for kernels that are compiled with -fsanitize=thread and linked with the
// hooks of races.cc in place of that sanitizer's library. Two accesses of a word by different threads, one
// of them a write, must be ordered by __syncwarp(), a barrier of the block or an mbarrier (arrival,
// then wait); a bulk copy or cp.async is a write of the thread that starts it. Shuffles, votes and
// mma order nothing. (Vector clocks: Lamport 1978, Fidge 1988; what each word remembers:
// FastTrack, PLDI 2009.)
#pragma once

#include <cstddef>
#include <cstdint>

namespace thriftattn::emulator::races {

#ifdef THRIFTATTN_EMULATE_RACES
inline constexpr bool kOn = true;
#else
inline constexpr bool kOn = false;
#endif

void begin_block(int threads);
void end_block();
// Thread `thread` runs from here on; -1: none.
void now_runs(int thread);

// Threads that meet: the first opens the meeting, each joins, and after the last each takes what all
// gave.
void open(uint64_t meeting);
void join(uint64_t meeting, int thread);
void take(uint64_t meeting, int thread);

// An mbarrier: arrivals and copies give, a phase that is complete can be taken.
void give(const void* bar, int thread);
void complete(const void* bar);
void acquire(const void* bar, int thread);

// A copy into shared memory by the running thread.
void copy_writes(const void* at, size_t bytes);

}  // namespace thriftattn::emulator::races
