"""Small networks under every optimizer, trained by steps that are recorded or done by hand, and what these leave."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import engm

SIDE, N, CLASSES = 6, 5, 3
# torch 2.11 traces neither quantiles, whose operator reads a value there, nor generators: such steps run eagerly.
TRACES_ALL = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


class Images(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(), nn.Dropout(0.2)),
        )
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Sequences(nn.Module):
    """An LSTM or a transformer over the rows of an image."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(12, CLASSES)

    def forward(self, x):
        found = self.layer(x.transpose(1, 2).flatten(2))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


NETWORKS = {
    "group norm": lambda: Images(lambda c: nn.GroupNorm(2, c)),
    "batch norm": lambda: Images(nn.BatchNorm2d),
    "transformer": lambda: Sequences(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)),
    "LSTM": lambda: Sequences(nn.LSTM(12, 12, batch_first=True)),
}


def engm_of(model, sgd):
    return engm.ENGM(model, sgd, 0.5)


OPTIMIZERS = {
    "ENGM": engm_of,
    "ENGM auto": lambda model, sgd: engm.ENGM(model, sgd, "auto"),
    "MSGD": engm.MSGD,
    "A-ENGM": lambda model, sgd: engm.AENGM(model, sgd, 0.5, tau=10),
    "N-ENGM": lambda model, sgd: engm.NENGM(model, sgd, 0.05),
    "SNGM": engm.SNGM,
    "GNC": lambda model, sgd: engm.GNC(model, sgd, 0.5),
    "F-ENGM": lambda model, sgd: engm.FENGM(model, sgd),
}


class Training:
    """A network with its optimizer, and a step that calls both by hand or as a recorded one."""

    backend = "replay"

    def __init__(self, net, optimizer=engm_of, attacked=False, **options):
        self.model = engm.GradNormModule(net, **options)
        self.opt = optimizer(self.model, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9))
        self.attacked = attacked
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.opt, [7])
        self.recorded = engm.record(self.opt, self.losses, backend=self.backend)

    def losses(self, x, y):
        if not self.attacked:
            return F.cross_entropy(self.model(x), y, reduction="none")
        self.model.eval()
        x_adv = (x + 0.1 * torch.rand_like(x)).requires_grad_()
        with self.model.paused():
            (slope,) = torch.autograd.grad(F.cross_entropy(self.model(x_adv), y, reduction="sum"), x_adv)
        x_adv = (x_adv + 0.1 * slope.sign()).detach().requires_grad_()
        losses = F.cross_entropy(self.model(x_adv), y, reduction="none")
        measured = engm.measure(self.model, losses, x_adv, norms=self.opt.needs_norms)
        x_adv = (x_adv + 0.1 * measured.input_grads.sign()).detach()
        self.model.train()
        return F.cross_entropy(self.model(x_adv), y, reduction="none"), measured

    def by_hand(self, x, y):
        found = self.losses(x, y)
        return self.opt.backward(*found[:1], measurement=found[1]) if self.attacked else self.opt.backward(found)

    def go(self, step, batches, seed=0):
        """Steps over the batches, and everything that they leave."""
        figures = []
        for number, (x, y) in enumerate(batches):
            torch.manual_seed(seed + number)
            stats = step(x, y)
            figures.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(stats).items()})
            self.opt.step()
            self.opt.zero_grad()
            self.schedule.step()
        return figures, copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.opt.state_dict())


def batches(count, sizes=(N,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, SIDE, SIDE, generator=generator), torch.randint(CLASSES, (n,), generator=generator))
        for n in (sizes[k * len(sizes) // count] for k in range(count))
    ]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
