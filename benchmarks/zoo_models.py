"""The models that coverage is claimed for, each with a small batch and what turns its output into one tensor.

Width and depth are a library's own but where that would not fit a laptop; then the model is of the same classes with
fewer or narrower blocks, and its options say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import zoo_transformers
from torch import Tensor, nn

CLASSES = 7


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        family: the library and the kind of model.
        name: the library's name for it.
        make: builds it, with random weights.
        side: pixels along a side of the images; 0 for token sequences, whose length is 12.
        frames: how many a video has; 0 for images.
        options: the model's options as text, where they are not the library's own.
    """

    family: str
    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    side: int = 64
    frames: int = 0
    options: str = ""

    def batch(self, n: int) -> Tensor:
        """``n`` inputs."""
        generator = torch.Generator().manual_seed(0)
        if not self.side:
            return torch.randint(1, 50, (n, 12), generator=generator)
        shape = (n, 3, self.frames, self.side, self.side) if self.frames else (n, 3, self.side, self.side)
        return torch.randn(shape, generator=generator)


def output_of(found: Any) -> Tensor:
    """The tensor of a model's output that a loss would read; auxiliary heads are added to it."""
    if isinstance(found, Tensor):
        return found
    if isinstance(found, dict):
        for name in ("out", "logits", "last_hidden_state"):
            if name in found:
                return _with(found[name], found.get("aux"))
    main, *others = (part for part in found if isinstance(part, Tensor))
    for other in others:
        main = _with(main, other)
    return main


def _with(main: Tensor, auxiliary: Tensor | None) -> Tensor:
    return main if auxiliary is None or auxiliary.shape != main.shape else main + 0.4 * auxiliary


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    """``[n]`` losses that weigh every output differently."""
    out = output_of(model(x)).flatten(1)
    weights = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (out * weights.to(out) + 0.1 * out.square()).mean(1)


# -- torchvision ---------------------------------------------------------------------------------------------------

SIDES = {"inception_v3": 299}  # its auxiliary head pools and convolves by 5


def classification() -> list[Case]:
    """Every classification model of torchvision."""
    from torchvision import models

    cases = []
    for name in models.list_models(module=models):
        if name in REDUCED:
            cases.append(REDUCED[name])
            continue
        options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
        if name.startswith("vit_"):
            options["image_size"] = 64
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = True
        side = SIDES.get(name, 64)
        cases.append(Case("torchvision classification", name, _torchvision(name, options), side))
    return cases


def _torchvision(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        if name == "maxvit_t":
            own = {"stem_channels": 64, "block_channels": [64, 128, 256, 512], "block_layers": [2, 2, 5, 2]}
            rest = {"head_dim": 32, "stochastic_depth_prob": 0.0, "num_classes": CLASSES}
            return models.MaxVit(input_size=(64, 64), partition_size=2, **own, **rest)
        return models.get_model(name, **options)

    return make


def _narrow_vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(56, 14, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=CLASSES)


def _narrow_regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    blocks = BlockParams.from_init_params(depth=27, w_0=56, w_a=20.0, w_m=2.5, group_width=8, se_ratio=0.25)
    return RegNet(blocks, num_classes=CLASSES)


REDUCED = {
    "vit_h_14": Case(
        "torchvision classification", "vit_h_14", _narrow_vision_transformer, 56, options="4 blocks of width 64"
    ),
    "regnet_y_128gf": Case("torchvision classification", "regnet_y_128gf", _narrow_regnet, options="an eighth as wide"),
}


def segmentation_and_video() -> list[Case]:
    """Segmentation and video models of torchvision."""
    cases = []
    for name in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        cases.append(Case("torchvision segmentation", name, _segmentation(name)))
    for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d"):
        side, frames = (224, 16) if name == "s3d" else (32, 8)  # s3d ends in a pool of 7x7
        cases.append(Case("torchvision video", name, _video(name), side, frames))
    cases.append(Case("torchvision video", "mvit_v2_s", _small_mvit, 32, 8, options="2 blocks of width 16"))
    cases.append(Case("torchvision video", "swin3d_t", _small_swin3d, 32, 4, options="2 blocks of width 16"))
    return cases


def _segmentation(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)

    return make


def _video(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, num_classes=CLASSES)

    return make


def _small_mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return MViT(
        spatial_size=(32, 32),
        temporal_size=8,
        block_setting=blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=CLASSES,
    )


def _small_swin3d() -> nn.Module:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=[2, 2, 2], num_classes=CLASSES
    )


# -- timm ----------------------------------------------------------------------------------------------------------

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "vit_small_patch16_224": (64, {"img_size": 64}),
    "vit_base_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "deit3_small_patch16_224": (64, {"img_size": 64}),
    "convnext_atto": (64, {}),
    "convnext_tiny": (64, {}),
    "convnextv2_atto": (64, {}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64}),
    "efficientnet_b0": (64, {}),
    "efficientnet_lite0": (64, {}),
    "efficientnetv2_rw_t": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mobilenetv4_conv_medium": (64, {}),
    "mobilenetv4_hybrid_medium": (64, {}),
}


# FAMILIES has one small model of every other family of timm, LARGE_IMAGES those that take no images of 64 pixels.
# Families whose smallest model has more than 60 million parameters are left out.
FAMILIES = (
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_atto_rms",
    "cpubone_nano",
    "cs3darknet_focus_s",
    "csatv2",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "flexivit_small",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "gmlp_ti16_224",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "levit_384_s8",
    "lowformer_b0",
    "mambaout_femto",
    "maxvit_pico_rw_256",
    "mobilenetv3_small_050",
    "mobileone_s1",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "nf_regnet_b0",
    "pit_ti_224",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "sam2_hiera_tiny",
    "selecsls42",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "visformer_tiny",
    "vit_srelpos_small_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
    "xception41p",
    "xcit_nano_12_p8_224",
)
LARGE_IMAGES = {
    "crossvit_tiny_240": 240,
    "efficientformer_l1": 224,
    "halonet_h1": 256,
    "inception_resnet_v2": 299,
    "inception_v4": 299,
}


def timm_models() -> list[Case]:
    """timm's models: those with options of their own, then a small one of every other family."""
    cases = []
    for name, (side, options) in TIMM.items():
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        cases.append(Case("timm", name, _timm(name, options), side, options=shown))
    for name, side in {**dict.fromkeys(FAMILIES, 64), **LARGE_IMAGES}.items():
        cases.append(Case("timm", name, partial(_of_family, name, side), side))
    return cases


def _of_family(name: str, side: int) -> nn.Module:
    """A model of timm; some are told the size of their images, the others take any."""
    import timm

    try:
        return timm.create_model(name, num_classes=CLASSES, img_size=side)
    except TypeError:
        return timm.create_model(name, num_classes=CLASSES)


def _timm(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return make


# -- transformers, torch -------------------------------------------------------------------------------------------


def transformers() -> list[Case]:
    """Small architectures of Hugging Face's transformers."""
    words = [Case("transformers", name, partial(zoo_transformers.build, name), 0) for name in zoo_transformers.LANGUAGE]
    images = [Case("transformers", name, partial(zoo_transformers.build, name)) for name in zoo_transformers.VISION]
    return [*words, *images]


def torch_modules() -> list[Case]:
    """torch's own recurrent and transformer modules."""
    return [
        Case("torch", "nn.TransformerEncoder", _encoder, 0, options="2 blocks of width 32"),
        Case("torch", "nn.LSTM", _lstm, 0, options="2 layers, bidirectional"),
    ]


class _Sequences(nn.Module):
    """Token embeddings, a body over them, and a linear head on its mean."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(50, 32), body, nn.Linear(width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        found = self.body(self.words(words))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


def _encoder() -> nn.Module:
    return _Sequences(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2), 32)


def _lstm() -> nn.Module:
    return _Sequences(nn.LSTM(32, 24, 2, bidirectional=True, batch_first=True), 48)


def every() -> list[Case]:
    """Every case of the zoo."""
    return [*classification(), *segmentation_and_video(), *timm_models(), *transformers(), *torch_modules()]
