"""Decoding the prompts of one image together gives the results of SAM's own modules."""

import pytest
import torch

from fiftyone_mobilesamv2.modeling import prompt_guided_decoder
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import (
    MULTIMASK,
    SINGLE_MASK,
    PromptGuidedDecoder,
    prompts_per_chunk,
)

# name -> (channels of the embedding, side of the embedding, side of the network input)
GEOMETRIES = {"release": (256, 64, 1024), "demo": (128, 32, 256)}


def decoder_and_features(geometry: str) -> tuple[PromptGuidedDecoder, torch.Tensor]:
    channels, side, image_size = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    decoder = PromptGuidedDecoder(channels, side, image_size).eval().requires_grad_(False)
    for parameter in decoder.parameters():  # norms are initialized to the identity, which would hide a missing one
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return decoder, torch.randn(channels, side, side, generator=generator)


def some_prompts(count: int, points: int, image_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, 2, generator=generator) * image_size
    return {
        "boxes": torch.cat([corners.amin(1), corners.amax(1)], 1),
        "points": torch.rand(count, points, 2, generator=generator) * image_size,
        "point_labels": torch.randint(0, 2, (count, points), generator=generator),
    }


def decode_with_sam(decoder, features, multimask, boxes=None, points=None, point_labels=None):
    """The release's computation, with a copy of the embedding for every prompt."""
    with_points = None if points is None else (points, point_labels)
    sparse, dense = decoder.prompt_encoder(points=with_points, boxes=boxes, masks=None)
    return decoder.mask_decoder(features[None], decoder.prompt_encoder.get_dense_pe(), sparse, dense, multimask)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


PROMPTS = {
    "boxes": (["boxes"], 1),
    "a point": (["points", "point_labels"], 1),
    "points": (["points", "point_labels"], 3),
    "boxes and points": (["boxes", "points", "point_labels"], 2),
}


@pytest.mark.parametrize("masks", [SINGLE_MASK, MULTIMASK])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_results_equal_those_of_sam(geometry, prompts, masks):
    decoder, features = decoder_and_features(geometry)
    names, points = PROMPTS[prompts]
    given = {key: value for key, value in some_prompts(3, points, GEOMETRIES[geometry][2]).items() if key in names}
    expected_logits, expected_iou = decode_with_sam(decoder, features, masks == MULTIMASK, **given)
    logits, iou = decoder(decoder.image_side(features, decoder.positions()), decoder.embed_prompts(**given), masks)
    assert logits.shape[:2] == iou.shape == (3, len(range(4)[masks]))
    assert_close(logits, expected_logits)
    torch.testing.assert_close(iou, expected_iou, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_bfloat16_is_close(geometry):
    decoder, features = decoder_and_features(geometry)
    prompts = decoder.embed_prompts(boxes=some_prompts(6, 1, GEOMETRIES[geometry][2])["boxes"])
    expected_logits, expected_iou = decoder(decoder.image_side(features, decoder.positions()), prompts)
    logits, iou = decoder(decoder.image_side(features, decoder.positions(torch.bfloat16)), prompts)
    assert logits.dtype == iou.dtype == torch.float32
    assert not torch.equal(logits, expected_logits)
    deviation = (logits - expected_logits).abs() / expected_logits.std()
    assert deviation.mean() <= 0.02 and deviation.max() <= 0.2
    torch.testing.assert_close(iou, expected_iou, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_chunking_does_not_change_results(count, monkeypatch):
    """Prompts are decoded together and one by one."""
    decoder, features = decoder_and_features("demo")
    side = decoder.image_side(features, decoder.positions())
    prompts = decoder.embed_prompts(boxes=some_prompts(count, 1, 256)["boxes"])
    assert prompts_per_chunk(side.keys) > count
    logits, iou = decoder(side, prompts)
    monkeypatch.setitem(prompt_guided_decoder.CHUNK_BYTES, "cpu", 1)
    assert prompts_per_chunk(side.keys) == 1
    one_by_one, iou_one_by_one = decoder(side, prompts)
    assert_close(logits, one_by_one)
    torch.testing.assert_close(iou, iou_one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", [SINGLE_MASK, MULTIMASK])
def test_no_prompts(masks):
    decoder, features = decoder_and_features("demo")
    logits, iou = decoder(
        decoder.image_side(features, decoder.positions()),
        decoder.embed_prompts(boxes=torch.zeros(0, 4)),
        masks,
    )
    count = len(range(4)[masks])
    assert logits.shape == (0, count, 128, 128) and iou.shape == (0, count)


def test_gradients_equal_those_of_sam():
    decoder, features = decoder_and_features("demo")
    decoder.mask_decoder.requires_grad_(True)
    features.requires_grad_()
    boxes = some_prompts(2, 1, 256)["boxes"]
    target = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    learned = [features, *decoder.mask_decoder.parameters()]

    def gradients(logits: torch.Tensor, iou: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((logits * target).mean() + iou.sum(), learned, materialize_grads=True)

    computed = gradients(*decoder(decoder.image_side(features, decoder.positions()), decoder.embed_prompts(boxes)))
    expected = gradients(*decode_with_sam(decoder, features, False, boxes))
    for mine, theirs in zip(computed, expected):
        assert (mine - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-7
    assert computed[0].abs().max() > 0
