"""Opacus' own layer tests (``opacus/tests/grad_samples`` of Opacus 1.6.0), with our norms in place of its samples.

Its tests draw a layer and an input, and compare what Opacus computes with one backpropagation per example. Here they
run unchanged but for three things: our norms stand where its gradient samples did, the norms of the reference's samples
stand beside them, and torch's recurrent and attention layers stand in for those that Opacus rewrote (``DPLSTM``, ...).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import engm

pytest.importorskip("opacus")

from opacus.utils import per_sample_gradients_utils as reference

PACKAGE = "opacus.tests.grad_samples"
OWN_LAYERS = {
    "DPLSTM": nn.LSTM,
    "DPGRU": nn.GRU,
    "DPRNN": nn.RNN,
    "DPMultiheadAttention": nn.MultiheadAttention,
}
FILES = [
    *("conv1d", "conv2d", "conv3d", "linear", "embedding", "embedding_bag", "group_norm", "layer_norm", "rms_norm"),
    *("instance_norm1d", "instance_norm2d", "instance_norm3d", "sequence_bias", "dp_rnn", "dp_multihead_attention"),
]


def losses_of(output: Any, batch_first: bool, reduction: str) -> Tensor:
    """The L1 loss of every example, as ``ModelWithLoss`` of Opacus has it for one."""
    if isinstance(output, PackedSequence):
        padded, lengths = pad_packed_sequence(output, batch_first=True)
        total = padded.abs().flatten(1).sum(1)
        return total if reduction == "sum" else total / (lengths * padded.shape[2])
    rows = output if batch_first else output.transpose(0, 1)
    dims = tuple(range(1, rows.dim()))
    return rows.abs().sum(dims) if reduction == "sum" else rows.abs().mean(dims)


def our_norms(x: Any, module: nn.Module, batch_first: bool, reduction: str) -> dict[str, Tensor]:
    """``[n]`` for every parameter."""
    model = engm.GradNormModule(reference.clone_module(module))
    output = model(*x) if type(x) is tuple else model(x)
    measured = engm.measure(model, losses_of(output, batch_first, reduction))
    norms = {name: squared.sqrt() for name, squared in measured.squared_norms.items()}
    if isinstance(x, PackedSequence) and x.sorted_indices is not None:  # the order that the reference is in
        norms = {name: norm[x.sorted_indices] for name, norm in norms.items()}
    return norms


def run_test(
    case: Any,
    x: Any,
    module: nn.Module,
    batch_first: bool = True,
    atol: float = 10e-6,
    rtol: float = 10e-5,
    ew_compatible: bool = True,
    chunk_method: Any = iter,
) -> None:
    """In place of ``GradSampleHooks_test.run_test``."""
    for reduction in ("sum", "mean"):
        if not isinstance(x, PackedSequence) and reference.is_batch_empty(x):
            with contextlib.suppress(ValueError):  # an empty batch, or a mean of nothing, is refused
                found = our_norms(x, module, batch_first, reduction)
                assert all(bool((norm == 0).all()) for norm in found.values())
            continue
        rows = reference.unpack_packedsequences(x) if isinstance(x, PackedSequence) else x
        samples = reference.compute_microbatch_grad_sample(
            rows, module, batch_first=batch_first, loss_reduction=reduction, chunk_method=chunk_method
        )
        expected = {name: sample.flatten(1).norm(dim=1) for name, sample in samples.items()}
        found = our_norms(x, module, batch_first, reduction)
        case.check_shapes(expected, found, reduction)
        case.check_values(expected, found, reduction, atol, rtol)
        assert set(found) == set(expected)


@pytest.fixture(scope="module")
def tests_of_opacus() -> Iterator[None]:
    """Import its tests with fewer drawn examples, our ``run_test``, and torch's layers in place of its own."""
    import opacus.layers

    settings.register_profile("few", max_examples=12, deadline=None)
    before = {name: getattr(opacus.layers, name) for name in OWN_LAYERS}
    imported = {name for name in sys.modules if name.startswith(PACKAGE)}
    current = settings.get_current_profile_name()
    settings.load_profile("few")
    try:
        for name, layer in OWN_LAYERS.items():
            setattr(opacus.layers, name, layer)
        common = importlib.import_module(f"{PACKAGE}.common")
        common.GradSampleHooks_test.run_test = run_test
        yield
    finally:
        settings.load_profile(current)
        for name, layer in before.items():
            setattr(opacus.layers, name, layer)
        for name in {name for name in sys.modules if name.startswith(PACKAGE)} - imported:
            del sys.modules[name]


@pytest.mark.usefixtures("tests_of_opacus")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", FILES)
def test_layers(file: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{file}_test")
    tests = list(unittest.defaultTestLoader.loadTestsFromModule(module))
    cases = [case for suite in tests for case in suite]
    assert cases
    for case in cases:
        case.debug()
