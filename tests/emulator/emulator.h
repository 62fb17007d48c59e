// Runs CUDA kernels on the CPU, to test their indices, barriers and copies where there is no GPU.
//
// Every thread of a block is a fiber; blocks run one after the other. A fiber runs until it waits at a barrier, at a
// collective of its warp, or ends; which one goes on is drawn from a seed, so that other seeds try other interleavings.
// What would be undefined or wrong on the card is an exception of type emulator::Error, which names the block, the
// thread and the source line:
//   - threads of one block at different barriers, or a barrier after some have returned;
//   - lanes of one warp at different collectives (mma, ldmatrix, shuffles, __syncwarp), or lanes that are missing;
//   - a deadlock;
//   - a write before or behind the block's shared memory, found when the block ends;
//   - a misaligned asynchronous copy, one that leaves shared memory, one that nobody waited for;
//   - a misaligned load or store, an index outside a local array (the sanitizers that build.py turns on).
// Shared memory is NaN (bytes 0xFF) before each block, and the destination of a copy is NaN until it is waited for: a
// missing barrier or wait shows as NaN, provided the schedule lets a thread run ahead. Accesses to global memory are
// plain C++ and are not checked.
//
//   ENGM_EMULATOR_SEED        schedule, 0 by default
//   ENGM_EMULATOR_SHARED_KB   shared memory a block may use, 99 by default (sm_86)
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kLanes = 32;

// A place in the source, taken as a default argument: `Site site = Site::here()`.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};

// The running thread's, kept up to date by the scheduler; CUDA's names for them are in cuda_words.h.
extern Index thread_index, block_index, block_size, grid_size;

// Bytes of shared memory that one block may ask for.
int64_t shared_limit();

// Ends the launch with an Error about the running thread.
[[noreturn]] void fail(const std::string& what);

// The same without an exception, for code that cannot be unwound; outside of kernels it aborts.
[[noreturn]] void abandon(const std::string& what);

// The block's shared memory, 128-byte aligned.
unsigned char* shared_memory();

// Fails unless [address, address + bytes) lies in shared memory and is aligned to `alignment`.
void check_shared(const void* address, int64_t bytes, int64_t alignment, const char* what);

// __syncthreads().
void block_barrier(Site site);

// What the last lane of a warp does for all 32 when it has arrived: lanes[l] is what lane l passed. Lanes are suspended
// meanwhile, so it may write to their variables.
using Action = void (*)(void* const (&lanes)[kLanes]);

// All lanes of the warp have to come here, with one action and from one site.
void collective(const char* name, Action action, void* mine, Site site);

// The running thread's asynchronous copy of `bytes` to shared memory, `filled` of them from src and the rest zero.
void copy_async(void* dst, const void* src, int bytes, int filled);
void copy_async_commit();
void copy_async_wait(int pending);

// Runs `body(context)` in every thread; throws Error. Not reentrant, but threads of the process may take turns.
void run_blocks(void (*body)(const void* context), const void* context, int64_t blocks, int threads, int64_t shared);

}  // namespace emulator
