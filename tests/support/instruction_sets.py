"""CPU kernels of one instruction set, for tests that compare them."""

from contextlib import contextmanager

from engm import _C


@contextmanager
def forced(isa):
    """Kernels are of this instruction set, one of ``build_info()["cpu_isas"]``, while the context is open."""
    _C.set_isa(isa)
    try:
        yield
    finally:
        _C.set_isa("auto")
