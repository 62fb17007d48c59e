// The problems of expanded_correction.cuh in plain numbers: corrected norms from uncorrected ones.
#pragma once

#include <cstdint>

#include "element.h"

namespace engm::cuda {

// filters[o] = K_o for o < d, filters[d] = M, and zeros after that; moments = ‖K_o‖² [d], <M, K_o> [d], ‖M‖²
struct CorrectionFilters {
  // Sums are float, or double for kFloat64.
  const void* correlation;  // K [d, length]
  const void* patch_mean;   // M [length]
  void* filters;            // [rows, length], Element
  void* moments;            // [2·d + 1]
  int64_t length;
  int d, rows;  // rows > d
  Element element;
};

// norms[i] -= 2 <G_i, shift_i M + scale_i K> - ‖shift_i M + scale_i K‖²
struct ExpandedCorrection {
  const void* gy;                       // [n, d, T] or, with channels_last, [n, T, d], Element
  const void* responses;                // of x to the filters: [n, rows, T] or [n, T, rows], Element
  const void *moments, *shift, *scale;  // [2·d + 1], [n, d], [n, d] of the sums' type
  void* norms;                          // [n] of the sums' type
  uint8_t* done;                        // [n], whether the norm could be corrected so
  int64_t n, positions;
  int d, rows;
  bool channels_last;
  Element element;
};

// Both enqueue on the given cudaStream_t and return the launch's cudaError_t, 0 if it is queued.
int launch_correction_filters(const CorrectionFilters& problem, void* stream);
int launch_expanded_correction(const ExpandedCorrection& problem, void* stream);

}  // namespace engm::cuda
