"""What csrc/ops.cpp binds; the tensor operators are in ``torch.ops.engm``."""

from collections.abc import Sequence
from typing import Any

class Cost:
    """What one example costs in either form, and the form that is taken."""

    @property
    def direct_flops(self) -> float: ...
    @property
    def gram_flops(self) -> float: ...
    @property
    def elements(self) -> float: ...
    @property
    def form(self) -> str: ...
    def bytes(self, element_size: int = 4) -> float: ...

def linear_cost(T: int, p: int, d: int) -> Cost: ...
def conv_cost(
    channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_size: Sequence[int],
    output_size: Sequence[int],
) -> Cost: ...
def build_info() -> dict[str, Any]: ...
def set_isa(name: str) -> None: ...
