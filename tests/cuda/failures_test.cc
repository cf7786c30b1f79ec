// What goes wrong on a device: launches that fail are reported by their own call, memory that runs
// out by an Error with its bytes, and afterwards everything works as if it had not happened.
#include <gtest/gtest.h>

#include <regex>
#include <string>

#include "cuda/device_case.h"
#include "cuda/device_steps.h"

namespace thriftattn::testing {
namespace {

TEST(CudaFailures, OutOfMemoryNamesAskedHeldAndFree) {
  SKIP_WITHOUT_DEVICE();
  cuda::DeviceMemory some(1 << 20);
  try {
    cuda::DeviceMemory much(int64_t{1} << 50);
    FAIL() << "a petabyte was given";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::out_of_memory);
    for (const char* word : {"asked", "held", "free"}) {
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
  }
  cuda::fill(some.data(), 0, some.bytes(), nullptr);
  cuda::synchronize(nullptr);
}

#ifdef THRIFTATTN_WITH_CUDA

template <class Body>
Error error_of(Body body) {
  try {
    body();
  } catch (const Error& e) {
    return e;
  }
  return Error(ErrorCode::invalid_argument, "nothing failed");
}

// A capture that has failed refuses every launch into its stream.
class FailedCapture {
 public:
  explicit FailedCapture(cudaStream_t stream) : stream_(stream) {
    EXPECT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    EXPECT_NE(cudaStreamSynchronize(stream), cudaSuccess);
    (void)cudaGetLastError();
  }
  ~FailedCapture() {
    cudaGraph_t graph = nullptr;
    EXPECT_NE(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    EXPECT_EQ(graph, nullptr);
    (void)cudaGetLastError();
  }

 private:
  cudaStream_t stream_;
};

TEST(CudaFailures, AFailedLaunchIsReportedByItsCall) {
  SKIP_WITHOUT_DEVICE();
  struct Kind {
    const char* name;
    LayerPolicy policy;
    int64_t tokens;  // of the step that fails
    const char* kernel;
  };
  const Kind kinds[] = {{"decode", sealed_policy(64, 128), 1, "attend_prepare"},
                        {"verify", plain_policy(Format::bf16), 8, "attend_prepare"},
                        {"prefill", sealed_policy(64, 128), 100, "prefill_facts"},
                        {"plain prefill", plain_policy(Format::bf16), 100, "prefill_facts"}};
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.name);
    const StepsOptions options{.policy = kind.policy, .steps = {300, kind.tokens, 1}};
    DeviceSteps undisturbed(options);
    undisturbed.run();
    DeviceSteps steps(options);
    steps.step();
    steps.begin();
    {
      const FailedCapture capture(steps.stream());
      const Error of_append = error_of([&] { steps.append(); });
      const Error of_attend = error_of([&] { steps.attend(); });
      EXPECT_EQ(of_append.code(), ErrorCode::unsupported);
      EXPECT_EQ(of_attend.code(), ErrorCode::unsupported);
      for (const auto& [error, kernel] :
           {std::pair{of_append, "append_pages"}, std::pair{of_attend, kind.kernel}}) {
        const std::string message = error.what();
        EXPECT_NE(message.find("cudaErrorStreamCaptureInvalidated"), std::string::npos) << message;
        EXPECT_NE(message.find(kernel), std::string::npos) << message;
      }
    }
    steps.append();
    steps.attend();
    steps.commit();
    steps.run();
    EXPECT_TRUE(steps.result() == undisturbed.result());
  }
}

constexpr int64_t kMiB = int64_t{1} << 20;

// All that the device has left but about 16 MiB.
std::vector<cuda::DeviceMemory> take_memory() {
  std::vector<cuda::DeviceMemory> taken;
  size_t spare = 0;
  for (const int64_t bytes : {1024 * kMiB, 16 * kMiB, 2 * kMiB}) {
    try {
      for (;;) taken.emplace_back(bytes);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::out_of_memory) << e.what();
    }
    if (bytes == 16 * kMiB) spare = taken.size() - 1;
  }
  EXPECT_EQ(taken[spare].bytes(), 16 * kMiB);
  taken[spare] = cuda::DeviceMemory();
  return taken;
}

// A step that gets part of its memory gives it back, as often as it is tried.
TEST(CudaFailures, WithoutMemoryTheCacheStaysUsable) {
  SKIP_WITHOUT_DEVICE();
  for (const LayerPolicy& policy :
       {plain_policy(Format::bf16), layered_policy(0.02, 0.0003), sealed_policy(64, 128)}) {
    SCOPED_TRACE(std::string(to_string(policy.k_format)));
    const StepsOptions options{
        .shape = {.kv_heads = 4, .q_heads = 4, .head_dim_k = 128, .head_dim_v = 128},
        .policy = policy,
        .steps = {300, 1, 1, 12000, 1, 1}};
    DeviceSteps undisturbed(options);
    undisturbed.run();

    DeviceSteps steps(options);
    for (int i = 0; i < 2; ++i) steps.step();
    auto taken = take_memory();
    steps.step();  // in the page that is there
    const int64_t used = steps.cache().usage().total();
    const int64_t mapped = cuda::mapped_bytes(steps.cache());
    for (int attempt = 0; attempt < 3; ++attempt) {
      const Error error = error_of([&] { steps.begin(); });
      EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
      std::smatch numbers;
      const std::string message = error.what();
      ASSERT_TRUE(std::regex_search(
          message, numbers,
          std::regex("asked for (\\d+) bytes, (\\d+) are held by its pool, (\\d+) of (\\d+) are "
                     "free on the device")))
          << message;
      EXPECT_GE(std::stoll(numbers[1]), 2 * kMiB);
      EXPECT_GE(std::stoll(numbers[2]), 2 * kMiB);
      EXPECT_LT(std::stoll(numbers[3]), 64 * kMiB);
      EXPECT_EQ(std::stoll(numbers[4]), cuda::device_info().memory_total);
      EXPECT_EQ(steps.cache().length(steps.sequence()), 302);
      EXPECT_EQ(steps.cache().usage().total(), used);
      // Each of the three pools may keep a piece for the next step.
      EXPECT_LE(cuda::mapped_bytes(steps.cache()), mapped + 3 * 2 * kMiB);
    }
    taken.clear();
    steps.run();
    EXPECT_TRUE(steps.result() == undisturbed.result());
  }
}

#endif

}  // namespace
}  // namespace thriftattn::testing
