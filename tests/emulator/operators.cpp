// The CUDA bindings and kernels as torch.ops.engm_emulated.*, for CPU tensors.
#include "schemas.h"

TORCH_LIBRARY(engm_emulated, m) { engm::define_operators(m); }
TORCH_LIBRARY_IMPL(engm_emulated, CPU, m) { engm::implement_cuda(m); }
