"""Networks that the recipes do not have: a wide VGG-8 and vision transformers, made of layers that engm knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engm.recipes.models import resnet18, wide_resnet
from engm.recipes.models.norms import norm_layer


def vgg8(norm: str, width: int = 128) -> nn.Module:
    """Six convolutions, two each with once, twice and four times ``width`` channels, and two linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for out in (width, width, 2 * width, 2 * width, 4 * width, 4 * width):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), norm_layer(norm)(out), nn.ReLU()]
        if channels == out:
            layers.append(nn.MaxPool2d(2))
        channels = out
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(16 * channels, 8 * width), nn.ReLU(), nn.Linear(8 * width, 10)
    )


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """ViT with mean pooling and fixed sinusoidal positions, so that every parameter belongs to a layer."""

    positions: Tensor

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        angle = torch.arange((side // patch) ** 2)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], 2).flatten(1))
        self.layers = nn.Sequential(*[EncoderLayer(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.layers(tokens + self.positions.to(tokens.dtype))
        return self.head(self.norm(tokens).mean(1))


SIDES = {"vit-s": 224, "vit-b": 224}


def network(name: str, norm: str, *, tiny: bool = False) -> nn.Module:
    """A network by name: resnet18, vgg8, wrn34-10, vit-s, vit-b, vit-cifar; ``tiny`` has the same layers, narrower."""
    torch.manual_seed(0)
    if name == "resnet18":
        return resnet18(width=4 if tiny else 64, norm=norm)  # type: ignore[arg-type]
    if name == "vgg8":
        return vgg8(norm, 8 if tiny else 128)
    if name == "wrn34-10":
        return wide_resnet(10 if tiny else 34, 1 if tiny else 10, norm=norm)  # type: ignore[arg-type]
    if name == "vit-cifar":
        return VisionTransformer(32, 4, *((24, 2, 2) if tiny else (384, 12, 6)), classes=10)
    width, heads = {"vit-s": (384, 6), "vit-b": (768, 12)}[name]
    return VisionTransformer(224, 16, *((24, 2, 2) if tiny else (width, 12, heads)), classes=1000)


def batch(name: str, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images in [0, 1] of the network's size, and labels."""
    generator = torch.Generator().manual_seed(1)
    side = SIDES.get(name, 32)
    x = torch.rand(n, 3, side, side, generator=generator)
    return x.to(device), torch.randint(10, (n,), generator=generator).to(device)
