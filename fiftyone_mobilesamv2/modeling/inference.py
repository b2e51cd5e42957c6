"""Prepares encoders and detectors for inference: they compute the same function of the image, but faster.

Call :func:`prepare_for_inference` once, after loading the weights (the tensors of a prepared module differ from those
of a checkpoint), and never on a module that will be trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from ultralytics.models.sam.modules import blocks as sam_vit
from ultralytics.models.sam.modules import tiny_encoder
from ultralytics.models.sam.modules.utils import get_rel_pos
from ultralytics.nn.modules import Detect

from ..errors import ArgumentError

# Attribute of a prepared module that holds the device type and dtype it was prepared for.
_PREPARED_FOR = "prepared_for"
# For this many rows of queries, the bias of a ViT-B takes 50 MB.
_QUERY_ROWS = 4


class WindowAttention(nn.Module):
    """TinyViT's attention, computed with `scaled_dot_product_attention`; its bias is gathered once."""

    bias: Tensor

    def __init__(self, attention: tiny_encoder.Attention) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = attention.norm, attention.qkv, attention.proj
        self.num_heads = attention.num_heads
        indices: Tensor = attention.get_buffer("attention_bias_idxs")
        self.register_buffer("bias", attention.attention_biases[:, indices][None].detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Window tokens [B, N, C] -> [B, N, C]."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=3)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(len(x), -1, -1, -1))
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class RelativePositionAttention(nn.Module):
    """The attention of SAM's ViTs, computed with `scaled_dot_product_attention`.

    The tables of relative positions are gathered once. The bias of a query is the sum of a term for the key's row and
    one for its column. It is materialized for a few rows of queries at a time: for a whole 64 x 64 grid and 12 heads it
    would take 800 MB.
    """

    rel_pos_h: Tensor
    rel_pos_w: Tensor

    def __init__(self, attention: sam_vit.REAttention) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads = attention.num_heads
        for name in ("rel_pos_h", "rel_pos_w"):
            table = getattr(attention, name).detach()
            size = (len(table) + 1) // 2
            self.register_buffer(name, get_rel_pos(size, size, table), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Token grid [B, H, W, C] -> [B, H, W, C]."""
        height, width = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        grid = q.unflatten(2, (height, width))
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self.rel_pos_h)
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, self.rel_pos_w)
        attended = [
            F.scaled_dot_product_attention(
                queries.flatten(2, 3), k, v, attn_mask=(row[..., None] + column[..., None, :]).flatten(4).flatten(2, 3)
            )
            for queries, row, column in zip(*(t.split(_QUERY_ROWS, dim=2) for t in (grid, rows, columns)))
        ]
        out: Tensor = self.proj(torch.cat(attended, dim=2).transpose(1, 2).reshape(x.shape))
        return out


class InFloat32(nn.Module):
    """A module that computes in float32, whatever dtype its parent is converted to."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x.float())
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InFloat32:
        # `Module.to` ends up here: follow the device, but ignore the dtype.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


class Float32Detect(nn.Module):
    """YOLO's head with scores and boxes in float32: at 1024 px, bfloat16 values are 4 px apart."""

    def __init__(self, head: Detect) -> None:
        super().__init__()
        for layers in (*head.cv2, *head.cv3):
            layers[-1] = InFloat32(layers[-1])
        head.set_submodule("dfl", InFloat32(head.dfl))
        head.dynamic = True  # otherwise it would cache its anchors on the device where it first ran
        self.head = head
        # ultralytics identifies a layer's inputs and output by these; a head on its own has none.
        self.f, self.i = getattr(head, "f", None), getattr(head, "i", None)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        raw: dict[str, Any] = self.head.forward_head(features, **self.head.one2many)
        raw["feats"] = [feature.float() for feature in features]  # the anchors take their dtype
        return self.head._inference(raw), raw


class Strips(nn.Module):
    """Runs a module on one strip of the image at a time, so that intermediate results stay in the cache.

    Args:
        module: a module that keeps the spatial size, made of convolutions and position-wise operations.
        rows: number of rows per strip.
        halo: number of rows above and below its own row that an output depends on.
        dim: the dimension of the rows.
    """

    def __init__(self, module: nn.Module, rows: int, halo: int, dim: int) -> None:
        super().__init__()
        self.module = module
        self.rows, self.halo, self.dim = rows, halo, dim

    def forward(self, x: Tensor) -> Tensor:
        size, strips = x.shape[self.dim], []
        for start in range(0, size, self.rows):
            stop = min(start + self.rows, size)
            # The module pads each strip with zeros; inside the image, that affects only the halo, which is cut off.
            first, last = max(start - self.halo, 0), min(stop + self.halo, size)
            y = self.module(x.narrow(self.dim, first, last - first))
            strips.append(y.narrow(self.dim, start - first, stop - start))
        return torch.cat(strips, self.dim)


def fuse_batch_norms(module: nn.Module) -> None:
    """Folds each batch norm into the convolution that feeds it: the module before it in its parent.

    Raises:
        ArgumentError: another module precedes it, so its input is unknown.
    """
    for parent in list(module.modules()):
        owner, last = parent, ""  # the parent and name of the previous module
        for name, child in list(parent.named_children()):
            # Another subclass may do more than these.
            if isinstance(child, nn.BatchNorm2d) and type(child) in (nn.BatchNorm2d, BatchNormAct2d):
                convolution = getattr(owner, last, None)
                if not isinstance(convolution, nn.Conv2d) or convolution.out_channels != child.num_features:
                    raise ArgumentError(
                        f"The batch norm '{name}' of {type(parent).__name__} can't be folded: it does not follow a "
                        f"convolution with the same number of channels."
                    )
                setattr(owner, last, fuse_conv_bn_eval(convolution, child))
                setattr(parent, name, child.act if isinstance(child, BatchNormAct2d) else nn.Identity())
            owner, last = _last_of_sequence(parent, name)


def _last_of_sequence(parent: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The parent and name of the last module of the sequence `name`; of `name` itself if it is not a sequence."""
    while isinstance(sequence := getattr(parent, name), nn.Sequential) and len(sequence):
        parent, name = sequence, next(reversed(sequence._modules))
    return parent, name


_Replacements = dict[type[nn.Module], Callable[[Any], nn.Module]]  # builds a faster module from one of that type

_FASTER: _Replacements = {
    tiny_encoder.Attention: WindowAttention,
    sam_vit.REAttention: RelativePositionAttention,
    Detect: Float32Detect,
}

# CPU only. At 1024 px, TinyViT's hidden layers take 64 and 32 MiB; in strips, 8 and 2 MiB.
_IN_STRIPS: _Replacements = {
    tiny_encoder.MBConv: partial(Strips, rows=32, halo=1, dim=2),
    tiny_encoder.MLP: partial(Strips, rows=1024, halo=0, dim=1),
}


def prepare_for_inference(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Modifies an encoder or detector with loaded weights in place, so that it runs faster on `device`.

    Batch norms are folded into convolutions, attention is fused and its bias gathered once, layers whose activations
    exceed a CPU's cache are computed in strips, and tensors are converted to `dtype` and channels-last. Preparing a
    module again has no effect.

    Raises:
        ValueError: the module was prepared for another device or dtype.
    """
    target = (device.type, dtype)
    prepared = getattr(module, _PREPARED_FOR, target)
    if prepared != target:
        raise ArgumentError(f"This {type(module).__name__} was prepared for {prepared}: load another one for {target}.")
    setattr(module, _PREPARED_FOR, target)
    module.eval().requires_grad_(False)
    fuse_batch_norms(module)
    _replace(module, _FASTER | (_IN_STRIPS if device.type == "cpu" else {}))
    module.to(device, dtype).to(memory_format=torch.channels_last)


def _replace(module: nn.Module, faster: _Replacements) -> None:
    for name, child in module.named_children():
        if type(child) in faster:
            setattr(module, name, faster[type(child)](child))
        elif not isinstance(child, Strips | Float32Detect):  # these contain the module they replaced
            _replace(child, faster)
