"""A working model passes; the same model fails when broken in any of the usual ways."""

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
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import DEMO_MODEL
from fiftyone_mobilesamv2.modeling.checkpoints.lookup import pretrained_model
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


class Wrapped(nn.Module):
    """Wraps a module with functions applied before and after it."""

    def __init__(self, module: nn.Module, before: Callable | None = None, after: Callable | None = None) -> None:
        super().__init__()
        self.module, self.before, self.after = module, before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.module(self.before(x) if self.before else x)
        return self.after(x) if self.after else x


def verdict_of(measured: Measured, healthy: Measured) -> str:
    """The verdict, given the reference values of the working model."""
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


def test_working_model_passes(healthy):
    assert verdict_of(healthy, healthy) == "works"
    assert all(check.passed for check in checks(healthy, float(healthy.iou.mean()), KNOWN.known_fingerprint))
    assert set(healthy.seconds) == {"encode", "discover", "decode", "crop"}


def test_model_without_reference_values_passes(healthy):
    """As for the released models, the fingerprint is printed but not compared."""
    results = checks(healthy)
    assert verdict(results) == "works" and [check.passed for check in results].count(None) == 1


@pytest.mark.slow
def test_decoder_of_another_encoder_is_recognized(model, images, healthy):
    """The embedding has the same statistics in a rotated space, as when ViT-H's decoder gets ViT-B's embedding."""
    channels = model.config.embed_dim
    rotation, _ = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)))
    model.image_encoder = Wrapped(model.image_encoder, after=lambda x: torch.einsum("dc,bchw->bdhw", rotation, x))
    sentence = verdict_of(measure(model, images), healthy)
    assert "decoder and encoder do not match" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("part", ["image_encoder", "decoder", "both"])
@pytest.mark.parametrize("how", [shuffle, randomise])
def test_noise_weights_are_recognized(model, images, healthy, part, how):
    for name in ("image_encoder", "decoder") if part == "both" else (part,):
        how(getattr(model, name))
    with torch.inference_mode():
        model._positions = model.decoder.positions(model.dtype)
    sentence = verdict_of(measure(model, images), healthy)
    assert "decoder and encoder do not match" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("how", ["BGR", "0..1"])
def test_wrong_input_format_of_the_encoder_is_recognized(model, images, healthy, how, monkeypatch):
    right = mobilesamv2.preprocess

    def wrong(image: np.ndarray, image_size: int):
        if how == "BGR":
            return right(np.ascontiguousarray(image[..., ::-1]), image_size)
        pixels, size = right(image, image_size)
        return (pixels * STD + MEAN) / 255, size

    monkeypatch.setattr(mobilesamv2, "preprocess", wrong)
    sentence = verdict_of(measure(model, images), healthy)
    assert sentence.startswith("The encoder receives images in another format")


@pytest.mark.slow
@pytest.mark.parametrize("form", [lambda x: x.flip(1), lambda x: (x * STD + MEAN) / 255], ids=["BGR", "0..1"])
def test_weights_trained_on_another_format_are_recognized(model, images, healthy, form):
    """The scenes have random colours, so masks from BGR are as good and only the fingerprint differs."""
    model.image_encoder = Wrapped(model.image_encoder, before=form)
    sentence = verdict_of(measure(model, images), healthy)
    assert "wrong normalisation" in sentence or "the preprocessing differs from that in training" in sentence


def test_weights_that_do_better_with_bgr_are_recognized(healthy):
    """Photos reveal this because their colours are not random."""
    measured = dataclasses.replace(healthy, forms=healthy.forms | {"BGR": (0.8, 0.7)})
    assert verdict_of(measured, healthy).startswith("The encoder's weights expect BGR")


@pytest.mark.slow
def test_wrong_input_format_of_the_detector_is_recognized(model, images, healthy, monkeypatch):
    right = object_discovery.letterbox
    monkeypatch.setattr(object_discovery, "letterbox", lambda image, size: right(image, size).flip(1))
    assert verdict_of(measure(model, images), healthy).startswith("The detector receives images in another format")


@pytest.mark.slow
def test_noise_in_the_detector_is_recognized(model, images, healthy):
    shuffle(model.discovery.detector)
    sentence = verdict_of(measure(model, images), healthy)
    assert "object discovery finds too few" in sentence


def test_disagreement_of_points_and_boxes_is_recognized(healthy):
    assert "masks from points" in verdict_of(dataclasses.replace(healthy, agreement=0.2), healthy)


# Models for photos, which the package does not contain ---------------------------------------------------------------


def measured_on_photos(healthy: Measured, iou: np.ndarray) -> Measured:
    boxes, ellipses = (np.concatenate(ious) for ious in zip(*map(_trivial_ious, photos())))
    return dataclasses.replace(
        healthy, iou=iou, box_iou=boxes, ellipse_iou=ellipses, fingerprint=np.zeros(FINGERPRINT_CHANNELS)
    )


def test_verdict_on_photos_depends_on_the_iou(healthy):
    """Masks near the drawn ones pass, even if some objects are missed; boxes, ellipses and low IoUs fail."""
    count = sum(len(known.objects) for known in photos())
    for iou, works in ((0.9, True), (0.7, True), (0.55, False), (0.4, False), (0.0, False)):
        assert (verdict(checks(measured_on_photos(healthy, np.full(count, iou)))) == "works") == works
    some_missed = np.where(np.arange(count) < 3, 0.1, 0.85)
    assert verdict(checks(measured_on_photos(healthy, some_missed))) == "works"
    for trivial in zip(*map(_trivial_ious, photos())):
        assert "weights load" in verdict(checks(measured_on_photos(healthy, np.concatenate(trivial))))


@torch.inference_mode()
@pytest.mark.slow
def test_random_weights_fail_on_photos(working):
    """The weights are the initial ones of the smallest released architecture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, decoder = encoder_config("tiny_vit").build(), PromptGuidedDecoder()
    model = MobileSAMv2(encoder, decoder, encoder_config("tiny_vit"), copy.deepcopy(working.discovery), "cpu")
    measured = measure(model, photos()[3:4])
    assert "weights load" in verdict(checks(measured)) and measured.iou.mean() < 0.5
