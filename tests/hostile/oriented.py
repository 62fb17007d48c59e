"""Random programs on tensors whose examples lie along any dimension: in front, behind, beside others in one dimension.

Examples are gated, masked and weighted otherwise at every step, so that rows and elements that had no gradient get one
later. In one program of five examples may meet, behind gates too: it is right, or refused, and always right with
``coupled="exact"``.

    python tests/hostile/oriented.py FIRST LAST     run the programs of these seeds, and say which are wrong or refused
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "support")]

from oracle import per_example_gradients, trained

import engm
from engm.checks import RefusedError

# What lies along a dimension: examples, features, or both, of which the first named varies slowest.
EXAMPLES, FEATURES, EXAMPLES_OF_FEATURES, FEATURES_OF_EXAMPLES = "e", "f", "ef", "fe"
Dims = tuple[tuple[str, int], ...]  # of every dimension what lies along it, and how many features
STEPS = 8
ROUNDING = 1e-13  # of norms: what sums of numbers of the size of 1 leave where they cancel


class Data:
    """What a step brings beside the input, by the number of its place in the program."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.generator = torch.Generator().manual_seed(seed)

    def gates(self) -> Tensor:
        """``[n]`` of zeros and ones, of which one may be much smaller."""
        gates = (torch.rand(self.n, generator=self.generator, dtype=torch.float64) < 0.6).double()
        return gates * (1e-9 if torch.rand((), generator=self.generator) < 0.1 else 1.0)

    def chance(self) -> float:
        """A number from 0 to 1."""
        return float(torch.rand((), generator=self.generator))

    def order(self) -> Tensor:
        """``[n]``, the examples in any order."""
        return torch.randperm(self.n, generator=self.generator)

    def mask(self, shape: torch.Size) -> Tensor:
        """Zeros and ones of any shape."""
        return (torch.rand(shape, generator=self.generator, dtype=torch.float64) < 0.5).double()


Operation = Callable[[Tensor, Data], Tensor]


class Program(nn.Module):
    """A sequence of operations on one tensor, and what its dimensions are in between.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.drawn = random.Random(seed)
        torch.manual_seed(seed)
        self.dims: Dims = (
            (EXAMPLES, 1),
            *((FEATURES, self.drawn.randint(2, 4)) for _ in range(self.drawn.randint(1, 2))),
        )
        self.shape = tuple(size for _, size in self.dims[1:])
        self.layers = nn.ModuleList()
        self.own = nn.ParameterList()
        self.names: list[str] = []
        self.operations: list[tuple[Operation, Dims]] = []
        self.kept: list[tuple[int, Dims]] = []  # values that may be read again, by number
        kinds = [getattr(self, name) for name in dir(self) if name.startswith("make_")]
        kinds += 4 * [self.a_meeting] if seed % 5 == 4 else []
        self.meets = False
        while len(self.operations) < 3 + seed % 8:
            made = self.drawn.choice(kinds)()
            if made is not None:
                self.names.append(made[0])
                self.operations.append(made[1:])
                self.dims = made[2]
        self.end = self.split_all()
        self.leaves_out = self.drawn.random() < 0.3  # operations, at some steps
        self.double()

    # -- kinds of operations: each gives its name, itself, and the dimensions afterwards; None where it does not fit

    def places(self, *kinds: str) -> list[int]:
        return [place for place, (kind, _) in enumerate(self.dims) if kind in kinds]

    def with_size(self, place: int, size: int) -> Dims:
        dims = list(self.dims)
        dims[place] = FEATURES, size
        return tuple(dims)

    def without(self, place: int) -> Dims:
        return tuple(dim for number, dim in enumerate(self.dims) if number != place)

    def parameter(self, *shape: int) -> int:
        self.own.append(nn.Parameter(torch.randn(shape)))
        return len(self.own) - 1

    def a_feature(self) -> int | None:
        places = self.places(FEATURES)
        return self.drawn.choice(places) if places else None

    def view_of(self, place: int, rank: int) -> list[int]:
        return [-1 if number == place else 1 for number in range(rank)]

    def make_swap(self):
        if len(self.dims) < 2:
            return None
        first, second = self.drawn.sample(range(len(self.dims)), 2)
        dims = list(self.dims)
        dims[first], dims[second] = dims[second], dims[first]
        copies = self.drawn.random() < 0.3
        return (
            "swap",
            lambda t, d: t.transpose(first, second).contiguous() if copies else t.transpose(first, second),
            tuple(dims),
        )

    def make_merge(self):
        pairs = [
            k
            for k in range(len(self.dims) - 1)
            if {self.dims[k][0], self.dims[k + 1][0]} in ({EXAMPLES, FEATURES}, {FEATURES})
        ]
        if not pairs:
            return None
        k = self.drawn.choice(pairs)
        kind = "".join(dict.fromkeys(self.dims[k][0] + self.dims[k + 1][0]))
        merged = kind, self.dims[k][1] * self.dims[k + 1][1]
        return "merge", lambda t, d: t.flatten(k, k + 1), (*self.dims[:k], merged, *self.dims[k + 2 :])

    def split_at(self, dims: Dims, k: int) -> tuple[Operation, Dims]:
        kind, size = dims[k]
        parts = (EXAMPLES, 1), (FEATURES, size)
        first = kind == EXAMPLES_OF_FEATURES
        after = (*dims[:k], *(parts if first else parts[::-1]), *dims[k + 1 :])
        return lambda t, d: t.unflatten(k, (d.n, size) if first else (size, d.n)), after

    def make_split(self):
        places = self.places(EXAMPLES_OF_FEATURES, FEATURES_OF_EXAMPLES)
        return ("split", *self.split_at(self.dims, self.drawn.choice(places))) if places else None

    def split_all(self) -> Operation:
        """Brings the examples to the front, each with all that is its own behind it."""
        found, dims = [], self.dims
        for place in reversed(self.places(EXAMPLES_OF_FEATURES, FEATURES_OF_EXAMPLES)):
            operation, dims = self.split_at(dims, place)
            found.append(operation)
        (at,) = [k for k, (kind, _) in enumerate(dims) if kind == EXAMPLES]

        def end(t: Tensor, d: Data) -> Tensor:
            for operation in found:
                t = operation(t, d)
            return t.movedim(at, 0).reshape(d.n, -1)

        return end

    def make_layer(self):
        if self.dims[-1][0] != FEATURES:
            return None
        size = self.drawn.randint(2, 4)
        self.layers.append(nn.Linear(self.dims[-1][1], size, bias=self.drawn.random() < 0.5))
        layer = self.layers[-1]
        return "layer", lambda t, d: layer(t), self.with_size(len(self.dims) - 1, size)

    def make_in_front(self):
        if len(self.dims) < 2 or self.dims[-2][0] != FEATURES:
            return None
        size = self.drawn.randint(2, 4)
        weight = self.parameter(size, self.dims[-2][1])
        return "in front", lambda t, d: self.own[weight] @ t, self.with_size(len(self.dims) - 2, size)

    def make_contraction(self):
        place = self.a_feature()
        if place is None:
            return None
        size = self.drawn.randint(2, 4)
        weight = self.parameter(self.dims[place][1], size)
        return (
            "contraction",
            lambda t, d: torch.tensordot(t, self.own[weight], ([place], [0])).movedim(-1, place),
            self.with_size(place, size),
        )

    def make_scale(self):
        place = self.a_feature()
        if place is None:
            return None
        weight, view = self.parameter(self.dims[place][1]), self.view_of(place, len(self.dims))
        adds = self.drawn.random() < 0.5
        return (
            "shift" if adds else "scale",
            lambda t, d: t + self.own[weight].view(view) if adds else t * self.own[weight].view(view),
            self.dims,
        )

    def make_table(self):
        sizes = [size if kind == FEATURES else 1 for kind, size in self.dims]
        weight = self.parameter(*sizes)
        return "table", lambda t, d: t + torch.tanh(self.own[weight]), self.dims

    def make_gate(self):
        dims = self.dims

        def gate(t: Tensor, d: Data) -> Tensor:
            return t * spread(d.gates(), dims)

        return "gate", gate, dims

    def make_shared_branch(self):
        weight, dims = self.parameter(3), self.dims
        given = torch.randn(3, dtype=torch.float64)

        def branch(t: Tensor, d: Data) -> Tensor:
            return t + spread(d.gates() * (2 * d.gates() - 1), dims) * (self.own[weight] * given).sum().tanh()

        return "shared branch", branch, dims

    def make_mask(self):
        return "mask", lambda t, d: t * d.mask(t.shape), self.dims

    def make_function(self):
        name, function = self.drawn.choice(
            [
                ("tanh", torch.tanh),
                ("relu", torch.relu),
                ("hinge", lambda t: (t - 0.5).clamp_min(0)),
                ("abs", torch.abs),
                ("square", lambda t: 0.3 * t * t),
                ("where", lambda t: torch.where(t > 0, t, t.exp() - 1)),
            ]
        )
        return name, lambda t, d: function(t), self.dims

    def make_along(self):
        place = self.a_feature()
        if place is None:
            return None
        name, function = self.drawn.choice(
            [
                ("softmax", lambda t: t.softmax(place)),
                ("normalize", lambda t: F.normalize(t, dim=place)),
                ("sort", lambda t: t.sort(place).values),
                ("cumsum", lambda t: t.cumsum(place)),
                ("flip", lambda t: t.flip(place)),
                ("roll", lambda t: t.roll(1, place)),
                ("centre", lambda t: t - t.mean(place, keepdim=True)),
            ]
        )
        return name, lambda t, d: function(t), self.dims

    def make_reduction(self):
        place = self.a_feature()
        if place is None or len(self.dims) < 2:
            return None
        name, function = self.drawn.choice(
            [
                ("sum", lambda t: t.sum(place)),
                ("amax", lambda t: t.amax(place)),
                ("min", lambda t: t.min(place).values),
                ("norm", lambda t: (t.square().sum(place) + 1e-3).sqrt()),
                ("logsumexp", lambda t: t.logsumexp(place)),
                ("select", lambda t: t.select(place, 0)),
                ("median", lambda t: t.median(place).values),
            ]
        )
        return name, lambda t, d: function(t), self.without(place)

    def make_topk(self):
        place = self.a_feature()
        if place is None or self.dims[place][1] < 2:
            return None
        return "topk", lambda t, d: t.topk(2, place).values, self.with_size(place, 2)

    def make_shuffle(self):
        """Moves the examples about, does something to each, and moves them back."""
        places = self.places(EXAMPLES)
        if not places:
            return None
        place = places[0]
        functional = self.dims[-1][0] == FEATURES
        if functional:
            self.layers.append(nn.Linear(self.dims[-1][1], self.dims[-1][1]))
        layer = self.layers[-1] if functional else torch.tanh

        def shuffle(t: Tensor, d: Data) -> Tensor:
            order = d.order()
            return layer(t.index_select(place, order)).index_select(place, order.argsort())

        return "shuffle", shuffle, self.dims

    def make_beside(self):
        """Something computed beside the tensor, put next to it."""
        place = self.a_feature()
        if place is None:
            return None
        weight, view = self.parameter(self.dims[place][1]), self.view_of(place, len(self.dims))
        return (
            "beside",
            lambda t, d: torch.cat([t, torch.tanh(t * self.own[weight].view(view))], place),
            self.with_size(place, 2 * self.dims[place][1]),
        )

    def make_layer_again(self):
        """A layer that was called before, on other rows."""
        fitting = [k for k in self.layers if k.in_features == self.dims[-1][1]] if self.dims[-1][0] == FEATURES else []
        if not fitting:
            return None
        layer = self.drawn.choice(fitting)
        return "layer again", lambda t, d: layer(t), self.with_size(len(self.dims) - 1, layer.out_features)

    def make_parameter_again(self):
        """A parameter that was read before, by another operator."""
        place = self.a_feature()
        if place is None:
            return None
        fitting = [k for k, p in enumerate(self.own) if p.dim() == 2 and p.shape[0] == self.dims[place][1]]
        if not fitting:
            return None
        weight = self.drawn.choice(fitting)
        return (
            "parameter again",
            lambda t, d: torch.tensordot(t, self.own[weight].tanh(), ([place], [0])).movedim(-1, place),
            self.with_size(place, self.own[weight].shape[1]),
        )

    def make_experts(self):
        """Examples go to one of two layers or to none, as the batch says."""
        if self.dims[0][0] != EXAMPLES or self.dims[-1][0] != FEATURES or len(self.dims) < 2:
            return None
        size = self.dims[-1][1]
        self.layers.extend(nn.Linear(size, size) for _ in range(2))
        experts = list(self.layers[-2:])
        adds = self.drawn.random() < 0.5

        def route(t: Tensor, d: Data) -> Tensor:
            to = torch.randint(3, (d.n,), generator=d.generator)
            out = torch.zeros_like(t)
            for number, expert in enumerate(experts):
                rows = (to == number).nonzero().flatten()
                if adds:
                    out = out.index_add(0, rows, expert(t[rows]))
                else:
                    out = out.index_put((rows,), torch.tanh(expert(t[to == number])))
            return out + 0.1 * t

        return "experts", route, self.dims

    def make_take(self):
        """Features by indices, of each element's own, with repetitions."""
        place = self.a_feature()
        if place is None:
            return None
        size = self.dims[place][1]

        def take(t: Tensor, d: Data) -> Tensor:
            return t.take_along_dim(torch.randint(size, t.shape, generator=d.generator), place)

        return "take", take, self.dims

    def make_scatter(self):
        place = self.a_feature()
        if place is None:
            return None
        size, reduce = self.dims[place][1], self.drawn.choice(["sum", "amax", "mean"])

        def scatter(t: Tensor, d: Data) -> Tensor:
            index = torch.randint(size, t.shape, generator=d.generator)
            return (0.5 * t).scatter_reduce(place, index, t, reduce)

        return f"scatter {reduce}", scatter, self.dims

    def make_convolution(self):
        if len(self.dims) != 3 or self.dims[0][0] == FEATURES or {kind for kind, _ in self.dims[1:]} != {FEATURES}:
            return None
        self.layers.append(layer := nn.Conv1d(self.dims[1][1], self.dims[1][1], 3, padding=1))
        layer.in_features = -1  # no other calls it
        return "convolution", lambda t, d: layer(t), self.dims

    def make_pool(self):
        if self.dims[-1][0] != FEATURES or len(self.dims) not in (2, 3):
            return None
        function = self.drawn.choice([F.max_pool1d, F.avg_pool1d])
        return function.__name__, lambda t, d: function(t, 3, 1, 1), self.dims

    def make_attention(self):
        """Between the features of two dimensions, of every example."""
        if len(self.dims) != 3 or [kind for kind, _ in self.dims] != [EXAMPLES, FEATURES, FEATURES]:
            return None
        weight = self.parameter(self.dims[2][1], self.dims[2][1])
        blocked = self.drawn.random() < 0.5

        def attend(t: Tensor, d: Data) -> Tensor:
            scores = t @ self.own[weight] @ t.mT
            if blocked:
                scores = scores.masked_fill(d.mask(scores.shape) > 0.7, -30.0)
            return scores.softmax(-1) @ t

        return "attention", attend, self.dims

    def make_norm(self):
        if self.dims[-1][0] != FEATURES or self.dims[-1][1] < 2:
            return None
        kind = self.drawn.choice([nn.LayerNorm, nn.RMSNorm])
        self.layers.append(layer := kind(self.dims[-1][1]))
        layer.in_features = -1
        return kind.__name__, lambda t, d: layer(t), self.dims

    def make_window(self):
        """A slice is written into."""
        place = self.a_feature()
        if place is None:
            return None
        weight = self.parameter(1)

        def write(t: Tensor, d: Data) -> Tensor:
            t = t.clone()
            t.select(place, 0).mul_(self.own[weight])
            return t

        return "window", write, self.dims

    def a_meeting(self):
        """The examples influence each other."""
        places = self.places(EXAMPLES)
        if not places:
            return None
        place, dims = places[0], self.dims
        name, function = self.drawn.choice(
            [
                ("centre over the batch", lambda t: t - t.mean(place, keepdim=True)),
                ("softmax over the batch", lambda t: t.softmax(place)),
                ("neighbours", lambda t: t - 0.5 * t.roll(1, place)),
                ("maximum of the batch", lambda t: t - t.amax(place, keepdim=True)),
                ("sum of the batch", lambda t: t + 0.1 * t.sum(place, keepdim=True)),
            ]
        )
        gated, self.meets = self.drawn.random() < 0.7, True

        def meet(t: Tensor, d: Data) -> Tensor:
            if not gated:
                return function(t)
            return t + spread(d.gates() * d.gates(), dims) * function(t * spread(d.gates(), dims))

        return name, meet, dims

    # -- running -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, data: Data) -> Tensor:
        before = ((EXAMPLES, 1), *((FEATURES, size) for size in self.shape))
        for operation, after in self.operations:
            left_out = self.leaves_out and before == after and data.chance() < 0.3
            x = x if left_out else operation(x, data)
            before = after
        return self.end(x, data)

    def losses(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """``[n]``, of a batch that belongs to the step; n differs now and then."""
        n = 2 + (seed + (step == STEPS - 2)) % 5
        data = Data(n, 1000 * seed + step)
        x = torch.randn(n, *self.shape, generator=data.generator, dtype=torch.float64)
        out = model(x * spread(data.gates(), ((EXAMPLES, 1), *((FEATURES, s) for s in self.shape))), data)
        weights = torch.linspace(-1, 1, out.shape[1], dtype=torch.float64)
        each = (out * weights + 0.3 * out.square()).sum(1)
        return each * data.gates() if seed % 3 == 0 else each


def spread(numbers: Tensor, dims: Dims) -> Tensor:
    """Numbers of the examples ``[n]``, such that they broadcast against a tensor of such dimensions."""
    (place,) = [k for k, (kind, _) in enumerate(dims) if kind != FEATURES]
    kind, size = dims[place]
    if kind == EXAMPLES_OF_FEATURES:
        numbers = numbers.repeat_interleave(size)
    elif kind == FEATURES_OF_EXAMPLES:
        numbers = numbers.repeat(size)
    return numbers.view([-1 if k == place else 1 for k in range(len(dims))])


def failures(seed: int) -> Iterator[str]:
    """What is wrong with the norms and updates of the program of a seed, step by step."""
    net = Program(seed)
    if not trained(net):
        return
    yield from _failures(net, seed, "refuse")
    if net.meets:
        yield from _failures(net, seed, "exact")


def _failures(net: Program, seed: int, coupled: str) -> Iterator[str]:
    model = engm.GradNormModule(net, coupled=coupled)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.0), 0.5)
    for step in range(STEPS):
        plain = net.losses(net, step, seed)
        if not plain.requires_grad:
            return
        expected = per_example_gradients(plain, trained(net))
        opt.zero_grad()
        try:
            stats = opt.backward(net.losses(model, step, seed))
        except RefusedError as error:
            if net.meets and coupled == "refuse" and "influences the losses of other examples" in str(error):
                continue
            yield f"step {step}, {coupled}: {str(error)[:150]}"
            return
        error = (stats.norms - expected.norms).abs()
        if not (error <= 1e-9 * expected.norms + ROUNDING).all():
            yield f"step {step}, {coupled}: norms are {(error / expected.norms).max():.1e} off"
        for name, wanted in expected.update(stats.weights).items():
            parameter = net.get_parameter(name)
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if not float((found - wanted).abs().max()) <= 1e-9 * (1 + float(expected.norms.max())):
                yield f"step {step}, {coupled}: the update of {name} is wrong"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        for said in failures(seed):
            print(seed, Program(seed).names, said, flush=True)
