"""``DistributedDataParallel`` in two, three and four gloo processes, by ``backward`` and by ``reweight``.

Processes are slow to start, so four are started once; smaller worlds are groups of the first of them.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import found_by, process_group
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from training import assert_close, assert_same, batch, grads, losses_of, network, sgd

import engm
from engm.optim import batch as problem

N, PROCESSES, STEPS = 12, 4, 2
SIZES = {2: {"even": (6, 6), "uneven": (9, 3)}, 3: {"even": (4, 4, 4), "uneven": (1, 8, 3)}}
SIZES[4] = {"even": (3, 3, 3, 3), "uneven": (2, 5, 1, 4)}
WORLDS = tuple(SIZES)
METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
    "groups": lambda model, inner: engm.ENGM(model, inner, 5.0, groups="parameter"),
    "auto": lambda model, inner: engm.ENGM(model, inner, "auto", clip_fraction=0.3),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.45),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 6.4, tau=2),
    "gnc": lambda model, inner: engm.GNC(model, inner, 1.0),
}
WAYS = ("backward", "reweight")

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.torch_insides,
]


def rows_of(world, split, rank):
    sizes = SIZES[world][split]
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def add_gradient(opt, losses, x, way, divisor):
    """One batch's share of the gradient."""
    if way == "backward":
        opt.backward(losses, x, divisor=divisor)
    else:
        (opt.reweight(losses, x).sum() / divisor).backward()


def train(method, way, wrap=lambda model: model, rows=slice(0, N), divisor=N, *, norm="group", pieces=1, hook=False):
    """Some steps on ``rows`` of each batch, in ``pieces`` of which the last reduces: parameters and weights."""
    model = wrap(engm.GradNormModule(network(norm)))
    opt = METHODS[method](model, sgd(model))
    if hook:  # a user's, on a parameter
        next(model.parameters()).register_hook(lambda gradient: 2 * gradient)
    weights = []
    for step in range(STEPS):
        x, y = (t[rows].clone().tensor_split(pieces) for t in batch(N, seed=step))
        opt.zero_grad()
        for piece in range(pieces):
            inputs = x[piece].requires_grad_()
            if piece < pieces - 1:
                with model.no_sync():
                    add_gradient(opt, losses_of(model, inputs, y[piece]), inputs, way, divisor)
            else:
                add_gradient(opt, losses_of(model, inputs, y[piece]), inputs, way, divisor)
            weights.append(opt.stats.weights)
        opt.step()
    return {"parameters": [p.detach() for p in model.parameters()], "weights": weights}


def equal_to_one(rank, world, group):
    """What a rank of one world finds, to be compared with one process."""

    def wrap(model):
        return DistributedDataParallel(model, process_group=group)

    found = {}
    for split in ("even", "uneven"):
        rows, divisor = rows_of(world, split, rank), N / world  # DDP averages over the ranks
        for way in WAYS:
            for method in METHODS if way == "backward" else ("engm", "aengm"):
                found[split, way, method] = train(method, way, wrap, rows, divisor)
    rows = rows_of(world, "even", rank)
    for way in WAYS:
        found["no_sync", way] = train("engm", way, wrap, rows, N / world, pieces=3)
    found["hook"] = train("engm", "backward", wrap, rows, N / world, hook=True)
    return found


class Branch(nn.Module):
    """A branch whose layer is in the graph and gets no gradient, and one that may not be used."""

    def __init__(self, *, used):
        super().__init__()
        self.body, self.stopped, self.spare = network("group"), nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
        self.used = used

    def forward(self, x):
        logits = self.body(x)
        logits = logits + Stop.apply(self.stopped(logits))
        return logits + self.spare(logits) if self.used else logits


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def options(rank, group):
    """Gradients of two steps under DDP's options, one-pass and by autograd, with when each bucket was reduced."""
    found = {}
    cases = {
        "plain": {"bucket_cap_mb": 0.0005},
        "views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0005},
        "unused": {"find_unused_parameters": True},
    }
    for name, how in cases.items():
        for way in WAYS:
            torch.manual_seed(0)
            net = Branch(used=name != "unused")
            model = DistributedDataParallel(engm.GradNormModule(net), process_group=group, **how)
            opt = METHODS["engm"](model, sgd(model))
            sums, reduced = [], []

            def hook(state, bucket, sums=sums, reduced=reduced):
                reduced.append((bucket.index(), len(sums)))
                return allreduce_hook(state, bucket)

            def counted(parameter, gradient, sums=sums, really=problem._in_form_of):
                sums.append(parameter)
                return really(parameter, gradient)

            model.register_comm_hook(group, hook)
            steps = []
            for step in range(2):  # DDP arranges its buckets after the first
                x, y = (t[rows_of(2, "even", rank)] for t in batch(N, seed=step))
                opt.zero_grad()
                losses = losses_of(model, x, y)
                if way == "backward":
                    measured = len(reduced)
                    with (
                        mock.patch.object(problem, "_in_form_of", counted),
                        mock.patch("engm.distributed.HANDED_OVER_AT_ONCE", 1),
                    ):
                        opt.backward(losses)
                else:
                    mean = opt.reweight(losses).mean()
                    measured = len(reduced)
                    mean.backward()
                steps.append({"by the norm pass": measured, "reduced": list(reduced), "sums": len(sums)})
                steps[-1]["gradients"] = [None if g is None else g.clone() for g in grads(model)]
                sums.clear()
                reduced.clear()
            found[name, way] = steps
    return found


def coupled(rank, group):
    """With batch norm in training mode one pass does not do, and ``backward`` does what ``reweight`` does."""

    def wrap(model):
        return DistributedDataParallel(model, process_group=group)

    return {
        (way, method): train(method, way, wrap, rows_of(2, "even", rank), N / 2, norm="batch")
        for way in WAYS
        for method in ("engm", "aengm")
    }


def joined(rank, group):
    """Rank 0 has two batches more than rank 1."""
    found = {}
    for way in WAYS:
        model = DistributedDataParallel(engm.GradNormModule(network("group")), process_group=group)
        opt = METHODS["engm"](model, sgd(model))
        with model.join():
            for step in range(3 - 2 * rank):
                x, y = (t[rows_of(2, "even", rank)] for t in batch(N, seed=step))
                opt.zero_grad()
                add_gradient(opt, losses_of(model, x, y), x, way, 6)
                opt.step()
        found[way] = [p.detach() for p in model.parameters()]
    for method in ("aengm", "auto"):
        model = DistributedDataParallel(engm.GradNormModule(network("group")), process_group=group)
        opt = METHODS[method](model, sgd(model))
        x, y = batch(4)
        x.requires_grad_()
        with pytest.raises(RuntimeError, match=r"inside join\(\)") as caught, model.join():
            opt.backward(losses_of(model, x, y), x)
        found[method] = (str(caught.value), grads(model) == [None] * len(grads(model)))
    return found


def noise(rank, group):
    """The noise scale of one batch; by ``backward`` and by ``reweight``, even and uneven, and under ``no_sync``."""
    found = {}
    for split in ("even", "uneven"):
        for way in WAYS:
            model = DistributedDataParallel(engm.GradNormModule(network("group")), process_group=group)
            opt = METHODS["engm"](model, sgd(model))
            x, y = (t[rows_of(2, split, rank)] for t in batch(N))
            losses = losses_of(model, x, y)
            if way == "backward":
                opt.backward(losses)
            else:
                opt.reweight(losses).mean().backward()
            found[split, way] = {"scale": opt.gradient_noise_scale(), "gradients": [g.clone() for g in grads(model)]}
            found[split, way]["lengths"] = opt.stats.weights * opt.stats.norms
            with model.no_sync():
                opt.backward(losses_of(model, x, y))
            with pytest.raises(RuntimeError, match="no_sync"):
                opt.gradient_noise_scale()
    return found


def work(rank, port, results):
    with process_group(rank, port, PROCESSES):
        groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
        found = {world: equal_to_one(rank, world, groups[world]) for world in WORLDS if rank < world}
        if rank < 2:
            for check in (options, coupled, joined, noise):
                found[check.__name__] = check(rank, groups[2])
        torch.save(found, results / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes found."""
    return found_by(work, PROCESSES, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    """What one process finds on whole batches."""
    return {method: train(method, "backward") for method in METHODS}


def weights_of(found):
    """``[..., n]`` of all ranks' examples, step by step."""
    return [torch.cat(step, dim=-1) for step in zip(*(each["weights"] for each in found), strict=True)]


@pytest.mark.parametrize("world", WORLDS)
class TestProcessesAreOne:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("split", ["even", "uneven"])
    def test_one_pass(self, ranks, alone, world, split, method):
        found = [ranks[rank][world][split, "backward", method] for rank in range(world)]
        for each in found:
            assert_close(each["parameters"], alone[method]["parameters"])
            assert_same(each["parameters"], found[0]["parameters"])
        assert_close(weights_of(found), alone[method]["weights"])

    @pytest.mark.parametrize("method", ["engm", "aengm"])
    @pytest.mark.parametrize("split", ["even", "uneven"])
    def test_reweighted(self, ranks, alone, world, split, method):
        found = [ranks[rank][world][split, "reweight", method] for rank in range(world)]
        for each in found:
            assert_close(each["parameters"], alone[method]["parameters"])
        assert_close(weights_of(found), alone[method]["weights"])

    @pytest.mark.parametrize("way", WAYS)
    def test_micro_batches_reduced_once(self, ranks, alone, world, way):
        for rank in range(world):
            assert_close(ranks[rank][world]["no_sync", way]["parameters"], alone["engm"]["parameters"])

    def test_with_a_hook_on_a_parameter(self, ranks, world):
        one = train("engm", "backward", hook=True)
        for rank in range(world):
            assert_close(ranks[rank][world]["hook"]["parameters"], one["parameters"])


def test_something_was_clipped(alone):
    for method in ("engm", "groups", "auto", "nengm", "aengm"):
        weights = torch.cat([w.flatten() for w in alone[method]["weights"]])
        assert 0 < int((weights < 1).sum()) < len(weights)


@pytest.mark.parametrize("name", ["plain", "views", "unused"])
@pytest.mark.parametrize("way", WAYS)
class TestReduction:
    def test_gradients_are_those_of_one_process(self, ranks, name, way):
        torch.manual_seed(0)
        model = engm.GradNormModule(Branch(used=name != "unused"))
        opt = METHODS["engm"](model, sgd(model))
        for step in range(2):
            x, y = batch(N, seed=step)
            opt.zero_grad()
            opt.reweight(losses_of(model, x, y)).mean().backward()
            for rank in ranks[:2]:
                found = rank["options"][name, way][step]["gradients"]
                for (parameter, p), gradient in zip(model.named_parameters(), found, strict=True):
                    assert gradient is not None or parameter.startswith(("stopped", "spare"))
                    zero = torch.zeros_like(p)  # which DDP leaves where a layer in the graph gets no gradient
                    assert_close(zero if gradient is None else gradient, zero if p.grad is None else p.grad)

    def test_every_bucket_goes_once_and_none_in_the_norm_pass(self, ranks, name, way):
        for rank in ranks[:2]:
            for step in rank["options"][name, way]:
                assert step["by the norm pass"] == 0
                indices = [index for index, _ in step["reduced"]]
                assert indices == list(range(len(indices)))
                assert indices

    def test_reduction_starts_before_the_last_sum(self, ranks, name, way):
        if way == "reweight" or name == "unused":  # autograd's own; a single bucket
            return
        for rank in ranks[:2]:
            last = rank["options"][name, way][1]
            assert len(last["reduced"]) >= 3
            assert last["reduced"][0][1] < last["sums"]


@pytest.mark.parametrize("method", ["engm", "aengm"])
def test_backward_through_batch_statistics_is_the_reweighted_one(ranks, method):
    for rank in ranks[:2]:
        one, other = (rank["coupled"][way, method] for way in WAYS)
        assert_close(one["parameters"], other["parameters"])
        assert_close(one["weights"], other["weights"])
    assert_same(*(rank["coupled"]["backward", method]["parameters"] for rank in ranks[:2]))


class TestJoin:
    @pytest.mark.parametrize("way", WAYS)
    def test_ranks_may_have_unequally_many_batches(self, ranks, way):
        model = engm.GradNormModule(network("group"))
        opt = METHODS["engm"](model, sgd(model))
        for step in range(3):
            opt.zero_grad()
            for rank in range(2 if step == 0 else 1):
                x, y = (t[rows_of(2, "even", rank)] for t in batch(N, seed=step))
                opt.backward(losses_of(model, x, y), divisor=6 * 2)
            opt.step()
        for rank in ranks[:2]:
            assert_close(rank["joined"][way], [p.detach() for p in model.parameters()])

    @pytest.mark.parametrize("method", ["aengm", "auto"])
    def test_what_needs_all_ranks_is_refused(self, ranks, method):
        for rank in ranks[:2]:
            message, untouched = rank["joined"][method]
            assert "DistributedSampler" in message
            assert untouched


class TestNoiseScale:
    @pytest.mark.parametrize("way", WAYS)
    def test_is_of_the_batch_of_all_ranks(self, ranks, way):
        model = engm.GradNormModule(network("group"))
        opt = METHODS["engm"](model, sgd(model))
        opt.backward(losses_of(model, *batch(N)))
        for rank in ranks[:2]:
            assert_close(rank["noise"]["even", way]["scale"], opt.gradient_noise_scale())

    @pytest.mark.parametrize("way", WAYS)
    def test_with_unequally_many_examples(self, ranks, way):
        found = [rank["noise"]["uneven", way] for rank in ranks[:2]]
        shares = torch.cat([torch.full_like(each["lengths"], 1 / (2 * len(each["lengths"]))) for each in found])
        each = (shares * torch.cat([each["lengths"] for each in found]).square()).sum()
        mean = torch.stack([g.square().sum() for g in found[0]["gradients"]]).sum()
        trace = (each - mean) / (1 - shares.square().sum())
        for one in found:
            assert_close(one["scale"], trace / (each - trace))
