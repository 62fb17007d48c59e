"""Values of tensors that Python is given while a step is recorded: the step is refused, and trained as by hand."""

import copy
import ctypes
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded_training import Training, same
from torch import nn

import engm
from engm.recording.program import recorded
from engm.recording.state import Before

pytestmark = pytest.mark.torch_insides

WIDTH = 4


class Reading(nn.Module):
    """A network that does something with its hidden layer and a tensor of integers of the batch."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.register_buffer("table", torch.tensor([2, 3]))

    def forward(self, x, numbers):
        return self.b(self.how(self, torch.tanh(self.a(x)), numbers)).square().sum(1)


def steps(how, numbers, record):
    """What steps leave that see another tensor of integers each, and the report of the recorded ones."""
    torch.manual_seed(3)
    model = engm.GradNormModule(Reading(how), strict=False)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 0.5)
    step = engm.record(opt, model) if record else lambda x, numbers: opt.backward(model(x, numbers))
    left = []
    for each in numbers:
        left.append(dict(vars(step(torch.randn(3, 3), torch.tensor(each)))))
        opt.step()
        opt.zero_grad()
    return (left, copy.deepcopy(model.state_dict())), step.report() if record else None


def compared(how, numbers=([0, 1], [0, 1], [1, 2], [3, 3], [0, 2])):
    """The report of recorded steps that leave the bits that steps by hand leave."""
    found, report = steps(how, numbers, record=True)
    expected, _ = steps(how, numbers, record=False)
    assert same(found, expected), report
    return report


class Reverse(torch.autograd.Function):
    """Hands on its input, and backwards the gradient times what is in a tensor."""

    @staticmethod
    def forward(ctx, x, numbers):
        ctx.save_for_backward(numbers)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (numbers,) = ctx.saved_tensors
        return -gradient * (1 + sum(numbers.tolist())), None


def reads_in_an_inner_pass(net, h, numbers):
    with torch.enable_grad():
        point = h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(Reverse.apply(point, numbers).sum(), point)
    return h * slope


def catches_the_refusal(net, h, numbers):
    try:
        return h * (1 + max(numbers.tolist()))
    except RuntimeError:
        return h


def through_a_pointer(net, h, numbers):
    return h * (1 + ctypes.cast(numbers.data_ptr(), ctypes.POINTER(ctypes.c_int64))[1])


READS = {
    "Tensor.tolist": lambda net, h, t: h * (1 + max(t.tolist())),
    "Tensor.tolist of what was computed": lambda net, h, t: h * (1 + max((2 * t).tolist())),
    "Tensor.tolist of a parameter": lambda net, h, t: h * sum(net.b.bias.tolist()),
    "Tensor.numpy": lambda net, h, t: h * float(t.numpy().max()),
    "Tensor.__array__": lambda net, h, t: h * float(np.asarray(t).max()),
    "Tensor.__dlpack__": lambda net, h, t: h * (1 + torch.from_dlpack(t)[0]),
    "Tensor.__repr__": lambda net, h, t: h * (1 + len(str(10**t))),
    "Tensor.__format__": lambda net, h, t: h * (1 + len(f"{10**t}")),
    "Tensor.__deepcopy__": lambda net, h, t: h * (1 + copy.deepcopy(t)[0]),
    "Tensor.untyped_storage": lambda net, h, t: h * (1 + pickle.loads(pickle.dumps(t))[0]),
    "Tensor.data_ptr": through_a_pointer,
    "torch.tensor": lambda net, h, t: h * torch.tensor([t[0], t[1], 1, 1]),
    "torch.as_tensor": lambda net, h, t: h * torch.as_tensor([t[0], t[1], 1, 1]),
    "Tensor.new_tensor": lambda net, h, t: h * h.new_tensor([t[0], t[1], 1, 1]),
    "Tensor.__float__": lambda net, h, t: h * torch.FloatTensor([t[0], t[1], 1, 1]),
    "Tensor.__getitem__": lambda net, h, t: h[:, [t[0], t[1]]].repeat(1, 2),
    "torch.tensor_split": lambda net, h, t: torch.cat(
        [k * part for k, part in enumerate(torch.tensor_split(h, t, 1))], 1
    ),
    "Tensor.tolist in a backward pass": lambda net, h, t: Reverse.apply(h, t),
    "Tensor.tolist in an inner pass": reads_in_an_inner_pass,
    "Tensor.tolist, caught": catches_the_refusal,
}


@pytest.mark.parametrize("name", READS)
def test_what_python_is_given_of_a_tensor_is_not_baked_into_a_program(name):
    report = compared(READS[name])
    assert report.recorded == 0, report
    (reason,) = report.refused
    words = (
        f"'{re.escape(re.split(' |,', name)[0])}' cannot be recorded, at test_reads.py:\\d+ .*reads values of a tensor"
    )
    assert re.match(words, reason), reason


NO_READS = {
    "constants": lambda net, h, t: h * torch.tensor([1.0, 2.0, 3.0, 4.0]) * float(torch.tensor(2.0)),
    "constants as indices": lambda net, h, t: h[:, [0, 1, 2, 3]][:, t].repeat(1, 2),
    "a tensor in a list": lambda net, h, t: torch.stack([h, (1 + t[0]) * torch.tanh(h)]).sum(0),
    "a tensor that is copied": lambda net, h, t: h * (1 + torch.as_tensor(t)[0]) * (1 + t.clone()[1]),
    "integers of a buffer, which a program holds for": lambda net, h, t: h * sum(net.table.tolist()),
    "the address of a parameter": lambda net, h, t: h * (1 + (net.a.weight.data_ptr() == net.b.weight.data_ptr())),
    "what a tensor is": lambda net, h, t: h * len(t) * t.numel() * (t.dtype == torch.int64) * t.stride(0),
}


@pytest.mark.parametrize("name", NO_READS)
def test_what_is_not_read_is_recorded(name):
    report = compared(NO_READS[name])
    assert report.replayed == 3, report


def test_integers_of_a_buffer_that_change_make_another_kind():
    def change(net, h, t):
        return h * sum(net.table.tolist())

    found = []
    for record in (True, False):
        torch.manual_seed(3)
        model = engm.GradNormModule(Reading(change))
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 0.5)
        step = engm.record(opt, model) if record else lambda *batch, o=opt, m=model: o.backward(m(*batch))
        norms = []
        for k in range(8):
            if k == 4:
                model.unwrap().table.add_(1)
            norms.append(step(torch.randn(3, 3), torch.tensor([0, 1])).norms)
            opt.zero_grad()
        found.append(norms)
        if record:
            assert step.report().replayed == 4, step.report()
    assert same(*found)


class Spelling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, WIDTH)

    def forward(self, x, lengths, spelled):
        logits = self.a(x).log_softmax(2).transpose(0, 1)
        return F.ctc_loss(logits, spelled, lengths, torch.tensor([2, 2, 2]), reduction="none")


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.b = nn.GRU(3, WIDTH, batch_first=True), nn.Linear(WIDTH, 2)

    def forward(self, x, lengths, _):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        return self.b(self.rnn(padded)[1][0]).square().sum(1)


@pytest.mark.parametrize("kind", [Spelling, Packed])
def test_lengths_that_operators_of_torch_read_on_the_host(kind):
    found = []
    for record in (True, False):
        torch.manual_seed(3)
        model = engm.GradNormModule(kind())
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 0.5)
        step = engm.record(opt, model) if record else lambda *batch, o=opt, m=model: o.backward(m(*batch))
        norms = []
        for lengths in ([7, 6, 5], [7, 6, 5], [7, 7, 4], [7, 5, 6], [6, 7, 7]):
            norms.append(step(torch.randn(3, 7, 3), torch.tensor(lengths), torch.randint(1, WIDTH, (3, 2))).norms)
            opt.step()
            opt.zero_grad()
        found.append(norms)
        if record:
            assert step.report().recorded == 0
    assert same(*found)


# What tells nothing of values, though it differs between two tensors: who they are, and functions for C.
OF_NO_VALUE = frozenset(["__hash__", "_cdata", "__dlpack_c_exchange_api__"])


def told(of, tensor):
    """What a method or an attribute tells Python of a tensor besides other tensors; None for what needs arguments."""
    try:
        found = getattr(tensor, of)
        found = found() if callable(found) else found
    except Exception:
        return None
    if type(found).__name__ in ("PyCapsule", "UntypedStorage", "TypedStorage"):
        return object()
    return found if isinstance(found, int | float | complex | str | bytes | list | np.ndarray) else None


def differ(a, b):
    try:
        return type(a) is not type(b) or bool(np.any(np.asarray(a, dtype=object) != np.asarray(b, dtype=object)))
    except ValueError:
        return True


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_no_method_of_a_tensor_tells_of_its_values_unseen(shape, dtype):
    """All methods and attributes without arguments are tried on two tensors that differ in their values alone."""
    t = Training(nn.Linear(3, 2))
    one, other = (torch.full(shape, value).to(dtype) for value in (0, 3))
    telling = []
    for name in sorted(set(dir(torch.Tensor)) - OF_NO_VALUE):
        a, b = told(name, one.clone()), told(name, other.clone())
        if a is None or b is None or not differ(a, b):
            continue

        def read(tensor, name=name):
            with Before(t.opt).noting():
                found = getattr(tensor, name)
                if callable(found):
                    found()
            return [tensor + 1]

        with pytest.raises(RuntimeError, match=r"reads values of a tensor|get value out of a tracing tensor"):
            recorded(read, [other.clone()])
        telling.append(name)
    assert {"tolist", "numpy", "__repr__", "data_ptr", "untyped_storage", "__dlpack__"} <= set(telling), telling
