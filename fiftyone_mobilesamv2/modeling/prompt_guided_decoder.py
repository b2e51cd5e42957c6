"""Prompts of one image -> low-res logits and predicted IoU.

The weights live in ultralytics' SAM modules, so the names in released checkpoints match. The computation is our own and
equals SAM's up to the order of additions. The released decoder needs 3.5 GFLOP per prompt, nearly all of it for linear
maps of the S = 4096 image tokens, recomputed for every prompt. With few prompt tokens (T = 7 for a box), most of that
can be computed at less than half the cost:

- Until layer 0 writes to them, the image tokens K are the same for every prompt: layer 0's projections of them are
  computed once per image (:class:`ImageSide`). Later layers' projections of the positional encoding are the same for
  all images (:class:`Positions`).
- In later layers, products are reordered so that a projection W is applied to the few tokens rather than the many, per
  head: scores (Q Wq) (K Wk)^T = ((Q Wq) Wk^T) K^T, values P (K Wv) = (P K) Wv, and in the other direction
  (P V) Wo = P (V Wo). No projection of K remains.
- Only tokens whose output is used go through the last attention: the predicted IoU's token and those of the requested
  masks.
- A transposed convolution whose stride equals its kernel size works on each pixel separately, and so do the layer norm
  and the activation between the two. The pixels are rearranged once, at the end.
- Prompts are decoded in chunks whose image tokens fit a CPU's cache. The embedding is never copied per prompt on input,
  and prompts of different images never share a chunk, so a result depends only on its own image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ultralytics.models.sam.modules.decoders import MaskDecoder
from ultralytics.models.sam.modules.encoders import PromptEncoder
from ultralytics.models.sam.modules.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from ultralytics.nn.modules import LayerNorm2d

# Size of the image tokens of one chunk of prompts; 8 MiB hold two prompts in float32 at the release's geometry. On a
# CPU, these tokens and the values computed from them stay within the last-level cache; a GPU needs many prompts.
CHUNK_BYTES = {"cpu": 8 * 2**20}
CHUNK_BYTES_ACCELERATOR = 256 * 2**20

# Number of horizontal strips in which a chunk's masks are upscaled, again for the cache: upscaled tokens take twice the
# memory.
UPSCALED_STRIPS = 4


@dataclass(frozen=True)
class Positions:
    """Terms shared by all images: the positional encoding (pe) of the S = embed_size ** 2 image tokens of C channels.

    Queries stay float32 in every dtype: rounding them to bfloat16 was the largest source of error in masks (without it,
    the lowest IoU with float32 among 852 masks on photos rose from 0.952 to 0.975).
    """

    pe: Tensor  # float32 [S, C]
    k: list[Tensor]  # [h, S, d], the pe's part of the keys of layer 1's and the final token-to-image attention
    q: Tensor  # float32 [h, S, d], the pe's part of the queries of layer 1's image-to-token attention

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of image tokens. Prompt tokens are few and always float32."""
        return self.k[0].dtype


@dataclass(frozen=True)
class ImageSide:
    """Terms shared by all prompts of one image. S image tokens of C channels, h heads of d channels."""

    keys: Tensor  # [S, C] image tokens: the embedding plus the "no mask" embedding
    first_k: Tensor  # [h, S, d] keys of layer 0's token-to-image attention
    first_v: Tensor  # [h, S, d] its values
    first_q: Tensor  # float32 [h, S, d] queries of layer 0's image-to-token attention
    positions: Positions


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[N, T, h * d] -> [N, h, T, d]"""
    n, tokens, channels = x.shape
    return x.reshape(n, tokens, num_heads, channels // num_heads).transpose(1, 2)


def _shared_heads(projection: nn.Linear, x: Tensor, attention: Attention) -> Tensor:
    """Image tokens [S, C], projected -> [h, S, d]"""
    heads: Tensor = projection(x).unflatten(-1, (attention.num_heads, -1))
    return heads.transpose(0, 1).contiguous()


def _merge_heads(x: Tensor) -> Tensor:
    """[N, h, T, d] -> [N, T, h * d]"""
    n, num_heads, tokens, width = x.shape
    return x.transpose(1, 2).reshape(n, tokens, num_heads * width)


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head attention with `attention`'s weights. q [N, Tq, C], k and v [N, Tk, C] -> [N, Tq, C]"""
    heads = attention.num_heads
    out = F.scaled_dot_product_attention(
        _heads(attention.q_proj(q), heads), _heads(attention.k_proj(k), heads), _heads(attention.v_proj(v), heads)
    )
    projected: Tensor = attention.out_proj(_merge_heads(out))
    return projected


def _per_head(weight: Tensor, num_heads: int) -> Tensor:
    """A projection's weight [h * d, C] -> [h, d, C]"""
    per_head: Tensor = weight.unflatten(0, (num_heads, -1))
    return per_head


def _scores(few: Tensor, shared: Tensor) -> Tensor:
    """Products of each prompt's tokens `few` [N, h, T, d] with the shared tokens [h, S, d] -> [N, h, T, S]"""
    n, num_heads, tokens, width = few.shape
    few = few.transpose(0, 1).reshape(num_heads, n * tokens, width).to(shared.dtype)
    scores: Tensor = (few @ shared.transpose(1, 2)).unflatten(1, (n, tokens))
    return scores.transpose(0, 1)


def _fold(few: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """`few` [N, h, T, d] times each token's projection, ``keys @ weight.T`` per head, without computing it.

    keys [N, S, C], weight [h * d, C] -> [N, h, T, S]
    """
    _, num_heads, tokens, _ = few.shape
    folded = (few @ _per_head(weight, num_heads)).flatten(1, 2).to(keys.dtype)  # [N, h * T, C]
    products: Tensor = (folded @ keys.transpose(1, 2)).unflatten(1, (num_heads, tokens))
    return products


def _tokens_to_image(attention: Attention, queries: Tensor, keys: Tensor, pe_k: Tensor) -> Tensor:
    """Prompt tokens attend to the image: ``attention(queries, keys + pe, keys)``.

    Args:
        queries: [N, T, C]. keys: [N, S, C]. pe_k: [h, S, d], from :class:`Positions`.

    Returns:
        [N, T, C]
    """
    heads = attention.num_heads
    q = _heads(attention.q_proj(queries), heads)
    q = q * q.shape[-1] ** -0.5
    scores = _fold(q, attention.k_proj.weight, keys) + _scores(q, pe_k)
    p = torch.softmax(scores, dim=-1).flatten(1, 2)  # [N, h * T, S]
    attended = (p @ keys).unflatten(1, (heads, -1)).to(queries.dtype)  # [N, h, T, C]
    v = _merge_heads(attended @ _per_head(attention.v_proj.weight, heads).transpose(1, 2))
    # Softmax's rows sum to 1, so the bias can be added afterwards.
    out: Tensor = attention.out_proj(v + attention.v_proj.bias)
    return out


def _image_to_tokens(attention: Attention, keys: Tensor, k: Tensor, v: Tensor, shared_q: Tensor, first: bool) -> Tensor:
    """The image attends to prompt tokens: ``keys + attention(keys + pe, k, v)``.

    Args:
        keys: [N, S, C]. k, v: [N, T, C].
        shared_q: [h, S, d], the projected part of the queries `keys + pe` that all prompts share.
        first: whether the shared part is the whole query, as in layer 0.

    Returns:
        [N, S, C]
    """
    heads = attention.num_heads
    k, v = _heads(attention.k_proj(k), heads), _heads(attention.v_proj(v), heads)
    k = k * k.shape[-1] ** -0.5
    scores = _scores(k, shared_q)
    if not first:
        scores = scores + _fold(k, attention.q_proj.weight, keys)
    p = torch.softmax(scores, dim=2).flatten(1, 2).to(keys.dtype)  # over T: [N, h * T, S]
    # Each head's softmax sums to 1, so an equal share of the bias in every head adds up to the whole bias.
    v = v @ _per_head(attention.out_proj.weight.T, heads) + attention.out_proj.bias / heads  # [N, h, T, C]
    return torch.baddbmm(keys, p.transpose(1, 2), v.flatten(1, 2).to(keys.dtype))


def _norm(norm: nn.LayerNorm | LayerNorm2d, x: Tensor) -> Tensor:
    """Layer norm over the last dimension, of any dtype, with the weights of `norm`."""
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _pixel_linear(convolution: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution of stride 2 and kernel 2: each pixel becomes 2 x 2. [..., C] -> [..., 4, C']"""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2).to(x.dtype)
    bias = None if convolution.bias is None else convolution.bias.repeat(4).to(x.dtype)
    pixels: Tensor = F.linear(x, weight, bias).unflatten(-1, (4, -1))
    return pixels


# Which of the decoder's four masks to compute: the single mask of an unambiguous prompt, or the three of an ambiguous
# one.
SINGLE_MASK = slice(0, 1)
MULTIMASK = slice(1, None)


class PromptGuidedDecoder(nn.Module):
    """SAM's prompt encoder and mask decoder; terms that prompts share are computed once per image.

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

    @property
    def _transformer(self) -> TwoWayTransformer:
        return cast(TwoWayTransformer, self.mask_decoder.transformer)

    @property
    def _layers(self) -> tuple[TwoWayAttentionBlock, TwoWayAttentionBlock]:
        return cast("tuple[TwoWayAttentionBlock, TwoWayAttentionBlock]", tuple(self._transformer.layers))

    def embed_prompts(
        self, boxes: Tensor | None = None, points: Tensor | None = None, point_labels: Tensor | None = None
    ) -> Tensor:
        """Prompts in network-input pixels -> prompt tokens.

        Args:
            boxes: [N, 4] xyxy, or None.
            points: [N, P, 2] xy, or None.
            point_labels: [N, P], 1 inside the object, 0 outside, -1 for padding.

        Returns:
            [N, T, C]; T = 2 for boxes, P + 1 for points (SAM pads points that come without a box), P + 2 for both.
        """
        with_points = None if points is None else (points, point_labels)
        with self._full_precision():
            tokens: Tensor = self.prompt_encoder(points=with_points, boxes=boxes, masks=None)[0]
        return tokens

    def _full_precision(self) -> torch.autocast:
        # A position is the sine of a product: with bfloat16's 8 bits, its argument is off by half a pixel.
        device = self.prompt_encoder.no_mask_embed.weight.device
        return torch.autocast(device.type, enabled=False)

    def positions(self, dtype: torch.dtype = torch.float32) -> Positions:
        """Computes the terms that all images share; valid as long as the weights do not change.

        Args:
            dtype: the dtype in which image tokens are computed.
        """
        _, second = self._layers
        with self._full_precision():
            pe = self.prompt_encoder.get_dense_pe()[0].flatten(1).T
        to_image = (second.cross_attn_token_to_image, self._transformer.final_attn_token_to_image)
        return Positions(
            pe=pe,
            k=[_shared_heads(attention.k_proj, pe, attention).to(dtype) for attention in to_image],
            q=_shared_heads(second.cross_attn_image_to_token.q_proj, pe, second.cross_attn_image_to_token),
        )

    def image_side(self, features: Tensor, positions: Positions) -> ImageSide:
        """Computes the terms that all prompts of an image share.

        Args:
            features: [C, G, G], one image's embedding.
            positions: the result of :meth:`positions`.
        """
        keys = features.flatten(1).T + self.prompt_encoder.no_mask_embed.weight
        with_pe = keys + positions.pe
        first, _ = self._layers
        to_image, to_token = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        return ImageSide(
            keys=keys.to(positions.dtype).contiguous(),
            first_k=_shared_heads(to_image.k_proj, with_pe, to_image).to(positions.dtype),
            first_v=_shared_heads(to_image.v_proj, keys, to_image).to(positions.dtype),
            first_q=_shared_heads(to_token.q_proj, with_pe, to_token),
            positions=positions,
        )

    def _first_layer(self, side: ImageSide, tokens: Tensor) -> Tensor:
        """The part of layer 0 that updates the prompt tokens [N, T, C]; all of them see the same image tokens."""
        layer, _ = self._layers
        queries = layer.norm1(_attend(layer.self_attn, tokens, tokens, tokens))
        attention = layer.cross_attn_token_to_image
        n, count, _ = tokens.shape
        q = _heads(attention.q_proj(queries + tokens).reshape(1, n * count, -1), attention.num_heads)
        out = F.scaled_dot_product_attention(q.to(side.first_k.dtype), side.first_k[None], side.first_v[None])
        out = _merge_heads(out).reshape(n, count, -1).to(queries.dtype)
        queries = layer.norm2(queries + attention.out_proj(out))
        normed: Tensor = layer.norm3(queries + layer.mlp(queries))
        return normed

    def _decode_chunk(self, side: ImageSide, tokens: Tensor, queries: Tensor, masks: slice) -> tuple[Tensor, Tensor]:
        """Decodes layer 0's queries to low-res logits and predicted IoU; see :meth:`forward`."""
        decoder, transformer = self.mask_decoder, self._transformer
        first, second = self._layers
        keys = side.keys.expand(len(queries), -1, -1)
        keys = _image_to_tokens(
            first.cross_attn_image_to_token, keys, queries + tokens, queries, side.first_q, first=True
        )
        keys = _norm(first.norm4, keys)

        q = queries + tokens
        queries = second.norm1(queries + _attend(second.self_attn, q, q, queries))
        attended = _tokens_to_image(second.cross_attn_token_to_image, queries + tokens, keys, side.positions.k[0])
        queries = second.norm2(queries + attended)
        queries = second.norm3(queries + second.mlp(queries))
        keys = _image_to_tokens(
            second.cross_attn_image_to_token, keys, queries + tokens, queries, side.positions.q, first=False
        )
        keys = _norm(second.norm4, keys)

        mask_indices = range(decoder.num_mask_tokens)[masks]
        used = [0, *(1 + i for i in mask_indices)]
        queries = queries[:, used]
        attended = _tokens_to_image(
            transformer.final_attn_token_to_image, queries + tokens[:, used], keys, side.positions.k[1]
        )
        queries = transformer.norm_final_attn(queries + attended)
        weights = [decoder.output_hypernetworks_mlps[i](queries[:, 1 + n]) for n, i in enumerate(mask_indices)]
        logits = self._masks(keys, torch.stack(weights, dim=1))
        return logits, decoder.iou_prediction_head(queries[:, 0])[:, masks]

    def _masks(self, keys: Tensor, weights: Tensor) -> Tensor:
        """Upscales image tokens [N, S, C] four times and multiplies them with `weights` [N, M, C / 8].

        Returns:
            float32 [N, M, 4G, 4G]
        """
        first, norm, activation, second, _ = cast(
            "tuple[nn.ConvTranspose2d, LayerNorm2d, nn.Module, nn.ConvTranspose2d, nn.Module]",
            tuple(self.mask_decoder.output_upscaling),
        )
        weights = weights.transpose(1, 2).to(keys.dtype)
        width = self.prompt_encoder.image_embedding_size[1]
        strips = []
        for x in keys.chunk(UPSCALED_STRIPS, dim=1):
            x = activation(_norm(norm, _pixel_linear(first, x)))
            x = activation(_pixel_linear(second, x)).flatten(1, 3)  # [N, 16 * tokens of the strip, C / 8]
            logits = (x @ weights).unflatten(1, (-1, width, 2, 2, 2, 2)).permute(0, 7, 1, 3, 5, 2, 4, 6)
            strips.append(logits.to(torch.float32, memory_format=torch.contiguous_format).flatten(5, 7).flatten(2, 4))
        return torch.cat(strips, dim=2)

    def forward(self, side: ImageSide, prompts: Tensor, masks: slice = SINGLE_MASK) -> tuple[Tensor, Tensor]:
        """Decodes all prompts of one image, in chunks of bounded memory.

        Args:
            side: the result of :meth:`image_side`.
            prompts: [N, T, C] from :meth:`embed_prompts`.
            masks: which of the four masks to compute, :data:`SINGLE_MASK` or :data:`MULTIMASK`.

        Returns:
            Low-res logits, float32 [N, M, 4G, 4G], and predicted IoU [N, M].
        """
        decoder = self.mask_decoder
        if len(prompts) == 0:
            count, size = len(range(decoder.num_mask_tokens)[masks]), 4 * self.prompt_encoder.image_embedding_size[0]
            return prompts.new_zeros(0, count, size, size), prompts.new_zeros(0, count)
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(len(prompts), -1, -1), prompts], dim=1)
        queries = self._first_layer(side, tokens)
        size = prompts_per_chunk(side.keys)
        chunks = [self._decode_chunk(side, t, q, masks) for t, q in zip(tokens.split(size), queries.split(size))]
        logits, iou = zip(*chunks)
        return torch.cat(logits), torch.cat(iou)


def prompts_per_chunk(keys: Tensor) -> int:
    """Number of prompts to decode at a time, each with its own copy of the image tokens `keys`."""
    return max(1, CHUNK_BYTES.get(keys.device.type, CHUNK_BYTES_ACCELERATOR) // (keys.numel() * keys.element_size()))
