"""What the sources in csrc/ bind to Python, but for the operators (engm/ops.py)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, device, dtype
from torch.nn import Module, Parameter

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
    @property
    def direct_parts(self) -> list[float]: ...
    @property
    def gram_parts(self) -> list[float]: ...
    @property
    def direct_time(self) -> float: ...
    @property
    def gram_time(self) -> float: ...
    def bytes(self, element_size: int = 4) -> float: ...

def linear_cost(T: int, p: int, d: int, device: str = "cpu", precision: str = "float32") -> Cost: ...
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
    device: str = "cpu",
    precision: str = "float32",
    channels_last: bool = False,
) -> Cost: ...
def cost_table(device: str = "cpu", precision: str = "float32", builtin: bool = False) -> dict[str, float]: ...
def cost_table_source(device: str = "cpu") -> str: ...
def set_cost_table(
    device: str, values: Mapping[str, float], precision: str | None = None, source: str = "set by hand"
) -> None: ...
def reset_cost_tables() -> None: ...
def set_cost_table_loader(loader: Callable[[str], None]) -> None: ...
def cuda_precision(dtype: str, convolution: bool) -> str: ...
def build_info() -> dict[str, Any]: ...
def set_isa(name: str) -> None: ...

class StraightLine:
    """Operators that are run one after another (csrc/program.cpp)."""

    def __init__(
        self, places: int, constants: Sequence[tuple[int, Tensor]], inputs: Sequence[int], outputs: Sequence[int]
    ) -> None: ...
    def add(
        self,
        name: str,
        overload: str,
        arguments: Sequence[tuple[int | list[int]] | list[Any] | None],
        first_result: int,
        results: int,
        last_read: Sequence[int],
    ) -> None: ...
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]: ...

def walk_graph(
    root: Tensor, token: str
) -> tuple[
    list[Any],
    list[tuple[int | None, ...]],
    list[tuple[int, ...]],
    list[tuple[tuple[int, ...] | None, ...]],
    list[Tensor],
    list[tuple[int, Tensor]],
    list[tuple[int, Any]],
    bool,
]: ...

ALL_GRADIENTS: int
NO_GRADIENTS: int

def write_record(output: Tensor, record: object, gradients: int) -> None: ...
def records_of(output: Tensor) -> list[Any]: ...

class GradientQueue:
    """Gradients on their way to a collector, small ones handed over together (csrc/graph_records.cpp)."""

    def __init__(self, collector: object, most_bytes: int) -> None: ...
    @property
    def collector(self) -> Any: ...
    def flush(self) -> None: ...

class FrozenStatistics:
    """The hooks by which batch norms take the batch's statistics for constants (csrc/frozen_statistics.cpp)."""

    def __init__(self) -> None: ...
    def freeze(self, node: object, gain: Callable[[], Tensor], slot: int, output: int) -> None: ...
    def thaw(self) -> None: ...

class GradientPrints:
    """What is kept of the gradients that a backward pass is looked at for (csrc/gradient_prints.cpp)."""

    def __init__(
        self,
        by_element: bool,
        directions: Callable[[int, dtype, device], Tensor],
        dense: Callable[[Tensor], Tensor],
    ) -> None: ...
    def take(self, number: int, gradient: Tensor) -> None: ...
    def taken(self) -> list[tuple[int, tuple[int, ...], Tensor, dtype]]: ...

class PrintHooks:
    """The hooks on some nodes that take prints (csrc/gradient_prints.cpp)."""

    def __init__(self, prints: GradientPrints) -> None: ...
    def watch_outputs(self, node: object, numbers: Sequence[tuple[int, int]]) -> None: ...
    def watch_inputs(self, node: object, numbers: Sequence[tuple[int, int]]) -> None: ...
    def remove(self) -> None: ...

def first_alike(numbers: Tensor, lengths: Sequence[int]) -> list[int]: ...

class CallRecorder:
    """The forward hook of a module that takes and returns one tensor (csrc/captured_calls.cpp)."""

    def __init__(
        self, capture: object, name: str, rule: object, kind: type, refuse: Callable[..., None], copies: bool
    ) -> None: ...
    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Tensor | None: ...

def note_call(
    call: object,
    kind: type,
    capture: object,
    name: str,
    module: Module,
    rule: object,
    activations: object,
    output: Tensor,
) -> None: ...
def trained_of(module: Module) -> dict[str, Parameter]: ...
def reads_activations(rule: object, trained: dict[str, Parameter]) -> bool: ...
def saved_statistics(output: Tensor, name: str) -> tuple[Tensor, Tensor] | None: ...
def slot_of(output: Tensor, tensor: Tensor) -> int: ...
def note_inputs(call: object, inputs: object, reads: bool) -> None: ...
def same_types(objects: list[Any], types: tuple[type, ...]) -> bool: ...
def same_items(held: tuple[tuple[Mapping[Any, Any], int, tuple[Any, ...], tuple[Any, ...]], ...]) -> bool: ...
def facts_of(tensors: list[Tensor], versions: Sequence[bool]) -> bytes: ...
def untracked_alias(tensor: Tensor) -> Tensor: ...
def sum_of_outer_products(left: Tensor, right: Tensor) -> Tensor: ...
def run_lstm(
    gates: Tensor,
    hh: Tensor,
    hr: Tensor | None,
    state: Sequence[Tensor],
    present: Tensor | None,
    reverse: bool,
    outputs: Tensor,
    contents: Tensor,
    cells: Tensor,
    squashed: Tensor,
    unprojected: Tensor | None,
) -> list[Tensor]: ...
def back_lstm(
    of_cell: Tensor,
    by_cell: Tensor,
    by_hidden: Tensor,
    forget: Tensor,
    hh: Tensor,
    hr: Tensor | None,
    found: Tensor,
    projected: Tensor | None,
    outputs: Tensor | None,
    end: Sequence[Tensor],
    present: Tensor | None,
    reverse: bool,
) -> None: ...
def run_gru(
    gates: Tensor,
    hh: Tensor,
    bias: Tensor | None,
    state: Sequence[Tensor],
    present: Tensor | None,
    reverse: bool,
    outputs: Tensor,
    from_hidden: Tensor,
) -> list[Tensor]: ...
def back_gru(
    by_hidden: Tensor,
    updates: Tensor,
    hh: Tensor,
    found: Tensor,
    outputs: Tensor | None,
    end: Sequence[Tensor],
    present: Tensor | None,
    reverse: bool,
) -> Tensor: ...
def run_rnn(
    steps: Tensor,
    hh: Tensor,
    state: Sequence[Tensor],
    present: Tensor | None,
    reverse: bool,
    outputs: Tensor,
    relu: bool,
) -> list[Tensor]: ...
def back_rnn(
    slopes: Tensor,
    hh: Tensor,
    found: Tensor,
    outputs: Tensor | None,
    end: Sequence[Tensor],
    present: Tensor | None,
    reverse: bool,
) -> None: ...
def self_test(device: device) -> list[tuple[str, str, str, float, float, str]]: ...
def distrusted(device: device) -> list[tuple[str, str, str]]: ...
