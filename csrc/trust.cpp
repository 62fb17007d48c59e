// Keeps what the trials of kernels on devices said.
#include "trust.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <sstream>

namespace engm {
namespace {

constexpr int kKernels = int(Kernel::kCount), kPrecisions = 5, kDevices = 64;
enum State : uint8_t { kUnknown, kTrusted, kDistrusted };

std::array<std::atomic<uint8_t>, size_t(kKernels) * kPrecisions * kDevices> states{};
std::atomic<bool> everything_is_trusted{false};
std::mutex one_at_a_time;
std::vector<Verdict>& all_verdicts() {
  static std::vector<Verdict> found;
  return found;
}

std::atomic<uint8_t>& state_of(Kernel kernel, Precision precision, at::Device device) {
  const int index = device.has_index() ? device.index() : 0;
  TORCH_CHECK(index < kDevices, "engm counts ", kDevices, " devices, and this is number ", index, ".");
  return states[(size_t(index) * kKernels + size_t(kernel)) * kPrecisions + size_t(precision)];
}

std::string in_words(const Trial& trial) {
  std::ostringstream words;
  words << trial.what << ": ";
  if (trial.failure.empty())
    words << "relative error " << trial.error << ", at most " << trial.limit << " is rounding";
  else
    words << trial.failure;
  return words.str();
}

// Remembers what the trials of one kernel said, and warns if it is not to be trusted.
bool judge(Kernel kernel, Precision precision, at::Device device, const std::vector<Trial>& trials) {
  Verdict verdict{kernel, precision, device, true, ""};
  for (const Trial& trial : trials)
    if (verdict.trusted && !trial.passed()) verdict.trusted = false, verdict.reason = in_words(trial);
  std::vector<Verdict>& found = all_verdicts();
  const auto same = [&](const Verdict& v) { return v.kernel == kernel && v.precision == precision && v.device == device; };
  const auto old = std::find_if(found.begin(), found.end(), same);
  const bool said_before = old != found.end() && !old->trusted;
  if (old == found.end())
    found.push_back(verdict);
  else
    *old = verdict;
  state_of(kernel, precision, device) = verdict.trusted ? kTrusted : kDistrusted;
  if (!verdict.trusted && !said_before)
    TORCH_WARN("engm: the kernel ", name_of(kernel), " in ", name_of(precision), " is wrong on ", device,
               ", so ATen's operators compute in its place from now on: slower, and right. (", verdict.reason,
               ".) Please report it with what `engm doctor` prints.");
  return verdict.trusted;
}

}  // namespace

const char* name_of(Kernel kernel) {
  constexpr std::array<const char*, kKernels> names{
      "gemm_norm",   "conv_norm",  "depthwise_norm", "gram_norm",    "gram_contraction", "rank_one",
      "affine_norm", "correction", "embedding_norm", "clip_weights", "weighting",        "weighted_gemm"};
  return names[size_t(kernel)];
}

const char* name_of(Precision precision) {
  constexpr std::array<const char*, kPrecisions> names{"tf32", "float32", "bfloat16", "float16", "float64"};
  return names[size_t(precision)];
}

bool trusted(Kernel kernel, Precision precision, at::Device device, bool capturing) {
  if (on_trial() || everything_is_trusted) return true;
  std::atomic<uint8_t>& state = state_of(kernel, precision, device);
  if (state != kUnknown) return state == kTrusted;
  TORCH_CHECK(!capturing, "engm: the kernel ", name_of(kernel), " in ", name_of(precision), " was never used on ", device,
              ", and cannot be tried while a CUDA graph is captured. Run one step before, or engm.self_test(\"cuda\").");
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (state != kUnknown) return state == kTrusted;
  return judge(kernel, precision, device, trials_of(kernel, precision, device));
}

std::vector<Trial> self_test(at::Device device) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  std::vector<Trial> all;
  for (int kernel = 0; kernel < kKernels; ++kernel) {
    for (int precision = 0; precision < kPrecisions; ++precision) {
      const std::vector<Trial> trials = trials_of(Kernel(kernel), Precision(precision), device);
      if (trials.empty()) continue;
      judge(Kernel(kernel), Precision(precision), device, trials);
      all.insert(all.end(), trials.begin(), trials.end());
    }
  }
  return all;
}

std::vector<Verdict> verdicts() {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return all_verdicts();
}

void trust_everything(bool everything) { everything_is_trusted = everything; }

void forget_verdicts() {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  all_verdicts().clear();
  for (std::atomic<uint8_t>& state : states) state = kUnknown;
}

}  // namespace engm
