"""The paper's Fig. 3 for every method: how well its predictor follows the exact norms, over a real adversarial run.

Three runs: batch norm in training mode, batch norm in evaluation mode (the network trains in training mode; attack,
predictors and exact gradients see its running statistics), and group norm. Each trains a network with ENGM on
adversarial examples. ENGM with its own norm pass, ENGM with norms borrowed from the attack's last step, A-ENGM (a
regression every ``--tau`` steps) and N-ENGM take part in every step, so that their factors and lines are as old as in
a run of their own. At the steps ``--at`` every example's exact gradient is computed, one backpropagation each.
Reported are the correlation of the predictor with the exact norm, the mean of |w_hat - w| / w, and the cosine of
sum_i w_hat_i g_i with sum_i w_i g_i; alpha is the median of the exact norms, so that half of the examples are clipped.
N-ENGM has a threshold of its own, here the median of its predictor, the best that can be chosen for a batch.

    python benchmarks/weights.py --plot
    python benchmarks/weights.py --data CIFAR10.npz --eps 0.0314 --steps 140 --at 10 35 70 105 140 --plot
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fidelity
import numpy as np
import output
import torch
import torch.nn.functional as F
import workloads
from torch import Tensor, nn

import engm
from engm.recipes.models.resnet import NormName

SETTINGS: dict[str, tuple[NormName, str]] = {  # the network's norm, and its mode while it is looked at
    "batch norm, training mode": ("batch", "training"),
    "batch norm, evaluation mode": ("batch", "evaluation"),
    "group norm": ("group", "training"),
}
BORROWER, NAIVE = "ENGM, borrowed", "N-ENGM"
MEASURES = {
    "correlation": "correlation with the exact norm",
    "weight_error": "mean |ŵ − w| / w",
    "cosine": "cosine of the update with the naive one",
}


@dataclass
class Watcher:
    """A method that takes part in every step and changes nothing."""

    model: engm.GradNormModule
    opt: engm.ExampleOptimizer

    def predict(self, x: Tensor, y: Tensor, measured: engm.Measurement | None) -> Tensor:
        """``[n]``, what the weights would be made from."""
        losses = workloads.losses_of(self.model, x, y)
        self.opt.reweight(losses, inputs=x, measurement=measured)
        stats = self.opt.stats
        if stats is None or stats.norms is None:
            raise RuntimeError(f"{type(self.opt).__name__} left no norms")
        return stats.norms


def watchers(net: nn.Module, args: argparse.Namespace) -> dict[str, Watcher]:
    """All methods, each behind a wrapper and with a calibration of its own; their inner optimizers never step."""
    models = [engm.GradNormModule(net) for _ in range(4)]
    inner = [fidelity.inner_sgd(model, args) for model in models]
    opts: dict[str, engm.ExampleOptimizer] = {
        "ENGM, own pass": engm.ENGM(models[0], inner[0], alpha=args.alpha),
        BORROWER: engm.ENGM(models[1], inner[1], alpha=args.alpha),
        "A-ENGM": engm.AENGM(models[2], inner[2], alpha=args.alpha, tau=args.tau),
        NAIVE: engm.NENGM(models[3], inner[3], alpha=args.alpha),
    }
    return {name: Watcher(model, opt) for (name, opt), model in zip(opts.items(), models, strict=True)}


def judge(net: nn.Module, x: Tensor, y: Tensor, predicted: dict[str, Tensor]) -> dict[str, Any]:
    """Every method against the exact gradients of the batch, in the mode that ``net`` is in."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    exact = fidelity.Judge(fidelity.exact_gradients(workloads.losses_of(net, x, y), parameters))
    scaled = predicted | {NAIVE: predicted[NAIVE] * (exact.alpha / predicted[NAIVE].median())}
    return {
        "mean_exact_norm": float(exact.norms.mean()),
        "sgd_cosine": float(F.cosine_similarity(exact.gradients.sum(0), exact.update, dim=0)),
        "modes": {name: exact(norms) for name, norms in scaled.items()},
    }


def run(args: argparse.Namespace, setting: str) -> list[dict[str, Any]]:
    """Trains once, and returns what was found at every step of ``args.at``."""
    torch.manual_seed(args.seed)
    norm, mode = SETTINGS[setting]
    args = argparse.Namespace(**vars(args), statistics=mode)
    images, labels = fidelity.load(args.data)
    net = fidelity.network(args, images.shape[1], norm)
    watching = watchers(net, args)
    trained = engm.GradNormModule(net)
    opt = engm.ENGM(trained, fidelity.inner_sgd(trained, args), alpha=args.alpha)
    batches = fidelity.batches_of(len(labels), args.batch, torch.Generator().manual_seed(args.seed))
    records = []
    for step in range(args.steps + 1):
        chosen = batches[step % len(batches)]
        x, y = images[chosen], labels[chosen]
        x_adv, measured = fidelity.attack(watching[BORROWER].model, x, y, args)
        keep = {key: value.clone() for key, value in net.state_dict().items()}
        for watcher in watching.values():
            watcher.model.train(mode == "training")
        predicted = {name: w.predict(x_adv, y, measured if name == BORROWER else None) for name, w in watching.items()}
        found = judge(net, x_adv, y, predicted) if step in args.at else None
        net.load_state_dict(keep)  # watching leaves no trace in the running statistics
        trained.train()
        losses = workloads.losses_of(trained, x_adv, y)
        opt.backward(losses)
        opt.step()
        opt.zero_grad()
        if found is not None:
            records.append({"step": step, "loss": losses.mean().item(), **found})
            errors = ", ".join(f"{name} {row['weight_error']:.1%}" for name, row in found["modes"].items())
            print(f"{setting}, step {step}: loss {records[-1]['loss']:.3f}, error of w {errors}", flush=True)
    return records


def show(setting: str, records: list[dict[str, Any]]) -> None:
    """Print one run: range of the correlation, means of error and cosine with the worst looks."""
    cells = []
    for name in records[0]["modes"]:
        c, e, s = ([record["modes"][name][key] for record in records] for key in MEASURES)
        cells.append([
            name, f"{min(c):.3f} to {max(c):.3f}", f"{np.mean(e):.1%}", f"{max(e):.1%}", f"{np.mean(s):.4f}",
            f"{min(s):.4f}",
        ])  # fmt: skip
    plain = np.mean([record["sgd_cosine"] for record in records])
    output.show(
        f"{setting}: {len(records)} looks (every weight 1: mean cosine {plain:.4f})",
        ["norms from", "correlation", "error of w", "worst", "cosine", "worst"],
        cells,
    )


def draw(document: dict[str, Any], path: Path) -> None:
    """Draws every measure over the steps: a row for each measure, a column for each run."""
    with output.picture(path, len(MEASURES), len(document["settings"]), (12, 9)) as boxes:
        for column, (setting, records) in enumerate(document["settings"].items()):
            steps = [record["step"] for record in records]
            boxes[0][column].set_title(setting, fontsize=10)
            for row, (key, label) in enumerate(MEASURES.items()):
                box = boxes[row][column]
                for name in records[0]["modes"]:
                    box.plot(steps, [record["modes"][name][key] for record in records], "o-", markersize=4, label=name)
                box.grid(alpha=0.3)
                if key == "weight_error":
                    box.set_yscale("symlog", linthresh=1e-3)
                    box.set_ylim(bottom=0)
                if column == 0:
                    box.set_ylabel(label, fontsize=9)
            boxes[-1][column].set_xlabel("training step")
        boxes[0][0].legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = fidelity.options(__doc__)
    parser.add_argument("--tau", type=int, default=50, help="steps between two regressions of A-ENGM")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--plot", action="store_true", help="a plot over the steps beside the JSON")
    parser.set_defaults(
        eps=0.2, attack_steps=10, at=[5, 10, 20, 45, 75, 130, 185, 240, 299], out=output.RESULTS / "weights.json"
    )
    args = parser.parse_args(argv)
    if not any(0 <= step <= args.steps for step in args.at):
        parser.error(f"no step of --at {args.at} lies within --steps {args.steps}")
    torch.set_num_threads(args.threads)
    settings = {}
    for setting in args.settings:
        settings[setting] = run(args, setting)
    for setting, records in settings.items():
        show(setting, records)
    document = {"arguments": {**vars(args), "out": str(args.out)}, "machine": output.machine(), "settings": settings}
    output.save(args.out, document)
    if args.plot:
        draw(document, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
