"""A working model passes; the same one, broken in each way that models break in, does not."""

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.doctor import segmentation_check
from fiftyone_mobilesamv2.doctor.ground_truth import photos, scenes
from fiftyone_mobilesamv2.doctor.segmentation_check import (
    FINGERPRINT_CHANNELS,
    Measured,
    _trivial_ious,
    checks,
    measure,
    verdict,
)
from fiftyone_mobilesamv2.modeling import mobilesamv2, object_discovery
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import DEMO_MODEL, pretrained_model
from fiftyone_mobilesamv2.modeling.image_encoders import PIXEL_MEAN, PIXEL_STD, encoder_config
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import PromptGuidedDecoder

MEAN, STD = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
KNOWN = pretrained_model(DEMO_MODEL)


@pytest.fixture(scope="module", autouse=True)
def small_grid():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation_check, "GRID", 6)
        yield


@pytest.fixture(scope="module")
def images():
    return scenes()[:5]


@pytest.fixture(scope="module")
def working() -> MobileSAMv2:
    return MobileSAMv2.from_pretrained(DEMO_MODEL, device="cpu")


@pytest.fixture(scope="module")
def healthy(working, images) -> Measured:
    return measure(working, images)


@pytest.fixture
def model(working) -> MobileSAMv2:
    """A copy to break."""
    return copy.deepcopy(working)


class Around(nn.Module):
    """A module between two functions."""

    def __init__(self, module: nn.Module, before: Callable | None = None, after: Callable | None = None) -> None:
        super().__init__()
        self.module, self.before, self.after = module, before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.module(self.before(x) if self.before else x)
        return self.after(x) if self.after else x


def found(measured: Measured, healthy: Measured) -> str:
    """The verdict, with what is known of the working model."""
    return verdict(checks(measured, float(healthy.iou.mean()), KNOWN.known_fingerprint))


def shuffle(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].reshape(weight.shape))


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.numel() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())


def test_working_model(healthy):
    assert found(healthy, healthy) == "works"
    assert all(check.passed for check in checks(healthy, float(healthy.iou.mean()), KNOWN.known_fingerprint))
    assert set(healthy.seconds) == {"encode", "discover", "decode", "crop"}


def test_nothing_known_of_the_model(healthy):
    """As for the released ones: the fingerprint is told and not compared."""
    results = checks(healthy)
    assert verdict(results) == "works" and [check.passed for check in results].count(None) == 1


@pytest.mark.slow
def test_decoder_of_another_encoder(model, images, healthy):
    """An embedding of the same statistics in another space: what ViT-H's decoder gets from ViT-B's encoder."""
    channels = model.config.embed_dim
    rotation, _ = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)))
    model.image_encoder = Around(model.image_encoder, after=lambda x: torch.einsum("dc,bchw->bdhw", rotation, x))
    sentence = found(measure(model, images), healthy)
    assert "decoder and encoder do not match" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("part", ["image_encoder", "decoder", "both"])
@pytest.mark.parametrize("how", [shuffle, randomise])
def test_weights_that_are_noise(model, images, healthy, part, how):
    for name in ("image_encoder", "decoder") if part == "both" else (part,):
        how(getattr(model, name))
    with torch.inference_mode():
        model._positions = model.decoder.positions(model.dtype)
    sentence = found(measure(model, images), healthy)
    assert "decoder and encoder do not match" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("how", ["BGR", "0..1"])
def test_images_reach_the_encoder_in_another_form(model, images, healthy, how, monkeypatch):
    right = mobilesamv2.preprocess

    def wrong(image: np.ndarray, image_size: int):
        if how == "BGR":
            return right(np.ascontiguousarray(image[..., ::-1]), image_size)
        pixels, size = right(image, image_size)
        return (pixels * STD + MEAN) / 255, size

    monkeypatch.setattr(mobilesamv2, "preprocess", wrong)
    sentence = found(measure(model, images), healthy)
    assert sentence.startswith("The encoder receives images in another format")


@pytest.mark.slow
@pytest.mark.parametrize("form", [lambda x: x.flip(1), lambda x: (x * STD + MEAN) / 255], ids=["BGR", "0..1"])
def test_weights_that_expect_another_form(model, images, healthy, form):
    """The scenes' colours are random: masks of BGR are as good, and the fingerprint alone tells."""
    model.image_encoder = Around(model.image_encoder, before=form)
    sentence = found(measure(model, images), healthy)
    assert "wrong normalisation" in sentence or "the preprocessing differs from that in training" in sentence


def test_weights_that_would_rather_have_bgr(healthy):
    """As photos tell, whose colours are not random."""
    measured = dataclasses.replace(healthy, forms=healthy.forms | {"BGR": (0.8, 0.7)})
    assert found(measured, healthy).startswith("The encoder's weights expect BGR")


@pytest.mark.slow
def test_detector_sees_bgr(model, images, healthy, monkeypatch):
    right = object_discovery.letterbox
    monkeypatch.setattr(object_discovery, "letterbox", lambda image, size: right(image, size).flip(1))
    assert found(measure(model, images), healthy).startswith("The detector receives images in another format")


@pytest.mark.slow
def test_detector_that_is_noise(model, images, healthy):
    shuffle(model.discovery.detector)
    sentence = found(measure(model, images), healthy)
    assert "object discovery finds too few" in sentence


def test_masks_from_points_that_are_of_other_things(healthy):
    assert "masks from points" in found(dataclasses.replace(healthy, agreement=0.2), healthy)


# Models of photos, of which none comes with the package ---------------------------------------------------------------


def of_photos(healthy: Measured, iou: np.ndarray) -> Measured:
    boxes, ellipses = (np.concatenate(ious) for ious in zip(*map(_trivial_ious, photos())))
    return dataclasses.replace(
        healthy, iou=iou, box_iou=boxes, ellipse_iou=ellipses, fingerprint=np.zeros(FINGERPRINT_CHANNELS)
    )


def test_answers_on_photos(healthy):
    """Near the drawn masks: works, also with some objects missed. Boxes, ellipses, or half of that: fails."""
    count = sum(len(known.objects) for known in photos())
    for iou, works in ((0.9, True), (0.7, True), (0.55, False), (0.4, False), (0.0, False)):
        assert (verdict(checks(of_photos(healthy, np.full(count, iou)))) == "works") == works
    some_missed = np.where(np.arange(count) < 3, 0.1, 0.85)
    assert verdict(checks(of_photos(healthy, some_missed))) == "works"
    for trivial in zip(*map(_trivial_ious, photos())):
        assert "weights load" in verdict(checks(of_photos(healthy, np.concatenate(trivial))))


@torch.inference_mode()
@pytest.mark.slow
def test_random_weights_do_not_pass_on_photos(working):
    """Those of the smallest released architecture, as built."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, decoder = encoder_config("tiny_vit").build(), PromptGuidedDecoder()
    model = MobileSAMv2(encoder, decoder, encoder_config("tiny_vit"), copy.deepcopy(working.discovery), "cpu")
    measured = measure(model, photos()[3:4])
    assert "weights load" in verdict(checks(measured)) and measured.iou.mean() < 0.5
