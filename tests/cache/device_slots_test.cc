// A cache whose slots the CPU does not address, as on a device: the same bookkeeping, accounting and
// saved bytes as in CPU memory, through copies alone; what fails leaves the cache usable.
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <random>

#include "cache/kv_cache_impl.h"
#include "cache/sequence_io.h"
#include "support/attention_case.h"
#include "thriftattn/error.h"

namespace thriftattn::testing {
namespace {

// Memory that only copies reach. `budget` slots a pool, then none.
class FarMemory : public SlotMemory {
 public:
  FarMemory(SlotMemoryOptions options, const int64_t* budget)
      : options_(std::move(options)), budget_(budget) {}
  void place(int32_t id) override {
    if (static_cast<int64_t>(slots_.size()) >= *budget_) {
      throw Error(ErrorCode::out_of_memory, "no memory for " + options_.name);
    }
    EXPECT_EQ(slots_.count(id), 0u) << "slot " << id << " is held already";
    slots_[id].assign(static_cast<size_t>(options_.slot_bytes), options_.zeroed ? 0 : 0xEE);
  }
  void free(int32_t id) noexcept override { slots_.erase(id); }
  void copy(int32_t from, int32_t to) override { slots_.at(to) = slots_.at(from); }
  void read(int32_t id, void* to) const override {
    std::memcpy(to, slots_.at(id).data(), slots_.at(id).size());
  }
  void write(int32_t id, const void* from) override {
    std::memcpy(slots_.at(id).data(), from, slots_.at(id).size());
  }

 private:
  SlotMemoryOptions options_;
  const int64_t* budget_;
  std::map<int32_t, std::vector<uint8_t>> slots_;
};

struct FarDevice : CacheDevice {
  int64_t budget = int64_t{1} << 30;
  std::unique_ptr<SlotMemory> make_memory(const SlotMemoryOptions& options) override {
    return std::make_unique<FarMemory>(options, &budget);
  }
};

// A CPU cache and its far twin, fed alike: the twin's slots get the bytes that the CPU encoded, which is
// what kernels do.
class Twins {
 public:
  explicit Twins(const LayerPolicy& policy, int64_t window = 0)
      : config_{.layers = {{.kv_heads = 2, .q_heads = 4, .head_dim_k = 64, .head_dim_v = 64,
                            .window = window},
                           {.kv_heads = 2, .q_heads = 4, .head_dim_k = 64, .head_dim_v = 64}},
                .policy = {policy, policy}},
        cpu(config_),
        device(std::make_shared<FarDevice>()),
        far(std::make_unique<KvCache::Impl>(config_, device)) {}

  void step(SequenceId near_id, SequenceId far_id, int64_t tokens, int64_t committed) {
    cpu.begin_step(near_id, tokens);
    for (int64_t l = 0; l < 2; ++l) {
      const std::vector<float> k = draw(tokens), v = draw(tokens);
      cpu.append(near_id, l, TensorView<const float>::dense(k.data(), tokens, 2, 64),
                 TensorView<const float>::dense(v.data(), tokens, 2, 64));
    }
    far.begin_step(far_id, tokens);
    far.impl().make_room(far.impl().sequence(far_id));
    encode(near_id, far_id);
    cpu.commit(near_id, committed);
    far.commit(far_id, committed);
  }

  // What kernels would have written.
  void encode(SequenceId near_id, SequenceId far_id) {
    const Sequence& from = cpu.impl().sequence(near_id);
    const Sequence& to = far.impl().sequence(far_id);
    for (size_t l = 0; l < 2; ++l) {
      LayerStore& near_store = cpu.impl().layers[l];
      LayerStore& far_store = far.impl().layers[l];
      const LayerSequence& a = from.layers[l];
      const LayerSequence& b = to.layers[l];
      ASSERT_EQ(a.pages.size(), b.pages.size());
      for (size_t j = 0; j < a.pages.size(); ++j) {
        ASSERT_EQ(a.pages[j] == kNoPage, b.pages[j] == kNoPage) << "page " << j;
        if (a.pages[j] != kNoPage) {
          far_store.pages.write(b.pages[j], near_store.pages.data(a.pages[j]));
        }
      }
      for (size_t j = 0; j < a.residuals.size(); ++j) {
        ASSERT_EQ(a.residuals[j] == kNoPage, b.residuals[j] == kNoPage) << "residual " << j;
        if (a.residuals[j] != kNoPage) {
          far_store.residuals.write(b.residuals[j], near_store.residuals.data(a.residuals[j]));
        }
      }
      ASSERT_EQ(a.open.size(), b.open.size());
      for (size_t j = 0; j < a.open.size(); ++j) {
        const int64_t page = a.first_open + static_cast<int64_t>(j);
        const int64_t held =
            std::min(kPageTokens, from.length + from.step_tokens - page * kPageTokens);
        write_open(far_store, a.open[j], b.open[j].slot, held);
      }
    }
  }

  // Rows of tokens that are not there stay as the slot was.
  void write_open(LayerStore& store, const OpenPage& from, int32_t slot, int64_t held) {
    std::vector<uint8_t> bytes;
    store.open->read(slot, bytes);
    uint8_t* to = bytes.data();
    const auto copy = [&](const std::vector<uint16_t>& part, int64_t dim) {
      for (int64_t h = 0; h < 2 && !part.empty(); ++h) {
        std::memcpy(to + h * kPageTokens * dim * 2,
                    &part[static_cast<size_t>(h * kPageTokens * dim)],
                    static_cast<size_t>(held * dim * 2));
      }
      to += part.size() * 2;
    };
    copy(from.k, 64);
    copy(from.v, 64);
    std::memcpy(to, from.k_reference.data(), from.k_reference.size() * 2);
    store.open->write(slot, bytes.data());
  }

  std::vector<float> draw(int64_t tokens) {
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(tokens * 2 * 64));
    for (float& value : x) value = normal(rng_);
    return x;
  }

  static std::vector<uint8_t> saved(const KvCache& cache, SequenceId id) {
    std::vector<uint8_t> bytes;
    save_sequence(cache, id, [&](const void* data, size_t n) {
      const auto* from = static_cast<const uint8_t*>(data);
      bytes.insert(bytes.end(), from, from + n);
    });
    return bytes;
  }

  void expect_same(SequenceId near_id, SequenceId far_id, const char* what) const {
    EXPECT_EQ(cpu.length(near_id), far.length(far_id)) << what;
    EXPECT_TRUE(saved(cpu, near_id) == saved(far, far_id)) << what << ": the bytes differ";
    const CacheUsage a = cpu.usage(), b = far.usage();
    EXPECT_EQ(a.base_bytes, b.base_bytes) << what;
    EXPECT_EQ(a.residual_bytes, b.residual_bytes) << what;
    EXPECT_EQ(a.summary_bytes, b.summary_bytes) << what;
    EXPECT_EQ(a.plain_bytes, b.plain_bytes) << what;
    EXPECT_EQ(a.open_bytes, b.open_bytes) << what;
    EXPECT_EQ(a.table_bytes, b.table_bytes) << what;
    EXPECT_EQ(a.reencoded_pages, b.reencoded_pages) << what;
    EXPECT_EQ(cpu.impl().budget.held(), far.impl().budget.held()) << what;
  }

 private:
  KvCacheConfig config_;
  std::mt19937 rng_{5};

 public:
  KvCache cpu;
  std::shared_ptr<FarDevice> device;
  KvCache far;
};

LayerPolicy mixed_policy() {
  LayerPolicy p = sealed_policy(64, 128);
  p.v_format = Format::fp8_e4m3;
  return p;
}

TEST(DeviceSlots, SameBytesAndUsageAsInCpuMemory) {
  const std::pair<const char*, LayerPolicy> policies[] = {{"layered", layered_policy(0.05, 0.0)},
                                                          {"sealed", sealed_policy(64, 128)},
                                                          {"plain", plain_policy(Format::bf16)},
                                                          {"mixed", mixed_policy()}};
  for (const auto& [name, policy] : policies) {
    Twins t(policy, 100);
    const SequenceId a = t.cpu.create(), b = t.far.create();
    for (const int64_t n : {1, 62, 1, 5, 130, 70}) t.step(a, b, n, n);
    t.expect_same(a, b, name);
    t.step(a, b, 90, 37);  // a part of a step stays
    t.expect_same(a, b, name);
    t.far.begin_step(b, 80);
    t.far.impl().make_room(t.far.impl().sequence(b));
    t.far.rollback(b);
    t.expect_same(a, b, name);
    // A fork shares what is full and writes to copies of its own.
    const SequenceId fa = t.cpu.fork(a), fb = t.far.fork(b);
    t.expect_same(fa, fb, name);
    const std::vector<uint8_t> before = Twins::saved(t.far, b);
    t.step(fa, fb, 3, 3);
    t.expect_same(fa, fb, name);
    EXPECT_TRUE(Twins::saved(t.far, b) == before) << name << ": the fork wrote to its source";
    t.cpu.free(fa);
    t.far.free(fb);
    // Into the open page, and into one that is sealed.
    for (const int64_t length : {t.cpu.length(a) - 2, int64_t{250}}) {
      t.cpu.truncate(a, length);
      t.far.truncate(b, length);
      t.expect_same(a, b, name);
    }
    t.step(a, b, 64, 64);
    t.expect_same(a, b, name);
    t.cpu.free(a);
    t.far.free(b);
    EXPECT_EQ(t.far.usage().total(), 0) << name;
    EXPECT_EQ(t.far.impl().budget.held(), 0) << name;
  }
}

TEST(DeviceSlots, LoadsWhatTheCpuSavedAndTheOtherWay) {
  Twins t(sealed_policy(64, 128));
  const SequenceId a = t.cpu.create(), b = t.far.create();
  for (const int64_t n : {100, 64, 9}) t.step(a, b, n, n);
  const std::vector<uint8_t> bytes = Twins::saved(t.cpu, a);
  const auto source = [&bytes](size_t at) {
    return [&bytes, at](void* to, size_t n) mutable {
      ASSERT_LE(at + n, bytes.size());
      std::memcpy(to, &bytes[at], n);
      at += n;
    };
  };
  const SequenceId far_copy = load_sequence(t.far, 173, source(0));
  EXPECT_TRUE(Twins::saved(t.far, far_copy) == bytes);
  const SequenceId near_copy = load_sequence(t.cpu, 173, source(0));
  EXPECT_TRUE(Twins::saved(t.cpu, near_copy) == bytes);
}

TEST(DeviceSlots, WithoutMemoryTheStepIsUndone) {
  Twins t(layered_policy(0.05, 0.0));
  const SequenceId a = t.cpu.create(), b = t.far.create();
  t.step(a, b, 100, 100);
  t.device->budget = 3;
  t.far.begin_step(b, 300);
  EXPECT_THROW(t.far.impl().make_room(t.far.impl().sequence(b)), Error);
  t.far.rollback(b);
  t.expect_same(a, b, "after the error");
  EXPECT_EQ(t.far.impl().budget.held(), t.cpu.impl().budget.held());
  // A fork needs a slot for its open page, in each layer.
  t.device->budget = 1;
  EXPECT_THROW(t.far.fork(b), Error);
  t.expect_same(a, b, "after the fork that failed");
  t.device->budget = 100;
  t.step(a, b, 50, 50);
  t.expect_same(a, b, "with memory again");
}

TEST(DeviceSlots, RefusesTheCpusKernels) {
  Twins t(plain_policy(Format::bf16));
  const SequenceId b = t.far.create();
  const std::vector<float> x(2 * 64, 1.0f);
  const auto view = TensorView<const float>::dense(x.data(), 1, 2, 64);
  t.far.begin_step(b, 1);
  try {
    t.far.append(b, 0, view, view);
    FAIL() << "append() took tokens for a device";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(error.what()).find("on a device"), std::string::npos) << error.what();
  }
  std::vector<float> q(4 * 64, 1.0f), out(4 * 64);
  AttendRequest request{.sequence = b, .layer = 0, .config = {.softmax_scale = 0.1f}};
  request.q = TensorView<const float>::dense(q.data(), 1, 4, 64);
  request.out = TensorView<float>::dense(out.data(), 1, 4, 64);
  EXPECT_THROW(attend(t.far, request), Error);
  t.far.rollback(b);
}

}  // namespace
}  // namespace thriftattn::testing
