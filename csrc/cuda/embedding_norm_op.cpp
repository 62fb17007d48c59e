// Binds embedding_norm_sq on CUDA: checks operands, allocates workspace and output.
#include "embedding_norm.h"

#include <ATen/ops/empty.h>

#include "../elementwise_checks.h"
#include "../ops.h"
#include "../precision.h"
#include "element_type.h"
#include "stream.h"
#include "sum_partials.h"

namespace engm::cuda {

at::Tensor embedding_norm_sq(const at::Tensor& indices_in, const at::Tensor& gy_in, int64_t padding_idx) {
  const at::ScalarType type = check_embedding(indices_in, gy_in);
  TORCH_CHECK(gy_in.size(1) < 1 << 30, "embedding_norm_sq: expected fewer than 2^30 positions an example, got ",
              gy_in.size(1), ".");
  const OnDevice on(gy_in);
  if (!on.trusts(Kernel::kEmbeddingNorm, precision_of(gy_in.scalar_type())))
    return aten::embedding_norm_sq(indices_in, gy_in, padding_idx);
  const at::Tensor indices = indices_in.to(at::kLong).contiguous(), gy = gy_in.contiguous();
  const int64_t n = gy.size(0), positions = gy.size(1), channels = gy.size(2);
  const auto options = gy.options().dtype(type);
  at::Tensor norm_sq = at::empty({n}, options);
  if (gy.numel() == 0) return norm_sq.zero_();
  const bool aligned = is_aligned_16(gy.const_data_ptr()) && channels * gy.element_size() % 16 == 0;
  const int64_t slabs = embedding_slabs(channels, element_of(gy), aligned);
  at::Tensor next = at::empty({n, positions}, options.dtype(at::kInt));
  at::Tensor parts = at::empty({n, slabs}, options);
  const EmbeddingNorm problem{indices.const_data_ptr<int64_t>(),
                              gy.const_data_ptr(),
                              next.mutable_data_ptr<int32_t>(),
                              parts.mutable_data_ptr(),
                              n,
                              positions,
                              channels,
                              slabs,
                              padding_idx,
                              element_of(gy),
                              aligned};
  check_launch(launch_embedding_norm(problem, on.stream()), "embedding_norm_sq");
  const SumPartials sums{parts.const_data_ptr(), nullptr, norm_sq.mutable_data_ptr(), n, slabs, type == at::kDouble};
  check_launch(launch_sum_partials(sums, on.stream()), "embedding_norm_sq");
  return norm_sq;
}

}  // namespace engm::cuda
