"""Names of engm/torch_internals.py, one by one, against plain torch: what normalisation layers save in their nodes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import found_by, process_group
from torch import Tensor, nn

from engm import torch_internals as internals

pytestmark = pytest.mark.torch_insides


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.GroupNorm(2, 4), "NativeGroupNormBackward"), (nn.LayerNorm(4), "NativeLayerNormBackward")]
)
def test_saved_statistics(layer, name):
    x = leaf(5, 4)
    groups = x.detach().view(5, -1, 2 if name == "NativeGroupNormBackward" else 4)
    output = layer.double()(x)
    mean, rstd = internals.saved_statistics(output, name)
    torch.testing.assert_close(mean.flatten(), groups.mean(-1).flatten())
    var = groups.var(-1, correction=0).flatten()
    torch.testing.assert_close(rstd.flatten(), torch.rsqrt(var + layer.eps))
    assert not mean.requires_grad
    assert internals.saved_statistics(output.relu(), name) is None
    assert internals.saved_statistics(x.detach(), name) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert internals.saved_statistics(layer(x), name) is None


def test_saved_statistics_of_16_bits_are_not_used():
    layer = nn.LayerNorm(4).bfloat16()
    found = internals.saved_statistics(layer(leaf(5, 4).bfloat16()), "NativeLayerNormBackward")
    assert found is None or found[1].dtype == torch.float32


def test_saved_rstd_of_other_nodes():
    x = leaf(5, 4)
    assert internals.saved_rstd(x.square()) is None
    assert internals.saved_rstd(x.detach()) is None
    assert hasattr(torch._C._functions.FusedRmsNormBackward0, "_saved_result1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, whose RMS norm alone is one node")
def test_saved_rstd():
    x, weight = leaf(5, 4).float().cuda(), leaf(4, seed=1).float().cuda()
    found = internals.saved_rstd(F.rms_norm(x, [4], weight, 1e-5))
    torch.testing.assert_close(found.flatten(), torch.rsqrt(x.detach().square().mean(1) + 1e-5))
    assert not found.requires_grad
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert internals.saved_rstd(F.rms_norm(x, [4], weight, 1e-5)) is None


def test_is_narrow():
    narrow = [dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
              if internals.is_narrow(torch.zeros(1, dtype=dtype))]  # fmt: skip
    assert narrow == [torch.float16, torch.bfloat16]


def test_batch_norms():
    node = F.batch_norm(leaf(5, 4), None, None, training=True).grad_fn
    assert internals.operator_name(node) == internals.BATCH_NORMS[0]
    operators = set(internals.BATCH_NORMS) - {internals.SYNC_BATCH_NORM}
    missing = [name for name in operators if not hasattr(torch._C._functions, f"{name}Backward0")]
    assert not missing, "no operator of torch makes such a node"
    assert internals.SYNC_BATCH_NORM in internals.BATCH_NORMS


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_statistics(training):
    x, weight, bias = leaf(5, 4, 3), leaf(4, seed=1), leaf(4, seed=2)
    running_mean, running_var = leaf(4, seed=3).detach(), leaf(4, seed=4).detach().exp()
    node = F.batch_norm(x, running_mean.clone(), running_var.clone(), weight, bias, training=training).grad_fn
    mean, rstd, of_the_batch = internals.batch_norm_statistics(node)
    var, own = torch.var_mean(x.detach(), [0, 2], correction=0)
    torch.testing.assert_close(mean, own if training else running_mean)
    torch.testing.assert_close(rstd, torch.rsqrt((var if training else running_var) + 1e-5))
    assert of_the_batch == training
    assert not any(found.requires_grad for found in (mean, rstd))
    assert internals.batch_norm_statistics(x.square().grad_fn) is None


def sync_batch_norm(rank: int, port: int, folder: Path) -> None:
    """Leave what is known of the node of two processes' batch norm, whose kernels on the CPU are given here."""
    import torch.distributed as dist

    channels = lambda t: t.view(1, -1, 1)  # noqa: E731

    def statistics(x, eps):
        var, mean = torch.var_mean(x, [0, 2], correction=0)
        return mean, torch.rsqrt(var + eps)

    def gathered(x, means, rstds, running_mean, running_var, momentum, eps, counts):
        mean = means.mean(0)  # both processes have equally many
        return mean, torch.rsqrt((rstds**-2 - eps + means**2).mean(0) - mean**2 + eps)

    def normalised(x, weight, bias, mean, rstd, eps):
        return (x - channels(mean)) * channels(rstd * weight) + channels(bias)

    torch.batch_norm_stats, torch.batch_norm_elemt = statistics, normalised
    torch.batch_norm_gather_stats_with_counts = gathered
    x, weight, bias = leaf(5, 4, 3, seed=rank), leaf(4, seed=7), leaf(4, seed=8)
    function = nn.modules._functions.SyncBatchNorm
    with process_group(rank, port, 2):
        output = function.apply(x, weight, bias, None, None, 1e-5, 0.1, dist.group.WORLD, 2)
    node = output.grad_fn
    mean, rstd, of_the_batch = internals.batch_norm_statistics(node)
    inputs, scale = internals.batch_norm_inputs(node)
    found = {"mean": mean, "rstd": rstd, "x": inputs, "weight": scale}
    found["known"] = torch.tensor([of_the_batch, internals.is_sync_batch_norm(node)])
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return found_by(sync_batch_norm, 2, tmp_path_factory.mktemp("sync"))


def test_is_sync_batch_norm():
    assert not internals.is_sync_batch_norm(F.batch_norm(leaf(5, 4), None, None, training=True).grad_fn)


def test_sync_batch_norm(of_two_processes):
    assert internals.SYNC_BATCH_NORM == "SyncBatchNorm"
    assert all(found["known"].all() for found in of_two_processes)


def test_batch_norm_statistics_of_two_processes(of_two_processes):
    var, mean = torch.var_mean(torch.cat([leaf(5, 4, 3, seed=rank).detach() for rank in (0, 1)]), [0, 2], correction=0)
    assert internals.batch_norm_statistics(leaf(2).square().grad_fn) is None
    for found in of_two_processes:
        torch.testing.assert_close(found["mean"], mean)
        torch.testing.assert_close(found["rstd"], torch.rsqrt(var + 1e-5))


def test_batch_norm_inputs(of_two_processes):
    x, weight = leaf(5, 4), leaf(4, seed=1)
    found, scale = internals.batch_norm_inputs(F.batch_norm(x, None, None, weight, training=True).grad_fn)
    assert torch.equal(found, x)
    assert torch.equal(scale, weight)
    assert not any(saved.requires_grad for saved in (found, scale))
    assert internals.batch_norm_inputs(F.batch_norm(x, None, None, training=True).grad_fn)[1] is None
    for rank, found in enumerate(of_two_processes):
        assert torch.equal(found["x"], leaf(5, 4, 3, seed=rank))
        assert torch.equal(found["weight"], leaf(4, seed=7))


def test_anybatchnorm():
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d
    assert all(issubclass(kind, internals.AnyBatchNorm) for kind in kinds)
    assert not issubclass(nn.InstanceNorm1d, internals.AnyBatchNorm)
    assert not issubclass(nn.GroupNorm, internals.AnyBatchNorm)
