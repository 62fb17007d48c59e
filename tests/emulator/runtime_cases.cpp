// Kernels for test_runtime.py: right ones, and ones with each of the faults that the emulator has to find.
#include <cmath>

#include "exported.h"
#include "reduce.cuh"

using namespace engm::cuda;

namespace {

constexpr int kThreads = 64;

struct Case {
  const float* in;
  float* out;
  int variant;
};

__global__ void sum_kernel(Case p) {
  ENGM_SHARED(float, scratch);
  const float total = block_sum<kThreads>(p.in[blockIdx.x * kThreads + threadIdx.x], scratch);
  if (threadIdx.x == 0) p.out[blockIdx.x] = total;
}

// Everybody reads what the neighbour wrote: variant 1 without the barrier.
__global__ void neighbour_kernel(Case p) {
  ENGM_SHARED(float, shared);
  shared[threadIdx.x] = p.in[threadIdx.x];
  if (p.variant != 1) __syncthreads();
  p.out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

// The same inside a warp.
__global__ void lane_kernel(Case p) {
  ENGM_SHARED(float, shared);
  shared[threadIdx.x] = p.in[threadIdx.x];
  if (p.variant != 1) __syncwarp();
  p.out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void uninitialised_kernel(Case p) {
  ENGM_SHARED(float, shared);
  if (threadIdx.x < 32) shared[threadIdx.x] = 1;
  __syncthreads();
  p.out[threadIdx.x] = shared[threadIdx.x];
}

struct alignas(16) Four {
  float at[4];
};

__global__ void faults_kernel(Case p) {
  ENGM_SHARED(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  switch (p.variant) {
    case 0:  // two halves of a warp wait for different things
      if (lane < 16)
        __syncthreads();
      else
        __syncwarp();
      break;
    case 1:
      if (warp == 0)
        __syncthreads();
      else
        __syncthreads();
      break;
    case 2:
      if (threadIdx.x == 5) return;
      __syncthreads();
      break;
    case 3:
      if (lane != 3) shuffle_xor(1.0f, 1);
      break;
    case 4:
      if (lane < 7)
        shuffle_xor(1.0f, 1);
      else
        __syncwarp();
      break;
    case 5:
      if (lane < 7)
        __syncwarp();
      else
        __syncwarp();
      break;
    case 6: shared[threadIdx.x + 1] = 0; break;
    case 7: (shared - 1)[threadIdx.x] = 0; break;
    case 8: copy_async_16(shared + 4 * (threadIdx.x % 8) + 1, p.in, 16); break;
    case 9: copy_async_16(shared + 4 * (threadIdx.x % 16), p.in + 1, 16); break;
    case 10: copy_async_16(shared + 4 * (threadIdx.x % 16), p.in, 17); break;
    case 11: copy_async_element<4>(shared + kThreads, p.in, true); break;
    case 12: copy_async_element<4>(shared + threadIdx.x, p.in, true); break;
    case 13: copy_async_element<4>(shared + threadIdx.x, p.in, true), copy_async_commit(); break;
    case 14:  // a lane takes part in one shuffle fewer
      for (int i = 0; i < 8 - (lane == 9); ++i) shuffle_xor(1.0f, 1);
      break;
    case 15: p.out[0] = reinterpret_cast<const Four*>(shared + threadIdx.x)->at[1]; break;
    case 16: {
      float four[4] = {};
      four[threadIdx.x % 8] = 1;
      p.out[0] = four[0];
      break;
    }
    default: break;
  }
  p.out[threadIdx.x] = 1;
}

// Two groups of copies, of which the variant says how many are waited for, then everybody's neighbour's.
template <int kPending>
__global__ void copies_kernel(Case p) {
  ENGM_SHARED(float, shared);
  float* second = shared + kThreads;
  copy_async_element<4>(shared + threadIdx.x, p.in + threadIdx.x, true), copy_async_commit();
  copy_async_element<4>(second + threadIdx.x, p.in + kThreads + threadIdx.x, true), copy_async_commit();
  copy_async_wait<kPending>();
  __syncthreads();
  const int other = (threadIdx.x + 1) % kThreads;
  p.out[threadIdx.x] = shared[other], p.out[kThreads + threadIdx.x] = second[other];
  copy_async_wait<0>();
}

// The first bytes of 16, the rest zero; without bytes the source may be anything.
__global__ void filled_kernel(Case p) {
  ENGM_SHARED(float, shared);
  const float* nowhere = reinterpret_cast<const float*>(uintptr_t(16));
  copy_async_16(shared + 4 * threadIdx.x, p.variant == 0 ? nowhere : p.in, p.variant);
  copy_async_element<8>(shared + 4 * kThreads + 2 * threadIdx.x, p.variant == 0 ? nowhere : p.in, p.variant != 0);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
  for (int i = 0; i < 2; ++i) p.out[4 * kThreads + 2 * threadIdx.x + i] = shared[4 * kThreads + 2 * threadIdx.x + i];
}

// out[0] counts; then who came when.
__global__ void order_kernel(Case p) {
  for (int round = 0; round < 4; ++round) {
    p.out[1 + int(p.out[0]++)] = float(blockIdx.x * kThreads + threadIdx.x);
    __syncwarp();
  }
}

__global__ void words_kernel(Case p) {
  const bool right = blockDim.x == kThreads && gridDim.x == 3 && threadIdx.y == 0 && min(1, int64_t(2)) == 1 &&
                     max(1.5, 1) == 1.5 && isfinite(1.0) && !isfinite(nan("")) && __float_as_uint(1.0f) == 0x3f800000u;
  p.out[blockIdx.x * kThreads + threadIdx.x] = right ? __uint_as_float(0x40000000u) : 0;
}

}  // namespace

ENGM_EXPORT const char* run_case(const char* name, const float* in, float* out, int variant, int blocks, int threads,
                                 int shared) {
  const std::string which = name;
  const Case p{in, out, variant};
  if (which == "sum") return exported::run(sum_kernel, blocks, threads, shared, p);
  if (which == "neighbour") return exported::run(neighbour_kernel, blocks, threads, shared, p);
  if (which == "lane") return exported::run(lane_kernel, blocks, threads, shared, p);
  if (which == "uninitialised") return exported::run(uninitialised_kernel, blocks, threads, shared, p);
  if (which == "faults") return exported::run(faults_kernel, blocks, threads, shared, p);
  if (which == "copies" && variant == 0) return exported::run(copies_kernel<0>, blocks, threads, shared, p);
  if (which == "copies" && variant == 1) return exported::run(copies_kernel<1>, blocks, threads, shared, p);
  if (which == "copies" && variant == 2) return exported::run(copies_kernel<2>, blocks, threads, shared, p);
  if (which == "filled") return exported::run(filled_kernel, blocks, threads, shared, p);
  if (which == "order") return exported::run(order_kernel, blocks, threads, shared, p);
  if (which == "words") return exported::run(words_kernel, blocks, threads, shared, p);
  return "no such case";
}

ENGM_EXPORT int64_t shared_limit() { return emulator::shared_limit(); }
