"""A model, not a measurement: what a step of SGD and of ENGM would take on more and more devices.

All assumptions are arguments. Every device has the same share of work at any world size (weak scaling) and the
same link, on which messages follow one another. A ring all-reduce of S bytes over p devices takes
2 (p - 1) latency + 2 (p - 1) / p S / bandwidth, an all-gather or reduce-scatter half of that (Thakur et al. 2005).
Gradients become ready at an even pace and are reduced in buckets, as DistributedDataParallel does: in the backward pass
of the parameters (SGD, ENGM by reweight), or while the weighted sums are formed (ENGM in one pass). Under fully_shard
the parameters lie in equal parts; each is gathered before it runs, forwards and backwards, while the part before it
computes, and its gradient is scattered afterwards. Activations' gradients, parameters' gradients and weighted sums take
as long as a forward pass each. Stragglers, congestion, kernels slowed by traffic and the optimizer's step are left out.

    python benchmarks/scaling_simulation.py
    python benchmarks/scaling_simulation.py --parameters 46.16e6 --forward 60 --bandwidth 5 --attack-steps 10
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import output

NUMBER, NORM = 8, 4  # bytes of a statistic, and of a norm


@dataclass(frozen=True)
class Link:
    """One device's connection to its neighbours in the ring."""

    latency: float  # seconds a message
    bandwidth: float  # bytes a second
    world: int

    def all_gather(self, size: float) -> float:
        """Seconds to give every device all ``size`` bytes; a reduce-scatter takes as long."""
        return (self.world - 1) * (self.latency + size / self.world / self.bandwidth)

    def all_reduce(self, size: float) -> float:
        """Seconds to sum ``size`` bytes over the devices."""
        return 2 * self.all_gather(size)


@dataclass(frozen=True)
class Work:
    """One device's share of a step.

    Attributes:
        forward: seconds of a forward pass; the gradients of all activations take as long, and so do those of all
            parameters.
        norms: seconds of per-example norms.
        attack_steps: forward and backward passes without parameters' gradients before the step.
        size: bytes of all parameters.
        parts: how many parts ``fully_shard`` splits the network into.
        bucket: bytes of a bucket of DistributedDataParallel.
    """

    forward: float
    norms: float
    attack_steps: int
    size: float
    parts: int
    bucket: float


def reduced(work: Work, link: Link, start: float, end: float) -> float:
    """When the last bucket is summed, if gradients become ready at an even pace from ``start`` to ``end``."""
    free, done = start, 0.0
    while done < work.size:
        part = min(work.bucket, work.size - done)
        done += part
        free = max(free, start + (end - start) * done / work.size) + link.all_reduce(part)
    return max(free, end)


def ddp_steps(work: Work, link: Link) -> dict[str, float]:
    """Seconds of a step under DistributedDataParallel, by method."""
    passed = (2 * work.attack_steps + 1) * work.forward
    normed = passed + work.forward + work.norms
    return {
        "SGD": reduced(work, link, passed, passed + 2 * work.forward),
        "ENGM, one pass": reduced(work, link, normed, normed + work.forward),
        "ENGM, reweighted": reduced(work, link, normed, normed + 2 * work.forward),
    }


def sharded_pass(work: Work, link: Link, seconds: float, *, scatters: bool = False) -> float:
    """Seconds of a pass through all parts that computes for ``seconds``."""
    transfer = link.all_gather(work.size / work.parts)
    computed, gathered = 0.0, transfer
    free = gathered  # when the link has nothing more to do
    for part in range(work.parts):
        began = max(computed, gathered)
        if part < work.parts - 1:
            gathered = free = max(free, began) + transfer
        computed = began + seconds / work.parts
        if scatters:
            free = max(free, computed) + transfer
    return max(computed, free)


def sharded_steps(work: Work, link: Link) -> dict[str, float]:
    """Seconds of a step under fully_shard, by method; every part is freed after every pass."""
    plain = (2 * work.attack_steps + 1) * sharded_pass(work, link, work.forward)
    normed = sharded_pass(work, link, work.forward + work.norms)
    backward = sharded_pass(work, link, 2 * work.forward, scatters=True)
    return {"SGD, sharded": plain + backward, "ENGM, sharded": plain + normed + backward}


def statistics(link: Link, args: argparse.Namespace) -> dict[str, float]:
    """Mean seconds a step for what is estimated from all ranks; nothing overlaps with them."""
    world = link.world
    return {
        "calibration": link.all_reduce(2 * args.tensors * NUMBER) / args.calibrate_every,
        "A-ENGM": (link.all_reduce(3 * NUMBER) + link.all_reduce(4 * NUMBER)) / args.tau,
        "alpha='auto'": link.all_gather(world * NUMBER) + link.all_gather(world * args.examples * NORM),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=11.17e6, help="default: ResNet-18")
    parser.add_argument("--tensors", type=int, default=62)
    parser.add_argument("--bytes", type=int, default=4, help="bytes of a parameter and of its gradient")
    parser.add_argument("--examples", type=int, default=128, help="examples on one device")
    parser.add_argument("--forward", type=float, default=10.0, help="milliseconds of a forward pass")
    parser.add_argument("--norms", type=float, default=0.8, help="time of per-example norms, in forward passes")
    parser.add_argument("--attack-steps", type=int, default=0, help="forward and backward passes before the step")
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds a message")
    parser.add_argument("--bandwidth", type=float, default=10.0, help="GB/s of a device's link")
    parser.add_argument("--bucket", type=float, default=25.0, help="megabytes of a bucket of DistributedDataParallel")
    parser.add_argument("--parts", type=int, default=10, help="parts that fully_shard splits the network into")
    parser.add_argument("--calibrate-every", type=int, default=50, help="steps between two calibrations")
    parser.add_argument("--tau", type=int, default=50, help="steps between two regressions of A-ENGM")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8, 16, 64, 256])
    return parser.parse_args(arguments)


def simulate(args: argparse.Namespace, world: int) -> dict[str, dict[str, float]]:
    """What ``world`` devices take: seconds of a step by method and of statistics, and bytes that a device sends."""
    forward, size = args.forward / 1e3, args.parameters * args.bytes
    work = Work(forward, args.norms * forward, args.attack_steps, size, args.parts, args.bucket * 2**20)
    link = Link(args.latency / 1e6, args.bandwidth * 1e9, world)
    share = (world - 1) / world * size
    passes = 2 * args.attack_steps  # of the attack, which gather the parameters too
    return {
        "steps": ddp_steps(work, link) | sharded_steps(work, link),
        "statistics": statistics(link, args),
        "bytes": {"DDP": 2 * share, "SGD, sharded": (3 + passes) * share, "ENGM, sharded": (4 + passes) * share},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    alone = simulate(args, 1)
    found = {world: simulate(args, world) for world in args.worlds}
    print("A MODEL, under the assumptions at the head of this script: nothing here was measured.")
    output.show(
        "milliseconds a step, and the share of it that one device alone would need",
        ["devices", *alone["steps"]],
        [
            [str(world), *(f"{1e3 * t:.1f} {alone['steps'][name] / t:4.0%}" for name, t in each["steps"].items())]
            for world, each in {1: alone, **found}.items()
        ],
    )
    output.show(
        "besides, microseconds a step for what is estimated from the batch of all devices",
        ["devices", *alone["statistics"]],
        [[str(world), *(f"{1e6 * t:.1f}" for t in each["statistics"].values())] for world, each in found.items()],
    )
    output.show(
        "megabytes that a device sends in a step",
        ["devices", *alone["bytes"]],
        [[str(world), *(f"{size / 1e6:.0f}" for size in each["bytes"].values())] for world, each in found.items()],
    )


if __name__ == "__main__":
    main()
