// Launches the two kernels of embedding_norm.cuh.
#include "embedding_norm.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

template <typename T, int kPack>
int launch_sums(const EmbeddingNorm& p, void* stream) {
  using Sum = typename SumOf<T>::Type;
  return launch(embedding_sum_kernel<T, kPack>, p.n * p.slabs, kEmbeddingThreads, kEmbeddingThreads / 32 * sizeof(Sum),
                stream, p);
}

template <typename T>
int launch_typed(const EmbeddingNorm& p, void* stream) {
  return p.aligned ? launch_sums<T, 16 / sizeof(T)>(p, stream) : launch_sums<T, 1>(p, stream);
}

}  // namespace

int64_t embedding_slabs(int64_t channels, Element element, bool aligned) {
  return ceil_div(channels, 32 * (aligned ? 16 / bytes_of(element) : 1));
}

int launch_embedding_norm(const EmbeddingNorm& p, void* stream) {
  const int error = launch(embedding_link_kernel, p.n * embedding_chunks(p.positions), kEmbeddingThreads,
                           kEmbeddingThreads * sizeof(int64_t), stream, p);
  if (error != 0) return error;
  switch (p.element) {
    case Element::kFloat64: return launch_typed<double>(p, stream);
    case Element::kFloat16: return launch_typed<Half>(p, stream);
    case Element::kBFloat16: return launch_typed<Bf16>(p, stream);
    default: return launch_typed<float>(p, stream);
  }
}

}  // namespace engm::cuda
