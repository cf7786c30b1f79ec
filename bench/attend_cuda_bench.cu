// thriftattn_cuda_bench: decode, verify, prefill and append on the device, a JSON line each; --prefill
// runs the prefill rows alone.
//
// Keys and values are drawn on the device so that pages hold known shares of the attention, and
// go through append(). The query heads of a group point in two directions; a page's keys are
// noise plus a multiple of one of them, which sets the share that it holds. Caches rotate through
// more than twice the L2; each time is the median of replays of a CUDA graph of one rotation,
// between events. Peaks are measured in the same run.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/attend_args.cuh"
#include "cuda/attend_launch.h"
#include "cuda/checks.h"
#include "thriftattn/cuda.h"
#include "thriftattn/error.h"

namespace {

using namespace thriftattn;
using cuda::check;
using cuda::DeviceMemory;

bool g_profile = false;  // a few plain calls, for a profiler
std::string g_only;      // of the runs, those whose name has this
constexpr float kGain = 0.25f;  // |q| / sqrt(head_dim): noise of scores

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

// Directions: halves of the dims, +-1/sqrt(D/2) there.
__device__ float direction(int which, int d, int dim) {
  if ((d < dim / 2) != (which == 0)) return 0.0f;
  return ((d * 2654435761u) >> 13 & 1 ? 1.0f : -1.0f) * rsqrtf(dim / 2.0f);
}

__global__ void draw_kv(uint16_t* k, uint16_t* v, const float* lift, int64_t first_token, int64_t n,
                        int heads, int dim, uint32_t seed) {
  const int64_t width = int64_t{heads} * dim;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n * width;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t token = first_token + i / width;
    const int d = static_cast<int>(i % dim);
    const int64_t page = token / kPageTokens;
    const float x = normal(token * width + i % width, seed) +
                    lift[2 * page] * direction(0, d, dim) + lift[2 * page + 1] * direction(1, d, dim);
    k[i] = __float_as_uint(x) + 0x8000u >> 16;
    v[i] = __float_as_uint(normal(token * width + i % width, seed + 77)) + 0x8000u >> 16;
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

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

class Timer {
 public:
  Timer() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    check(cudaEventCreate(&begin_), "event");
    check(cudaEventCreate(&end_), "event");
  }
  cudaStream_t stream() const { return stream_; }

  // Milliseconds of each of `rounds` replays of what `body` puts on the stream.
  template <class Body>
  std::vector<double> time(int rounds, Body body) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    body(stream_);
    check(cudaStreamEndCapture(stream_, &graph), "capture");
    check(cudaGraphInstantiate(&exec, graph, 0), "graph");
    std::vector<double> ms;
    for (int i = 0; i < rounds + 2; ++i) {
      check(cudaEventRecord(begin_, stream_), "event");
      check(cudaGraphLaunch(exec, stream_), "graph");
      check(cudaEventRecord(end_, stream_), "event");
      check(cudaStreamSynchronize(stream_), "run");
      float t = 0;
      check(cudaEventElapsedTime(&t, begin_, end_), "event");
      if (i >= 2) ms.push_back(t);
    }
    check(cudaGraphExecDestroy(exec), "graph");
    check(cudaGraphDestroy(graph), "graph");
    return ms;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

struct Peaks {
  double copy = 0, read = 0;
};

Peaks measure_peaks(Timer& timer) {
  const int64_t n = int64_t{2} << 30;
  DeviceMemory a(n), b(n);
  cuda::fill(a.data(), 1, n, timer.stream());
  const auto copy = timer.time(11, [&](cudaStream_t s) { cuda::copy_on_device(b.data(), a.data(), n, s); });
  const auto read = timer.time(11, [&](cudaStream_t s) {
    read_all<<<132 * 8, 512, 0, s>>>(a.as<uint4>(), n / 16, b.as<uint32_t>());
  });
  const auto own = timer.time(11, [&](cudaStream_t s) {
    copy_all<<<132 * 4, 512, 0, s>>>(a.as<uint4>(), b.as<uint4>(), n / 16);
  });
  // The better of the driver's copy and of a kernel.
  return {2e-6 * n / std::min(median(copy), median(own)), 1e-6 * n / median(read)};
}

struct Spec {
  const char* name;
  LayerPolicy policy;
  int64_t batch, ctx, q_heads, kv_heads, dim, q_len;
  double promoted, skipped;
};

struct Row {
  double ms = 0, bytes = 0;
};

LayerPolicy layered(double promote, double skip, bool sealed) {
  LayerPolicy p{.k_format = Format::nvfp4, .v_format = Format::nvfp4, .promote = promote, .skip = skip};
  if (sealed) {
    p.residency = Residency::dropped;
    p.sinks = 64;
    p.recent = 512;
  }
  return p;
}

// What page p's keys are lifted by along the two directions, for the shares asked for.
std::vector<float> lifts(int64_t pages, double promoted, double skipped) {
  std::vector<float> lift(static_cast<size_t>(2 * pages), 0.0f);
  if (promoted == 0 && skipped == 0) return lift;
  const double n = static_cast<double>(pages);
  const double heavy_each = 0.0225, light_each = 0.00005 * 2048 / n;
  const double heavy = std::round(promoted * n / 2), light = std::round(skipped * n);
  const double base_each = (0.98 - heavy * heavy_each - light * light_each) / (n - heavy - light);
  for (int64_t p = 0; p < pages; ++p) {
    // Spread evenly: a page is heavy in one direction at most, light in both or neither.
    const bool is_heavy = std::floor((p + 1) * promoted) > std::floor(p * promoted);
    const bool is_light = !is_heavy && std::fmod(p * 0.6180339887, 1.0) < skipped / (1 - promoted);
    for (int d = 0; d < 2; ++d) {
      double mass = is_light ? light_each : base_each;
      if (is_heavy) {
        const auto index = static_cast<int64_t>(std::floor((p + 1) * promoted));
        if (index % 2 == d) mass = heavy_each;
      }
      lift[static_cast<size_t>(2 * p + d)] = static_cast<float>(std::log(mass / base_each) / kGain);
    }
  }
  return lift;
}

Row run(const Spec& spec, Timer& timer, const Peaks& peaks, double bf16_ms, bool parts) {
  const std::string name = std::string(spec.name) + (spec.q_len == 1 ? "" : "-verify");
  if (!g_only.empty() && name.find(g_only) == std::string::npos) return {};
  const LayerShape shape{.kv_heads = spec.kv_heads, .q_heads = spec.q_heads, .head_dim_k = spec.dim,
                         .head_dim_v = spec.dim};
  const int64_t pages = (spec.ctx + 63) / 64;
  const cuda::SlotSizes sizes = cuda::slot_sizes(shape, spec.policy);
  const bool layered_policy = is_layered(spec.policy.k_format);
  const bool sealed = spec.policy.residency == Residency::dropped;
  // Residuals of a sealed policy: sinks and recent only, as the cache would hold them.
  const auto holds_residual = [&](int64_t p) {
    return layered_policy && (!sealed || p == 0 || (p + 1) * 64 > spec.ctx - 512 - 64);
  };
  int64_t residuals = 0;
  for (int64_t p = 0; p < pages; ++p) residuals += holds_residual(p) ? 1 : 0;
  const int64_t set_bytes = spec.batch * pages * sizes.page;
  const int64_t rotation = std::max<int64_t>(1, std::min<int64_t>(8, (int64_t{300} << 20) / set_bytes + 1));
  const int64_t sequences = rotation * spec.batch;
  const int64_t chunk = 1024;

  DeviceMemory pool(sequences * pages * sizes.page), open(std::max<int64_t>(16, sequences * 32 * sizes.open)),
      res(std::max<int64_t>(16, sequences * residuals * spec.kv_heads * sizes.residual));
  std::vector<int32_t> blocks, residual_ids, open_ids, lengths(static_cast<size_t>(sequences));
  int32_t next = 0;
  // Pages of sequences lie interleaved, as a server's would.
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t p = 0; p < pages; ++p) {
      blocks.push_back(static_cast<int32_t>((p * 7919 % pages) * sequences + s));
      for (int64_t h = 0; h < spec.kv_heads; ++h) residual_ids.push_back(holds_residual(p) ? next++ : -1);
    }
    for (int i = 0; i < 32; ++i) open_ids.push_back(static_cast<int32_t>(s * 32 + i));
  }
  // 7919 is prime: p * 7919 % pages is a permutation unless it divides pages.
  const auto upload = [&](const auto& x) {
    DeviceMemory m(static_cast<int64_t>(x.size() * sizeof(x[0])));
    cuda::copy_to_device(m.data(), x.data(), m.bytes(), timer.stream());
    cuda::synchronize(timer.stream());
    return m;
  };
  const DeviceMemory d_blocks = upload(blocks), d_residuals = upload(residual_ids), d_open = upload(open_ids);
  const DeviceMemory d_lift = upload(lifts(pages, spec.promoted, spec.skipped));

  // Filling, through append(), timed.
  const cuda::AttendPlan filler(shape, spec.policy, {.batch = 1, .max_pages = pages, .step_tokens = chunk, .open_pages = 32});
  const int64_t width = spec.kv_heads * spec.dim;
  DeviceMemory k(chunk * width * 2), v(chunk * width * 2), length(16), fill_ws(filler.workspace_bytes()), offsets(16);
  double append_ms = 0, append_tokens = 0;
  cudaEvent_t e0, e1;
  check(cudaEventCreate(&e0), "event");
  check(cudaEventCreate(&e1), "event");
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t at = 0; at < spec.ctx; at += chunk) {
      const int64_t n = std::min(chunk, spec.ctx - at);
      draw_kv<<<1024, 256, 0, timer.stream()>>>(k.as<uint16_t>(), v.as<uint16_t>(), d_lift.as<float>(), at, n,
                                                static_cast<int>(spec.kv_heads), static_cast<int>(spec.dim),
                                                static_cast<uint32_t>(s));
      const int32_t numbers[3] = {static_cast<int32_t>(at + n), 0, static_cast<int32_t>(n)};
      cuda::copy_to_device(length.data(), numbers, 4, timer.stream());
      cuda::copy_to_device(offsets.data(), numbers + 1, 8, timer.stream());
      cuda::AppendCall call;
      call.memory = {pool.as<uint8_t>(), res.as<uint8_t>(), open.as<uint8_t>(), nullptr};
      call.tables = {length.as<int32_t>(), d_blocks.as<int32_t>() + s * pages,
                     d_residuals.as<int32_t>() + s * pages * spec.kv_heads, d_open.as<int32_t>() + s * 32,
                     offsets.as<int32_t>()};
      call.k = k.data();
      call.v = v.data();
      call.workspace = fill_ws.data();
      const bool timed = s == 0 && at / chunk % 8 == 7;
      if (timed) check(cudaEventRecord(e0, timer.stream()), "event");
      cuda::append(filler, call, timer.stream());
      if (timed) check(cudaEventRecord(e1, timer.stream()), "event");
      cuda::synchronize(timer.stream());
      if (timed) {
        float t = 0;
        check(cudaEventElapsedTime(&t, e0, e1), "event");
        append_ms += t;
        append_tokens += static_cast<double>(n);
      }
    }
    lengths[static_cast<size_t>(s)] = static_cast<int32_t>(spec.ctx);
  }
  const DeviceMemory d_lengths = upload(lengths);

  const cuda::AttendPlan plan(shape, spec.policy,
                              {.batch = spec.batch, .max_pages = pages, .step_tokens = spec.q_len, .open_pages = 32});
  const int64_t q_width = spec.q_heads * spec.dim, rows = spec.batch * spec.q_len;
  std::vector<float> q(static_cast<size_t>(rows * q_width));
  for (size_t i = 0; i < q.size(); ++i) {
    const int d = static_cast<int>(i % static_cast<size_t>(spec.dim));
    const int which = static_cast<int>(i / static_cast<size_t>(spec.dim)) % 2;
    const bool on = (d < spec.dim / 2) == (which == 0);
    const float sign = ((static_cast<uint32_t>(d) * 2654435761u) >> 13 & 1) ? 1.0f : -1.0f;
    q[i] = on ? sign * kGain * std::sqrt(2.0f) : 0.0f;
  }
  const DeviceMemory d_q = upload(q);
  DeviceMemory out(rows * q_width * 2), workspace(plan.workspace_bytes()),
      decisions(rows * pages * spec.kv_heads);
  const auto call_of = [&](int64_t r) {
    cuda::AttendCall call;
    const int64_t s = r * spec.batch;
    call.memory = {pool.as<uint8_t>(), res.as<uint8_t>(), open.as<uint8_t>(), nullptr};
    call.tables = {d_lengths.as<int32_t>() + s, d_blocks.as<int32_t>() + s * pages,
                   d_residuals.as<int32_t>() + s * pages * spec.kv_heads, d_open.as<int32_t>() + s * 32, nullptr};
    call.config = {.softmax_scale = 1.0f / std::sqrt(static_cast<float>(spec.dim))};
    call.q = d_q.data();
    call.q_element = cuda::Element::f32;
    call.out = out.data();
    call.workspace = workspace.data();
    return call;
  };
  if (g_profile) {
    for (int i = 0; i < 3; ++i) cuda::attend(plan, call_of(0), timer.stream());
    cuda::synchronize(timer.stream());
    return {};
  }
  // What was decided, and from it the bytes.
  cuda::AttendCall look = call_of(0);
  cuda::fill(decisions.data(), 0, decisions.bytes(), timer.stream());
  look.decisions = decisions.as<uint8_t>();
  cuda::attend(plan, look, timer.stream());
  std::vector<uint8_t> decided(static_cast<size_t>(decisions.bytes()));
  cuda::copy_to_host(decided.data(), decisions.data(), decisions.bytes(), timer.stream());
  cuda::synchronize(timer.stream());
  double count[6] = {};
  for (const uint8_t d : decided) ++count[d];
  for (double& c : count) c /= static_cast<double>(spec.q_len);
  const double plane = 36.0 * spec.dim, means = 4.0 * spec.dim, tail = 36 + 4 + 4.0 / spec.kv_heads;
  const double open_bytes = static_cast<double>((spec.ctx - 1) % 64 + 1) * 4 * spec.dim + 2.0 * spec.dim;
  const double element = spec.policy.k_format == Format::fp8_e4m3 ? 1 + 4.0 / spec.dim : 2;
  const double bytes = count[1] * (2 * plane + means + tail) + count[2] * (4 * plane + means + tail) +
                       count[3] * (plane + means + tail) + count[4] * open_bytes +
                       count[5] * (128.0 * spec.dim * element + 4.0 / spec.kv_heads);
  const double closed = count[1] + count[2] + count[3];

  const auto all = timer.time(21, [&](cudaStream_t s) {
    for (int64_t r = 0; r < rotation; ++r) cuda::attend(plan, call_of(r), s);
  });
  const double ms = median(all) / rotation, best = *std::min_element(all.begin(), all.end()) / rotation;
  // prepare, prepare and the walk (which needs it each time), merge.
  double part[3] = {};
  if (parts) {
    for (int i = 0; i < 3; ++i) {
      part[i] = median(timer.time(11, [&](cudaStream_t s) {
                  for (int64_t r = 0; r < rotation; ++r) {
                    const cuda::AttendArgs a = cuda::make_attend_args(plan.state(), call_of(r));
                    if (i < 2) cuda::launch_prepare(a, s);
                    if (i == 1) cuda::launch_walk(plan.state(), a, s);
                    if (i == 2) cuda::launch_merge(a, s);
                  }
                })) / rotation;
    }
    part[1] -= part[0];
  }
  const double gb_s = bytes / ms * 1e-6;
  const double append_bytes = append_tokens * width * 2 * 2 + append_tokens / 64 * (sizes.page + (sizes.residual * spec.kv_heads));
  std::printf(
      "{\"op\": \"%s\", \"policy\": \"%s\", \"device\": \"cuda\", \"ctx\": %lld, \"queries\": %lld, \"batch\": %lld, "
      "\"q_heads\": %lld, \"kv_heads\": %lld, \"head_dim\": %lld, \"ms_min\": %.5f, \"ms_median\": %.5f, "
      "\"bytes_read\": %.0f, \"gb_s\": %.1f, \"peak_gb_s\": %.1f, \"peak_read_gb_s\": %.1f, "
      "\"fraction_of_peak\": %.4f, \"ms_bf16\": %.5f, \"speedup_vs_bf16\": %.3f, \"promoted_fraction\": %.4f, "
      "\"skipped_fraction\": %.4f, \"prepare_ms\": %.5f, \"decode_ms\": %.5f, \"merge_ms\": %.5f, "
      "\"append_gb_s\": %.1f, \"rotation\": %lld}\n",
      spec.q_len == 1 ? "decode" : "verify", spec.name, (long long)spec.ctx, (long long)spec.q_len, (long long)spec.batch,
      (long long)spec.q_heads, (long long)spec.kv_heads, (long long)spec.dim, best, ms, bytes, gb_s, peaks.copy,
      peaks.read, gb_s / peaks.copy, bf16_ms > 0 ? bf16_ms : ms, bf16_ms > 0 ? bf16_ms / ms : 1.0,
      closed > 0 ? count[2] / closed : 0, closed > 0 ? count[3] / closed : 0, part[0], part[1], part[2],
      append_ms > 0 ? append_bytes / append_ms * 1e-6 : 0, (long long)rotation);
  std::fflush(stdout);
  return {ms, bytes};
}

struct PrefillSpec {
  const char* name;
  LayerPolicy policy;
  int64_t cached, step, q_heads, kv_heads, dim;
};

__global__ void draw_q(uint16_t* q, int64_t n, float gain) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    q[i] = __float_as_uint(gain * normal(i, 4242)) + 0x8000u >> 16;
  }
}

// A causal step on `cached` tokens, in prefill mode; BF16 q and out. Work is counted as 4 * q_heads *
// head_dim for each visible (query, key).
void run_prefill(const PrefillSpec& spec, Timer& timer) {
  const LayerShape shape{.kv_heads = spec.kv_heads, .q_heads = spec.q_heads, .head_dim_k = spec.dim,
                         .head_dim_v = spec.dim};
  const int64_t total = spec.cached + spec.step, pages = (total + 63) / 64, open_pages = spec.step / 64 + 2;
  const cuda::SlotSizes sizes = cuda::slot_sizes(shape, spec.policy);
  const bool sealed = spec.policy.residency == Residency::dropped;
  // Every page of the step holds residuals; of those before, as the cache would.
  const auto holds_residual = [&](int64_t p) {
    return sizes.residual > 0 && (!sealed || p == 0 || (p + 1) * 64 > spec.cached - 512);
  };
  std::vector<int32_t> blocks, residual_ids, open_ids;
  int32_t residuals = 0;
  for (int64_t p = 0; p < pages; ++p) {
    blocks.push_back(static_cast<int32_t>(p * 7919 % pages));
    for (int64_t h = 0; h < spec.kv_heads; ++h) residual_ids.push_back(holds_residual(p) ? residuals++ : -1);
  }
  for (int64_t i = 0; i < open_pages; ++i) open_ids.push_back(static_cast<int32_t>(i));
  const auto upload = [&](const std::vector<int32_t>& x) {
    DeviceMemory m(static_cast<int64_t>(x.size() * 4));
    cuda::copy_to_device(m.data(), x.data(), m.bytes(), timer.stream());
    cuda::synchronize(timer.stream());
    return m;
  };
  const DeviceMemory d_blocks = upload(blocks), d_residuals = upload(residual_ids), d_open = upload(open_ids);
  DeviceMemory pool(pages * sizes.page), open(std::max<int64_t>(16, open_pages * sizes.open)),
      res(std::max<int64_t>(16, int64_t{residuals} * sizes.residual)), lift(pages * 8), numbers(16);
  cuda::fill(lift.data(), 0, lift.bytes(), timer.stream());
  const cuda::AttendPlan plan(shape, spec.policy, {.batch = 1, .max_pages = pages, .step_tokens = spec.step,
                                                   .open_pages = open_pages});
  const int64_t width = spec.kv_heads * spec.dim, q_width = spec.q_heads * spec.dim;
  DeviceMemory workspace(plan.workspace_bytes()), k(spec.step * width * 2), v(spec.step * width * 2),
      q(spec.step * q_width * 2), out(spec.step * q_width * 2);
  const cuda::LayerMemory memory{pool.as<uint8_t>(), res.as<uint8_t>(), open.as<uint8_t>(), nullptr};
  const cuda::BatchTables tables{numbers.as<int32_t>(), d_blocks.as<int32_t>(), d_residuals.as<int32_t>(),
                                 d_open.as<int32_t>(), numbers.as<int32_t>() + 1};
  for (int64_t at = 0; at < total;) {
    // The step comes last and whole.
    const int64_t n = std::min(spec.step, at < spec.cached ? spec.cached - at : total - at);
    draw_kv<<<1024, 256, 0, timer.stream()>>>(k.as<uint16_t>(), v.as<uint16_t>(), lift.as<float>(), at, n,
                                              static_cast<int>(spec.kv_heads), static_cast<int>(spec.dim), 5);
    at += n;
    const int32_t of_step[3] = {static_cast<int32_t>(at), 0, static_cast<int32_t>(n)};
    cuda::copy_to_device(numbers.data(), of_step, 12, timer.stream());
    cuda::AppendCall call;
    call.memory = memory;
    call.tables = tables;
    call.k = k.data();
    call.v = v.data();
    call.workspace = workspace.data();
    cuda::append(plan, call, timer.stream());
    cuda::synchronize(timer.stream());
  }
  draw_q<<<1024, 256, 0, timer.stream()>>>(q.as<uint16_t>(), spec.step * q_width, 1.0f);
  cuda::AttendCall call;
  call.memory = memory;
  call.tables = tables;
  call.config = {.mode = AttendMode::prefill, .softmax_scale = 1.0f / std::sqrt(static_cast<float>(spec.dim))};
  call.q = q.data();
  call.out = out.data();
  call.workspace = workspace.data();
  const auto all = timer.time(g_profile ? 1 : 7, [&](cudaStream_t s) { cuda::attend(plan, call, s); });
  const double pairs = static_cast<double>(spec.step) * static_cast<double>(spec.cached) +
                       0.5 * static_cast<double>(spec.step) * static_cast<double>(spec.step + 1);
  const double flop = 4.0 * static_cast<double>(q_width) * pairs, ms = median(all);
  std::printf("{\"op\": \"prefill\", \"policy\": \"%s\", \"device\": \"cuda\", \"ctx\": %lld, \"queries\": %lld, "
              "\"batch\": 1, \"q_heads\": %lld, \"kv_heads\": %lld, \"head_dim\": %lld, \"ms_min\": %.4f, "
              "\"ms_median\": %.4f, \"tflop_s\": %.1f, \"workspace_mb\": %.1f}\n",
              spec.name, (long long)total, (long long)spec.step, (long long)spec.q_heads, (long long)spec.kv_heads,
              (long long)spec.dim, *std::min_element(all.begin(), all.end()), ms, flop / ms * 1e-9,
              static_cast<double>(plan.workspace_bytes()) * 1e-6);
  std::fflush(stdout);
}

void run_prefill_rows(Timer& timer) {
  const LayerPolicy bf16{.k_format = Format::bf16, .v_format = Format::bf16};
  const LayerPolicy thrifty = layered(1, 0.0003, true);
  LayerPolicy x2 = layered(1, 0, false);
  x2.k_format = x2.v_format = Format::nvfp4x2;
  constexpr int64_t kLong = 32768, kChunk = 2048;
  run_prefill({"bf16", bf16, 0, kLong, 32, 8, 128}, timer);
  run_prefill({"bf16", bf16, kLong - kChunk, kChunk, 32, 8, 128}, timer);
  run_prefill({"thrifty", thrifty, kLong - kChunk, kChunk, 32, 8, 128}, timer);
  run_prefill({"nvfp4x2", x2, kLong - kChunk, kChunk, 32, 8, 128}, timer);
  run_prefill({"thrifty", thrifty, 0, kLong, 32, 8, 128}, timer);
  run_prefill({"thrifty", thrifty, kLong - 512, 512, 32, 8, 128}, timer);
}

// append() of one step into an empty sequence. Bytes are what must be read and written: K and V as
// they come, the open form of every page (the step's own queries read it), pages and residuals.
// Steps go to sequences in turn, so that neither input nor output is in the L2.
void run_append(const char* name, const LayerPolicy& policy, int64_t tokens, Timer& timer, const Peaks& peaks) {
  const LayerShape shape{.kv_heads = 8, .q_heads = 32, .head_dim_k = 128, .head_dim_v = 128};
  const cuda::SlotSizes sizes = cuda::slot_sizes(shape, policy);
  const int64_t width = shape.kv_heads * shape.head_dim_k, pages = tokens / kPageTokens;
  const double input = 2.0 * static_cast<double>(tokens * width) * 2;
  const double open_bytes = static_cast<double>(pages * sizes.open);
  const double pages_bytes = static_cast<double>(pages * (sizes.page + sizes.residual * shape.kv_heads));
  const double bytes = input + open_bytes + pages_bytes;
  const auto rotation = std::max<int64_t>(1, static_cast<int64_t>(150e6 / bytes) + 1);

  DeviceMemory pool(rotation * pages * sizes.page), open(rotation * pages * sizes.open),
      res(rotation * pages * shape.kv_heads * sizes.residual), k(rotation * tokens * width * 2),
      v(rotation * tokens * width * 2), status(sizeof(cuda::AppendStatus)), lift(pages * 8);
  cuda::fill(status.data(), 0, status.bytes(), timer.stream());
  cuda::fill(lift.data(), 0, lift.bytes(), timer.stream());
  std::vector<int32_t> blocks, residual_ids;
  for (int64_t p = 0; p < rotation * pages; ++p) {
    blocks.push_back(static_cast<int32_t>(p / pages * pages + p % pages * 7919 % pages));
    for (int64_t h = 0; h < shape.kv_heads; ++h) residual_ids.push_back(static_cast<int32_t>(p * shape.kv_heads + h));
  }
  const std::vector<int32_t> lengths = {static_cast<int32_t>(tokens)}, offsets = {0, static_cast<int32_t>(tokens)};
  const auto upload = [&](const std::vector<int32_t>& x) {
    DeviceMemory m(static_cast<int64_t>(x.size() * sizeof(x[0])));
    cuda::copy_to_device(m.data(), x.data(), m.bytes(), timer.stream());
    cuda::synchronize(timer.stream());
    return m;
  };
  const DeviceMemory d_blocks = upload(blocks), d_residuals = upload(residual_ids), d_lengths = upload(lengths),
                     d_offsets = upload(offsets);
  const cuda::AttendPlan plan(shape, policy, {.batch = 1, .max_pages = pages, .step_tokens = tokens, .open_pages = pages + 1});
  DeviceMemory workspace(plan.workspace_bytes());
  std::vector<int32_t> open_ids;
  for (int64_t r = 0; r < rotation; ++r) {
    for (int64_t p = 0; p <= pages; ++p) open_ids.push_back(static_cast<int32_t>(r * pages + p % pages));
    draw_kv<<<1024, 256, 0, timer.stream()>>>(k.as<uint16_t>() + r * tokens * width, v.as<uint16_t>() + r * tokens * width,
                                              lift.as<float>(), 0, tokens, static_cast<int>(shape.kv_heads), 128,
                                              static_cast<uint32_t>(r));
  }
  const DeviceMemory d_open = upload(open_ids);
  const auto call_of = [&](int64_t r) {
    cuda::AppendCall call;
    call.memory = {pool.as<uint8_t>(), res.as<uint8_t>(), open.as<uint8_t>(), nullptr};
    call.tables = {d_lengths.as<int32_t>(), d_blocks.as<int32_t>() + r * pages,
                   d_residuals.as<int32_t>() + r * pages * shape.kv_heads, d_open.as<int32_t>() + r * (pages + 1),
                   d_offsets.as<int32_t>()};
    call.k = k.as<uint16_t>() + r * tokens * width;
    call.v = v.as<uint16_t>() + r * tokens * width;
    call.status = status.as<cuda::AppendStatus>();
    call.workspace = workspace.data();
    return call;
  };
  const auto all = timer.time(21, [&](cudaStream_t s) {
    for (int64_t r = 0; r < rotation; ++r) cuda::append(plan, call_of(r), s);
  });
  const double ms = median(all) / rotation, best = *std::min_element(all.begin(), all.end()) / rotation;
  const double gb_s = bytes / ms * 1e-6;
  std::printf(
      "{\"op\": \"append\", \"policy\": \"%s\", \"device\": \"cuda\", \"tokens\": %lld, \"kv_heads\": %lld, \"head_dim\": 128, "
      "\"element\": \"bf16\", \"ms_min\": %.5f, \"ms_median\": %.5f, \"bytes_in\": %.0f, \"bytes_open\": %.0f, "
      "\"bytes_pages\": %.0f, \"gb_s\": %.1f, \"gb_s_without_open\": %.1f, \"peak_gb_s\": %.1f, "
      "\"fraction_of_peak\": %.4f, \"rotation\": %lld}\n",
      name, (long long)tokens, (long long)shape.kv_heads, best, ms, input, open_bytes, pages_bytes, gb_s,
      (input + pages_bytes) / ms * 1e-6, peaks.copy, gb_s / peaks.copy, (long long)rotation);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
    for (int i = 1; i + 1 < argc; ++i) {
      if (std::strcmp(argv[i], "--only") == 0) g_only = argv[i + 1];
    }
    const cuda::DeviceInfo info = cuda::device_info();
    std::fprintf(stderr, "%s, sm_%d%d, driver %d, runtime %d\n", info.name.c_str(), info.major, info.minor,
                 info.driver_version, info.runtime_version);
    Timer timer;
    if (argc > 1 && std::strcmp(argv[1], "--profile") == 0) {
      g_profile = true;
      run({"thrifty", layered(1, 0.0003, true), 4, 131072, 32, 8, 128, 1, 0, 0}, timer, {}, 0, false);
      return 0;
    }
    if (argc > 1 && std::strcmp(argv[1], "--prefill") == 0) {
      run_prefill_rows(timer);
      return 0;
    }
    const Peaks peaks = measure_peaks(timer);
    std::fprintf(stderr, "copy %.0f GB/s, read %.0f GB/s\n", peaks.copy, peaks.read);
    for (const int64_t tokens : {512, 8192, 32768}) {
      run_append("thrifty", layered(1, 0.0003, true), tokens, timer, peaks);
      run_append("balanced", layered(0.02, 0.0003, false), tokens, timer, peaks);
    }
    if (argc > 1 && std::strcmp(argv[1], "--append") == 0) return 0;
    const LayerPolicy bf16{.k_format = Format::bf16, .v_format = Format::bf16};
    const LayerPolicy fp8{.k_format = Format::fp8_e4m3, .v_format = Format::fp8_e4m3};
    LayerPolicy x2 = layered(1, 0, false);
    x2.k_format = x2.v_format = Format::nvfp4x2;
    const int64_t shapes[3][2] = {{4, 131072}, {1, 131072}, {8, 32768}};
    for (const auto& [batch, ctx] : shapes) {
      for (const int64_t heads : {32, 64}) {
        if (quick && heads == 64 && batch != 4) continue;
        const double base = run({"bf16", bf16, batch, ctx, heads, 8, 128, 1, 0, 0}, timer, peaks, 0, true).ms;
        run({"thrifty", layered(1, 0.0003, true), batch, ctx, heads, 8, 128, 1, 0, 0}, timer, peaks, base, true);
        if (ctx == 131072) {
          run({"balanced-4-0", layered(0.02, 0, false), batch, ctx, heads, 8, 128, 1, 0.04, 0}, timer, peaks, base, true);
          run({"balanced-2-60", layered(0.02, 0.0003, false), batch, ctx, heads, 8, 128, 1, 0.02, 0.6}, timer, peaks, base, true);
        }
        if (quick && batch != 4) continue;
        run({"thrifty", layered(1, 0.0003, true), batch, ctx, heads, 8, 128, 8, 0, 0}, timer, peaks, base, true);
        if (heads == 32) {
          run({"fp8", fp8, batch, ctx, heads, 8, 128, 1, 0, 0}, timer, peaks, base, false);
          run({"nvfp4x2", x2, batch, ctx, heads, 8, 128, 1, 0, 0}, timer, peaks, base, false);
        }
      }
    }
    if (!quick) {
      const double base = run({"bf16", bf16, 1, 1048576, 32, 8, 128, 1, 0, 0}, timer, peaks, 0, true).ms;
      run({"thrifty", layered(1, 0.0003, true), 1, 1048576, 32, 8, 128, 1, 0, 0}, timer, peaks, base, true);
    }
    run_prefill_rows(timer);
  } catch (const Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
