"""Lower precision for the network, full precision for what is computed from its logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ONEDNN_BLOCK = 8  # channels
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**10
"""What losses are multiplied by in float16 at first; the scale grows until something overflows.

An example's gradient at its logits is at most 1 in size, and float16 ends at 65,504.
"""


class Autocast(nn.Module):
    """A network under autocast in its forward pass only, with float32 logits.

    Args:
        net: the network; its parameters stay float32.
        device: type of the device, ``"cuda"`` or ``"cpu"``.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, net: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.device, self.dtype = net, device, dtype

    def forward(self, x: Tensor) -> Tensor:
        """``net(x)`` in float32."""
        with torch.autocast(self.device, self.dtype):
            logits: Tensor = self.net(x)
        return logits.float()


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """What scales losses and skips steps that overflow, for float16; None for formats of a wider range."""
    return torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE) if precision == "fp16" else None


def check_channels_last(net: nn.Module, device: torch.device) -> None:
    """Refuses a network whose backward pass would corrupt memory in channels-last format on a CPU.

    oneDNN's ``brgconv_strided:avx2`` (torch 2.14.1) writes beyond the input gradient of a strided 1x1 convolution of
    fewer than 8 channels: ``Conv2d(4, 8, 1, 2)`` on ``[16, 4, 8, 8]`` ends in "corrupted size vs. prev_size".

    Raises:
        ValueError: there is such a convolution; names it.
    """
    if device.type != "cpu":
        return
    for name, module in net.named_modules():
        if not isinstance(module, nn.Conv2d) or max(module.kernel_size) > 1 or max(module.stride) == 1:
            continue
        if module.in_channels // module.groups < ONEDNN_BLOCK:
            raise ValueError(
                f"channels-last is not safe for layer '{name}' on a CPU: torch's backward pass of a strided 1x1 "
                f"convolution of fewer than {ONEDNN_BLOCK} channels writes out of bounds; leave out --channels-last"
            )
