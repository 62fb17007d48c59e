// Launches the kernels of gram_norm.cuh for one precision; each gram_norm_<precision>.cu instantiates one.
#pragma once

#include "gram_norm.cuh"
#include "launch.cuh"

namespace engm::cuda {

template <typename P>
int launch_gram(const GramNorm& p, void* stream) {
  const int64_t blocks = p.geometry.n * p.geometry.groups * p.tiles;
  const int error = launch(p.threads == 256 ? gram_norm_kernel<P, 256> : gram_norm_kernel<P, 512>, blocks, p.threads,
                           p.shared, stream, p);
  if (error != 0) return error;
  constexpr int kExamples = kGramFinishThreads / 32;
  const int64_t finish = (p.geometry.n + kExamples - 1) / kExamples;
  return launch(gram_norm_finish_kernel<P>, finish, kGramFinishThreads, 0, stream, p);
}

extern template int launch_gram<Tf32>(const GramNorm&, void*);
extern template int launch_gram<Tf32x3>(const GramNorm&, void*);
extern template int launch_gram<BFloat16>(const GramNorm&, void*);
extern template int launch_gram<Float16>(const GramNorm&, void*);
extern template int launch_gram<Float64>(const GramNorm&, void*);

}  // namespace engm::cuda
