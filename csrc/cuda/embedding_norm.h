// The problem of embedding_norm.cuh in plain numbers: the squared norm of an embedding's weight gradient, per example.
#pragma once

#include <cstdint>

#include "element.h"

namespace engm::cuda {

struct EmbeddingNorm {
  const int64_t* indices;  // [n, T], dense
  const void* gy;          // [n, T, d], Element, dense
  int32_t* next;           // [n, T], workspace
  void* parts;             // [n, slabs], sums of squares, float or double for kFloat64
  int64_t n, positions, channels;
  int64_t slabs;        // embedding_slabs()
  int64_t padding_idx;  // negative where there is none
  Element element;
  bool aligned;  // gy and d allow accesses of 16 bytes
};

// How many slabs the channels are cut into.
int64_t embedding_slabs(int64_t channels, Element element, bool aligned);

// Enqueues on the given cudaStream_t; returns the launch's cudaError_t, 0 if it is queued.
int launch_embedding_norm(const EmbeddingNorm& problem, void* stream);

}  // namespace engm::cuda
