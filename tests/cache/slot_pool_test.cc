// Slots: side by side and zeroed in regions, reused, really returned, and what a full pool says.
#include "cache/slot_pool.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/memory_region.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

constexpr int64_t kSlot = 78336;  // 8 heads of 128, sealed

SlotPoolOptions options(SlotPlacement placement, bool poison = false) {
  return {.name = "a test slot", .slot_bytes = kSlot, .placement = placement, .poison = poison};
}

bool all_zero(const uint8_t* p) {
  return std::all_of(p, p + kSlot, [](uint8_t x) { return x == 0; });
}

// Bytes of [p, p + kSlot) that the system holds, by its own pages.
int64_t resident(const uint8_t* p) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + kSlot) / page * page;
  std::vector<unsigned char> held((last - first) / page);
  EXPECT_EQ(mincore(reinterpret_cast<void*>(first), last - first, held.data()), 0);
  return static_cast<int64_t>(page) *
         std::count_if(held.begin(), held.end(), [](unsigned char x) { return (x & 1) != 0; });
}

TEST(SlotPool, SlotsOfARegionLieSideBySideAndAreZero) {
  ByteBudget budget(0);
  SlotPool pool(options(SlotPlacement::region), &budget);
  std::vector<int32_t> ids;
  int64_t neighbours = 0;
  // Beyond one region (64 MiB at most) and many large pages.
  for (int i = 0; i < 1200; ++i) {
    ids.push_back(pool.acquire());
    uint8_t* slot = pool.data(ids.back());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(slot) % SlotPool::kAlignment, 0u);
    ASSERT_TRUE(all_zero(slot)) << i;
    std::memset(slot, i % 251 + 1, kSlot);
    if (i > 0 && slot == pool.data(ids[static_cast<size_t>(i - 1)]) + kSlot) ++neighbours;
  }
  EXPECT_EQ(budget.held(), 1200 * kSlot);
  if (kSlotRegions) {
    EXPECT_GE(neighbours, 1190);
  }
  // Asking for large pages moved nothing and lost nothing.
  for (int i = 0; i < 1200; ++i) {
    const uint8_t* slot = pool.data(ids[static_cast<size_t>(i)]);
    ASSERT_TRUE(std::all_of(slot, slot + kSlot, [&](uint8_t x) { return x == i % 251 + 1; })) << i;
  }
}

TEST(SlotPool, AFreedSlotIsReturnedAndComesBackZeroed) {
  for (const SlotPlacement placement : {SlotPlacement::region, SlotPlacement::single}) {
    ByteBudget budget(0);
    SlotPool pool(options(placement), &budget);
    const int32_t before = pool.acquire(), id = pool.acquire(), after = pool.acquire();
    for (const int32_t i : {before, id, after}) std::memset(pool.data(i), 7, kSlot);
    const uint8_t* freed = pool.data(id);
    EXPECT_GT(resident(freed), kSlot - 3 * 4096);
    pool.release(id);
    if (kSlotRegions && placement == SlotPlacement::region) {
      EXPECT_EQ(resident(freed), 0);
    }
    EXPECT_EQ(budget.held(), 2 * kSlot);
    EXPECT_EQ(pool.used(), 2);
    EXPECT_EQ(pool.acquire(), id);
    EXPECT_TRUE(all_zero(pool.data(id)));
    // The neighbours keep their bytes, also where they share one of the system's pages with it.
    for (const int32_t i : {before, after}) {
      EXPECT_TRUE(std::all_of(pool.data(i), pool.data(i) + kSlot, [](uint8_t x) { return x == 7; }));
    }
  }
}

TEST(SlotPool, OwnersAreCountedAndPoisonIsSeen) {
  ByteBudget budget(0);
  SlotPool pool(options(SlotPlacement::region, true), &budget);
  const int32_t id = pool.acquire();
  pool.add_ref(id);
  pool.release(id);
  EXPECT_EQ(pool.refs(id), 1);
  EXPECT_TRUE(all_zero(pool.data(id)));
  pool.release(id);
  EXPECT_EQ(pool.data(id)[0], 0xFF);
  EXPECT_EQ(pool.data(id)[kSlot - 1], 0xFF);
  EXPECT_EQ(pool.acquire(), id);
  EXPECT_TRUE(all_zero(pool.data(id)));
}

TEST(SlotPool, AFullBudgetSaysWhatIsAskedAndChangesNothing) {
  ByteBudget budget(2 * kSlot);
  SlotPool pool(options(SlotPlacement::region), &budget);
  const int32_t first = pool.acquire();
  pool.acquire();
  try {
    pool.acquire();
    FAIL() << "the budget is full";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::out_of_memory);
    EXPECT_NE(std::string(e.what()).find("a test slot asks for 78336 bytes, 156672 of 156672"),
              std::string::npos)
        << e.what();
  }
  EXPECT_EQ(pool.used(), 2);
  pool.release(first);
  EXPECT_EQ(pool.acquire(), first);
}

TEST(MemoryRegion, StartsOnALargePageAndMoves) {
  MemoryRegion region(3 * MemoryRegion::kLargePage - 5);
  ASSERT_TRUE(region);
  EXPECT_EQ(region.size(), 3 * MemoryRegion::kLargePage);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(region.data()) % MemoryRegion::kLargePage, 0u);
  region.data()[5] = 3;
  region.collapse(0);
  MemoryRegion moved = std::move(region);
  EXPECT_FALSE(region);  // NOLINT(bugprone-use-after-move): empty is what it must be
  EXPECT_EQ(moved.data()[5], 3);
  EXPECT_EQ(moved.data()[MemoryRegion::kLargePage + 1], 0);
}

TEST(MemoryRegion, MoreThanTheSystemHasIsEmpty) {
  EXPECT_FALSE(MemoryRegion(int64_t{1} << 62));
}

}  // namespace
}  // namespace thriftattn
