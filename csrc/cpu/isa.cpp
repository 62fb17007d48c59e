// Picks the table of inner loops at run time, by what the processor has.
#include <atomic>
#include <cstdlib>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENGM_X86 1
#else
#define ENGM_X86 0
#endif

namespace engm::cpu {

#define ENGM_DECLARE(isa)               \
  namespace isa {                       \
  extern const Kernels<float> kFloat;   \
  extern const Kernels<double> kDouble; \
  }
ENGM_DECLARE(baseline)
#if ENGM_X86
ENGM_DECLARE(avx2)
ENGM_DECLARE(avx512)
#endif
#undef ENGM_DECLARE

namespace {

struct Isa {
  const char* name;
  const Kernels<float>* single;
  const Kernels<double>* wide;
  bool supported;
};

// All instruction sets of this build, the best first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#if ENGM_X86
      {"avx512", &avx512::kFloat, &avx512::kDouble,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
      {"avx2", &avx2::kFloat, &avx2::kDouble, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", &baseline::kFloat, &baseline::kDouble, true},
  };
  return all;
}

const Isa* find(const std::string& name) {
  for (const Isa& isa : isas())
    if (isa.supported && (name == "auto" || name == isa.name)) return &isa;
  return nullptr;
}

// The environment's ENGM_CPU_ISA forces an instruction set; one that does not run here is ignored.
const Isa* initial() {
  const char* wanted = std::getenv("ENGM_CPU_ISA");
  const Isa* isa = wanted ? find(wanted) : nullptr;
  return isa ? isa : find("auto");
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{initial()};
  return isa;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *current().load()->single;
}

template <>
const Kernels<double>& kernels<double>() {
  return *current().load()->wide;
}

bool set_isa(const std::string& name) {
  const Isa* isa = find(name);
  if (isa) current() = isa;
  return isa != nullptr;
}

std::string isa_in_use() { return current().load()->name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.emplace_back(isa.name);
  return names;
}

}  // namespace engm::cpu
