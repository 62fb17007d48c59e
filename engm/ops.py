"""The compiled operators that norms and weighted sums are made of, typed and documented.

Inputs may have any strides. Sums are formed in float32 for float16, bfloat16 and float32 inputs and in float64 for
float64; squared norms come back in that type. No operator is differentiable. :mod:`engm.reference` has a plain twin of
each. At the end of this file are their fake implementations, which tell ``torch.compile`` shapes and dtypes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from . import _C

__all__ = [
    "affine_norm_sq",
    "clip_weights",
    "conv_grads",
    "conv_norm_sq",
    "correction_factors",
    "embedding_norm_sq",
    "linear_grads",
    "linear_norm_sq",
    "patch_mean",
    "position_sums",
    "recurrence",
    "recurrence_back",
    "scale_examples",
    "scaled_accumulate",
    "weighted_gemm",
    "weighted_sums",
]


def _operator(name: str) -> Callable[..., Any]:
    """The operator of that name: as ``torch.compile`` knows it, or the quicker way to the same (csrc/calls.cpp)."""
    return getattr(torch.ops.engm if torch.compiler.is_dynamo_compiling() else _C, name)


def linear_norm_sq(
    a: Tensor,
    b: Tensor,
    form: str = "auto",
    shift: Tensor | None = None,
    patch_mean: Tensor | None = None,
    scale: Tensor | None = None,
    correlation: Tensor | None = None,
) -> Tensor:
    r"""Squared norms of the per-example weight gradients of a linear layer, ``‖b_iᵀ a_i‖²_F``.

    With a correction (all four of the last arguments), the gradient whose norm is taken is that of a layer that feeds a
    batch norm in training mode: ``G_i[o, :] - shift[i, o] patch_mean - scale[i, o] correlation[o, :]``.

    Args:
        a: Activations ``[n, T, p]``.
        b: Backprops ``[n, T, d]``.
        form: ``"direct"`` forms tiles of the gradient in registers, 2·T·p·d FLOPs an example; ``"gram"`` contracts
            ``a aᵀ`` with ``b bᵀ``, T²(p + d) FLOPs, on the CPU centred against cancellation (an example whose terms
            cancel all the same is done again in direct form); ``"auto"`` takes the cheaper form. With a correction the
            CPU has the direct form, and by ``"auto"`` for up to eight positions
            ``‖G‖² - 2 <G, correction> + ‖correction‖²`` (direct again where that cancels).
        shift: ``[n, d]``, the example's shift gradient times scale/σ.
        patch_mean: ``[p]``, mean activation.
        scale: ``[n, d]``, the example's scale gradient times scale/σ.
        correlation: ``[d, p]``, mean of the normalised output times the activation.

    Returns:
        ``[n]`` squared norms, float64 for float64 operands, else float32.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit, ``form`` is unknown, the correction is incomplete or, on
            the CPU, combined with ``form="gram"``.

    On the CPU a thread's workspace is about 0.4 MB for either factor, or 64·T bytes where that is more, in direct form,
    and ``2T² + 2T(p + d)`` elements in Gram form. On CUDA the Gram form multiplies by cuBLAS and holds ``2T²`` elements
    an example, of as many examples at once as take 256 MiB. No per-example gradient is stored.
    """
    return _operator("linear_norm_sq")(a, b, form, shift, patch_mean, scale, correlation)


def conv_norm_sq(
    x: Tensor,
    gy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    form: str = "auto",
    shift: Tensor | None = None,
    patch_mean: Tensor | None = None,
    scale: Tensor | None = None,
    correlation: Tensor | None = None,
) -> Tensor:
    r"""Squared norms of the per-example weight gradients of a convolution with zero padding.

    The gradient is ``G_i[o, c, tap] = Σ_t gy[i, o, t] x[i, c, t·stride + tap·dilation - padding]``; a correction is
    subtracted from it as in :func:`linear_norm_sq`.

    Args:
        x: Inputs ``[n, C, *S]`` with one to three spatial dimensions, in any memory format.
        gy: Backprops ``[n, d, *So]``; ``So`` must be the output size of the convolution.
        kernel_size: One value a spatial dimension, as are ``stride``, ``padding`` (symmetric, zeros) and ``dilation``.
        stride: See ``kernel_size``.
        padding: See ``kernel_size``. For other padding modes pad ``x`` first and pass 0.
        dilation: See ``kernel_size``.
        groups: Divides ``C`` and ``d``; ``groups == C`` is depthwise.
        form: ``"direct"`` forms tiles of the gradient in registers; ``"gram"`` contracts ``gy gyᵀ`` with the sum over
            taps of the shifted pixel Gram matrix ``x xᵀ`` (inner dimension C, not C·taps), and repeats an example in
            direct form where its terms cancel; ``"auto"`` takes the cheaper form. With a
            correction the CPU has the direct form alone.
        shift: ``[n, d]``, as for :func:`linear_norm_sq`.
        patch_mean: ``[C, *kernel_size]``, mean patch; a group of output channels uses its own ``C / groups`` rows.
        scale: ``[n, d]``, as for :func:`linear_norm_sq`.
        correlation: ``[d, C / groups, *kernel_size]``, mean of the normalised output times the patch.

    Returns:
        ``[n]`` squared norms, float64 for float64 operands, else float32.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit, ``gy`` has not the output size of the convolution, ``form``
            is unknown, the correction is incomplete or combined with ``form="gram"`` (on the CPU, or with groups).

    On the CPU a thread's workspace is about 0.4 MB for either factor in direct form, or one packed block of 16 channels
    (64 bytes a padded pixel) where that is more, plus one padded image where a group has few channels; in Gram form
    ``(pixels + C)·padded pixels + (T + d)·T`` elements and a copy of either factor. No per-example gradient is stored,
    and no batch unfolded; on CUDA patches that do not overlap are copied, which takes the size of ``x``, and are then
    rows of a linear layer, which follow convolutions' switch for TF32.
    """
    return _operator("conv_norm_sq")(
        x, gy, kernel_size, stride, padding, dilation, groups, form, shift, patch_mean, scale, correlation
    )


def linear_grads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Per-example weight gradients of a linear layer, ``G_i = b_iᵀ a_i``, and their squared norms, in one pass.

    This is for layers where ``d·p < T·(p + d)``: there the gradients are smaller than the factors they are formed from,
    and the weighted sum ``Σ_i w_i G_i`` is a matrix-vector product over ``grads.flatten(1)``.

    Args:
        a: Activations ``[n, T, p]``.
        b: Backprops ``[n, T, d]``.

    Returns:
        ``norm_sq [n]`` and ``grads [n, d, p]``, contiguous; float64 for float64 operands, else float32.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.

    Workspace and cost are those of :func:`linear_norm_sq` in direct form; the gradients are written once.
    """
    return _operator("linear_grads")(a, b)


def conv_grads(
    x: Tensor,
    gy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Per-example weight gradients of a convolution with zero padding, and their squared norms, in one pass.

    ``G_i[o, c, tap] = Σ_t gy[i, o, t] x[i, c, t·stride + tap·dilation - padding]``. The gradient is worth keeping where
    it is smaller than ``x`` and ``gy``: 9,216 numbers an example against 65,536 for 32 channels at 32×32. The weighted
    sum ``Σ_i w_i G_i`` is then a matrix-vector product over ``grads.flatten(1)`` instead of a second convolution.

    Args:
        x: Inputs ``[n, C, *S]``; this and all other arguments are as for :func:`conv_norm_sq`.
        gy: Backprops ``[n, d, *So]``.
        kernel_size: One value a spatial dimension.
        stride: One value a spatial dimension.
        padding: One value a spatial dimension.
        dilation: One value a spatial dimension.
        groups: Divides ``C`` and ``d``.

    Returns:
        ``norm_sq [n]`` and ``grads [n, d, C / groups, *kernel_size]``, contiguous; float64 for float64 operands, else
        float32.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit, or ``gy`` has not the output size of the convolution.

    On the CPU a thread's workspace is that of :func:`conv_norm_sq` in direct form and one panel of at most 8 rows of
    the gradient.
    """
    return _operator("conv_grads")(x, gy, kernel_size, stride, padding, dilation, groups)


def affine_norm_sq(
    x: Tensor, gy: Tensor, mean: Tensor | None, rstd: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Per-example scale and shift gradients of a normalisation layer, and their squared norms.

    With ``x̂ = (x - mean) rstd``: ``scale_grads = Σ_s gy x̂`` and ``shift_grads = Σ_s gy``, in one pass.

    Args:
        x: Inputs of the layer ``[n, C, S]`` (``channel_dim=1``) or ``[n, S, C]`` (``channel_dim=2``).
        gy: Backprops, the shape of ``x``.
        mean: 3-d and broadcastable to ``x``, or None for 0 (RMSNorm).
        rstd: 3-d and broadcastable to ``x``.
        channel_dim: 1 or 2.

    Returns:
        ``norm_sq [2, n]`` (scale, shift), ``scale_grads [n, C]``, ``shift_grads [n, C]``.

    Raises:
        RuntimeError: Shapes or dtypes do not fit, or ``channel_dim`` is neither 1 nor 2.

    Workspace: 4·C elements a thread; operands whose last dimension is strided are copied.
    """
    return _operator("affine_norm_sq")(x, gy, mean, rstd, channel_dim)


def correction_factors(
    outputs: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""What a batch norm in training mode takes off the gradients of the layer before it, as far as its output tells.

    With ``N = √(n·T)``: ``normalised = (outputs - mean) rstd / N``, ``gain shift`` and ``gain scale / N``, in one pass.
    The weight gradient of a layer whose output has the gradient ``normalised`` is ``N`` times the mean of normalised
    output times patch, and the last result takes that ``N`` off. So half of the mean's division comes before the sum
    over the batch and half behind, and float16 holds both.

    Args:
        outputs: ``[n, d, T]``, the output of the layer.
        mean: ``[d]``, of the outputs over batch and positions.
        rstd: ``[d]``, reciprocal standard deviation of the outputs.
        gain: ``[d]``, scale/σ of the batch norm.
        shift: ``[n, d]``, per-example gradients of the batch norm's shift.
        scale: ``[n, d]``, per-example gradients of the batch norm's scale.

    Returns:
        ``normalised [n, d, T]`` in the dtype and, where they are dense, the strides of the outputs; ``shift`` and
        ``scale``, each ``[n, d]``, float64 for float64 outputs, else float32.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.
    """
    return _operator("correction_factors")(outputs, mean, rstd, gain, shift, scale)


def patch_mean(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    r"""The mean over examples and output positions of what each tap of a convolution reads of each channel.

    That is the weight gradient of a convolution with one output channel whose output has the constant gradient
    ``1 / (n·T)``; pixels outside of the image are 0.

    Args:
        x: Inputs of the convolution ``[n, C, *S]``, 1 to 3 spatial dimensions, any memory format.
        kernel_size: One value a spatial dimension, as the rest.
        stride: As the layer's.
        padding: As the layer's.
        dilation: As the layer's.

    Returns:
        ``[C, *kernel_size]``, float64 for float64 inputs, else float32.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.

    Workspace: on the CPU one image of 16 channels a thread; on CUDA partial sums of a few blocks a multiprocessor.
    """
    return _operator("patch_mean")(x, kernel_size, stride, padding, dilation)


def embedding_norm_sq(indices: Tensor, gy: Tensor, padding_idx: int = -1) -> Tensor:
    r"""Squared norms of the per-example weight gradients of an embedding, ``Σ_v ‖Σ_{t: idx_t = v} gy_t‖²``.

    The norm equals ``Σ_{t,s: idx_t = idx_s} ⟨gy_t, gy_s⟩``, but is formed as squares of sums, so nothing cancels.
    Neither the size of the table is needed nor a buffer of that size.

    Args:
        indices: ``[n, T]``, int64 or int32.
        gy: Backprops ``[n, T, d]``.
        padding_idx: Positions of this index are left out; negative for none.

    Returns:
        ``[n]`` squared norms, float64 for float64 backprops, else float32.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.

    Workspace: on the CPU ``T`` positions and ``d`` doubles a thread; on CUDA ``n·T`` 32-bit links, which take T²
    comparisons an example. Operands that are not contiguous are copied.
    """
    return _operator("embedding_norm_sq")(indices, gy, padding_idx)


def clip_weights(squared_norms: Tensor, alpha: float, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Norms and clipping weights from the squared norms of all parameter tensors.

    ``norms_i = sqrt(max(Σ_l factors_l squared_norms_li, 0))`` and ``weights_i = min(alpha / norms_i, 1)`` (Eq. 5),
    summed in order and in float64, so both are bitwise repeatable. A norm of 0 has weight 1, a non-finite sum NaN.

    Args:
        squared_norms: ``[layers, n]``.
        alpha: The bound, positive; ``inf`` gives weights of 1.
        factors: ``[layers]`` calibration factors, 1 if None.

    Returns:
        ``norms [n]`` and ``weights [n]``, float64 for float64 squared norms, else float32.

    Raises:
        RuntimeError: ``alpha`` is not positive, or shapes do not fit.

    Workspace: ``n`` doubles.
    """
    return _operator("clip_weights")(squared_norms, alpha, factors)


def position_sums(gradients: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    r"""Per-example gradients of a bias, ``s_i = Σ_t gradients_it``, and their squared norms.

    Args:
        gradients: Gradients of a layer's output, ``[n, T, d]`` or ``[n, d, T]``.
        dim: The dimension of the positions, 1 or 2.

    Returns:
        ``norm_sq [n]`` and ``sums [n, d]``, float64 for float64 gradients, else float32. With one position the sums
        may be a view of the gradients.

    Raises:
        RuntimeError: The gradients have not three dimensions, or ``dim`` is none of the two.

    Workspace: ``n d`` elements.
    """
    return _operator("position_sums")(gradients, dim)


def recurrence(
    kind: str,
    inputs: Tensor,
    ih: Tensor,
    hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    hr: Tensor | None,
    state: Sequence[Tensor],
    present: Tensor | None = None,
    reverse: bool = False,
) -> list[Tensor]:
    r"""The steps of a recurrent layer in one direction, as ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` compute them.

    On the CPU one operator in float32 and float64, elsewhere a sequence of ATen's.

    Args:
        kind: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``, with 4, 3, 1 and 1 gates.
        inputs: ``[n, T, p]``.
        ih: Of the inputs, ``[gates·H, p]``.
        hh: Of the hidden state, ``[gates·H, P]``; ``P = H`` without projections.
        bias_ih: ``[gates·H]`` or None.
        bias_hh: ``[gates·H]`` or None.
        hr: Projections of an LSTM, ``[P, H]``, or None.
        state: The hidden state before the first step ``[n, P]``, and of an LSTM the cell ``[n, H]``.
        present: Bool ``[n, T]``, which steps an example has: at others its state stays as it is. None: all.
        reverse: Whether the last step comes first.

    Returns:
        The hidden states after each step ``[n, T, P]``; with ``hr`` the same before their projection ``[n, T, H]``; and
        what :func:`recurrence_back` needs besides, ``[n, T, .]`` each.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit, or the kind is unknown.

    Workspace: on the CPU a copy of ``hh`` where it is small.
    """
    return _operator("recurrence")(kind, inputs, ih, hh, bias_ih, bias_hh, hr, state, present, reverse)


def recurrence_back(
    kind: str,
    kept: Sequence[Tensor],
    hh: Tensor,
    hr: Tensor | None,
    state: Sequence[Tensor],
    outputs: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    present: Tensor | None = None,
    reverse: bool = False,
) -> list[Tensor]:
    r"""The steps of :func:`recurrence` back, to the gradients of ``W_hh h + b_hh`` and ``W_ih x + b_ih``.

    Args:
        kind: As given to :func:`recurrence`, as are ``hh``, ``hr``, ``state``, ``present`` and ``reverse``.
        kept: What :func:`recurrence` returned.
        hh: See ``kind``.
        hr: See ``kind``.
        state: See ``kind``.
        outputs: Gradient of the outputs ``[n, T, P]``; None counts as zero.
        hidden: Gradient of the last hidden state ``[n, P]``; None counts as zero.
        cell: Gradient of an LSTM's last cell ``[n, H]``; None counts as zero.
        present: See ``kind``.
        reverse: See ``kind``.

    Returns:
        The gradient of ``W_hh h + b_hh``, ``[n, T, gates·H]``, which is that of ``W_ih x + b_ih`` as well but in a GRU,
        where the latter comes second; with ``hr`` that of the new hidden states ``[n, T, P]`` comes last. Zero at steps
        that an example has not.

    Raises:
        RuntimeError: ``kept`` is of another kind of layer, or of another dtype.

    Workspace: as :func:`recurrence`.
    """
    return _operator("recurrence_back")(kind, kept, hh, hr, state, outputs, hidden, cell, present, reverse)


def scaled_accumulate(a: Tensor | None, b: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted sum of per-example gradients, ``Σ_i w_i b_iᵀ a_i``, as one GEMM.

    Args:
        a: Activations ``[n, T, p]``, or None for a bias: then the result is ``Σ_{i,t} w_i b_it``.
        b: Backprops ``[n, T, d]``.
        weights: ``[n]``.

    Returns:
        ``[d, p]``, or ``[d]`` without ``a``; float64 for float64 operands, else float32.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.

    Workspace: one scaled copy of the smaller of ``a`` and ``b``.
    """
    return _operator("scaled_accumulate")(a, b, weights)


def scale_examples(tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    r"""Every tensor times its examples' weights, ``out[i, ...] = weights_i tensor[i, ...]``; on CUDA in one launch.

    Products are formed in float32 (float64 for float64 tensors) and rounded once to the tensor's own dtype. As in any
    multiplication, a weight of 0 times an infinity or NaN is NaN.

    Args:
        tensors: ``[n, ...]`` each, of any floating dtypes and shapes.
        weights: ``[n]``.

    Returns:
        One tensor for each, in that tensor's dtype. The memory format is kept where the tensor is dense and examples
        are its outermost dimension; others come back contiguous.

    Raises:
        RuntimeError: A tensor has not one row a weight, is on another device, or is not of a floating point dtype.

    Workspace: none beyond the results.
    """
    return _operator("scale_examples")(tensors, weights)


def weighted_sums(tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    r"""Weighted sums over examples, ``Σ_i weights_i tensor[i, ...]``, of every tensor; on CUDA in one launch.

    This is for per-example gradients that were kept whole: biases, scales, shifts, small weights. Sums run over the
    examples in a fixed order, so they are bitwise repeatable. A weight of 0 times an infinity or NaN is NaN.

    Args:
        tensors: ``[n, *shape]`` each, of any floating or complex dtypes and shapes.
        weights: ``[n]``.

    Returns:
        One contiguous ``[*shape]`` for each, float64 for float64 tensors, else float32; complex for complex tensors.

    Raises:
        RuntimeError: A tensor has not one row a weight, is on another device, or is not of a floating point dtype.

    Workspace: none beyond the results; tensors that are not contiguous are copied.
    """
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    sums = _operator("weighted_sums")(parts, weights)
    return [torch.view_as_complex(s) if t.is_complex() else s for s, t in zip(sums, tensors, strict=True)]


def weighted_gemm(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted sum of per-example gradients, ``Σ_i w_i b_iᵀ a_i``, with the weights applied inside the product.

    The result is that of :func:`scaled_accumulate`, which is the default and runs on the CPU; here no scaled copy is
    made. On CUDA float32 operands are rounded to TF32 where ``torch.backends.cuda.matmul`` allows that and otherwise
    taken as sums of two TF32 numbers; 16-bit backprops are rounded again after scaling. Sums are bitwise repeatable.

    Args:
        a: Activations ``[n, T, p]``.
        b: Backprops ``[n, T, d]``.
        weights: ``[n]``.

    Returns:
        ``[d, p]``, float64 for float64 operands, else float32.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.

    Workspace on CUDA: partial sums of about 264 tiles of 128×128 at most.
    """
    return _operator("weighted_gemm")(a, b, weights)


def in_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, which takes as long as a small operator even where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def uncast(device: torch.device) -> AbstractContextManager[object]:
    """While this context is open, operators on such a device take their operands as they are: autocast is off.

    To enter ``torch.autocast(..., enabled=False)`` takes as long as a small operator even where it is off already.
    """
    on = torch.is_autocast_enabled(device.type)
    return cast(AbstractContextManager[object], torch.autocast(device.type, enabled=False)) if on else nullcontext()


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """The type that sums over ``t`` are formed in: float64 for float64, float32 for everything narrower.

    Complex numbers have real and imaginary parts of these types.
    """
    if t.is_complex():
        return torch.complex128 if t.dtype == torch.complex128 else torch.complex64
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@torch.library.register_fake("engm::linear_norm_sq")
@torch.library.register_fake("engm::conv_norm_sq")
def _norm_sq_fake(inputs: Tensor, *_: object) -> Tensor:
    return inputs.new_empty(inputs.shape[0], dtype=accumulation_dtype(inputs))


@torch.library.register_fake("engm::linear_grads")
def _linear_grads_fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    norm_sq = a.new_empty(a.shape[0], dtype=accumulation_dtype(a))
    return norm_sq, norm_sq.new_empty(a.shape[0], b.shape[2], a.shape[2])


@torch.library.register_fake("engm::conv_grads")
def _conv_grads_fake(
    x: Tensor,
    gy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    norm_sq = x.new_empty(x.shape[0], dtype=accumulation_dtype(x))
    return norm_sq, norm_sq.new_empty(x.shape[0], gy.shape[1], x.shape[1] // groups, *kernel_size)


@torch.library.register_fake("engm::affine_norm_sq")
def _affine_fake(x: Tensor, gy: Tensor, mean: object, rstd: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    grads = x.new_empty(x.shape[0], x.shape[channel_dim], dtype=accumulation_dtype(x))
    return grads.new_empty(2, x.shape[0]), grads, torch.empty_like(grads)


@torch.library.register_fake("engm::clip_weights")
def _clip_fake(squared_norms: Tensor, alpha: float, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    norms = squared_norms.new_empty(squared_norms.shape[1], dtype=accumulation_dtype(squared_norms))
    return norms, torch.empty_like(norms)


@torch.library.register_fake("engm::correction_factors")
def _correction_factors_fake(outputs: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shift = outputs.new_empty(outputs.shape[:2], dtype=accumulation_dtype(outputs))
    dense = outputs.is_contiguous() or outputs.transpose(1, 2).is_contiguous()
    return torch.empty_like(outputs if dense else outputs.contiguous()), shift, torch.empty_like(shift)


@torch.library.register_fake("engm::patch_mean")
def _patch_mean_fake(x: Tensor, kernel_size: Sequence[int], *_: object) -> Tensor:
    return x.new_empty(x.shape[1], *kernel_size, dtype=accumulation_dtype(x))


@torch.library.register_fake("engm::position_sums")
def _position_sums_fake(gradients: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    sums = gradients.new_empty(gradients.shape[0], gradients.shape[3 - dim], dtype=accumulation_dtype(gradients))
    return sums.new_empty(gradients.shape[0]), sums


@torch.library.register_fake("engm::embedding_norm_sq")
def _embedding_fake(indices: Tensor, gy: Tensor, padding_idx: int = -1) -> Tensor:
    return gy.new_empty(gy.shape[0], dtype=accumulation_dtype(gy))


def _dense_by_example(t: Tensor) -> bool:
    """Whether examples lie one after another and each is dense, in any order of the other dimensions."""
    dense = torch.empty_like(t).stride() == t.stride()  # empty_like keeps strides where a tensor is dense, only there
    return t.numel() == 0 or (dense and (t.shape[0] == 1 or t.stride(0) == t.numel() // t.shape[0]))


@torch.library.register_fake("engm::scale_examples")
def _scale_examples_fake(tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [torch.empty_like(t if _dense_by_example(t) else t.contiguous()) for t in tensors]


@torch.library.register_fake("engm::weighted_sums")
def _weighted_sums_fake(tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [t.new_empty(t.shape[1:], dtype=accumulation_dtype(t)) for t in tensors]


@torch.library.register_fake("engm::weighted_gemm")
def _weighted_gemm_fake(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    return a.new_empty(b.shape[2], a.shape[2], dtype=accumulation_dtype(a))


_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


@torch.library.register_fake("engm::recurrence")
def _recurrence_fake(
    kind: str, inputs: Tensor, ih: Tensor, hh: Tensor, bias_ih: object, bias_hh: object, hr: object, *_: object
) -> list[Tensor]:
    size = ih.shape[0] // _GATES[kind]
    widths = [hh.shape[1], *([] if hr is None else [size])]
    widths += {"LSTM": [4 * size, size, size], "GRU": [3 * size, size]}.get(kind, [])
    return [inputs.new_empty(*inputs.shape[:2], width) for width in widths]


@torch.library.register_fake("engm::recurrence_back")
def _recurrence_back_fake(kind: str, kept: Sequence[Tensor], hh: Tensor, hr: Tensor | None, *_: object) -> list[Tensor]:
    widths = [hh.shape[0]] * (2 if kind == "GRU" else 1) + ([] if hr is None else [hh.shape[1]])
    return [hh.new_empty(*kept[0].shape[:2], width) for width in widths]
