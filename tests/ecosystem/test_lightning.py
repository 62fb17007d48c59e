"""``examples/lightning_module.py`` under Lightning's trainer, against loops without it."""

from __future__ import annotations

import re
import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from training import assert_same, batch, clone, losses_of, network, sgd

import engm

lightning = pytest.importorskip("lightning")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = runpy.run_path(str(ROOT / "examples" / "lightning_module.py"))
N, STEPS = 6, 2  # examples of a batch, batches of an epoch
ALPHA = 7.0

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def loader(dtype: torch.dtype) -> DataLoader[Any]:
    """The batches of the plain loop, in their order."""
    batches = [batch(N, seed=step, dtype=dtype) for step in range(STEPS)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=N)


def fit(module: Any, epochs: int, dtype: torch.dtype = torch.float32, precision: Any = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision=precision,
    )  # fmt: skip
    trainer.fit(module, loader(dtype), **options)
    return trainer


def state(model: engm.GradNormModule, opt: engm.ExampleOptimizer) -> dict[str, Any]:
    """Everything a run leaves behind, without names of classes."""
    assert opt.stats is not None
    return clone({"model": model.state_dict(), "optimizer": opt.state_dict(), "weights": opt.stats.weights})


class AENGM(EXAMPLE["StepOfLightning"], engm.AENGM):  # type: ignore[misc]
    """A-ENGM, which has much to keep in a checkpoint."""


class Approximated(EXAMPLE["Classifier"]):  # type: ignore[misc]
    """The example with A-ENGM and a schedule; notes what Lightning calls."""

    def configure_optimizers(self) -> dict[str, Any]:
        self.calls: list[int] = []
        opt = AENGM(self.model, sgd(self.model), ALPHA, tau=2)
        return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)}

    def training_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        opt = self.optimizers()
        opt.optimizer.backward(losses_of(self.model, x, y), x)
        opt.step()
        opt.zero_grad()
        self.lr_schedulers().step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert all(parameter.grad is not None for parameter in self.parameters())
        self.calls.append(self.global_step)


def plain(norm: str, *, one_pass: bool, dtype: torch.dtype, autocast: bool = False) -> dict[str, Any]:
    """The loop without Lightning."""
    model = engm.GradNormModule(network(norm, dtype=dtype))
    opt = engm.ENGM(model, sgd(model, weight_decay=0.0), alpha=ALPHA)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    for step in range(STEPS):
        x, y = batch(N, seed=step, dtype=dtype)
        with context:
            losses = losses_of(model, x, y)
        if one_pass:
            opt.backward(losses)
        else:
            opt.reweight(losses).mean().backward()
        opt.step()
        opt.zero_grad()
    return state(model, opt)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_example_is_the_plain_loop_bit_for_bit(norm: str, one_pass: bool, dtype: torch.dtype) -> None:
    module = EXAMPLE["Classifier"](network(norm, dtype=dtype), alpha=ALPHA, one_pass=one_pass)
    trainer = fit(module, 1, dtype)
    found = state(module.model, trainer.optimizers[0])
    assert 0 < (found["weights"] < 1).sum() < N
    assert_same(found, plain(norm, one_pass=one_pass, dtype=dtype))
    assert trainer.global_step == STEPS
    assert set(trainer.callback_metrics) == {"loss", "clipped"}


@pytest.mark.parametrize("one_pass", [True, False])
def test_mixed_precision_is_the_plain_loop_under_autocast(one_pass: bool) -> None:
    """Lightning's autocast is still on where ``backward`` is called; the plain loop's is not."""
    module = EXAMPLE["Classifier"](network(dtype=torch.float32), alpha=ALPHA, one_pass=one_pass)
    trainer = fit(module, 1, precision="bf16-mixed")
    expected = plain("group", one_pass=one_pass, dtype=torch.float32, autocast=True)
    assert_same(state(module.model, trainer.optimizers[0]), expected)


def test_a_run_resumed_from_lightnings_checkpoint_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = Approximated(network("batch"))
    expected = fit(whole, 2, torch.float64)
    assert whole.calls == list(range(2 * STEPS)), "one call before every step"
    assert expected.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5 ** (2 * STEPS)
    half = Approximated(network("batch"))
    fit(half, 1, torch.float64).save_checkpoint(tmp_path / "half.ckpt")
    rest = Approximated(network("batch", seed=1))
    found = fit(rest, 2, torch.float64, ckpt_path=tmp_path / "half.ckpt")
    assert rest.calls == list(range(STEPS, 2 * STEPS))
    assert_same(state(rest.model, found.optimizers[0]), state(whole.model, expected.optimizers[0]))
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in network("batch").state_dict()}


@pytest.mark.parametrize("call", ["backward", "reweight"])
def test_lightnings_wrapper_does_not_pass_for_the_optimizer(call: str) -> None:
    """It takes on our class, so that our methods run on it; what they note would be in no checkpoint."""

    class Careless(EXAMPLE["Classifier"]):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], index: int) -> None:
            losses = losses_of(self.model, *batch)
            with pytest.raises(TypeError, match=r"opt\.optimizer"):
                getattr(self.optimizers(), call)(losses)

    module = Careless(network())
    fit(module, 1, torch.float64)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_script_trains(capsys: pytest.CaptureFixture[str]) -> None:
    EXAMPLE["main"]()
    (loss,) = re.findall(r"last step: loss ([\d.]+), clipped \d+%", capsys.readouterr().out)
    assert float(loss) < 1, "from 2.3"
