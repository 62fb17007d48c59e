"""All outer optimizers, with thresholds that clip some of the examples of ``training.batch`` and not others."""

import pytest

import engm

METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 5.0, tau=1),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.45),
    "msgd": engm.MSGD,
    "fengm": lambda model, inner: engm.FENGM(model, inner, 2.0),
    "sngm": engm.SNGM,
    "gnc": lambda model, inner: engm.GNC(model, inner, 0.5),
}


def every(*methods):
    """A test of each of these methods, or of all."""
    return pytest.mark.parametrize("method", methods or METHODS)
