// Chooses the precision of the direct form of convolutions. Kernel and formula are in direct_norm.cuh, tiles in
// conv_norm.cuh.
#include "conv_norm.cuh"

namespace engm::cuda {

extern template int run_conv<Tf32InPlace>(const DirectNorm&, void*);
extern template int run_conv<Tf32x3>(const DirectNorm&, void*);
extern template int run_conv<BFloat16>(const DirectNorm&, void*);
extern template int run_conv<Float16>(const DirectNorm&, void*);
extern template int run_conv<Float64>(const DirectNorm&, void*);

bool plan_conv_norm(DirectNorm& p, Precision precision, int64_t shared_limit) {
  switch (precision) {
    case Precision::kTf32: return plan_conv<Tf32InPlace>(p, shared_limit);
    case Precision::kFloat32: return plan_conv<Tf32x3>(p, shared_limit);
    case Precision::kBFloat16: return plan_conv<BFloat16>(p, shared_limit);
    case Precision::kFloat16: return plan_conv<Float16>(p, shared_limit);
    case Precision::kFloat64: return plan_conv<Float64>(p, shared_limit);
  }
  return false;
}

int launch_conv_norm(const DirectNorm& p, Precision precision, void* stream) {
  switch (precision) {
    case Precision::kTf32: return run_conv<Tf32InPlace>(p, stream);
    case Precision::kFloat32: return run_conv<Tf32x3>(p, stream);
    case Precision::kBFloat16: return run_conv<BFloat16>(p, stream);
    case Precision::kFloat16: return run_conv<Float16>(p, stream);
    case Precision::kFloat64: return run_conv<Float64>(p, stream);
  }
  return 1;
}

}  // namespace engm::cuda
