"""A run in memory: objectives with optimizers, speed switches, and what each setting does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_runs import PLAIN, tiny_dataset
from with_beside import losses_of_objective

import engm
from engm.adversarial import OBJECTIVES
from engm.recipes.config import RunConfig
from engm.recipes.data import load_digits
from engm.recipes.methods import METHOD_NAMES
from engm.recipes.processes import Processes
from engm.recipes.runs.progress import cells
from engm.recipes.training.run import Run

CPU = Processes(torch.device("cpu"))


def trained(config: RunConfig, epochs: int | None = None) -> Run:
    run = Run(config, CPU, tiny_dataset())
    for _ in range(epochs or config.epochs):
        run.finish_epoch(run.train_epoch(lambda: None))
    return run


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.net.parameters()])


# Three of the seven optimizers an objective, so chosen that any two objectives have another one in common, and every
# optimizer has three objectives or more. What each of them computes is proven elsewhere.
PAIRS = [
    (objective, optimizer, "eager" if (k - 2 * i) % 7 else "auto")
    for i, objective in enumerate(OBJECTIVES)
    for k, optimizer in enumerate(METHOD_NAMES)
    if (k - 2 * i) % 7 in (0, 1, 3)
]


def test_pairs_hold_every_objective_and_every_optimizer() -> None:
    for place, names, least in ((0, OBJECTIVES, 3), (1, METHOD_NAMES, 3)):
        count = Counter(pair[place] for pair in PAIRS)
        assert count.keys() == set(names)
        assert min(count.values()) >= least
        assert {pair[place] for pair in PAIRS if pair[2] == "auto"} == set(names), "recorded steps are among them"


@pytest.mark.parametrize(("objective", "optimizer", "step"), PAIRS)
def test_pairs_learn_digits(objective: str, optimizer: str, step: str) -> None:
    """Twenty steps on real digits: the objective's own loss of fixed examples falls."""
    lr = {"sngm": 0.02, "f-engm": 0.1}.get(optimizer, 0.05)
    config = RunConfig(
        width=4,
        epochs=2,
        batch_size=64,
        attack_steps=2,
        objective=objective,
        optimizer=optimizer,
        lr=lr,
        alpha="paper",
        step=step,
    )
    run = Run(
        config if optimizer in ("msgd", "sngm", "mgnc", "f-engm") else replace(config, alpha="2"), CPU, load_digits()
    )

    def loss() -> float:
        x, y = run.dataset.train.batch(torch.arange(128))
        x_adv = run.trainer.attack(run.net, x, y, generator=torch.Generator().manual_seed(1)).inputs
        run.net.eval()
        with torch.no_grad():
            return float(losses_of_objective(run.trainer.objective, run.net, x, x_adv, y).mean())

    run.train_epoch(lambda: None)  # running statistics have to settle before evaluation mode means anything
    before = loss()
    for _ in range(2):
        run.batch = 0
        run.train_epoch(lambda: None)
    assert loss() < before
    stats = run.trainer.optimizer.stats  # type: ignore[attr-defined]
    assert bool(stats.weights.isfinite().all())


@pytest.mark.parametrize("borrow", [None, True, False])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_borrowed_norms_are_used_where_the_attack_climbs_the_loss(norm: str, borrow: bool | None) -> None:
    """By default where examples couple: elsewhere the optimizer's own pass is exact and costs no more."""
    measured = {}
    for objective, mode in [*((name, "auto") for name in OBJECTIVES), ("fat", "train")]:
        config = replace(PLAIN, objective=objective, attack_mode=mode, norm=norm, borrow=borrow)
        run = Run(config, CPU, tiny_dataset())
        calls: list[bool] = []
        backward = run.trainer.optimizer.backward  # type: ignore[attr-defined]

        def spy(losses, *args, calls=calls, backward=backward, **kwargs):  # type: ignore[no-untyped-def]
            calls.append(kwargs["measurement"] is not None)
            return backward(losses, *args, **kwargs)

        run.trainer.optimizer.backward = spy  # type: ignore[attr-defined]
        run.train_epoch(lambda: None)
        measured[objective, mode] = calls[0]  # before any are judged
    climbing = norm == "batch" if borrow is None else borrow
    assert measured == {
        ("pgd", "auto"): climbing,
        ("fat", "train"): climbing,
        ("fat", "auto"): climbing,
        ("ates", "auto"): climbing,
        ("backward-smoothing", "auto"): False,
        ("lbgat", "auto"): False,
        ("self-adaptive", "auto"): False,
        ("trades", "auto"): False,
        ("mart", "auto"): False,
    }


def test_awp_measures_at_the_perturbed_weights() -> None:
    """With AWP nothing is borrowed, and the norms differ from those without it."""
    config = replace(PLAIN, norm="group", optimizer="engm", alpha="1e9", lr=1e-12, momentum=0.0, weight_decay=0.0)
    plain, perturbed = (Run(c, CPU, tiny_dataset()) for c in (config, replace(config, awp=True, awp_gamma=0.1)))
    for run in (plain, perturbed):
        before = weights(run)
        run.train_epoch(lambda: None)
        torch.testing.assert_close(weights(run), before, rtol=0, atol=1e-9)
    one, other = (run.trainer.optimizer.stats.norms for run in (plain, perturbed))  # type: ignore[attr-defined]
    assert ((one - other).abs() / one).mean() > 0.01


def test_eps_of_zero_is_natural_training() -> None:
    config = replace(PLAIN, eps=0.0, optimizer="msgd", norm="group", epochs=1)
    run = trained(config)
    net = Run(config, CPU, tiny_dataset()).net
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4)
    for x, y in run.batches.epoch(0):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        sgd.step()
    torch.testing.assert_close(weights(run), torch.cat([p.detach().flatten() for p in net.parameters()]))


def test_a_growing_radius_reaches_the_attack() -> None:
    run = Run(replace(PLAIN, eps=0.2, eps_warmup=1.0), CPU, tiny_dataset())
    seen: list[tuple[float, float]] = []
    run.train_epoch(lambda: seen.append((run.trainer.attack.eps, run.trainer.attack.step_size)))
    assert [eps for eps, _ in seen] == pytest.approx([0.0, 0.05, 0.1, 0.15])
    assert [step for eps, step in seen[1:]] == pytest.approx([eps / 4 for eps, _ in seen[1:]])


def test_averaged_weights_are_what_is_evaluated() -> None:
    run = Run(replace(PLAIN, ema=0.5), CPU, tiny_dataset())
    averaged = None

    def follow() -> None:
        nonlocal averaged
        averaged = weights(run) if averaged is None else 0.5 * averaged + 0.5 * weights(run)

    run.finish_epoch(run.train_epoch(follow))
    found = torch.cat([p.detach().flatten() for p in run.evaluated.parameters()])
    torch.testing.assert_close(found, averaged)
    assert run.evaluated is not run.net


def test_channels_last_changes_no_number() -> None:
    config = replace(PLAIN, threat="l2", eps=0.3, norm="group", epochs=1, width=8)
    one, other = trained(config), trained(replace(config, channels_last=True))
    assert other.net.get_parameter("layer1.0.conv1.weight").is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weights(other), weights(one), rtol=1e-4, atol=1e-5)


def test_channels_last_is_refused_where_torch_would_corrupt_memory() -> None:
    with pytest.raises(ValueError, match=r"'layer2.0.shortcut.0' on a CPU: .* writes out of bounds"):
        Run(replace(PLAIN, channels_last=True), CPU, tiny_dataset())


def test_bf16_trains_and_keeps_float32_weights_under_their_own_names() -> None:
    run = trained(replace(PLAIN, precision="bf16", epochs=1))
    plain = trained(replace(PLAIN, epochs=1))
    assert run.net.state_dict().keys() == plain.net.state_dict().keys()
    assert {p.dtype for p in run.net.parameters()} == {torch.float32}
    assert run.trainer.optimizer.stats.norms.dtype == torch.float32  # type: ignore[attr-defined]
    assert run.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=0.05)
    assert run.history[0]["loss"] != plain.history[0]["loss"]


def test_the_compiled_attack_is_the_same_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    compiler = torch.compile

    def counting(net: torch.nn.Module) -> torch.nn.Module:
        compiled.append(net)
        return compiler(net, backend="aot_eager")  # type: ignore[return-value]  # as inductor, without a minute of C++

    monkeypatch.setattr(torch, "compile", counting)
    config = replace(PLAIN, threat="l2", eps=0.3, epochs=1)
    one, other = trained(config), trained(replace(config, compile_attack=True))
    assert compiled == [other.trainer.model.unwrap()]
    torch.testing.assert_close(weights(other), weights(one), rtol=1e-4, atol=1e-5)


def test_auto_alpha_follows_the_norms() -> None:
    run = trained(replace(PLAIN, alpha="auto", clip_fraction=0.25, epochs=6, lr=1e-3))
    assert isinstance(run.trainer.optimizer, engm.ENGM)
    clipped = [row["clipped"] for row in run.history[2:]]
    assert 0.1 < sum(clipped) / len(clipped) < 0.45
    alphas = [row["alpha"] for row in run.history]
    assert alphas[-1] == float(run.trainer.optimizer.quantile.value)  # type: ignore[arg-type,union-attr]
    assert len(set(alphas)) == 6
    assert cells(run.history[-1])["alpha"] == f"{alphas[-1]:.3g}"
    assert "alpha" not in trained(replace(PLAIN, epochs=1)).history[0]


def test_state_of_another_kind_of_device_is_refused() -> None:
    run = trained(PLAIN, epochs=1)
    with pytest.raises(ValueError, match="trained on cuda; go on there"):
        run.load_state_dict({**run.state_dict(), "device": "cuda"})


def test_state_of_another_number_of_processes_is_refused() -> None:
    run = trained(PLAIN, epochs=1)
    state = run.state_dict()
    state["random"] *= 2
    with pytest.raises(ValueError, match="trained by 2 processes; go on with as many, not 1"):
        run.load_state_dict(state)
