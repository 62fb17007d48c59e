"""Models and optimizers that went through ``accelerator.prepare``, against loops without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerators import no_accelerator_stays
from processes import found_by
from torch import Tensor
from training import assert_close, assert_same, batch, clone, losses_of, network, sgd

import engm

accelerate = pytest.importorskip("accelerate")

N, STEPS, RANKS = 8, 4, 2
METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 6.0, tau=2),
}


@contextmanager
def accelerated(**options: Any) -> Iterator[Any]:
    """An ``Accelerator`` on the CPU, and no trace of its global state afterwards."""
    with no_accelerator_stays():
        yield accelerate.Accelerator(cpu=True, **options)


def setup(method: str, norm: str, dtype: torch.dtype, seed: int = 0) -> tuple[engm.GradNormModule, Any]:
    model = engm.GradNormModule(network(norm, seed=seed, dtype=dtype))
    return model, METHODS[method](model, sgd(model))


def inputs(step: int, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = (t[rows].clone() for t in batch(N, seed=step, dtype=dtype))
    return x.requires_grad_(), y


def state(model: engm.GradNormModule, opt: engm.ExampleOptimizer) -> dict[str, Any]:
    assert opt.stats is not None
    return clone({"model": model.state_dict(), "optimizer": opt.state_dict(), "weights": opt.stats.weights})


def plain(method: str, norm: str, dtype: torch.dtype = torch.float32, *, autocast: bool = False) -> dict[str, Any]:
    """The loop without Accelerate."""
    model, opt = setup(method, norm, dtype)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    for step in range(STEPS):
        x, y = inputs(step, slice(0, N), dtype)
        with context:
            logits = model(x)
        losses = torch.nn.functional.cross_entropy(logits.float() if autocast else logits, y, reduction="none")
        opt.reweight(losses, x).mean().backward()
        opt.step()
        opt.zero_grad()
    return state(model, opt)


def steps(accelerator: Any, prepared: Any, stepper: Any, opt: Any, which: range, rows: slice, dtype: Any) -> None:
    """``prepared`` and ``stepper`` are what ``prepare`` made of the model and of ``opt``."""
    for step in which:
        x, y = inputs(step, rows, dtype)
        losses = losses_of(prepared, x, y)
        accelerator.backward(opt.reweight(losses, x).mean())
        stepper.step()
        stepper.zero_grad()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("method", METHODS)
def test_prepared_is_the_plain_loop_bit_for_bit(method: str, norm: str, precision: str) -> None:
    with accelerated(mixed_precision=precision) as accelerator:
        model, opt = setup(method, norm, torch.float32)
        prepared, stepper = accelerator.prepare(model, opt)
        assert stepper.optimizer is opt
        steps(accelerator, prepared, stepper, opt, range(STEPS), slice(0, N), torch.float32)
        found = state(model, opt)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert (found["weights"] < 1).any()
    assert_same(found, plain(method, norm, autocast=precision == "bf16"))
    assert unwrapped is model
    assert not {"forward", "_original_forward"} & set(vars(model.unwrap())), "left on the user's network"


def test_a_run_resumed_from_accelerates_checkpoint_is_the_uninterrupted_one(tmp_path: Path) -> None:
    for seed, which in ((0, range(2)), (1, range(2, STEPS))):
        with accelerated() as accelerator:
            model, opt = setup("aengm", "batch", torch.float32, seed)
            prepared, stepper = accelerator.prepare(model, opt)
            if seed:
                accelerator.load_state(str(tmp_path))
            steps(accelerator, prepared, stepper, opt, which, slice(0, N), torch.float32)
            if not seed:
                accelerator.save_state(str(tmp_path))
    assert_same(state(model, opt), plain("aengm", "batch"))


def test_accumulation_is_one_batch() -> None:
    """Accelerate divides by its number of micro-batches and steps after the last; weights are of single examples."""
    with accelerated(gradient_accumulation_steps=2) as accelerator:
        model, opt = setup("engm", "group", torch.float64)
        prepared, stepper = accelerator.prepare(model, opt)
        for step in range(STEPS):
            for half in (slice(0, N // 2), slice(N // 2, N)):
                with accelerator.accumulate(prepared):
                    steps(accelerator, prepared, stepper, opt, range(step, step + 1), half, torch.float64)
    assert_close(model.state_dict(), plain("engm", "group", torch.float64)["model"])


def work(rank: int, port: int, results: Path) -> None:
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in here.items()}
    share = N // RANKS
    found = {}
    with accelerated() as accelerator:
        for method in METHODS:
            model, opt = setup(method, "group", torch.float64)
            prepared, stepper = accelerator.prepare(model, opt)
            assert isinstance(prepared, torch.nn.parallel.DistributedDataParallel)
            rows = slice(rank * share, (rank + 1) * share)
            steps(accelerator, prepared, stepper, opt, range(STEPS), rows, torch.float64)
            found[method] = state(model, opt)
        torch.save(found, results / f"{rank}.pt")
        accelerator.end_training()


def test_two_processes_are_one(tmp_path: Path) -> None:
    ranks = found_by(work, RANKS, tmp_path)
    for method in METHODS:
        one = plain(method, "group", torch.float64)
        for rank in ranks:
            assert_close(rank[method]["model"], one["model"])
        assert_close(torch.cat([rank[method]["weights"] for rank in ranks]), one["weights"])
