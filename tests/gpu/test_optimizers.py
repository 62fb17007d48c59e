"""All outer optimizers on the GPU: resumed runs, accumulation, and no waiting for the device."""

import io

import pytest
import torch
from device_cases import DEVICE, cuda_only, gpu
from test_engine import losses_of, network, no_synchronisation, on_device, sgd

import engm

pytestmark = gpu
METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 1.0),
    "auto": lambda model, inner: engm.ENGM(model, inner, "auto"),
    "grouped": lambda model, inner: engm.ENGM(model, inner, 1.0, groups="parameter"),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 1.0, tau=2),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.1),
    "fengm": engm.FENGM,
    "sngm": engm.SNGM,
    "gnc": lambda model, inner: engm.GNC(model, inner, 0.5),
    "msgd": engm.MSGD,
}
every_method = pytest.mark.parametrize("method", METHODS)


def make(method, norm="group", **options):
    model, x, y = on_device(network(norm), torch.float64, **options)
    return model, METHODS[method](model, sgd(model)), x, y


def train(model, opt, x, y, steps):
    for _ in range(steps):
        opt.backward(losses_of(model, x, y), x)
        opt.step()
        opt.zero_grad()


@every_method
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_resumed_run_equals_an_uninterrupted_one(method, norm):
    if method == "grouped" and norm == "batch":
        pytest.skip("one backward pass a group: the CPU's tests have it")
    model, opt, x, y = make(method, norm, calibrate_every=3)
    train(model, opt, x, y, 3)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), buffer)
    train(model, opt, x, y, 3)
    buffer.seek(0)
    weights, state = torch.load(buffer, map_location=DEVICE, weights_only=True)
    resumed, resumed_opt, *_ = make(method, norm, calibrate_every=3)
    resumed.load_state_dict(weights)
    resumed_opt.load_state_dict(state)
    train(resumed, resumed_opt, x, y, 3)
    for (name, want), got in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=name)  # cuDNN may choose another algorithm


@every_method
def test_micro_batches_add_up_to_the_batch(method):
    if method in ("auto", "aengm"):
        pytest.skip("its threshold or its line follows every call")
    gradients = []
    for parts in ([slice(None)], [slice(0, 5), slice(5, None)]):
        model, opt, x, y = make(method)
        for rows in parts:
            part = x[rows].clone()
            opt.backward(losses_of(model, part, y[rows]), part, divisor=len(y))
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-12)


@cuda_only
@every_method
def test_no_step_waits_for_the_device(method):
    model, opt, x, y = make(method)
    train(model, opt, x, y, 3)  # strict checks look, once a structure
    with no_synchronisation():
        train(model, opt, x, y, 2)
