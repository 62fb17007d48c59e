// Chooses the precision of the direct form of linear layers. Kernel and formula are in direct_norm.cuh, tiles in
// gemm_norm.cuh.
#include "gemm_norm.cuh"

namespace engm::cuda {

extern template int run_gemm<Tf32InPlace>(const DirectNorm&, void*);
extern template int run_gemm<Tf32x3>(const DirectNorm&, void*);
extern template int run_gemm<BFloat16>(const DirectNorm&, void*);
extern template int run_gemm<Float16>(const DirectNorm&, void*);
extern template int run_gemm<Float64>(const DirectNorm&, void*);

bool plan_gemm_norm(DirectNorm& p, Precision precision, int64_t shared_limit) {
  switch (precision) {
    case Precision::kTf32: return plan_gemm<Tf32InPlace>(p, shared_limit);
    case Precision::kFloat32: return plan_gemm<Tf32x3>(p, shared_limit);
    case Precision::kBFloat16: return plan_gemm<BFloat16>(p, shared_limit);
    case Precision::kFloat16: return plan_gemm<Float16>(p, shared_limit);
    case Precision::kFloat64: return plan_gemm<Float64>(p, shared_limit);
  }
  return false;
}

int launch_gemm_norm(const DirectNorm& p, Precision precision, void* stream) {
  switch (precision) {
    case Precision::kTf32: return run_gemm<Tf32InPlace>(p, stream);
    case Precision::kFloat32: return run_gemm<Tf32x3>(p, stream);
    case Precision::kBFloat16: return run_gemm<BFloat16>(p, stream);
    case Precision::kFloat16: return run_gemm<Float16>(p, stream);
    case Precision::kFloat64: return run_gemm<Float64>(p, stream);
  }
  return 1;
}

}  // namespace engm::cuda
