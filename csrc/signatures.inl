// The operators' functions, declared once for every set of them: ops.h includes this file within the namespace of each.
// engm/ops.py documents the arguments, and csrc/README.md has the formulas. n is the number of examples.

at::Tensor linear_norm_sq(const at::Tensor& a, const at::Tensor& b, std::string_view form, const OptionalTensor& shift,
                          const OptionalTensor& patch_mean, const OptionalTensor& scale,
                          const OptionalTensor& correlation);

at::Tensor conv_norm_sq(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view form,
                        const OptionalTensor& shift, const OptionalTensor& patch_mean, const OptionalTensor& scale,
                        const OptionalTensor& correlation);

// Both return norm_sq [n], and grads [n, d, p] or [n, d, C / groups, *kernel_size].
std::tuple<at::Tensor, at::Tensor> linear_grads(const at::Tensor& a, const at::Tensor& b);
std::tuple<at::Tensor, at::Tensor> conv_grads(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups);

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_norm_sq(const at::Tensor& x, const at::Tensor& gy,
                                                              const OptionalTensor& mean, const at::Tensor& rstd,
                                                              int64_t channel_dim);

std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors);

// What a batch norm behind a layer takes off the layer's gradients, as far as the layer's output goes: outputs [n, d, T],
// mean, rstd and gain [d], shift and scale [n, d]. Returns with N = sqrt(n·T) the normalised outputs over N, of the shape,
// strides and type of the outputs, gain·shift, and gain·scale / N.
std::tuple<at::Tensor, at::Tensor, at::Tensor> correction_factors(const at::Tensor& outputs, const at::Tensor& mean,
                                                                  const at::Tensor& rstd, const at::Tensor& gain,
                                                                  const at::Tensor& shift, const at::Tensor& scale);

// x [n, C, *S] -> [C, *kernel_size], the mean over examples and output positions of what a tap reads, in the type of sums.
at::Tensor patch_mean(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation);

// indices [n, T], gy [n, T, d] -> [n]; positions whose index is padding_idx are left out.
at::Tensor embedding_norm_sq(const at::Tensor& indices, const at::Tensor& gy, int64_t padding_idx);

// Every tensor is [n, ...] and the weights are [n]. The first multiplies each example by its weight, the second returns
// the weighted sums over the examples.
std::vector<at::Tensor> scale_examples(at::TensorList tensors, const at::Tensor& weights);
std::vector<at::Tensor> weighted_sums(at::TensorList tensors, const at::Tensor& weights);

// a [n, T, p], b [n, T, d] -> [d, p]
at::Tensor weighted_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& weights);
