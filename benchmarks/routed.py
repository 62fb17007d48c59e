"""Networks whose rows are moved or masked by data, otherwise at every step: time of ENGM's step as a ratio to SGD's.

Whose row it is is measured at every step there: a plain and a scaled backward pass without weight gradients come before
the one that norms are taken from. Then networks whose graph is another one at every step, so that where its layers and
parameters are has to be found out each time too; the first step of a recurrence, which measures and compares with
autograd's gradients, for more and more calls; and what that comparison costs a network whose rows stay where they are.

    python benchmarks/routed.py
    python benchmarks/routed.py --calls 100 --rounds 5
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import output
import torch
import torch.nn.functional as F
from interleaved import Step, compare
from torch import Tensor, nn

import engm

N = 16
WIDTH = 192
Losses = Callable[[nn.Module], Tensor]


def block(width: int = WIDTH) -> nn.Module:
    """Layers that work on rows."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Sorted(nn.Module):
    """Sequences ``[n, T, d]`` sorted by their lengths, worked on, and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(block() for _ in range(4)), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        x = x[order]
        for layers in self.blocks:
            x = x + layers(x)
        return self.out(x[order.argsort()].mean(1))


class Graphs(nn.Module):
    """Graphs of many sizes side by side: messages along edges, then the mean of every graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(block() for _ in range(4)), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for layers in self.blocks:
            x = x + layers(x.index_add(0, edges[1], x[edges[0]]))
        return self.out(x.new_zeros(N, WIDTH).index_add(0, graph, x))


class Routed(nn.Module):
    """Tokens that go to the best two of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(block() for _ in range(4))
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, picks = self.router(rows).softmax(1).topk(2, 1)
        mixed = rows
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(picks == number)
            mixed = mixed.index_add(0, row, expert(rows[row]) * weights[row, slot, None])
        return self.out(mixed.view_as(x).mean(1))


class Images(nn.Module):
    """Text in which the features of none, one or several images an example are put at placeholders."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.blocks = block(), nn.ModuleList(block() for _ in range(3))
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, places: Tensor, images: Tensor) -> Tensor:
        x = x.masked_scatter(places.unsqueeze(-1), self.seen(images))
        for layers in self.blocks:
            x = x + layers(x)
        return self.out(x.mean(1))


class Skipped(nn.Module):
    """Twelve blocks, each left out in one step of five."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(block() for _ in range(12)), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layers in self.blocks:
            if torch.rand(()) < 0.8:
                x = x + layers(x)
        return self.out(x.mean(1))


class Looped(nn.Module):
    """A recurrent cell, called once for every step of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return self.out(state[0])


class Sparse(nn.Module):
    """Few tokens that go to the best two of many experts; those that nobody picks are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 64), nn.ModuleList(block() for _ in range(64))
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, picks = self.router(rows).softmax(1).topk(2, 1)
        mixed = rows
        for number in picks.unique().tolist():
            row, slot = torch.where(picks == number)
            mixed = mixed.index_add(0, row, self.experts[number](rows[row]) * weights[row, slot, None])
        return self.out(mixed.view_as(x).mean(1))


def loss(logits: Tensor) -> Tensor:
    """``[n]``."""
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1], reduction="none")


def sorted_losses(net: nn.Module) -> Tensor:
    return loss(net(torch.randn(N, 40, WIDTH), torch.randperm(N)))


def graph_losses(net: nn.Module) -> Tensor:
    sizes = torch.randint(10, 70, (N,))
    graph, starts = torch.repeat_interleave(torch.arange(N), sizes), sizes.cumsum(0) - sizes
    parts = [torch.randint(0, k, (2, 3 * k)) + s for k, s in zip(sizes.tolist(), starts.tolist(), strict=True)]
    return loss(net(torch.randn(len(graph), WIDTH), torch.cat(parts, 1), graph))


def routed_losses(net: nn.Module) -> Tensor:
    return loss(net(torch.randn(N, 40, WIDTH)))


def image_losses(net: nn.Module) -> Tensor:
    places = torch.arange(40) < 8 * torch.randint(0, 4, (N, 1))
    return loss(net(torch.randn(N, 40, WIDTH), places, torch.randn(int(places.sum()), WIDTH)))


def skipped_losses(net: nn.Module) -> Tensor:
    return loss(net(torch.randn(N, 40, WIDTH)))


def looped_losses(net: nn.Module) -> Tensor:
    return loss(net(torch.randn(N, next(LENGTHS), WIDTH)))


def sparse_losses(net: nn.Module) -> Tensor:
    return loss(net(torch.randn(N, 3, WIDTH)))


class Padded(nn.Module):
    """A transformer on sequences with padding, which the mean leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.out((x * ~padding[:, :, None]).sum(1) / lengths[:, None])


def padded_losses(net: nn.Module) -> Tensor:
    return loss(net(torch.randn(N, 40, WIDTH), torch.randint(10, 41, (N,))))


def batched_losses(net: nn.Module) -> Tensor:
    n, length = next(SIZES)
    return loss(net(torch.randn(n, length, WIDTH), torch.randint(length // 2, length + 1, (n,))))


NETWORKS: dict[str, tuple[type[nn.Module], Losses]] = {
    "sequences sorted by length": (Sorted, sorted_losses),
    "graphs of many sizes": (Graphs, graph_losses),
    "tokens routed to experts": (Routed, routed_losses),
    "a varying number of images": (Images, image_losses),
    "another padding mask": (Padded, padded_losses),
    "another length and number of sequences": (Padded, batched_losses),
}
# No two alike within a run; one after the other about as much work.
SIZES = ((640 // length + extra, length) for extra in itertools.count() for length in range(30, 50))
LENGTHS = itertools.count(20)
BUILT_ANEW: dict[str, tuple[type[nn.Module], Losses]] = {
    "blocks left out at random": (Skipped, skipped_losses),
    "a recurrent cell in a loop": (Looped, looped_losses),
    "experts that are called if picked": (Sparse, sparse_losses),
}
COMPARED_AT_FIRST = 16  # new structures, of which a few are compared with autograd's gradients later on


def training_steps(net: nn.Module, losses: Losses) -> dict[str, Step]:
    """A step of SGD and one of ENGM."""
    model = engm.GradNormModule(net)
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.0), 1.0)

    def plain() -> None:
        sgd.zero_grad()
        losses(net).mean().backward()
        sgd.step()

    def clipped() -> None:
        opt.zero_grad()
        opt.backward(losses(model))
        opt.step()

    return {"SGD": plain, "ENGM": clipped}


class Recurrence(nn.Module):
    """One layer called many times."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.cell, self.read, self.out, self.calls = nn.Linear(64, 64), nn.Linear(32, 64), nn.Linear(64, 10), calls

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 64)
        for t in range(self.calls):
            h = torch.tanh(self.read(x[:, t]) + self.cell(h))
        return self.out(h)


def first_step(calls: int) -> tuple[float, float]:
    """Seconds of a plain step, and of the first step of ENGM."""
    x, net = torch.randn(N, calls, 32), Recurrence(calls)
    steps = training_steps(net, lambda model: loss(model(x)))
    steps["SGD"]()
    seconds = []
    for name in ("SGD", "ENGM"):
        start = time.perf_counter()
        steps[name]()
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def checked_every_step() -> dict[str, Step]:
    """A step of SGD on a convolutional network, ENGM's, and ENGM's with a comparison with autograd's gradients."""
    layers: list[nn.Module] = []
    for width in (32, 32, 64, 64):
        previous = 3 if not layers else layers[-3].out_channels
        layers += [nn.Conv2d(previous, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    x = torch.randn(N, 3, 32, 32)
    steps = training_steps(net, lambda model: loss(model(x)))
    model = engm.GradNormModule(net, check_every=1)
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.0), 1.0)

    def checked() -> None:
        opt.zero_grad()
        opt.backward(loss(model(x)))
        opt.step()

    return steps | {"ENGM, checked": checked}


def timed(network: type[nn.Module], losses: Losses, rounds: int, before: int = 0) -> dict[str, dict[str, float]]:
    """The time of SGD's and ENGM's steps, after some steps of ENGM."""
    steps = training_steps(network(), losses)
    for _ in range(before):
        steps["ENGM"]()
    return {name: timing.as_json() for name, timing in compare(steps, reference="SGD", rounds=rounds).items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, nargs="*", default=[100, 400, 1600, 3200])
    parser.add_argument("--out", type=Path, default=output.RESULTS / "routed.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    moved = {name: timed(*network, options.rounds) for name, network in NETWORKS.items()}
    anew = {name: timed(*network, options.rounds, COMPARED_AT_FIRST) for name, network in BUILT_ANEW.items()}
    first = []
    for calls in options.calls:
        plain, measured = first_step(calls)
        first.append({"calls": calls, "plain_seconds": round(plain, 4), "ratio": round(measured / plain, 1)})
    checked = compare(checked_every_step(), reference="SGD", rounds=options.rounds)
    share = (checked["ENGM, checked"].ratio - checked["ENGM"].ratio) / checked["ENGM"].ratio / 200
    tables = {"data-routed rows, otherwise at every step": moved, "another graph at every step": anew}
    for title, steps in tables.items():
        rows = [
            (name, f"{row['SGD']['seconds'] * 1e3:.1f}", f"{row['ENGM']['ratio']:.2f} ± {row['ENGM']['spread']:.2f}")
            for name, row in steps.items()
        ]
        output.show(title, ["network", "SGD, ms", "ENGM / SGD"], rows)
    output.show(
        "the first step of a recurrence",
        ["calls", "SGD, ms", "first step / SGD"],
        [(str(row["calls"]), f"{row['plain_seconds'] * 1e3:.1f}", f"{row['ratio']:.1f}") for row in first],
    )
    print(f"\na comparison with autograd's gradients every 200 steps takes {share:.2%} of ENGM's time")
    comparison = {name: timing.as_json() for name, timing in checked.items()} | {"share": round(share, 5)}
    document = {
        "machine": output.machine(),
        "steps": moved,
        "built_anew": anew,
        "first_step": first,
        "comparison": comparison,
    }
    output.save(options.out, document)


if __name__ == "__main__":
    main()
