"""The image encoders that MobileSAMv2 can run with, behind one registry.

Every encoder maps a normalised, padded image ``[B, 3, S, S]`` to an embedding ``[B, C, G, G]`` that the prompt-guided
decoder reads. ``state_dict`` keys of TinyViT and the ViTs are those of the released checkpoints; EfficientViT's blocks
come from timm under other names, and :attr:`EncoderConfig.rename` translates the released names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import GELUTanh
from timm.models.efficientvit_mit import ConvNormAct, FusedMBConv, ResidualBlock
from torch import Tensor, nn
from ultralytics.models.sam.modules.encoders import ImageEncoderViT
from ultralytics.models.sam.modules.tiny_encoder import TinyViT
from ultralytics.nn.modules import C2f, Conv, LayerNorm2d

from ..errors import ArgumentError
from .arrays import ImageArray

# Mean and standard deviation of RGB values (0..255) with which every released encoder was trained.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class SamNeck(nn.Module):
    """EfficientViT-SAM's neck: sums the last three stages at one size and refines the sum.

    Source: "EfficientViT-SAM: Accelerated Segment Anything Model Without Accuracy Loss" (arXiv 2402.05008), figure 2.
    """

    def __init__(self, in_channels: list[int], head_width: int, head_depth: int, out_channels: int, size: int) -> None:
        super().__init__()
        norm: Any = partial(nn.BatchNorm2d, eps=1e-6)  # timm only calls it, but its annotation demands a class
        self.size = size
        self.input_ops = nn.ModuleList(
            ConvNormAct(channels, head_width, 1, norm_layer=norm, act_layer=None) for channels in reversed(in_channels)
        )
        self.middle = nn.Sequential(
            *(
                ResidualBlock(
                    FusedMBConv(head_width, head_width, expand_ratio=1, norm_layer=norm, act_layer=(GELUTanh, None)),
                    nn.Identity(),
                )
                for _ in range(head_depth)
            )
        )
        self.output_ops = nn.ModuleList(
            [ConvNormAct(head_width, out_channels, 1, bias=True, norm_layer=None, act_layer=None)]
        )

    def forward(self, stages: list[Tensor]) -> Tensor:
        total: Tensor | None = None
        for op, stage in zip(self.input_ops, reversed(stages)):
            x = op(stage)
            if x.shape[-1] != self.size:
                x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", align_corners=False)
            total = x if total is None else total + x
        out: Tensor = self.output_ops[0](self.middle(total))
        return out


class SamNeckEncoder(nn.Module):
    """A timm backbone, :class:`SamNeck` on its last three stages, and a layer norm.

    Args:
        backbone: a `features_only` model that returns the three stages.
        head_width, head_depth: the neck's channels and blocks.
        embed_dim, embed_size: channels and side of the embedding.
        network_size: side in pixels to which the padded input is resampled; 512 for the released EfficientViTs.
    """

    def __init__(
        self, backbone: nn.Module, head_width: int, head_depth: int, embed_dim: int, embed_size: int, network_size: int
    ) -> None:
        super().__init__()
        feature_info: Any = backbone.feature_info
        self.network_size = network_size
        self.backbone = backbone
        self.neck = SamNeck(feature_info.channels(), head_width, head_depth, embed_dim, embed_size)
        self.norm = LayerNorm2d(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.network_size:
            x = F.interpolate(x, size=(self.network_size, self.network_size), mode="bilinear", align_corners=False)
        out: Tensor = self.norm(self.neck(self.backbone(x)))
        return out


class EfficientNetEncoder(nn.Module):
    """An EfficientNet-Lite and a neck that fuses its strides 8, 16 and 32 at stride 16.

    Args:
        backbone: a `features_only` model that returns these three stages.
        embed_dim: channels of the embedding.
    """

    scale: Tensor
    shift: Tensor
    # EfficientNet-Lite was trained on RGB values that were normalised with these.
    _MEAN, _STD = 127.0, 128.0

    def __init__(self, backbone: nn.Module, embed_dim: int) -> None:
        super().__init__()
        feature_info: Any = backbone.feature_info
        fine, same, coarse = feature_info.channels()
        self.backbone = backbone
        self.fine, self.same, self.coarse = Conv(fine, embed_dim, 3, 2), Conv(same, embed_dim), Conv(coarse, embed_dim)
        self.fuse = nn.Sequential(C2f(3 * embed_dim, embed_dim, 2), nn.Conv2d(embed_dim, embed_dim, 1))
        self.norm = LayerNorm2d(embed_dim)
        mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        self.register_buffer("scale", std / self._STD, persistent=False)
        self.register_buffer("shift", (mean - self._MEAN) / self._STD, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        fine, same, coarse = self.backbone(x * self.scale + self.shift)
        coarse = F.interpolate(self.coarse(coarse), scale_factor=2.0)
        out: Tensor = self.norm(self.fuse(torch.cat([self.fine(fine), self.same(same), coarse], 1)))
        return out


def _rename_efficientvit(key: str) -> str:
    """Name in :class:`SamNeckEncoder` of a tensor of a released EfficientViT-SAM encoder."""
    key = re.sub(r"^(neck\.(?:input|output)_ops\.\d+)\.op_list\.0\.", r"\1.", key)
    key = re.sub(r"^neck\.middle\.op_list\.", "neck.middle.", key)
    key = re.sub(r"^backbone\.stages\.0\.op_list\.0\.", "backbone.stem_in_conv.", key)
    key = re.sub(r"^backbone\.stages\.0\.op_list\.(\d+)\.", lambda m: f"backbone.stem_res{int(m[1]) - 1}.", key)
    return re.sub(
        r"^backbone\.stages\.([1-9]\d*)\.op_list\.",
        lambda m: f"backbone.stages_{int(m[1]) - 1}.blocks.",
        key,
    )


def _unchanged(key: str) -> str:
    return key


@dataclass(frozen=True)
class EncoderConfig:
    """Properties of an encoder that the rest of the model depends on.

    Attributes:
        build: builds the module, with untrained weights.
        rename: released tensor name -> name in the module.
        image_size: side in pixels to which an image is resized (long side) and padded.
        embed_dim, embed_size: channels and side of the embedding; low-res logits have four times that side.
        neck: the submodules between the backbone's features and the embedding, which can be trained on their own.
    """

    build: Callable[[], nn.Module]
    rename: Callable[[str], str] = _unchanged
    image_size: int = 1024
    embed_dim: int = 256
    embed_size: int = 64
    neck: tuple[str, ...] = ("neck",)


# Of every SamNeckEncoder.
_SAM_NECK = ("neck", "norm")


def _tiny_vit() -> nn.Module:
    # MobileSAM's TinyViT-5M (arXiv 2306.14289), whose third patch merging keeps stride 16.
    return TinyViT(
        img_size=1024,
        in_chans=3,
        num_classes=1000,
        embed_dims=(64, 128, 160, 320),
        depths=(2, 2, 6, 2),
        num_heads=(2, 4, 5, 10),
        window_sizes=(7, 7, 14, 7),
        mlp_ratio=4.0,
        drop_rate=0.0,
        drop_path_rate=0.0,
        use_checkpoint=False,
        mbconv_expand_ratio=4.0,
        local_conv_size=3,
        layer_lr_decay=0.8,
    )


def _sam_vit(embed_dim: int, depth: int, num_heads: int, global_attn_indexes: tuple[int, ...]) -> nn.Module:
    norm: Any = partial(nn.LayerNorm, eps=1e-6)  # ultralytics only calls it, but its annotation demands a class
    return ImageEncoderViT(
        img_size=1024,
        patch_size=16,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=4,
        out_chans=256,
        qkv_bias=True,
        norm_layer=norm,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=global_attn_indexes,
    )


def _efficientvit(depths: tuple[int, ...], head_depth: int) -> nn.Module:
    # timm has no L0; its L1 with other depths is the same family.
    backbone = timm.create_model(
        "efficientvit_l1", features_only=True, out_indices=(1, 2, 3), depths=depths, norm_eps=1e-6
    )
    return SamNeckEncoder(backbone, 256, head_depth, embed_dim=256, embed_size=64, network_size=512)


def _resnet_demo() -> nn.Module:
    backbone = timm.create_model(
        "resnet10t", features_only=True, out_indices=(2, 3, 4), layers=(1, 2, 2, 2), channels=(64, 128, 192, 256)
    )
    return SamNeckEncoder(backbone, 128, 3, embed_dim=128, embed_size=32, network_size=256)


def _efficientnet_lite0() -> nn.Module:
    backbone = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4))
    return EfficientNetEncoder(backbone, embed_dim=128)


ENCODERS: dict[str, EncoderConfig] = {
    "tiny_vit": EncoderConfig(_tiny_vit),
    "efficientvit_l0": EncoderConfig(
        partial(_efficientvit, (1, 1, 1, 4, 4), head_depth=4), _rename_efficientvit, neck=_SAM_NECK
    ),
    "efficientvit_l1": EncoderConfig(
        partial(_efficientvit, (1, 1, 1, 6, 6), head_depth=8), _rename_efficientvit, neck=_SAM_NECK
    ),
    "efficientvit_l2": EncoderConfig(
        partial(_efficientvit, (1, 2, 2, 8, 8), head_depth=12), _rename_efficientvit, neck=_SAM_NECK
    ),
    "sam_vit_b": EncoderConfig(partial(_sam_vit, 768, 12, 12, (2, 5, 8, 11))),
    "sam_vit_l": EncoderConfig(partial(_sam_vit, 1024, 24, 16, (5, 11, 17, 23))),
    "sam_vit_h": EncoderConfig(partial(_sam_vit, 1280, 32, 16, (7, 15, 23, 31))),
    # The encoder of a small model for photos (training/photo_model.py); no weights of it come with the package yet.
    "efficientnet_lite0": EncoderConfig(
        _efficientnet_lite0,
        image_size=512,
        embed_dim=128,
        embed_size=32,
        neck=("fine", "same", "coarse", "fuse", "norm"),
    ),
    # The demo model's encoder: small enough to train on two CPU cores (training/), at a quarter of the resolution.
    "resnet_demo": EncoderConfig(_resnet_demo, image_size=256, embed_dim=128, embed_size=32, neck=_SAM_NECK),
}


def encoder_config(name: str) -> EncoderConfig:
    """The registry entry for `name`.

    Raises:
        ValueError: no encoder has that name.
    """
    if name not in ENCODERS:
        raise ArgumentError(f"Unknown image encoder {name!r}; choose one of {', '.join(ENCODERS)}.")
    return ENCODERS[name]


@dataclass(frozen=True)
class ImageEmbeddings:
    """Encoded images.

    Attributes:
        features: [B, C, G, G].
        original_sizes, input_sizes: (h, w) of each image, and of the resized image in the network input.
    """

    features: Tensor
    original_sizes: list[tuple[int, int]]
    input_sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.original_sizes)


def preprocess(image: ImageArray, image_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Converts an image to an encoder's input.

    Args:
        image: uint8 RGB [H, W, 3].
        image_size: side of the network input; the image's long side is resized to it (PIL bilinear, antialiased).

    Returns:
        The network input, float32 [3, image_size, image_size], normalised and zero-padded on the right and at the
        bottom; and (height, width) of the resized image in it.
    """
    height, width = image.shape[:2]
    scale = image_size / max(height, width)
    # At least one pixel: a 1 x 5000 image has a short side that rounds to zero.
    size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    resized = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    pixels = torch.zeros(image_size, image_size, 3)
    pixels[: size[0], : size[1]] = (torch.from_numpy(resized) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return pixels.permute(2, 0, 1), size
