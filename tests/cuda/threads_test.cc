// Host threads at once, each with its own stream, cache and workspace, and a second device: the
// bits of one thread alone.
#include <gtest/gtest.h>

#include <exception>
#include <latch>
#include <string>
#include <thread>

#include "cuda/device_case.h"
#include "cuda/device_steps.h"

#ifdef THRIFTATTN_WITH_CUDA
namespace thriftattn::testing {
namespace {

// A long prefill, a draft of tokens and decode, over kernels of every kind.
std::vector<StepsOptions> jobs() {
  const auto job = [](LayerPolicy policy, int64_t dim, int64_t q_heads, int64_t prompt) {
    static_assert(kPageTokens == 64);
    std::vector<int64_t> steps = {prompt, 8};
    steps.insert(steps.end(), 70, 1);  // a page becomes full
    return StepsOptions{
        .shape = {.kv_heads = 2, .q_heads = q_heads, .head_dim_k = dim, .head_dim_v = dim},
        .policy = policy,
        .steps = steps,
        .seed = static_cast<uint32_t>(prompt)};
  };
  LayerPolicy mixed = layered_policy(0.02, 0.0003);
  mixed.v_format = Format::bf16;
  return {job(sealed_policy(64, 512), 128, 8, 2100),
          job(layered_policy(0.02, 0.0003), 128, 16, 1500),
          job(layered_policy(0.02, 0.0003), 64, 4, 1900),
          job(plain_policy(Format::bf16), 128, 8, 1700),
          job(plain_policy(Format::fp8_e4m3), 64, 8, 1300),
          job(mixed, 256, 4, 900)};
}

struct Task {
  StepsOptions job;
  int device = 0;
};

// Of each task, run in a thread of its own: all steps of all threads at once.
std::vector<DeviceSteps::Result> run_at_once(const std::vector<Task>& tasks) {
  std::vector<DeviceSteps::Result> results(tasks.size());
  std::vector<std::string> failures(tasks.size());
  std::latch ready(static_cast<std::ptrdiff_t>(tasks.size()));
  {
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < tasks.size(); ++i) {
      threads.emplace_back([&, i] {
        bool waited = false;
        try {
          if (cudaSetDevice(tasks[i].device) != cudaSuccess) throw std::runtime_error("device");
          DeviceSteps steps(tasks[i].job);
          waited = true;
          ready.arrive_and_wait();
          steps.run();
          results[i] = steps.result();
        } catch (const std::exception& e) {
          failures[i] = e.what();
          if (!waited) ready.count_down();
        }
      });
    }
  }
  for (size_t i = 0; i < tasks.size(); ++i) EXPECT_EQ(failures[i], "") << "thread " << i;
  return results;
}

void expect_same(const DeviceSteps::Result& a, const DeviceSteps::Result& b,
                 const std::string& what) {
  EXPECT_TRUE(a.out == b.out) << what << ": the output differs";
  EXPECT_TRUE(a.lse == b.lse) << what << ": the LSE differs";
  EXPECT_TRUE(a.saved == b.saved) << what << ": the cache's bytes differ";
}

TEST(CudaThreads, AtOnceGiveTheBitsOfOneAlone) {
  SKIP_WITHOUT_DEVICE();
  std::vector<DeviceSteps::Result> alone;
  std::vector<Task> tasks;
  for (const StepsOptions& job : jobs()) {
    DeviceSteps steps(job);
    steps.run();
    alone.push_back(steps.result());
    EXPECT_TRUE(alone.back().saved == steps.saved_by_cpu()) << "job " << alone.size() - 1;
    // NaN would compare unequal to itself.
    ASSERT_TRUE(alone.back() == steps.result()) << "job " << alone.size() - 1;
  }
  for (int copy = 0; copy < 2; ++copy) {
    for (const StepsOptions& job : jobs()) tasks.push_back({job});
  }
  for (int round = 0; round < 3; ++round) {
    const auto results = run_at_once(tasks);
    for (size_t i = 0; i < tasks.size(); ++i) {
      expect_same(results[i], alone[i % alone.size()],
                  "round " + std::to_string(round) + ", thread " + std::to_string(i));
    }
  }
}

class TwoDevices : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_DEVICE();
    if (cuda::device_count() < 2) GTEST_SKIP() << "this machine has one CUDA device";
    const cuda::DeviceInfo first = cuda::device_info(0), second = cuda::device_info(1);
    if (first.major != second.major || first.minor != second.minor ||
        first.multiprocessors != second.multiprocessors) {
      GTEST_SKIP() << "the devices differ: " << first.name << ", " << second.name;
    }
  }
  void TearDown() override {
    if (!IsSkipped()) {
      EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
    }
  }
};

TEST_F(TwoDevices, PlansOfTheSecondGiveTheBitsOfTheFirst) {
  std::vector<DeviceSteps::Result> first;
  std::vector<Task> tasks;
  for (const StepsOptions& job : jobs()) {
    for (int device = 0; device < 2; ++device) {
      ASSERT_EQ(cudaSetDevice(device), cudaSuccess);
      DeviceSteps steps(job);
      steps.run();
      const DeviceSteps::Result result = steps.result();
      if (device == 0) {
        first.push_back(result);
      } else {
        expect_same(result, first.back(), "job " + std::to_string(first.size() - 1));
      }
      tasks.push_back({job, device});
    }
  }
  const auto at_once = run_at_once(tasks);
  for (size_t i = 0; i < tasks.size(); ++i) {
    expect_same(at_once[i], first[i / 2], "thread " + std::to_string(i));
  }
}

TEST_F(TwoDevices, APlanIsForItsDevice) {
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  DeviceSteps steps(jobs()[0]);
  steps.begin();
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  for (const bool appends : {true, false}) {
    try {
      appends ? steps.append() : steps.attend();
      ADD_FAILURE() << "a plan of device 1 ran on device 0";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::invalid_argument);
      EXPECT_NE(std::string(e.what()).find("made for device 1, device 0 is current"),
                std::string::npos)
          << e.what();
    }
  }
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  steps.append();
  steps.attend();
  steps.commit();
  EXPECT_TRUE(steps.result().saved == steps.saved_by_cpu());
}

}  // namespace
}  // namespace thriftattn::testing
#endif
