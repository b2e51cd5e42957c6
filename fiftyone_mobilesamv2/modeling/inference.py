"""Encoders and detectors prepared for inference: the same function of the image, computed faster.

:func:`prepare_for_inference` is applied once, after the weights are loaded (a prepared module has other tensors than a
checkpoint has) and never to a module that is still to be trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from ultralytics.models.sam.modules import blocks as sam_vit
from ultralytics.models.sam.modules import tiny_encoder
from ultralytics.models.sam.modules.utils import get_rel_pos
from ultralytics.nn.modules import Detect

from ..errors import ArgumentError

# The attribute of a prepared module with the device type and dtype that it was prepared for.
_PREPARED_FOR = "prepared_for"
# A ViT-B's bias of so many rows takes 50 MB.
_QUERY_ROWS = 4


class WindowAttention(nn.Module):
    """TinyViT's attention by `scaled_dot_product_attention`, its bias gathered once."""

    bias: Tensor

    def __init__(self, attention: tiny_encoder.Attention) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = attention.norm, attention.qkv, attention.proj
        self.num_heads = attention.num_heads
        indices: Tensor = attention.get_buffer("attention_bias_idxs")
        self.register_buffer("bias", attention.attention_biases[:, indices][None].detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of windows [B, N, C] -> [B, N, C]."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=3)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(len(x), -1, -1, -1))
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class RelativePositionAttention(nn.Module):
    """The attention of SAM's ViTs by `scaled_dot_product_attention`, its tables of relative positions gathered once.

    The bias of a query is the sum of a term for the key's row and one for its column. It is written out for a few rows
    of queries at a time: for a whole 64 x 64 grid and 12 heads it would take 800 MB.
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
        """A grid of tokens [B, H, W, C] -> [B, H, W, C]."""
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
    """A module that computes in float32, whatever the others around it are converted to."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x.float())
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InFloat32:
        # `Module.to` comes down to this: follow it to the device, not to the dtype.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


class Float32Detect(nn.Module):
    """YOLO's head with scores and boxes in float32: bfloat16 counts in steps of 4 px at 1024 px."""

    def __init__(self, head: Detect) -> None:
        super().__init__()
        for layers in (*head.cv2, *head.cv3):
            layers[-1] = InFloat32(layers[-1])
        head.set_submodule("dfl", InFloat32(head.dfl))
        head.dynamic = True  # or it would keep its anchors, and on the device where it was first used
        self.head = head
        self.f, self.i = head.f, head.i  # by these ultralytics knows a layer's input and output

    def forward(self, features: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        raw: dict[str, Any] = self.head.forward_head(features, **self.head.one2many)
        raw["feats"] = [feature.float() for feature in features]  # whose dtype the anchors get
        return self.head._inference(raw), raw


class Strips(nn.Module):
    """Runs a module on one strip of the image after the other, so that what it computes between stays in the cache.

    Args:
        module: keeps the size; of convolutions and what works on each position alone.
        rows: in a strip.
        halo: rows above and below its own that an output depends on.
        dim: which dimension has the rows.
    """

    def __init__(self, module: nn.Module, rows: int, halo: int, dim: int) -> None:
        super().__init__()
        self.module = module
        self.rows, self.halo, self.dim = rows, halo, dim

    def forward(self, x: Tensor) -> Tensor:
        size, strips = x.shape[self.dim], []
        for start in range(0, size, self.rows):
            stop = min(start + self.rows, size)
            # The module pads what it is given with zeros, which inside the image spoils the halo alone.
            first, last = max(start - self.halo, 0), min(stop + self.halo, size)
            y = self.module(x.narrow(self.dim, first, last - first))
            strips.append(y.narrow(self.dim, start - first, stop - start))
        return torch.cat(strips, self.dim)


def fuse_batch_norms(module: nn.Module) -> None:
    """Folds each batch norm into the convolution that feeds it: the module before it in its parent.

    Raises:
        ArgumentError: there is another module, which may not be what feeds it.
    """
    for parent in list(module.modules()):
        before: tuple[nn.Module, str] | None = None
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:  # and none that does more, as timm has
                owner, convolution_name = _last(before)
                convolution = getattr(owner, convolution_name, None)
                if not isinstance(convolution, nn.Conv2d) or convolution.out_channels != child.num_features:
                    raise ArgumentError(
                        f"The batch norm '{name}' of {type(parent).__name__} follows no convolution that feeds it: it "
                        f"can't be folded."
                    )
                setattr(owner, convolution_name, fuse_conv_bn_eval(convolution, child))
                setattr(parent, name, nn.Identity())
            before = parent, name


def _last(place: tuple[nn.Module, str] | None) -> tuple[nn.Module | None, str]:
    """Owner and name of the last module in a sequence of modules, or of the module itself."""
    if place is None:
        return None, ""
    owner, name = place
    while isinstance(sequence := getattr(owner, name), nn.Sequential) and len(sequence):
        owner, name = sequence, str(len(sequence) - 1)
    return owner, name


_Replacements = dict[type[nn.Module], Callable[[Any], nn.Module]]  # each makes a faster module of one of that type

_FASTER: _Replacements = {
    tiny_encoder.Attention: WindowAttention,
    sam_vit.REAttention: RelativePositionAttention,
    Detect: Float32Detect,
}

# On a CPU. TinyViT's hidden layers take 64 and 32 MiB at 1024 px, in strips 8 and 2.
_IN_STRIPS: _Replacements = {
    tiny_encoder.MBConv: partial(Strips, rows=32, halo=1, dim=2),
    tiny_encoder.MLP: partial(Strips, rows=1024, halo=0, dim=1),
}


def prepare_for_inference(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Changes an encoder or a detector, whose weights are loaded, into one that computes the same faster on `device`.

    Batch norms are folded into convolutions, attention is fused and its bias gathered once, what is larger than a CPU's
    cache is computed in strips, tensors are `dtype` and have their channels last. Prepared again, it stays as it is.

    Raises:
        ValueError: it has been prepared for another device or dtype.
    """
    wanted = (device.type, dtype)
    prepared = getattr(module, _PREPARED_FOR, wanted)
    if prepared != wanted:
        raise ArgumentError(f"This {type(module).__name__} was prepared for {prepared}: load another one for {wanted}.")
    setattr(module, _PREPARED_FOR, wanted)
    module.eval().requires_grad_(False)
    fuse_batch_norms(module)
    _replace(module, _FASTER | (_IN_STRIPS if device.type == "cpu" else {}))
    module.to(device, dtype).to(memory_format=torch.channels_last)


def _replace(module: nn.Module, faster: _Replacements) -> None:
    for name, child in module.named_children():
        if type(child) in faster:
            setattr(module, name, faster[type(child)](child))
        elif not isinstance(child, Strips | Float32Detect):  # they hold what they replaced
            _replace(child, faster)
