"""A rank that cannot take its batch: all ranks raise its error, none waits, and the next good step is taken by all."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import found_by, process_group
from synchronised import KERNELS, forward_over
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import assert_close, assert_same, batch, grads, losses_of, network, sgd

import engm
from engm.checks import NonFiniteError

RANKS, N, BAD = 3, 6, 1
METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
    "auto": lambda model, inner: engm.ENGM(model, inner, "auto", clip_fraction=0.3),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.45),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 6.0, tau=1),
    "msgd": engm.MSGD,
    "gnc": lambda model, inner: engm.GNC(model, inner, 1.0),
}
WAYS = ("backward", "reweight")
SYNCHRONISED = ("engm", "msgd")

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.torch_insides,
]


class Mixing(nn.Module):
    """Lets the examples of a batch influence one another where it is told to."""

    mixes = False

    def forward(self, x):
        return x - x.mean(0) if self.mixes else x


def data_parallel(norm="group", *, unused=False, **options):
    net = network(norm)
    if unused:
        net[7].register_parameter("spare", nn.Parameter(torch.ones(3)))
    return DistributedDataParallel(engm.GradNormModule(net, **options), find_unused_parameters=unused)


def synchronised():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network("batch"))
    with mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"):  # refuses what is on the CPU
        return DistributedDataParallel(engm.GradNormModule(net, batch_norm="frozen"))


@contextmanager
def synchronised_on_the_cpu():
    """While this context is open, ``nn.SyncBatchNorm`` runs on the CPU and over all ranks."""
    with ExitStack() as stack:
        for name, kernel in KERNELS.items():
            stack.enter_context(mock.patch(name, kernel))
        stack.enter_context(mock.patch.object(nn.SyncBatchNorm, "forward", forward_over(dist.group.WORLD, RANKS)))
        yield


def sharded(reshard=None):
    mesh = init_device_mesh("cpu", (RANKS,))
    net = network("group")
    for layer in net:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return engm.GradNormModule(fully_shard(net, mesh=mesh, reshard_after_forward=reshard))


def share(rank, seed=0):
    """A rank's part of a batch."""
    x, y = batch(RANKS * N, seed=seed)
    return x[rank::RANKS].clone().requires_grad_(), y[rank::RANKS]


def take(opt, way, losses, x, **options):
    if way == "backward":
        opt.backward(losses, x, **options)
    else:
        opt.reweight(losses, x, **options).mean().backward()


def not_finite(losses, x):
    return losses * torch.tensor([1, torch.nan, 1, 1, 1, 1]).to(losses), x


FAULTS = {
    "not finite": not_finite,
    "no example": lambda losses, x: (losses[:0], x),
    "no graph": lambda losses, x: (losses.detach(), x),
    "a number": lambda losses, x: (0.5, x),
    "inputs": lambda losses, x: (losses, x.detach().clone()),
    "no inputs": lambda losses, x: (losses, None),
}


def whole(tensors):
    return [None if t is None else t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for t in tensors]


def attempt(rank, model, method="engm", way="backward", fault=not_finite, **options):
    """Three good steps, with ``fault`` on one rank before the first and the second: the errors, and the parameters."""
    opt = METHODS[method](model, sgd(model))
    found = {"errors": []}
    for step in range(3):
        if step < 2:
            before = whole(grads(opt.model))
            x, y = share(rank, seed=step + 10)
            losses = losses_of(model, x, y)
            if rank == BAD:
                losses, x = fault(losses, x)
            try:
                take(opt, way, losses, x, **options)
            except (TypeError, ValueError, RuntimeError) as error:
                found["errors"].append((type(error).__name__, str(error)))
            assert_same(whole(grads(opt.model)), before)
        good(rank, model, opt, way, step)
    found["parameters"] = parameters_of(opt.model)
    return found


def good(rank, model, opt, way, seed):
    x, y = share(rank, seed=seed)
    opt.zero_grad()
    take(opt, way, losses_of(model, x, y), x)
    opt.step()


def parameters_of(model):
    for part in model.unwrap().modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return whole(p.detach() for p in model.parameters())


def straight(method, way, model, rank):
    """The good steps of :func:`attempt` alone."""
    opt = METHODS[method](model, sgd(model))
    for seed in range(3):
        good(rank, model, opt, way, seed)
    return parameters_of(opt.model)


def strict(rank):
    """A new structure on one rank, in which the examples influence one another."""
    mixing = Mixing()
    net = network("group").append(mixing)
    model = DistributedDataParallel(engm.GradNormModule(net))
    opt = METHODS["engm"](model, sgd(model))
    found = []
    for mixes in (False, rank == BAD, False):
        mixing.mixes = mixes
        x, y = share(rank)
        try:
            opt.backward(losses_of(model, x, y))
        except RuntimeError as error:
            found.append(str(error))
    return found


def first_step(rank):
    """No graph on one rank in the very first step."""
    model = data_parallel()
    opt = METHODS["engm"](model, sgd(model))
    x, y = share(rank)
    losses = losses_of(model, x, y)
    with pytest.raises(ValueError, match="has no graph") as caught:
        opt.backward(losses.detach() if rank == BAD else losses)
    return str(caught.value)


def micro_batches(rank):
    """Under ``no_sync`` nothing waits: ranks may have unequally many micro-batches, and refuse one alone."""
    model = data_parallel()
    opt = METHODS["engm"](model, sgd(model))
    refused = 0
    x, y = share(rank, seed=8)
    opt.backward(losses_of(model, x, y))  # after a step of all ranks
    opt.zero_grad()
    with model.no_sync():
        for step in range(1 + rank):
            x, y = share(rank, seed=step)
            opt.backward(losses_of(model, x, y))
        if rank == BAD:
            losses, _ = not_finite(losses_of(model, x, y), x)
            with pytest.raises(NonFiniteError, match=r"^losses of examples"):
                opt.backward(losses)
            with pytest.raises(ValueError, match=r"^losses has no graph"):
                opt.backward(losses_of(model, x, y).detach())
            refused += 1
    x, y = share(rank, seed=9)
    opt.backward(losses_of(model, x, y))
    return refused, whole(grads(model))


def options_of_one(rank):
    """An option that is out of range on one rank alone."""
    said = []
    for name, option in (("engm", "alpha"), ("aengm", "tau")):
        model = data_parallel()
        opt = METHODS[name](model, sgd(model))
        for step in range(3):
            x, y = share(rank, seed=step)
            before = getattr(opt, option)
            if step == 1 and rank == BAD:
                setattr(opt, option, 0)
            if step == 1:
                with pytest.raises(ValueError, match=option) as caught:
                    opt.backward(losses_of(model, x, y), x)
                said.append(str(caught.value))
                setattr(opt, option, before)
            else:
                opt.backward(losses_of(model, x, y), x)
    return said


def made_late(rank):
    """An optimizer made while the parts hold whole copies of their parameters; and one that holds a head besides."""
    model = sharded(reshard=False)
    inner = sgd(model)
    x, y = share(rank)
    losses_of(model, x, y)
    opt = METHODS["engm"](model, inner)
    take(opt, "reweight", losses_of(model, x, y), x)
    opt.step()
    with pytest.raises(ValueError, match="1 trained parameter that the wrapped model does not") as caught:
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    return str(caught.value)


def alone(rank):
    """Without ``DistributedDataParallel``, and in a group of one, nobody else is asked."""
    found = []
    groups = [dist.new_group([each]) for each in range(RANKS)]
    lone = engm.GradNormModule(network("group"))
    for model in (lone, DistributedDataParallel(engm.GradNormModule(network("group")), process_group=groups[rank])):
        opt = METHODS["aengm"](model, sgd(model))
        if rank == BAD:
            x, y = share(rank)
            losses, x = not_finite(losses_of(model, x, y), x)
            with pytest.raises(NonFiniteError, match=r"^losses of examples") as caught:
                opt.backward(losses, x)
            found.append(str(caught.value))
    return found


def work(rank, port, results):
    with process_group(rank, port, RANKS):
        found = {(m, w): attempt(rank, data_parallel(), m, w) for m in METHODS for w in WAYS}
        found |= {(m, w, "straight"): straight(m, w, data_parallel(), rank) for m in METHODS for w in WAYS}
        for name, fault in FAULTS.items():
            found["fault", name] = attempt(rank, data_parallel(), "nengm", "backward", fault)
        found["divisor"] = attempt(rank, data_parallel(), divisor=0.0 if rank == BAD else 6.0, fault=lambda *a: a)
        for way in WAYS:
            found["unused", way] = attempt(rank, data_parallel(unused=True), "engm", way)
            found["batch norm", way] = attempt(rank, data_parallel("batch", calibrate_every=1), "aengm", way)
        with synchronised_on_the_cpu():
            for method, way in itertools.product(SYNCHRONISED, WAYS):
                found["sync", method, way] = attempt(rank, synchronised(), method, way)
                found["sync", method, way, "straight"] = straight(method, way, synchronised(), rank)
        for method in METHODS:
            found["sharded", method] = attempt(rank, sharded(), method, "reweight")
            found["sharded", method, "straight"] = straight(method, "reweight", sharded(), rank)
        found["strict"] = strict(rank)
        found["first"] = first_step(rank)
        found["micro"] = micro_batches(rank)
        found["options"] = options_of_one(rank)
        found["late"] = made_late(rank)
        found["alone"] = alone(rank)
        torch.save(found, results / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes found."""
    return found_by(work, RANKS, tmp_path_factory.mktemp("ranks"))


def the_error(ranks, key, kind, text):
    """The one that all ranks raised, at both attempts."""
    for rank in ranks:
        assert len(rank[key]["errors"]) == 2
        for error in rank[key]["errors"]:
            assert error == ranks[0][key]["errors"][0]
    found, said = ranks[0][key]["errors"][0]
    assert found == kind
    assert said.startswith(f"on rank {BAD} of {RANKS}, which stops all of them: ")
    assert text in said


def went_on(ranks, key):
    for rank in ranks:
        assert_same(rank[key]["parameters"], ranks[0][key]["parameters"])


@pytest.mark.parametrize("way", WAYS)
class TestNotFinite:
    @pytest.mark.parametrize("method", METHODS)
    def test_all_raise_the_same_and_go_on(self, ranks, method, way):
        the_error(ranks, (method, way), "NonFiniteError", "losses of examples [1] are not finite")
        went_on(ranks, (method, way))
        for rank in ranks:
            assert_close(rank[method, way]["parameters"], rank[method, way, "straight"])

    @pytest.mark.parametrize("case", ["batch norm", "unused"])
    def test_before_calibration_and_with_unused_parameters(self, ranks, way, case):
        the_error(ranks, (case, way), "NonFiniteError", "losses of examples [1] are not finite")
        went_on(ranks, (case, way))

    @pytest.mark.parametrize("method", SYNCHRONISED)
    def test_before_a_pass_through_the_statistics_of_all_ranks(self, ranks, way, method):
        the_error(ranks, ("sync", method, way), "NonFiniteError", "losses of examples [1] are not finite")
        went_on(ranks, ("sync", method, way))
        for rank in ranks:
            assert_close(rank["sync", method, way]["parameters"], rank["sync", method, way, "straight"])


@pytest.mark.parametrize("method", METHODS)
def test_before_a_pass_through_parameters_that_are_split(ranks, method):
    the_error(ranks, ("sharded", method), "NonFiniteError", "losses of examples [1] are not finite")
    for rank in ranks:
        assert_close(rank["sharded", method]["parameters"], rank["sharded", method, "straight"])


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("no example", "ValueError", "losses has no example"),
        ("no graph", "ValueError", "losses has no graph"),
        ("a number", "TypeError", "losses must be a tensor [n]"),
        ("inputs", "ValueError", "do not require grad"),
        ("no inputs", "ValueError", "pass them, opt.backward(losses, inputs=x_adv)"),
    ],
)
def test_other_faults_of_one_rank(ranks, fault, kind, text):
    the_error(ranks, ("fault", fault), kind, text)
    went_on(ranks, ("fault", fault))


def test_a_divisor(ranks):
    the_error(ranks, "divisor", "ValueError", "divisor must be a positive")


def test_a_structure_that_strict_refuses_on_one_rank(ranks):
    for rank in ranks:
        (said,) = rank["strict"]
        assert said.startswith(f"on rank {BAD} of {RANKS}, which stops all of them: ")
        assert "influences the losses of other examples" in said
        assert said == ranks[0]["strict"][0]


def test_without_a_graph_in_the_first_step(ranks):
    assert len({rank["first"] for rank in ranks}) == 1


def test_micro_batches_under_no_sync_ask_nobody(ranks):
    assert [rank["micro"][0] for rank in ranks] == [rank == BAD for rank in range(RANKS)]
    assert_same(ranks[0]["micro"][1], ranks[1]["micro"][1])


def test_options_that_are_out_of_range_on_one_rank_stop_all(ranks):
    for said in zip(*(rank["options"] for rank in ranks), strict=True):
        assert len(set(said)) == 1
        assert said[0].startswith(f"on rank {BAD} of {RANKS}, which stops all of them: ")


def test_nobody_else_is_asked_where_nothing_is_shared(ranks):
    assert [len(rank["alone"]) for rank in ranks] == [2 * (rank == BAD) for rank in range(RANKS)]


def test_parameters_that_are_split_are_the_optimizers_own(ranks):
    assert all("param_groups[1]['params'][0] of shape (3,)" in rank["late"] for rank in ranks)
