"""Prompts of one image -> low-res logits and predicted IoU.

The weights live in ultralytics' SAM modules, so released checkpoints fit by name; the computation is ours. A prompt
costs the released decoder a pass over the whole image embedding. Much of that pass is the same for every prompt of the
image, so :class:`ImageSide` holds it, computed once, and the prompts are decoded against it in chunks. There is never
a copy of the embedding per prompt going in, and prompts of different images never share a chunk, so a result depends on
its own image alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ultralytics.models.sam.modules.decoders import MaskDecoder
from ultralytics.models.sam.modules.encoders import PromptEncoder
from ultralytics.models.sam.modules.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer

# Prompts decoded at a time. Per prompt the image tokens take 4 MiB in float32 (4096 x 256), so 16 of them stay
# within a last-level cache or a small share of a GPU, and are many enough to fill both.
PROMPTS_PER_CHUNK = 16


@dataclass(frozen=True)
class ImageSide:
    """What all prompts of one image share. S = embed_size ** 2 image tokens of C channels, h heads of d channels."""

    keys: Tensor  # [1, S, C] image tokens: the embedding plus the "no mask" embedding
    pe: Tensor  # [1, S, C] positional encoding of the tokens
    first_k: Tensor  # [1, h, S, d] of layer 0's token-to-image attention
    first_v: Tensor  # [1, h, S, d]
    first_q: Tensor  # [1, h, S, d] of layer 0's image-to-token attention


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[N, T, h * d] -> [N, h, T, d]"""
    n, tokens, channels = x.shape
    return x.reshape(n, tokens, num_heads, channels // num_heads).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """[N, h, T, d] -> [N, T, h * d]"""
    n, num_heads, tokens, channels = x.shape
    return x.transpose(1, 2).reshape(n, tokens, num_heads * channels)


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head attention with `attention`'s weights. q [N, Tq, C], k and v [N, Tk, C] -> [N, Tq, C]"""
    heads = attention.num_heads
    out = F.scaled_dot_product_attention(
        _heads(attention.q_proj(q), heads), _heads(attention.k_proj(k), heads), _heads(attention.v_proj(v), heads)
    )
    return attention.out_proj(_merge_heads(out))


def _attend_to_few(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Many queries (image tokens) to a few keys (prompt tokens), all prompts' queries possibly the same.

    The output projection is linear, so it is applied to the few values instead of the many outputs: with P_h the
    softmax of head h and W_h its rows of the projection, sum_h P_h V_h W_h = [P_1 .. P_h] [V_1 W_1; ..; V_h W_h].

    Args:
        q: [1 or N, h, S, d], projected and split into heads.
        k, v: [N, T, C].

    Returns:
        [N, S, C]
    """
    heads = attention.num_heads
    k = _heads(attention.k_proj(k), heads)
    v = _heads(attention.v_proj(v), heads)
    n, _, tokens, width = v.shape
    weight = attention.out_proj.weight.T.reshape(heads, width, -1)  # [h, d, C]
    v = (v @ weight).reshape(n, heads * tokens, -1)  # [N, h * T, C]
    p = torch.softmax(q @ k.transpose(-1, -2) * width**-0.5, dim=-1)  # [N, h, S, T]
    p = p.transpose(1, 2).reshape(n, p.shape[2], heads * tokens)
    return p @ v + attention.out_proj.bias


class PromptGuidedDecoder(nn.Module):
    """SAM's prompt encoder and mask decoder, run so that what prompts share is computed once per image.

    Args:
        embed_dim, embed_size: channels and side of the image embedding.
        image_size: side in pixels of the padded network input, in whose coordinates prompts are given.
    """

    def __init__(self, embed_dim: int = 256, embed_size: int = 64, image_size: int = 1024) -> None:
        super().__init__()
        self.prompt_encoder = PromptEncoder(
            embed_dim=embed_dim,
            image_embedding_size=(embed_size, embed_size),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(
            transformer_dim=embed_dim,
            transformer=TwoWayTransformer(depth=2, embedding_dim=embed_dim, num_heads=8, mlp_dim=8 * embed_dim),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )

    def embed_prompts(
        self, boxes: Tensor | None = None, points: Tensor | None = None, point_labels: Tensor | None = None
    ) -> Tensor:
        """Prompts in network-input pixels -> their tokens.

        Args:
            boxes: [N, 4] xyxy, or None.
            points: [N, P, 2] xy, or None.
            point_labels: [N, P], 1 inside the object, 0 outside, -1 not a point (padding).

        Returns:
            [N, T, C]; T = 2 for boxes, P + 1 for points (SAM pads points that come without a box), P + 2 for both.
        """
        with_points = None if points is None else (points, point_labels)
        with self._full_precision():
            tokens, _ = self.prompt_encoder(points=with_points, boxes=boxes, masks=None)
        return tokens

    def _full_precision(self) -> torch.autocast:
        # A position is the sine of a product: the 8 bits of a bfloat16 are half a pixel off before the sine.
        device = self.prompt_encoder.no_mask_embed.weight.device
        return torch.autocast(device.type, enabled=False)

    def image_side(self, features: Tensor) -> ImageSide:
        """The part of decoding that all prompts of an image share. `features`: [C, G, G], one image's embedding."""
        with self._full_precision():
            pe = self.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
        keys = features.unsqueeze(0).flatten(2).transpose(1, 2) + self.prompt_encoder.no_mask_embed.weight
        layer: TwoWayAttentionBlock = self.mask_decoder.transformer.layers[0]
        to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        with_pe = keys + pe
        return ImageSide(
            keys=keys,
            pe=pe,
            first_k=_heads(to_image.k_proj(with_pe), to_image.num_heads),
            first_v=_heads(to_image.v_proj(keys), to_image.num_heads),
            first_q=_heads(to_token.q_proj(with_pe), to_token.num_heads),
        )

    def _first_attend_to_image(self, attention: Attention, side: ImageSide, q: Tensor) -> Tensor:
        """Layer 0's prompt tokens [N, T, C] attend to the image: every prompt's queries in one attention."""
        n, tokens, _ = q.shape
        q = _heads(attention.q_proj(q).reshape(1, n * tokens, -1), attention.num_heads)
        out = F.scaled_dot_product_attention(q, side.first_k, side.first_v)
        return attention.out_proj(_merge_heads(out).reshape(n, tokens, -1))

    def _transform(self, side: ImageSide, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """SAM's two-way transformer. tokens [N, T, C] -> tokens [N, T, C], image tokens [N, S, C]"""
        transformer = self.mask_decoder.transformer
        queries, keys = tokens, side.keys
        for index, layer in enumerate(transformer.layers):
            if index == 0:
                queries = _attend(layer.self_attn, queries, queries, queries)
            else:
                q = queries + tokens
                queries = queries + _attend(layer.self_attn, q, q, queries)
            queries = layer.norm1(queries)

            if index == 0:
                attended = self._first_attend_to_image(layer.cross_attn_token_to_image, side, queries + tokens)
            else:
                attended = _attend(layer.cross_attn_token_to_image, queries + tokens, keys + side.pe, keys)
            queries = layer.norm2(queries + attended)
            queries = layer.norm3(queries + layer.mlp(queries))

            to_token = layer.cross_attn_image_to_token
            q = side.first_q if index == 0 else _heads(to_token.q_proj(keys + side.pe), to_token.num_heads)
            keys = layer.norm4(keys + _attend_to_few(to_token, q, queries + tokens, queries))

        attended = _attend(transformer.final_attn_token_to_image, queries + tokens, keys + side.pe, keys)
        return transformer.norm_final_attn(queries + attended), keys

    def decode_chunk(self, side: ImageSide, prompts: Tensor, masks: slice) -> tuple[Tensor, Tensor]:
        """Decodes all `prompts` in one pass; see :meth:`forward`, which bounds the memory."""
        decoder = self.mask_decoder
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(len(prompts), -1, -1), prompts.to(output_tokens.dtype)], dim=1)
        queries, keys = self._transform(side, tokens)

        size = self.prompt_encoder.image_embedding_size
        upscaled = decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, size))
        wanted = range(decoder.num_mask_tokens)[masks]
        weights = torch.stack([decoder.output_hypernetworks_mlps[i](queries[:, 1 + i]) for i in wanted], dim=1)
        logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return logits, decoder.iou_prediction_head(queries[:, 0])[:, masks]

    def forward(self, side: ImageSide, prompts: Tensor, multimask: bool = False) -> tuple[Tensor, Tensor]:
        """Decodes all prompts of one image, :data:`PROMPTS_PER_CHUNK` at a time.

        Args:
            side: from :meth:`image_side`.
            prompts: [N, T, C] from :meth:`embed_prompts`.
            multimask: the three masks of an ambiguous prompt (SAM's tokens 1 to 3) rather than the single-mask token.

        Returns:
            low-res logits [N, M, 4G, 4G] and predicted IoU [N, M]; M is 3 or 1.
        """
        masks = slice(1, None) if multimask else slice(0, 1)
        if len(prompts) == 0:
            count, size = (3 if multimask else 1), 4 * self.prompt_encoder.image_embedding_size[0]
            return prompts.new_zeros(0, count, size, size), prompts.new_zeros(0, count)
        chunks = [self.decode_chunk(side, chunk, masks) for chunk in prompts.split(PROMPTS_PER_CHUNK)]
        logits, iou = zip(*chunks)
        return torch.cat(logits), torch.cat(iou)
