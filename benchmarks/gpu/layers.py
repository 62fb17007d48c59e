"""The layers that kernels are timed on: those of the networks that whole steps train, at their own sizes."""

from __future__ import annotations

from dataclasses import dataclass

from engm import _C


@dataclass(frozen=True)
class ConvLayer:
    """A convolution and how often its network has it."""

    network: str
    channels: int
    side: int
    rows: int
    kernel: int = 3
    stride: int = 1
    count: int = 1

    @property
    def padding(self) -> int:
        return 0 if self.stride == self.kernel else self.kernel // 2

    @property
    def out(self) -> int:
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        """Kernel, stride, padding, dilation and groups, as the operators take them."""
        return [self.kernel] * 2, [self.stride] * 2, [self.padding] * 2, [1, 1], 1

    def __str__(self) -> str:
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.network} {self.channels}>{self.rows} {self.kernel}x{self.kernel}{stride} @{self.side}"

    def flops(self, form: str) -> float:
        """FLOPs for one example: of the form ``"gram"``, or of the direct form under any other name."""
        sizes = [self.side] * 2, [self.out] * 2
        cost = _C.conv_cost(self.channels, self.rows, *self.geometry, *sizes)
        return cost.gram_flops if form == "gram" else cost.direct_flops

    @property
    def elements(self) -> int:
        """Elements of both operands of one example."""
        return self.channels * self.side**2 + self.rows * self.out**2

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.rows * self.channels * self.kernel**2


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer over ``T`` positions."""

    network: str
    T: int
    p: int
    d: int
    count: int = 1

    def __str__(self) -> str:
        return f"{self.network} {self.p}>{self.d} T={self.T}"

    def flops(self, form: str) -> float:
        """FLOPs for one example, as :meth:`ConvLayer.flops` counts them."""
        cost = _C.linear_cost(self.T, self.p, self.d)
        return cost.gram_flops if form == "gram" else cost.direct_flops

    @property
    def elements(self) -> int:
        return self.T * (self.p + self.d)

    @property
    def weight(self) -> int:
        return self.p * self.d


CONVOLUTIONS = [
    ConvLayer("resnet18", 64, 32, 64, count=4),
    ConvLayer("resnet18", 128, 16, 128, count=3),
    ConvLayer("resnet18", 256, 8, 256, count=3),
    ConvLayer("resnet18", 512, 4, 512, count=3),
    ConvLayer("resnet18", 3, 32, 64),
    ConvLayer("resnet18", 64, 32, 128, stride=2),
    ConvLayer("resnet18", 128, 16, 256, stride=2),
    ConvLayer("resnet18", 256, 8, 512, stride=2),
    ConvLayer("resnet18", 64, 32, 128, kernel=1, stride=2),
    ConvLayer("wrn34-10", 160, 32, 160, count=9),
    ConvLayer("wrn34-10", 320, 16, 320, count=9),
    ConvLayer("wrn34-10", 640, 8, 640, count=9),
    ConvLayer("vgg8", 128, 32, 128),
    ConvLayer("vgg8", 256, 16, 256),
    ConvLayer("vgg8", 512, 8, 512),
    ConvLayer("vit-s", 3, 224, 384, kernel=16, stride=16),
]
LINEARS = [
    LinearLayer("vit-s", 196, 384, 1152, 12),
    LinearLayer("vit-s", 196, 384, 384, 12),
    LinearLayer("vit-s", 196, 384, 1536, 12),
    LinearLayer("vit-s", 196, 1536, 384, 12),
    LinearLayer("vit-b", 196, 768, 768, 12),
    LinearLayer("vit-b", 196, 768, 3072, 12),
    LinearLayer("vit-cifar", 64, 384, 1536, 6),
    LinearLayer("vgg8", 1, 8192, 1024),
    LinearLayer("resnet18", 1, 512, 10),
]
TINY_CONVOLUTIONS = [ConvLayer("tiny", 4, 6, 8), ConvLayer("tiny", 4, 6, 8, kernel=1, stride=2)]
TINY_LINEARS = [LinearLayer("tiny", 5, 8, 12), LinearLayer("tiny", 1, 8, 4)]
