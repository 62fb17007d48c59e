// Contracts the two Gram matrices of each example of a linear layer,
//
//   out[i] = Σ_{t,s} P[i, t, s] Q[i, t, s] = ‖B_iᵀ A_i‖²,    P = A_i A_iᵀ, Q = B_i B_iᵀ,
//
// both [n, T, T] with rows of a pitch that 16 bytes divide. They are symmetric, and the upper triangle alone is read:
// what lies above the diagonal is counted twice. Matrix products of any library may have formed them.
//
// A block owns an example. Of its kPack rows at a time, as many as elements in 16 bytes, group g has one pack of
// columns less than the group before: the first group and the last, the second and the last but one, and so on make
// lines of one length, over whose packs the threads go, neighbours in the warp reading neighbouring packs. Where the
// number of groups is odd, the one in the middle makes half a line. Each thread adds in the order of its packs, and the
// block its threads in a fixed order and in double, so that every run gives the same bits.
//
// Bytes: n·T·(T + kPack) elements of either matrix halved, mostly from L2, where the products have just left them.
//
// Cancellation is judged as gram_cancellation.h says. Linear layers are not centred as they are on the CPU. Where
// backprops are independent, Σ|P Q| / ‖G‖² is at most about
//   (1 + T/√rows)(1 + mean²/variance of the activations),
// which passes 64 only where means are many times the deviations or T is far beyond √rows; the direct form, which does
// not cancel, is taken there. Centring would cost every example a pass for the means and one more product.
#pragma once

#include "gram_contraction.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

template <typename Sum, int kThreads>
__global__ void __launch_bounds__(kThreads) gram_contraction_kernel(GramContraction c) {
  ENGM_SHARED(double, scratch);
  constexpr int kPack = 16 / int(sizeof(Sum));
  const int64_t i = blockIdx.x, matrix = int64_t(c.positions) * c.pitch;
  const Sum* const p = static_cast<const Sum*>(c.p) + i * matrix;
  const Sum* const q = static_cast<const Sum*>(c.q) + i * matrix;
  const int groups = c.pitch / kPack, length = groups + 1;  // a line's packs: those of the group above, then below
  const int count = (groups + 1) / 2 * kPack * length;
  Sum total = 0, magnitude = 0;
#pragma unroll 2
  for (int k = threadIdx.x; k < count; k += kThreads) {
    const int line = k / length, at = k - line * length;
    const int above = line / kPack, below = groups - 1 - above;
    const bool in_above = at < groups - above;
    const int row = (in_above ? above : below) * kPack + line % kPack;
    const int first = (in_above ? at + above : at - 1) * kPack;  // column
    if (row >= c.positions || (!in_above && above == below)) continue;
    const int64_t offset = int64_t(row) * c.pitch + first;
    const Pack<Sum, kPack> ps = load_pack<Sum, kPack>(p + offset), qs = load_pack<Sum, kPack>(q + offset);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const int column = first + j;
      if (column < row || column >= c.positions) continue;
      const Sum term = ps.at[j] * qs.at[j] * Sum(column == row ? 1 : 2);
      total += term;
      magnitude += fabs(term);
    }
  }
  const double sum = block_sum<kThreads>(double(total), scratch);
  const double size = block_sum<kThreads>(double(magnitude), scratch + kThreads / 32);
  if (threadIdx.x != 0) return;
  // A sum that is not finite may have overflowed on the way, in P or in Q: the direct form tells.
  const bool finite = size <= 1.7976931348623157e308;
  static_cast<Sum*>(c.out)[i] = Sum(sum > 0 ? sum : 0);
  c.reliable[i] = finite && !(size > c.cancellation * sum);
}

}  // namespace engm::cuda
