// The clock, the peaks, the data and the parts of a step (device_kernels.h).
#include <cuda_runtime.h>

#include <algorithm>

#include "bench/device_kernels.h"
#include "bench/statistics.h"
#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/checks.h"

namespace thriftattn::bench {
namespace {

using cuda::check;
using cuda::check_launch;
using cuda::DeviceMemory;

constexpr int64_t kPeakBytes = int64_t{2} << 30;
constexpr int kPeakRounds = 11;

__device__ float normal(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
  x ^= x >> 31;
  x *= 0x94d049bb133111ebull;
  x ^= x >> 29;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 32;
  const float u = (static_cast<uint32_t>(x) >> 8) * 0x1p-24f + 0x1p-25f;
  const float v = (static_cast<uint32_t>(x >> 32) >> 8) * 0x1p-24f;
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

__device__ uint16_t to_bf16(float x) {
  return static_cast<uint16_t>((__float_as_uint(x) + 0x8000u) >> 16);
}

__global__ void draw(DrawCall a) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < a.n * a.width;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t token = a.first_token + i / a.width, column = i % a.width;
    const int64_t at = token * a.width + column;
    a.k[i] = to_bf16(normal(at, a.seed) + a.means[token / kPageTokens * a.width + column]);
    a.v[i] = to_bf16(normal(at, a.seed + 0x10000u));
  }
}

__global__ void read_all(const uint4* x, int64_t n, uint32_t* out) {
  uint32_t sum = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint4 y = x[i];
    sum ^= y.x ^ y.y ^ y.z ^ y.w;
  }
  if (sum == 0x12345u) *out = sum;
}

__global__ void copy_all(const uint4* from, uint4* to, int64_t n) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    to[i] = a, to[i + step] = b, to[i + 2 * step] = c, to[i + 3 * step] = d;
  }
  for (; i < n; i += step) to[i] = from[i];
}

}  // namespace

struct DeviceClock::State {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;

  void drop_graph() {
    if (exec != nullptr) (void)cudaGraphExecDestroy(exec);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    exec = nullptr;
    graph = nullptr;
  }
  ~State() {
    drop_graph();
    if (begin != nullptr) (void)cudaEventDestroy(begin);
    if (end != nullptr) (void)cudaEventDestroy(end);
    if (stream != nullptr) (void)cudaStreamDestroy(stream);
  }
};

DeviceClock::DeviceClock() : state_(std::make_unique<State>()) {
  check(cudaStreamCreateWithFlags(&state_->stream, cudaStreamNonBlocking), "stream");
  check(cudaEventCreate(&state_->begin), "event");
  check(cudaEventCreate(&state_->end), "event");
}

DeviceClock::~DeviceClock() = default;

cuda::Stream DeviceClock::stream() const { return state_->stream; }

std::vector<double> DeviceClock::time(int rounds, const std::function<void(cuda::Stream)>& body) {
  constexpr int kWarmUp = 2;
  State& s = *state_;
  s.drop_graph();
  check(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal), "capture");
  try {
    body(s.stream);
  } catch (...) {
    (void)cudaStreamEndCapture(s.stream, &s.graph);
    (void)cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(s.stream, &s.graph), "capture");
  check(cudaGraphInstantiate(&s.exec, s.graph, 0), "graph");
  std::vector<double> ms;
  for (int i = 0; i < rounds + kWarmUp; ++i) {
    check(cudaEventRecord(s.begin, s.stream), "event");
    check(cudaGraphLaunch(s.exec, s.stream), "graph");
    check(cudaEventRecord(s.end, s.stream), "event");
    check(cudaStreamSynchronize(s.stream), "run");
    float t = 0;
    check(cudaEventElapsedTime(&t, s.begin, s.end), "event");
    if (i >= kWarmUp) ms.push_back(t);
  }
  s.drop_graph();
  return ms;
}

DevicePeaks measure_device_peaks(DeviceClock& clock) {
  const cuda::DeviceInfo info = cuda::device_info();
  const int64_t n = std::min(kPeakBytes, info.memory_free / 4 / 256 * 256);
  const int sms = info.multiprocessors;
  DeviceMemory a(n), b(n);
  cuda::fill(a.data(), 1, n, clock.stream());
  const auto driver = clock.time(
      kPeakRounds, [&](cuda::Stream s) { cuda::copy_on_device(b.data(), a.data(), n, s); });
  const auto own = clock.time(kPeakRounds, [&](cuda::Stream s) {
    copy_all<<<sms * 4, 512, 0, s>>>(a.as<uint4>(), b.as<uint4>(), n / 16);
    check_launch("copy_all");
  });
  const auto read = clock.time(kPeakRounds, [&](cuda::Stream s) {
    read_all<<<sms * 8, 512, 0, s>>>(a.as<uint4>(), n / 16, b.as<uint32_t>());
    check_launch("read_all");
  });
  const auto bytes = static_cast<double>(n);
  return {2e-6 * bytes / std::min(median(driver), median(own)), 1e-6 * bytes / median(read)};
}

void draw_rows(const DrawCall& call, cuda::Stream stream) {
  draw<<<1024, 256, 0, stream>>>(call);
  check_launch("draw");
}

void launch_part(DecodePart part, const cuda::AttendPlan& plan, const cuda::AttendCall& call,
                 cuda::Stream stream) {
  cuda::AttendArgs args = cuda::make_attend_args(plan.state(), call);
  const int64_t tokens = args.limits.step_tokens, each = args.positions;
  for (args.first_q = 0; args.first_q < tokens; args.first_q += each) {  // the passes of launch_attend()
    args.positions = static_cast<int32_t>(std::min(each, tokens - args.first_q));
    switch (part) {
      case DecodePart::prepare:
        cuda::launch_prepare(args, stream);
        if (args.g.budget != 0) cuda::launch_select(args, stream);
        break;
      case DecodePart::walk:
        cuda::launch_walk(plan.state(), args, stream);
        break;
      case DecodePart::merge:
        cuda::launch_merge(args, stream);
        break;
    }
  }
}

}  // namespace thriftattn::bench
