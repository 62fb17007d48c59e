// Binds affine_norm_sq on CUDA: checks operands, settles their layout and allocates outputs.
#include "affine_norm.h"

#include <ATen/ops/empty.h>

#include "../ops.h"
#include "../precision.h"
#include "element_type.h"
#include "stream.h"

namespace engm::cuda {
namespace {

// Describes a tensor that broadcasts to [n, C, S].
AffineOperand operand(const at::Tensor& t) {
  AffineOperand operand{t.const_data_ptr(), {0, 0, 0}};
  for (int64_t i = 0; i < 3; ++i) operand.step[i] = t.size(i) > 1 ? t.stride(i) : 0;
  return operand;
}

bool is_dense_along(const at::Tensor& t, int64_t dim) { return t.size(dim) <= 1 || t.stride(dim) == 1; }

// Whether every run along `dense` starts on 16 bytes and is a multiple of them.
bool is_aligned(const at::Tensor& t, int64_t dense) {
  bool aligned = is_aligned_16(t.const_data_ptr());
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t run = i == dense ? t.size(i) : t.size(i) > 1 ? t.stride(i) : 0;
    aligned &= run * t.element_size() % 16 == 0;
  }
  return aligned;
}

// Makes x and gy [n, C, S] dense along one of C and S, the same one in both, copying what is neither; returns whether
// along C.
bool settle_layout(at::Tensor& x, at::Tensor& gy) {
  const auto both = [&](int64_t dim) { return is_dense_along(x, dim) && is_dense_along(gy, dim); };
  if (x.size(2) == 1 && both(1)) return true;  // one position alone: threads lie along channels
  if (both(2)) return false;
  if (both(1)) return true;
  const bool channels_last = is_dense_along(gy, 1) && !is_dense_along(gy, 2);
  for (at::Tensor* t : {&x, &gy})
    if (!is_dense_along(*t, channels_last ? 1 : 2))
      *t = channels_last ? t->transpose(1, 2).contiguous().transpose(1, 2) : t->contiguous();
  return channels_last;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_norm_sq(const at::Tensor& x_in, const at::Tensor& gy_in,
                                                              const OptionalTensor& mean_in, const at::Tensor& rstd_in,
                                                              int64_t channel_dim) {
  TORCH_CHECK(x_in.dim() == 3 && gy_in.sizes() == x_in.sizes() && (channel_dim == 1 || channel_dim == 2),
              "affine_norm_sq: expected x and gy of one shape [n, C, S] with channel_dim=1, or [n, S, C] with "
              "channel_dim=2, got x ", x_in.sizes(), ", gy ", gy_in.sizes(), " and channel_dim=", channel_dim, ".");
  const at::ScalarType type = compute_type(x_in, gy_in, "affine_norm_sq");
  const OnDevice on(x_in);
  if (!on.trusts(Kernel::kAffineNorm, precision_of(x_in.scalar_type())))
    return aten::affine_norm_sq(x_in, gy_in, mean_in, rstd_in, channel_dim);
  const auto channels_second = [&](const at::Tensor& t) { return channel_dim == 1 ? t : t.transpose(1, 2); };
  const auto statistic = [&](const at::Tensor& t, const char* name) {
    bool fits = t.dim() == 3 && t.device() == x_in.device();
    for (int64_t i = 0; fits && i < 3; ++i) fits = t.size(i) == 1 || t.size(i) == x_in.size(i);
    TORCH_CHECK(fits, "affine_norm_sq: ", name, " must be 3-d, on the device of x and broadcast to x ", x_in.sizes(),
                ", got ", t.sizes(), " on ", t.device(), ". Use sizes of 1 for the dimensions it does not vary over.");
    return channels_second(t.to(type));
  };
  at::Tensor x = channels_second(x_in), gy = channels_second(gy_in);
  const at::Tensor rstd = statistic(rstd_in, "rstd"), mean = mean_in ? statistic(*mean_in, "mean") : at::Tensor();
  const bool channels_last = settle_layout(x, gy);

  const int64_t n = x.size(0), channels = x.size(1), positions = x.size(2), dense = channels_last ? 1 : 2;
  const auto options = x.options().dtype(type);
  at::Tensor scale = at::empty({n, channels}, options), shift = at::empty({n, channels}, options);
  at::Tensor norm_sq = at::empty({2, n}, options);
  if (x.numel() == 0) return {norm_sq.zero_(), scale.zero_(), shift.zero_()};
  const int64_t parts_count = affine_parts(n, channels, positions, channels_last);
  const bool adds_parts = channels_last && parts_count > 1;
  const at::Tensor parts = adds_parts ? at::empty({parts_count, 2, n, channels}, options) : at::Tensor();
  const AffineNorm problem{operand(x),
                           operand(gy),
                           mean.defined() ? operand(mean) : AffineOperand{nullptr, {0, 0, 0}},
                           operand(rstd),
                           parts.defined() ? parts.mutable_data_ptr() : nullptr,
                           {scale.mutable_data_ptr(), shift.mutable_data_ptr()},
                           norm_sq.mutable_data_ptr(),
                           n,
                           channels,
                           positions,
                           parts_count,
                           element_of(x),
                           channels_last,
                           is_aligned(x, dense) && is_aligned(gy, dense)};
  check_launch(launch_affine_norm(problem, on.stream()), "affine_norm_sq");
  return {norm_sq, scale, shift};
}

}  // namespace engm::cuda
