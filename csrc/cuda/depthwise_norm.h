// Declares the launcher of depthwise_norm.cuh, for convolutions whose groups have one input channel. The problem is
// that of the direct form, without its plan.
#pragma once

#include "direct_norm.h"

namespace engm::cuda {

// How many partial sums an example has: one for 32 output channels.
constexpr int64_t depthwise_tiles(const Geometry& geometry) {
  return (int64_t(geometry.groups) * geometry.rows + 31) / 32;
}

// Enqueues on the given stream; returns the launch's error, 0 if it is queued.
int launch_depthwise_norm(const DirectNorm& problem, Precision precision, void* stream);

}  // namespace engm::cuda
