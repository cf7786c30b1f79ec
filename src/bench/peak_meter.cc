// Reading and multiplying as fast as the machine can (peak_meter.h).
#include "bench/peak_meter.h"

#include <sys/mman.h>
#include <tbb/parallel_for.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <new>

#include "base/cpu_info.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/peak_meter.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::bench {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Streams of `bytes` each, read side by side: how many a core needs to keep its misses in flight
// differs between machines. `bytes` is a multiple of 1024.
uint64_t ReadStreams(const uint8_t* HWY_RESTRICT p, size_t bytes, int streams) {
  const hn::ScalableTag<uint64_t> d;
  const size_t step = hn::Lanes(d) * sizeof(uint64_t);
  const size_t each = bytes / static_cast<size_t>(streams);
  auto a = hn::Zero(d), b = a, c = a, e = a;
  for (size_t at = 0; at < each; at += 4 * step) {
    for (int s = 0; s < streams; ++s) {
      const auto* from = reinterpret_cast<const uint64_t*>(p + static_cast<size_t>(s) * each + at);
      const size_t lanes = hn::Lanes(d);
      a = hn::Xor(a, hn::Load(d, from));
      b = hn::Xor(b, hn::Load(d, from + lanes));
      c = hn::Xor(c, hn::Load(d, from + 2 * lanes));
      e = hn::Xor(e, hn::Load(d, from + 3 * lanes));
    }
  }
  return hn::GetLane(hn::Xor(hn::Xor(a, b), hn::Xor(c, e)));
}

// Twelve chains hide the latency of two multiply-adds a cycle and fit 16 registers. They start
// from different numbers: the compiler would merge equal ones.
float MulAddChains(int64_t iterations, const float* HWY_RESTRICT starts) {
  const hn::ScalableTag<float> d;
  const auto x = hn::Set(d, 0.999f), y = hn::Set(d, 1e-3f);
  auto a0 = hn::Set(d, starts[0]), a1 = hn::Set(d, starts[1]), a2 = hn::Set(d, starts[2]),
       a3 = hn::Set(d, starts[3]), a4 = hn::Set(d, starts[4]), a5 = hn::Set(d, starts[5]),
       a6 = hn::Set(d, starts[6]), a7 = hn::Set(d, starts[7]), a8 = hn::Set(d, starts[8]),
       a9 = hn::Set(d, starts[9]), a10 = hn::Set(d, starts[10]), a11 = hn::Set(d, starts[11]);
  for (int64_t i = 0; i < iterations; ++i) {
    a0 = hn::MulAdd(a0, x, y);
    a1 = hn::MulAdd(a1, x, y);
    a2 = hn::MulAdd(a2, x, y);
    a3 = hn::MulAdd(a3, x, y);
    a4 = hn::MulAdd(a4, x, y);
    a5 = hn::MulAdd(a5, x, y);
    a6 = hn::MulAdd(a6, x, y);
    a7 = hn::MulAdd(a7, x, y);
    a8 = hn::MulAdd(a8, x, y);
    a9 = hn::MulAdd(a9, x, y);
    a10 = hn::MulAdd(a10, x, y);
    a11 = hn::MulAdd(a11, x, y);
  }
  const auto s0 = hn::Add(hn::Add(a0, a1), hn::Add(a2, a3));
  const auto s1 = hn::Add(hn::Add(a4, a5), hn::Add(a6, a7));
  const auto s2 = hn::Add(hn::Add(a8, a9), hn::Add(a10, a11));
  return hn::GetLane(hn::Add(hn::Add(s0, s1), s2));
}

int64_t FloatLanes() { return static_cast<int64_t>(hn::Lanes(hn::ScalableTag<float>())); }

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace thriftattn::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#if HWY_ARCH_X86
#include <immintrin.h>
#endif

namespace thriftattn::bench {

HWY_EXPORT(ReadStreams);
HWY_EXPORT(MulAddChains);
HWY_EXPORT(FloatLanes);

namespace {

constexpr int kChains = 12;
constexpr float kStarts[kChains] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
constexpr int64_t kChunk = int64_t{1} << 20;  // bytes a task reads
constexpr int64_t kFlopTasks = 64;            // a thread that is held up gives work away
constexpr int64_t kFlopIterations = 20000;    // of one task

std::atomic<uint64_t> sink{0};  // what was computed must be used

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

#if HWY_ARCH_X86
// Highway 1.0 has no such operation, so this one function names its instruction.
__attribute__((target("avx512f,avx512bf16"))) float dot_chains(int64_t iterations,
                                                               const float* starts) {
  const auto x = (__m512bh)_mm512_set1_epi32(0x3f803f80);  // pairs of 1.0
  __m512 a[kChains];
  for (int c = 0; c < kChains; ++c) a[c] = _mm512_set1_ps(starts[c]);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) a[c] = _mm512_dpbf16_ps(a[c], x, x);
  }
  for (int c = 1; c < kChains; ++c) a[0] = _mm512_add_ps(a[0], a[c]);
  float lanes[16];
  _mm512_storeu_ps(lanes, a[0]);
  return lanes[0];
}
constexpr double kDotFlops = 64;
#else
float dot_chains(int64_t, const float*) { return 0.0f; }
constexpr double kDotFlops = 0;
#endif

template <typename F>
double gflops_of(PinnedThreads& threads, double flops_of_iteration, const F& chains) {
  double seconds = 0;
  threads.run([&] {
    const auto start = std::chrono::steady_clock::now();
    tbb::parallel_for(int64_t{0}, kFlopTasks, [&](int64_t) {
      sink += static_cast<uint64_t>(chains(kFlopIterations, kStarts));
    });
    seconds = seconds_since(start);
  });
  const double iterations = static_cast<double>(kFlopTasks) * kFlopIterations;
  return iterations * flops_of_iteration / seconds * 1e-9;
}

}  // namespace

int64_t last_level_cache_bytes() {
  for (const int name : {_SC_LEVEL4_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE, _SC_LEVEL2_CACHE_SIZE}) {
    if (const long bytes = sysconf(name); bytes > 0) return bytes;
  }
  return int64_t{32} << 20;
}

std::string isa_name() {
  // Better targets have lower bits.
  const int64_t targets = hwy::SupportedTargets() & HWY_TARGETS;
  return hwy::TargetName(targets & -targets);
}

struct PeakMeter::Buffer {
  explicit Buffer(int64_t n) : bytes(std::max(kChunk, n / kChunk * kChunk)) {
    memory = static_cast<uint8_t*>(
        ::operator new (static_cast<size_t>(bytes), std::align_val_t{size_t{1} << 21}));
    // Fewer page walks, so that the memory and not its bookkeeping is measured; best effort.
    madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  }
  ~Buffer() { ::operator delete (memory, std::align_val_t{size_t{1} << 21}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  int64_t bytes;
  uint8_t* memory;
};

PeakMeter::PeakMeter(PinnedThreads& threads, int64_t bytes)
    : threads_(threads), buffer_(std::make_unique<Buffer>(bytes)) {
  threads_.run([&] {
    tbb::parallel_for(int64_t{0}, buffer_->bytes / kChunk, [&](int64_t i) {
      std::fill_n(buffer_->memory + i * kChunk, kChunk, static_cast<uint8_t>(i + 1));
    });
  });
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    for (const int streams : {1, 2, 4, 8}) {
      const double rate = timed_pass(streams);
      if (rate > best) {
        best = rate;
        streams_ = streams;
      }
    }
  }
}

PeakMeter::~PeakMeter() = default;

double PeakMeter::timed_pass(int streams) {
  double seconds = 0;
  threads_.run([&] {
    const auto start = std::chrono::steady_clock::now();
    tbb::parallel_for(int64_t{0}, buffer_->bytes / kChunk, [&](int64_t i) {
      sink += HWY_DYNAMIC_DISPATCH(ReadStreams)(buffer_->memory + i * kChunk,
                                                static_cast<size_t>(kChunk), streams);
    });
    seconds = seconds_since(start);
  });
  return static_cast<double>(buffer_->bytes) / seconds * 1e-9;
}

double PeakMeter::read_gb_s() { return timed_pass(streams_); }

double PeakMeter::fp32_gflops() {
  const double flops = 2.0 * kChains * static_cast<double>(HWY_DYNAMIC_DISPATCH(FloatLanes)());
  return gflops_of(threads_, flops, [](int64_t n, const float* starts) {
    return HWY_DYNAMIC_DISPATCH(MulAddChains)(n, starts);
  });
}

std::optional<double> PeakMeter::bf16_gflops() {
  if (!cpu_has_avx512_bf16()) return std::nullopt;
  return gflops_of(threads_, kChains * kDotFlops, dot_chains);
}

}  // namespace thriftattn::bench
#endif  // HWY_ONCE
