"""The paper's Table 1: time of a PGD-10 training iteration of ResNet-18 with every outer optimizer, as ratios to MSGD.

All contenders take turns in one run. Every optimizer that reads norms is there twice: with norms borrowed from the
attack's last step, and with a pass of its own. What happens every 50 steps only (calibration of batch norm with the
exact gradients of 16 examples, A-ENGM's regression) is timed as a contender of its own and a fiftieth of what it adds
is charged to every step ("in all"; a run's first 50 steps calibrate three times more). MSGD is torch without engm.

Then whoever else clips every example's gradient exactly, on the plain training step (no attack) of networks whose
examples do not couple, as ratios to SGD. A peer that cannot run there is listed with the reason.

    python benchmarks/table1.py --norm both --plot
    python benchmarks/table1.py --width 64 --n 128 --norm both --device cuda --out benchmarks/results/gpu/table1.json
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import output
import peers
import torch
import workloads
from interleaved import Step, Timing, compare, runnable
from torch import Tensor, nn

PAPER_SECONDS = {  # an iteration on a Titan RTX
    "MSGD": 0.60,
    "MSGD + GNC": 0.61,
    "SNGM": 0.63,
    "F-ENGM": 5.05,
    "N-ENGM": 0.75,
    "A-ENGM": 0.83,
    "ENGM": 5.06,
}
WHOLE = {"MSGD + GNC": "gnc", "SNGM": "sngm"}  # these read the mean gradient only
NORMED = {"F-ENGM": "fengm", "N-ENGM": "nengm", "A-ENGM": "aengm", "ENGM": "engm"}
WAYS = {"borrowed": True, "own pass": False}
REPLAYED = {"MSGD": "msgd", "A-ENGM (borrowed)": "aengm", "ENGM (borrowed)": "engm", "ENGM (own pass)": "engm"}
REPLAY = ", replayed"  # from a recorded program (engm.record), MSGD as engm.MSGD
RARE = ", rare step"
RARE_EVERY = 50  # tau, and the steps between two calibrations
NAIVE = "naive ENGM"
NETWORKS = {"resnet18": "ResNet-18", "vgg": "VGG"}
PLAIN = ["group norm", "batch norm, evaluation mode"]


def paper_ratio(label: str) -> float | None:
    """The paper's ratio for an optimizer, however its norms are taken; None for one that the paper does not have."""
    seconds = PAPER_SECONDS.get(label.removeprefix("naive ").partition(" (")[0].removesuffix(REPLAY))
    return None if seconds is None else seconds / PAPER_SECONDS["MSGD"]


def adversarial_steps(net: nn.Module, x: Tensor, y: Tensor, norm: str, attack_steps: int) -> dict[str, Step]:
    """Every contender of Table 1; names that end in ``RARE`` do at every step what is otherwise rare."""
    ours = partial(workloads.pgd_step, net, x, y, attack_steps=attack_steps)
    steps: dict[str, Step] = {"MSGD": workloads.bare(net, x, y, attack_steps)}
    for label, method in WHOLE.items():
        steps[label] = ours(method, borrowed=False)
    for label, method in NORMED.items():
        for way, borrowed in WAYS.items():
            steps[f"{label} ({way})"] = ours(method, borrowed=borrowed)
            if method == "aengm" or (norm == "batch" and method != "nengm"):
                steps[f"{label} ({way}){RARE}"] = ours(method, borrowed=borrowed, rare=True)
    again = partial(workloads.recorded_step, net, x, y, backend="replay", attack_steps=attack_steps)
    for label, method in REPLAYED.items():
        steps[label + REPLAY] = again(method, borrowed="own" not in label)
    return steps | {NAIVE: workloads.bare(net, x, y, attack_steps, naive=True)}


def adversarial(net: nn.Module, x: Tensor, y: Tensor, norm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Table 1 for one network: per contender seconds, ratio to MSGD with its spread, the same in all, the paper's."""
    steps = adversarial_steps(net, x, y, norm, args.attack_steps)
    few = [name for name in steps if name == NAIVE or name.endswith(RARE)]
    timings = compare(steps, reference="MSGD", rounds=args.rounds, few=few, few_rounds=args.naive_rounds)
    rows: dict[str, Any] = {}
    for name, timing in timings.items():
        if name.endswith(RARE):
            continue
        rare = timings.get(name.removesuffix(REPLAY) + RARE)  # what is rare is never replayed
        paper = paper_ratio(name)
        rows[name] = timing.as_json() | {
            "ratio of a rare step": None if rare is None else round(rare.ratio, 4),
            "ratio in all": round(in_all(timing, rare).ratio, 4),
            "paper's ratio": None if paper is None else round(paper, 3),
        }
    return rows


def in_all(timing: Timing, rare: Timing | None) -> Timing:
    """The mean step of a run in which one in ``RARE_EVERY`` is a rare one."""
    if rare is None:
        return timing
    seconds = timing.seconds + (rare.seconds - timing.seconds) / RARE_EVERY
    return replace(timing, seconds=seconds, ratio=timing.ratio + (rare.ratio - timing.ratio) / RARE_EVERY)


def plain(net: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The plain step: ENGM beside its peers, and why a peer has no figure."""
    makers = {name: partial(maker, net, x, y) for name, maker in peers.PEERS.items()}
    others, reasons = runnable(makers)
    ours = {"SGD": workloads.plain_sgd(net, x, y), "ENGM": workloads.engm_step(net, x, y, "engm")}
    steps = ours | others | {NAIVE: workloads.naive_engm(net, x, y)}
    timings = compare(steps, reference="SGD", rounds=args.rounds, few=[NAIVE], few_rounds=args.naive_rounds)
    return {"contenders": {name: timing.as_json() for name, timing in timings.items()}, "cannot run": reasons}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints what the arguments ask for; returns what the JSON holds."""
    x, y = (t.to(args.device) for t in workloads.batch(args.n))
    document: dict[str, Any] = {
        "arguments": output.arguments(args),
        "machine": output.machine(args.device) | {"peers": peers.versions()},
        "adversarial": {},
        "plain": {},
    }
    for norm in ["batch", "group"] if args.norm == "both" else [args.norm]:
        net = workloads.network(args.network, args.width, norm).to(args.device)
        document["adversarial"][norm] = rows = adversarial(net, x, y, norm, args)
        show_adversarial(norm, rows, args)
    for setting in PLAIN if args.peers else []:
        net = workloads.network(args.network, args.width, setting.split()[0]).to(args.device)
        document["plain"][setting] = found = plain(net.train(setting == PLAIN[0]), x, y, args)
        show_plain(setting, found, args)
    return document


def show_adversarial(norm: str, rows: dict[str, Any], args: argparse.Namespace) -> None:
    title = (
        f"PGD-{args.attack_steps} iteration, {NETWORKS[args.network]} of width {args.width}, {norm} norm, n = {args.n}"
    )
    columns = ["optimizer", "s/iteration", "x MSGD", "spread", "in all", "paper", "peak MB"]
    cells = []
    for name, row in rows.items():
        known = row["paper's ratio"]
        paper = "" if known is None else f"{known:.2f}"
        cells.append([
            name, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", f"± {row['spread']:.2f}",
            f"{row['ratio in all']:.2f}", paper, f"{row['peak_megabytes']:.0f}",
        ])  # fmt: skip
    output.show(title, columns, cells)


def show_plain(setting: str, found: dict[str, Any], args: argparse.Namespace) -> None:
    base = found["contenders"]["SGD"]["peak_megabytes"]
    cells = [
        [name, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", f"± {row['spread']:.2f}",
         f"{row['peak_megabytes'] / base - 1:+.0%}"]
        for name, row in found["contenders"].items()
    ]  # fmt: skip
    title = f"plain step, exact clipping, {NETWORKS[args.network]} of width {args.width}, {setting}, n = {args.n}"
    output.show(title, ["", "s/step", "x SGD", "spread", "extra peak"], cells)
    for name, reason in found["cannot run"].items():
        print(f"  {name} cannot run: {reason}")


def draw(document: dict[str, Any], path: Path) -> None:
    """Draws bars on logarithmic scales: measured ratios beside those of the paper's Table 1, and the peers."""
    boxes = len(document["adversarial"]) + len(document["plain"])
    with output.picture(path, 1, boxes, (5.5 * boxes, 5.5)) as axes:
        remaining = iter(axes[0])
        for norm, rows in document["adversarial"].items():
            box = next(remaining)
            paper = [row["paper's ratio"] for row in rows.values()]
            ours = [row["ratio in all"] for row in rows.values()]
            output.bars(box, list(rows), {"measured, in all": ours, "paper, Titan RTX, n = 128": paper})
            attack = f"PGD-{document['arguments']['attack_steps']}"
            box.set_title(f"{attack} iteration, {norm} norm, time / MSGD", fontsize=10)
        for setting, found in document["plain"].items():
            box, rows = next(remaining), found["contenders"]
            output.bars(box, list(rows), {"measured": [row["ratio"] for row in rows.values()]})
            box.set_title(f"plain step, {setting}, time / SGD", fontsize=10)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--norm", choices=["batch", "group", "both"], default="batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--naive-rounds", type=int, default=2, help="rounds of naive ENGM and of the rare steps")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    output.add_options(parser, "table1.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with warnings.catch_warnings():
        for message in ("Full backward hook is firing", "Extension saving to"):  # peers warn; their results are right
            warnings.filterwarnings("ignore", message)
        document = run(args)
    output.save(args.out, document)
    if args.plot:
        draw(document, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
