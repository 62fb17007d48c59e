// The CUDA bindings and kernels as torch.ops.engm_emulated.*, for CPU tensors. They are used as they are, unless a test
// puts them on probation, as a device that they have not run on does.
#include "schemas.h"

#include <string>

#include "trust.h"

TORCH_LIBRARY(engm_emulated, m) { engm::define_operators(m); }
TORCH_LIBRARY_IMPL(engm_emulated, CPU, m) {
  engm::trust_everything(true);
  engm::implement_cuda(m);
}

// What computes in the place of kernels that are distrusted.
TORCH_LIBRARY(engm_through_aten, m) { engm::define_operators(m); }
TORCH_LIBRARY_IMPL(engm_through_aten, CPU, m) {
#define ENGM_IMPLEMENT(name) m.impl(#name, engm::aten::name);
  ENGM_EACH_OPERATOR(ENGM_IMPLEMENT)
#undef ENGM_IMPLEMENT
}

#define ENGM_EXPORT extern "C" __attribute__((visibility("default")))

ENGM_EXPORT void put_on_probation(int on) {
  engm::forget_verdicts();
  engm::trust_everything(on == 0);
}

// The kernels that were tried, one a line: name, precision, "trusted" or the reason why not.
ENGM_EXPORT const char* verdicts() {
  static std::string lines;
  lines.clear();
  for (const engm::Verdict& verdict : engm::verdicts())
    lines += std::string(engm::name_of(verdict.kernel)) + "\t" + engm::name_of(verdict.precision) + "\t" +
             (verdict.trusted ? "trusted" : verdict.reason) + "\n";
  return lines.c_str();
}

// Tries everything.
ENGM_EXPORT void self_test() { engm::self_test(at::kCPU); }

ENGM_EXPORT void form_at_once(int64_t elements) { engm::aten::form_at_once(elements); }
