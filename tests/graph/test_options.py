"""Options of operators that decide which rows are combined: at a step with others, no plan of the last step is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, relative, tensor, trained
from torch import Tensor, nn

import engm
from engm.checks import RefusedError
from engm.graph.routing import DECIDING, FIXED
from engm.rules.entries import names_of
from engm.torch_internals import operator_name

pytestmark = pytest.mark.torch_insides

N = 4

# Why no other option of an operator of ``FIXED`` decides whose a row is, by operators. Each of them leaves alone what
# lies along the first dimension of an output of three dimensions or more, and where the examples lie along another one
# of what is combined, rows are measured at every step.
FACTORS = "numbers that elements, or what is added, are multiplied by or compared with"
WITHIN_ROWS = "how the elements of one image, one sequence or one head are combined"
SHAPES = "shapes and strides of operands, which the shapes of outputs tell as far as rows are concerned"
CONVOLUTIONS = names_of("Convolution ConvolutionOverrideable CudnnConvolution MiopenConvolution MkldnnConvolution")
POOLS = names_of("AvgPool2D AvgPool3D MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D")
UPSAMPLES = names_of(
    """
    UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
    UpsampleNearestExact2D UpsampleTrilinear3D
    """
)
ATTENTION = names_of(
    """
    ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention ScaledDotProductFlashAttention
    ScaledDotProductFlashAttentionForCpu
    """
)
PRODUCTS = names_of("Addmm Addmv Addr Baddbmm Mm")
LOSSES = names_of("BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss MseLoss SmoothL1Loss SoftMarginLoss")
WITH_NUMBERS = LOSSES | names_of(
    "Add Addcdiv Addcmul Celu Clamp ClampMax ClampMin CudnnBatchNorm Div Elu FusedDropout Gelu Hardshrink Hardtanh "
    "LeakyRelu Lerp Logit MiopenBatchNorm Mul NativeBatchNorm NativeDropout Pow Rsub RreluWithNoise Softplus "
    "Softshrink Sub Threshold Xlogy"
)
JUSTIFIED: list[tuple[str, frozenset[str], str]] = [
    (
        "alpha approximate beta delta eps epsilon exponent input_scale lambd lower max max_val min min_val "
        "negative_slope other p rounding_mode scale self threshold upper value weight",
        WITH_NUMBERS | PRODUCTS | ATTENTION,
        FACTORS,
    ),
    ("is_result training", names_of("Elu RreluWithNoise"), "by which formula an element is differentiated"),
    ("reduction", LOSSES, "the shape of the output tells whether all elements are added up"),
    ("dilation groups output_padding padding stride transposed", CONVOLUTIONS, WITHIN_ROWS),
    ("bias_sym_sizes_opt", CONVOLUTIONS, SHAPES),
    ("ceil_mode count_include_pad dilation divisor_override kernel_size padding stride", POOLS, WITHIN_ROWS),
    ("align_corners output_size scales scales_d scales_h scales_w", UPSAMPLES, WITHIN_ROWS),
    ("self_sym_sizes", UPSAMPLES, SHAPES),
    ("align_corners interpolation_mode padding_mode", names_of("GridSampler2D"), WITHIN_ROWS),
    ("dropout_p is_causal max_k max_q", ATTENTION, WITHIN_ROWS),
    (
        "mat1_sym_sizes mat1_sym_strides mat2_sym_sizes mat2_sym_strides self_sym_sizes self_sym_strides",
        PRODUCTS,
        SHAPES,
    ),
    ("eps", names_of("NativeGroupNorm"), FACTORS),  # which torch 2.11 saves
    ("HxW", names_of("NativeGroupNorm"), "the shape of the output and the numbers of rows and channels tell it"),
]


def options_of_operators() -> set[tuple[str, str]]:
    """The options that nodes of operators in ``FIXED`` save, by operator and name."""
    found = set()
    for name in dir(torch._C._functions):
        kind = getattr(torch._C._functions, name)
        operator = name.rstrip("0123456789").removesuffix("Backward")
        if operator in FIXED:
            saved = [each.removeprefix("_saved_") for each in dir(kind) if each.startswith("_saved_")]
            found |= {(operator, option) for option in saved if not hasattr(kind, f"_raw_saved_{option}")}
    return found


def test_every_option_is_compared_or_decides_nothing():
    """Nothing is left of what torch's operators save, and nothing is claimed of options that they have not."""
    compared = {(operator, option) for operator, options in DECIDING.items() for option in options}
    justified = {
        (operator.removesuffix("Backward"), option)
        for options, operators, _ in JUSTIFIED
        for operator in operators
        for option in options.split()
    }
    options = options_of_operators()
    left = {(name, option) for name, option in options if (name.removesuffix("Backward"), option) not in justified}
    assert left == {one for one in compared if one in options}
    assert not compared & justified


class Net(nn.Module):
    """A layer, an operator with an option, and a layer."""

    def __init__(self, run: Callable[[Tensor, bool], Tensor], width: int = 6) -> None:
        super().__init__()
        self.first, self.run, self.last = nn.Linear(5, width), run, nn.Linear(width, 1)
        self.double()

    def forward(self, x: Tensor, other: bool) -> Tensor:
        return self.last(self.run(self.first(x), other))[:, 0].square()


# What combines rows of several examples if it is given the other option.
COMBINES: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "layer norm": lambda h, other: F.layer_norm(h, (N, 6) if other else (6,)),
    "rms norm": lambda h, other: torch.ops.aten._fused_rms_norm(h, [N, 6] if other else [6], None, 1e-5)[0],
    "weight norm": lambda h, other: torch._weight_norm(h, h.new_ones(*((1, 6) if other else (N, 1))), int(other)),
    "rows of a group norm": lambda h, other: torch.native_group_norm(
        h[:, :, None], None, None, *((1, 6 * N) if other else (N, 6)), 1, 2, 1e-5
    )[0].flatten(1),
    "groups of a group norm": lambda h, other: F.group_norm(h.reshape(1, 6 * N, 1), 1 if other else N).view(N, 6),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", COMBINES)
def test_options_that_combine_examples(name, strict):
    model = engm.GradNormModule(Net(COMBINES[name]), strict=strict)
    for seed in range(3):
        x = tensor(N, 5, seed=seed)
        truth = per_example_gradients(model(x, False), trained(model)).norms
        assert relative(engm.per_example_grad_norms(model, model(x, False)), truth) <= 1e-9
    with pytest.raises(RefusedError, match="influences the losses"):
        engm.per_example_grad_norms(model, model(tensor(N, 5, seed=3), True))


class Activated(nn.BatchNorm1d):
    """A batch norm with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.silu(y)


@pytest.mark.parametrize("arguments", [{}, {"coupled": "exact"}, {"strict": False}], ids=str)
@pytest.mark.parametrize("modes", [(False, False, True, True, False), (True, True, False, False, True)], ids=str)
def test_modes_of_batch_norms_without_a_rule(modes, arguments):
    torch.manual_seed(0)
    norm = Activated(6).double()
    net = Net(lambda h, _: norm(h))
    net.norm = norm
    model = engm.GradNormModule(net, batch_norm="exact", **arguments)
    for seed, training in enumerate(modes):
        model.train(training)
        x = tensor(N, 5, seed=seed)
        truth = per_example_gradients(model(x, False), trained(model)).norms
        assert relative(engm.per_example_grad_norms(model, model(x, False)), truth) <= 1e-9


def test_names_are_those_of_nodes():
    """What is compared is looked up by the names that nodes have."""
    norm = nn.BatchNorm1d(6)
    assert operator_name(norm(torch.ones(2, 6)).grad_fn) in DECIDING
    assert operator_name(F.layer_norm(torch.ones(2, 6, requires_grad=True), (6,)).grad_fn) in DECIDING
