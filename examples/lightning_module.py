"""engm inside a LightningModule, by manual optimization: one backward pass for everything, or Lightning's own.

python examples/lightning_module.py
"""

from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import engm


class StepOfLightning:
    """Runs the closure that Lightning gives every step; it computes no loss and runs ``on_before_optimizer_step``."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            closure()
        return super().step()


class ENGM(StepOfLightning, engm.ENGM):
    """ENGM as Lightning steps it; any other optimizer of engm goes in its place."""


class Classifier(lightning.LightningModule):
    """A classifier whose examples are clipped.

    Args:
        net: the network.
        alpha: the threshold.
        one_pass: norms and gradients from one backward pass; if not, the backward pass is Lightning's own, which
            distributed strategies and 16-bit precision need.
    """

    def __init__(self, net: nn.Module, alpha: float = 1.0, one_pass: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = engm.GradNormModule(net)
        self.alpha = alpha
        self.one_pass = one_pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        return ENGM(self.model, sgd, alpha=self.alpha)

    def training_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        opt = self.optimizers()  # Lightning's wrapper: it steps; opt.optimizer is ours, and knows about examples
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        if self.one_pass:
            opt.optimizer.backward(losses)
        else:
            self.manual_backward(opt.optimizer.reweight(losses).mean())
        opt.step()
        opt.zero_grad()
        stats = opt.optimizer.stats
        self.log_dict({"loss": stats.losses.mean(), "clipped": stats.clipped_fraction}, prog_bar=True)


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x, torch.tensor(digits.target)), batch_size=64, shuffle=True)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Classifier(net), loader)
    figures = trainer.callback_metrics
    print(f"last step: loss {figures['loss']:.3f}, clipped {figures['clipped']:.0%}")


if __name__ == "__main__":
    main()
