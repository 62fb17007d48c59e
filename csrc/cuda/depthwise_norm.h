// Direct form where every group has one input channel; the problem is the direct form's, without a plan.
#pragma once

#include "direct_norm.h"

namespace engm::cuda {

// Partials of an example: one for 32 output channels.
constexpr int64_t depthwise_tiles(const Geometry& geometry) {
  return (int64_t(geometry.groups) * geometry.rows + 31) / 32;
}

// Enqueues on the given stream; returns the launch's error, 0 if it is queued.
int launch_depthwise_norm(const DirectNorm& problem, Precision precision, void* stream);

}  // namespace engm::cuda
