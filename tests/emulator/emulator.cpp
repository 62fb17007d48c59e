#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int64_t kGuard = 8192;
constexpr unsigned char kPoison = 0xFF;
// NaN in every format, as the poison is, but told apart from it: 0x7FFF, over and over.
const std::vector<uint16_t> kGuardPattern(kGuard / 2, 0x7FFF);

struct Copy {
  void* dst;
  int bytes;
  unsigned char value[16];
};

// A thread's asynchronous copies that have not landed, oldest first, and where each committed group of them ends.
struct CopyQueue {
  std::vector<Copy> copies;
  std::vector<size_t> ends;
  size_t landed_copies = 0, landed_groups = 0;

  bool empty() const { return landed_copies == copies.size(); }
  void clear() {
    copies.clear(), ends.clear();
    landed_copies = landed_groups = 0;
  }
};

struct Thread {
  Fiber fiber;
  CopyQueue queue;
};

struct Warp {
  uint32_t present = 0;   // lanes that have not returned
  uint32_t runnable = 0;  // of those, lanes that wait for nothing
  uint32_t waiting = 0;   // lanes at the collective
  const char* name = nullptr;
  Action action = nullptr;
  Site site{};
  void* lanes[kLanes];
};

// Which warp goes on: one runs as far as it can, all take turns, or they are drawn.
enum class Order { kAhead, kTurns, kDrawn };

// One turn of a warp: its lanes go on in rotated order, forwards or backwards.
struct Round {
  int warp = 0, first = 0;
  bool backwards = false;
  uint32_t to_visit = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> order;  // of warps
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  int size = 0, live = 0, at_barrier = 0;
  Site barrier{};
  int current = 0;
  Round round;
  Fiber scheduler;
  Stacks stacks;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  std::string error;
  bool failed = false, running = false;  // in a fiber
  uint64_t random = 0;
};

Block block;
std::mutex one_launch;

uint64_t draw() {  // splitmix64
  uint64_t z = block.random += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

int64_t environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != 0 ? std::strtoll(value, nullptr, 10) : otherwise;
}

uint32_t bit(int lane) { return uint32_t(1) << lane; }

// The next lane of the warp's round that can go on, in the round's order; -1 if there is none.
int next_lane() {
  const uint32_t lanes = block.warps[block.round.warp].runnable & block.round.to_visit;
  if (lanes == 0) return -1;
  const int first = block.round.first;
  if (block.round.backwards) {
    const uint32_t turned = first == 31 ? lanes : lanes << (31 - first) | lanes >> (first + 1);
    return (first - __builtin_clz(turned)) & 31;
  }
  const uint32_t turned = first == 0 ? lanes : lanes >> first | lanes << (32 - first);
  return (first + __builtin_ctz(turned)) & 31;
}

void resume(Fiber& from, int lane) {
  block.warps[block.round.warp].runnable &= ~bit(lane);
  block.round.to_visit &= ~bit(lane);
  block.current = block.round.warp * kLanes + lane;
  thread_index.x = unsigned(block.current);
  from.switch_to(block.threads[block.current].fiber);
}

// Leaves the running thread. Straight to the next lane, past the scheduler: half the switches.
void suspend() {
  Fiber& mine = block.threads[block.current].fiber;
  const int lane = block.failed ? -1 : next_lane();
  if (lane < 0) return mine.switch_to(block.scheduler);
  resume(mine, lane);
}

void thread_entry() {
  try {
    block.body(block.context);
    Warp& warp = block.warps[block.current / kLanes];
    if (!block.threads[block.current].queue.empty()) fail("returned before its asynchronous copies were waited for");
    if (block.at_barrier > 0)
      fail("returned while other threads wait at the __syncthreads of " + text(block.barrier));
    if (warp.waiting != 0)
      fail(std::string("returned while other lanes of its warp wait at the ") + warp.name + " of " + text(warp.site));
    warp.present &= ~bit(block.current % kLanes);
    --block.live;
  } catch (const std::exception& error) {
    block.failed = true;
    block.error = error.what();
  }
  suspend();
  std::abort();  // nobody resumes a thread that has ended
}

std::string of_thread(const std::string& what) {
  return "emulator: block " + std::to_string(block_index.x) + ", thread " + std::to_string(block.current) + " " + what +
         ".";
}

std::string describe_deadlock() {
  std::string what = "emulator: deadlock in block " + std::to_string(block_index.x) + ":";
  if (block.at_barrier > 0)
    what += " " + std::to_string(block.at_barrier) + " threads wait at the __syncthreads of " + text(block.barrier) +
            ";";
  for (size_t w = 0; w < block.warps.size(); ++w)
    if (const Warp& warp = block.warps[w]; warp.waiting != 0)
      what += " " + std::to_string(__builtin_popcount(warp.waiting)) + " lanes of warp " + std::to_string(w) +
              " wait at the " + warp.name + " of " + text(warp.site) + ";";
  what.back() = '.';
  return what;
}

// Each lane of the warp that can go on does so once, until it waits or ends.
void run_warp(int w) {
  const uint64_t drawn = draw();
  block.round = {w, int(drawn & 31), (drawn & 32) != 0, ~uint32_t(0)};
  block.running = true;
  if (const int lane = next_lane(); lane >= 0) resume(block.scheduler, lane);
  block.running = false;
}

// The next warp in `order` from `from` on that can go on; -1 if none can.
int next_warp(int from) {
  const int n = int(block.order.size());
  for (int j = 0; j < n; ++j)
    if (const int at = (from + j) % n; block.warps[block.order[at]].runnable != 0) return at;
  return -1;
}

void schedule() {
  const int n = int(block.order.size());
  std::iota(block.order.begin(), block.order.end(), 0);
  for (int i = n - 1; i > 0; --i) std::swap(block.order[i], block.order[draw() % (i + 1)]);
  const Order order = Order(draw() % 3);
  int at = 0;
  while (block.live > 0) {
    at = next_warp(order == Order::kAhead ? 0 : order == Order::kTurns ? at + 1 : int(draw() % n));
    if (at < 0) throw Error(describe_deadlock());
    run_warp(block.order[at]);
    if (block.failed) throw Error(block.error);
  }
}

void prepare_block() {
  std::memset(block.shared, kPoison, size_t(block.shared_bytes));
  std::memcpy(block.shared - kGuard, kGuardPattern.data(), kGuard);
  std::memcpy(block.shared + block.shared_bytes, kGuardPattern.data(), kGuard);
  block.live = block.size;
  block.at_barrier = 0;
  block.failed = false;
  for (Warp& warp : block.warps) warp = Warp{};
  for (int t = 0; t < block.size; ++t) {
    Warp& warp = block.warps[t / kLanes];
    warp.present |= bit(t % kLanes);
    warp.runnable |= bit(t % kLanes);
    block.threads[t].queue.clear();
    block.threads[t].fiber.start(thread_entry, block.stacks.top(t), Stacks::kBytes - kGuard);
  }
}

void check_guards() {
  const unsigned char* expected = reinterpret_cast<const unsigned char*>(kGuardPattern.data());
  if (std::memcmp(block.shared + block.shared_bytes, expected, kGuard) == 0 &&
      std::memcmp(block.shared - kGuard, expected, kGuard) == 0)
    return;
  int64_t offset = block.shared_bytes;  // of the damage that is closest to the block's memory
  for (int64_t i = 0; i < kGuard; ++i) {
    if (offset = block.shared_bytes + i; block.shared[offset] != expected[i]) break;
    if (offset = -1 - i; block.shared[offset] != expected[kGuard - 1 - i]) break;
  }
  throw Error("emulator: block " + std::to_string(block_index.x) + " wrote at offset " + std::to_string(offset) +
              " of its " + std::to_string(block.shared_bytes) + " bytes of shared memory.");
}

}  // namespace

int64_t shared_limit() { return environment("ENGM_EMULATOR_SHARED_KB", 99) << 10; }

void fail(const std::string& what) { throw Error(of_thread(what)); }

void abandon(const std::string& what) {
  if (!block.running) {
    std::fprintf(stderr, "emulator: a launcher %s.\n", what.c_str());
    std::abort();
  }
  block.failed = true;
  block.error = of_thread(what);
  suspend();
  std::abort();  // nobody resumes a failed block
}

unsigned char* shared_memory() { return block.shared; }

void check_shared(const void* address, int64_t bytes, int64_t alignment, const char* what) {
  const int64_t offset = int64_t(reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(block.shared));
  if (offset < 0 || offset + bytes > block.shared_bytes)
    fail(std::string(what) + " takes " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
         " of the block's " + std::to_string(block.shared_bytes) + " bytes of shared memory");
  if (offset % alignment != 0)
    fail(std::string(what) + " has a shared address (offset " + std::to_string(offset) +
         ") that is not a multiple of " + std::to_string(alignment));
}

void block_barrier(Site site) {
  if (block.live < block.size)
    fail("waits at the __syncthreads of " + text(site) + " that others have returned before");
  if (block.at_barrier == 0) block.barrier = site;
  if (!(block.barrier == site))
    fail("waits at the __syncthreads of " + text(site) + " while others wait at that of " + text(block.barrier));
  if (++block.at_barrier < block.size) return suspend();
  block.at_barrier = 0;
  for (Warp& warp : block.warps) warp.runnable = warp.present;
  block.warps[block.current / kLanes].runnable &= ~bit(block.current % kLanes);
}

void collective(const char* name, Action action, void* mine, Site site) {
  Warp& warp = block.warps[block.current / kLanes];
  const int lane = block.current % kLanes;
  if (warp.present != ~uint32_t(0))
    fail(std::string("calls ") + name + " at " + text(site) + " without all 32 lanes of its warp");
  if (warp.waiting == 0) warp.name = name, warp.action = action, warp.site = site;
  if (warp.action != action || warp.name != name || !(warp.site == site))
    fail(std::string("calls ") + name + " at " + text(site) + " while other lanes of its warp wait at the " +
         warp.name + " of " + text(warp.site));
  warp.lanes[lane] = mine;
  warp.waiting |= bit(lane);
  if (warp.waiting != ~uint32_t(0)) return suspend();
  warp.waiting = 0;
  if (action != nullptr) action(warp.lanes);
  warp.runnable = ~bit(lane);
}

void copy_async(void* dst, const void* src, int bytes, int filled) {
  check_shared(dst, bytes, bytes, "an asynchronous copy");
  if (filled < 0 || filled > bytes)
    fail("copies " + std::to_string(filled) + " bytes asynchronously, expected 0 to " + std::to_string(bytes));
  if (reinterpret_cast<uintptr_t>(src) % uintptr_t(bytes) != 0)
    fail("copies " + std::to_string(bytes) + " bytes asynchronously from a source that is not aligned to them");
  Copy copy{dst, bytes, {}};
  if (filled > 0) std::memcpy(copy.value, src, size_t(filled));
  std::memset(dst, kPoison, size_t(bytes));
  block.threads[block.current].queue.copies.push_back(copy);
}

void copy_async_commit() {
  CopyQueue& queue = block.threads[block.current].queue;
  queue.ends.push_back(queue.copies.size());
}

void copy_async_wait(int pending) {
  CopyQueue& queue = block.threads[block.current].queue;
  while (queue.ends.size() - queue.landed_groups > size_t(pending))
    for (const size_t end = queue.ends[queue.landed_groups++]; queue.landed_copies < end; ++queue.landed_copies) {
      const Copy& copy = queue.copies[queue.landed_copies];
      std::memcpy(copy.dst, copy.value, size_t(copy.bytes));
    }
  if (queue.empty() && queue.landed_groups == queue.ends.size()) queue.clear();
}

void run_blocks(void (*body)(const void*), const void* context, int64_t blocks, int threads, int64_t shared) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (threads > kMaxThreads) throw Error("emulator: a block has at most 1024 threads.");
  block.size = threads;
  block.threads.resize(size_t(std::max<int>(threads, int(block.threads.size()))));
  block.warps.resize(size_t((threads + kLanes - 1) / kLanes));
  block.order.resize(block.warps.size());
  block.stacks.reserve(threads);
  block.memory.resize(size_t(shared + 2 * kGuard + 128));
  block.shared = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(block.memory.data()) + kGuard + 127) & ~uintptr_t(127));
  block.shared_bytes = shared;
  block.body = body;
  block.context = context;
  block_size = {unsigned(threads), 1, 1};
  grid_size = {unsigned(blocks), 1, 1};
  const uint64_t seed = uint64_t(environment("ENGM_EMULATOR_SEED", 0));
  block.random = seed;
  const bool backwards = draw() & 1;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t index = backwards ? blocks - 1 - b : b;
    block_index = {unsigned(index), 0, 0};
    block.random = seed * 0x632BE59BD9B4E019u + uint64_t(index);
    prepare_block();
    schedule();
    check_guards();
  }
}

}  // namespace emulator
