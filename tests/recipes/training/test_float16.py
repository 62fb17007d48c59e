"""Training in float16: losses are scaled, steps that overflow are skipped, a killed run goes on to the same bits."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import CPU, PLAIN, KilledAt, tiny_dataset, train_tiny

import engm
from engm.adversarial import PGD
from engm.recipes.runs.folder import RunFolder
from engm.recipes.training.run import Run

SHALLOW = {norm: replace(PLAIN, model=f"shallow_networks:{norm}") for norm in ("batch", "group")}
FLOAT16 = replace(SHALLOW["batch"], precision="fp16", epochs=2, step="auto")


@pytest.mark.parametrize("optimizer", ["engm", "a-engm", "n-engm", "mgnc", "msgd"])
@pytest.mark.parametrize("norm", SHALLOW)
def test_a_step_is_nearer_to_that_of_float32_than_in_bfloat16(optimizer: str, norm: str) -> None:
    norms, weights = {}, {}
    for precision in ("fp32", "fp16", "bf16"):
        run = Run(replace(SHALLOW[norm], precision=precision, optimizer=optimizer), CPU, tiny_dataset())
        run.trainer.step(*next(iter(run.dataset.train.batches([torch.arange(32)]))))
        weights[precision] = torch.cat([p.detach().flatten() for p in run.net.parameters()])
        norms[precision] = run.trainer.finish_epoch().mean_norm
    away = {precision: (found - weights["fp32"]).norm() for precision, found in weights.items()}
    assert 0 < away["fp16"] < away["bf16"]  # ten bits of a number in place of seven
    if norms["fp32"] is not None:
        assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05)


def test_a_step_that_overflows_is_skipped_and_in_no_figure() -> None:
    run = Run(replace(FLOAT16, optimizer="engm", alpha="auto"), CPU, tiny_dataset())
    scaler = run.trainer._scaler
    assert scaler is not None
    x, y = next(iter(run.dataset.train.batches([torch.arange(32)])))
    run.trainer.step(x, y)
    settled = scaler.get_scale()
    scaler.update(2.0**40)  # nothing survives that
    before = [p.detach().clone() for p in run.net.parameters()]
    run.trainer.step(x, y)
    assert all(torch.equal(p, old) for p, old in zip(run.net.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**39
    scaler.update(settled)
    run.trainer.step(x, y)
    assert not all(torch.equal(p, old) for p, old in zip(run.net.parameters(), before, strict=True))
    summary = run.trainer.finish_epoch().summary
    assert all(torch.tensor(value).isfinite() for value in summary.values()), summary
    assert 0 < summary["weight_mean"] <= 1
    scaler.update(2.0**40)
    run.trainer.step(x, y)
    alone = run.trainer.finish_epoch().summary
    assert torch.tensor(alone["loss"]).isfinite()
    assert torch.tensor([alone[name] for name in ("weight_mean", "norm_mean", "norm_max")]).isnan().all()


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = replace(FLOAT16, save_every=1)
    for steps in (3, 2):
        with suppress(KeyboardInterrupt):
            train_tiny(config, tmp_path / "killed", view=KilledAt(steps))
    for path in (tmp_path / "killed", tmp_path / "whole"):
        train_tiny(config, path)
    found, wanted = (RunFolder(tmp_path / name).store.latest() for name in ("killed", "whole"))
    assert found is not None
    assert wanted is not None
    assert found[1]["trainer"]["scaler"] == wanted[1]["trainer"]["scaler"]
    assert all(torch.equal(found[1]["net"][name], tensor) for name, tensor in wanted[1]["net"].items())


@pytest.mark.parametrize("eval_mode", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_is_the_same_by_scaled_losses(norm: str, eval_mode: bool) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    ).double()
    model = engm.GradNormModule(net)
    x, y = torch.rand(8, 1, 8, 8, dtype=torch.float64), torch.arange(8) % 3
    found = []
    for scale in (1.0, 1024.0):
        attack = PGD(0.1, 0.03, 3, norm=norm, eval_mode=eval_mode, loss_scale=scale)  # type: ignore[arg-type]
        found.append(attack(model, x, y, generator=torch.Generator().manual_seed(1), measure=True))
    assert torch.equal(found[0].inputs, found[1].inputs) or (found[0].inputs - found[1].inputs).abs().max() < 1e-14
    norms = [engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0) for _ in found]
    stats = [
        opt.reweight(torch.nn.functional.cross_entropy(model(f.inputs), y, reduction="none"), measurement=f.measurement)
        for opt, f in zip(norms, found, strict=True)
    ]
    assert torch.allclose(stats[0], stats[1], rtol=1e-12)
    with pytest.raises(ValueError, match="loss_scale"):
        PGD(0.1, 0.03, 3, loss_scale=0.0)
