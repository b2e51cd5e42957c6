"""Training of object discovery: what is ignored, what learns, and that an interrupted training ends the same."""

import copy
import dataclasses
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou
from ultralytics.cfg import get_cfg
from ultralytics.utils.loss import v8DetectionLoss

from fiftyone_mobilesamv2.errors import Cancelled
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_yolo
from fiftyone_mobilesamv2.modeling.object_discovery import ObjectDiscovery
from fiftyone_mobilesamv2.training.discovery import (
    BACKBONE_LAYERS,
    DiscoveryLoss,
    DiscoverySettings,
    covered_shares,
    train_discovery,
)
from fiftyone_mobilesamv2.training.examples import Example
from fiftyone_mobilesamv2.training.measuring import box_recall
from fiftyone_mobilesamv2.training.scenes import TRAIN_SEED, make_scene
from fiftyone_mobilesamv2.training.yolo_data import IGNORED, OBJECT

from .conftest import example_of, rectangle

SIZE = 128
NO_BOXES = np.zeros((0, 4), np.float32)


@pytest.fixture(scope="module")
def base():
    return load_yolo(PACKAGED_WEIGHTS / "demo_detector.safetensors")


@pytest.fixture(scope="module")
def examples():
    scenes = [make_scene(TRAIN_SEED, number) for number in range(6)]
    return [
        Example(str(i), f"scene {i}", partial(np.copy, scene.image), scene.boxes(), None, NO_BOXES)
        for i, scene in enumerate(scenes)
    ]


def settings(**changes):
    return DiscoverySettings(**{"epochs": 2, "batch_size": 4, "image_size": SIZE, **changes})


def train(base, examples, folder, report=lambda step: None, validate=lambda detector: 0.0, **changes):
    return train_discovery(base, examples, settings(**changes), folder, report, validate)


# Loss -----------------------------------------------------------------------------------------------------------------


def loss_of(kind, model, batch):
    torch.manual_seed(0)
    model.args = get_cfg()
    model.train()
    criterion = kind(model)
    preds = model(batch["img"])
    losses, items = criterion(preds, {key: value.clone() for key, value in batch.items()})
    return losses, items


def batch_of(boxes, kinds):
    """Boxes are xyxy of the image, from 0 to 1."""
    corners = torch.tensor(boxes).reshape(-1, 4)
    return {
        "img": torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)),
        "batch_idx": torch.zeros(len(corners)),
        "cls": torch.tensor(kinds, dtype=torch.float32)[:, None],
        "bboxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
    }


def test_loss_without_ignored_regions_is_that_of_ultralytics(base):
    batch = batch_of([[0.1, 0.1, 0.5, 0.6], [0.4, 0.5, 0.9, 0.9]], [OBJECT, OBJECT])
    ours, theirs = loss_of(DiscoveryLoss, base, batch)[0], loss_of(v8DetectionLoss, base, batch)[0]
    assert torch.equal(ours, theirs)


def test_predictions_in_an_ignored_region_are_not_false(base):
    """Without objects, each prediction costs its cross-entropy, unless half of its box is in the region."""
    batch = batch_of([[0.0, 0.0, 0.5, 1.0]], [IGNORED])
    base.args = get_cfg()
    with torch.inference_mode():
        predicted, raw = base.eval()(batch["img"])  # [1, 5, anchors]: cx, cy, w, h in pixels, and the score
        items = DiscoveryLoss(base)((predicted, raw), batch)[1]
    x, y, w, h, scores = predicted[0].double()
    inside = ((x + w / 2).clamp(0, SIZE / 2) - (x - w / 2).clamp(0, SIZE / 2)) * (
        (y + h / 2).clamp(0, SIZE) - (y - h / 2).clamp(0, SIZE)
    )
    counted = inside / (w * h) < 0.5
    assert 0.2 < counted.float().mean() < 0.8
    assert items["cls_loss"].item() == pytest.approx(
        base.args.cls * -torch.log1p(-scores[counted]).sum().item(), rel=1e-3
    )
    assert items["box_loss"] == items["dfl_loss"] == 0


def test_object_in_an_ignored_region_is_still_one(base):
    criterion = DiscoveryLoss(base)
    criterion._is_ignored = torch.tensor([[[True], [True], [False]]])
    scores, targets = torch.tensor([[[2.0], [2.0], [2.0]]]), torch.tensor([[[0.0], [0.7], [0.0]]])
    losses = criterion.bce(scores, targets)[0, :, 0]
    log1p = float(np.log1p(np.exp(-2.0)))
    assert losses.tolist() == pytest.approx([0, 0.7 * log1p + 0.3 * (2 + log1p), 2 + log1p])


def test_ignored_regions_belong_to_their_image(base):
    batch = batch_of([[0.1, 0.1, 0.4, 0.4], [0.0, 0.0, 1.0, 1.0]], [OBJECT, IGNORED])
    batch["img"] = batch["img"].repeat(2, 1, 1, 1)
    batch["batch_idx"] = torch.tensor([0.0, 1.0])
    base.args = get_cfg()
    criterion = DiscoveryLoss(base.train())
    criterion(base(batch["img"]), batch)
    assert not criterion._is_ignored[0].any() and criterion._is_ignored[1].float().mean() > 0.9


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 4), min_size=1, max_size=5))
def test_covered_shares_count_pixels(corners):
    boxes = torch.tensor([[min(x, X), min(y, Y), max(x, X), max(y, Y)] for x, y, X, Y in corners]).float()
    shares = covered_shares(boxes, boxes)
    for i, a in enumerate(boxes.int().tolist()):
        for j, b in enumerate(boxes.int().tolist()):
            pixels = np.zeros((20, 20), bool)
            pixels[a[1] : a[3], a[0] : a[2]] = True
            inside = pixels[b[1] : b[3], b[0] : b[2]].sum()
            assert shares[i, j].item() == pytest.approx(inside / max(1, pixels.sum()))


# Training -------------------------------------------------------------------------------------------------------------


def test_frozen_layers_keep_their_weights(base, examples, tmp_path):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    result = train(base, examples, tmp_path, epochs=1, frozen_layers=BACKBONE_LAYERS)
    changed = {name for name, tensor in result.tensors.items() if not torch.equal(tensor, before[name])}
    frozen = {name for name in before if int(name.split(".")[1]) < BACKBONE_LAYERS}
    assert changed and not changed & {name for name in frozen if "num_batches" not in name}
    assert any("model.22.cv2" in name for name in changed) and any("model.12" in name for name in changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())  # it is not changed


@pytest.mark.parametrize(
    "stop_at", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_interrupted_training_ends_as_an_uninterrupted_one(base, examples, tmp_path, stop_at):
    def stop(step):
        if step.done == stop_at:
            raise Cancelled

    def score(detector):
        return sum(float(tensor.float().abs().sum()) for tensor in detector.state_dict().values())

    whole = train(base, examples, tmp_path / "whole", epochs=3, validate=score)
    with pytest.raises(Cancelled):
        train(base, examples, tmp_path / "stopped", stop, epochs=3, validate=score)
    steps = []
    resumed = train(base, examples, tmp_path / "stopped", steps.append, epochs=3, validate=score)
    assert [step.done for step in steps] == list(range(2 * ((stop_at - 1) // 2) + 1, 7))
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in resumed.tensors.items())
    assert resumed.curve == whole.curve and resumed.score == whole.score
    again = train(base, examples, tmp_path / "stopped", pytest.fail, epochs=3, validate=pytest.fail)  # it is complete
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in again.tensors.items())


@pytest.mark.slow
def test_saves_of_another_training_are_not_continued(base, examples, tmp_path, caplog):
    train(base, examples, tmp_path, epochs=1)
    for changes, others in (({"seed": 1}, examples), ({}, examples[1:])):
        steps = []
        with caplog.at_level(logging.WARNING):
            train(base, others, tmp_path, steps.append, epochs=1, **changes)
        assert steps[0].done == 1 and "is of a training with other settings" in caplog.text
        caplog.clear()
    (tmp_path / "discovery.pt").write_bytes((tmp_path / "discovery.pt").read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        train(base, examples[1:], tmp_path, epochs=1)
    assert "can't be read" in caplog.text


def test_best_weights_are_returned(base, examples, tmp_path):
    scores = iter([0.3, 0.9, 0.5])
    seen = []

    def score(detector):
        seen.append({name: tensor.clone() for name, tensor in detector.state_dict().items()})
        return next(scores)

    result = train(base, examples, tmp_path, epochs=3, validate=score)
    assert result.score == 0.9 and [point["score"] for point in result.curve] == [0.3, 0.9, 0.5]
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in result.tensors.items())


def test_loss_that_is_not_finite_stops_the_training(base, examples, tmp_path, monkeypatch):
    original, calls = DiscoveryLoss.loss, []

    def broken(self, preds, batch):
        calls.append(1)
        losses, items = original(self, preds, batch)
        return (losses * float("nan") if len(calls) > 3 else losses), items

    monkeypatch.setattr(DiscoveryLoss, "loss", broken)
    result = train(base, examples, tmp_path, epochs=5)
    assert len(calls) == 4 and result.stopped == "The loss was not finite in epoch 2" and len(result.curve) == 1
    assert all(tensor.isfinite().all() for tensor in result.tensors.values())


@pytest.mark.slow
def test_few_images(base, examples, tmp_path):
    assert len(train(base, examples[:1], tmp_path / "one", epochs=2).curve) == 2
    bare = Example("0", "bare", examples[0].read, NO_BOXES, None, NO_BOXES)
    assert len(train(base, [bare, examples[1]], tmp_path / "bare", epochs=1).curve) == 1


def pair(index):
    """Two bright rectangles, one above the other with a gap between them, that are one object."""
    rng = np.random.default_rng(index)
    x, y = rng.integers(4, 40, 2)
    upper = rectangle((120, 96), (x, y, x + rng.integers(20, 50), y + 15))
    lower = rectangle((120, 96), (x, y + 30, x + rng.integers(20, 50), y + rng.integers(45, 70)))
    image = rng.integers(0, 40, (120, 96, 3)).astype(np.uint8)
    image[upper | lower] += np.array([180, 160, 60], np.uint8)
    return example_of(image, [upper | lower], f"pair {index}")


@pytest.mark.slow
def test_eight_images_are_learned_by_heart(base, tmp_path):
    images = [pair(i) for i in range(8)]

    def mean_iou(detector):
        discovery = ObjectDiscovery(detector.fuse(verbose=False), 160)
        ious = []
        with torch.inference_mode():
            for image in images:
                found = discovery(image.read(), conf=0, max_prompts=1)
                ious.append(float(box_iou(found.boxes, torch.from_numpy(image.boxes))[0, 0]))
        return np.mean(ious)

    assert mean_iou(copy.deepcopy(base).eval()) < 0.5
    changes = {"epochs": 80, "batch_size": 2, "image_size": 160, "mosaic": 0.0}
    assert train(base, images, tmp_path, validate=mean_iou, **changes).score > 0.9


@pytest.mark.slow
def test_few_images_are_learned(base, examples, tmp_path):
    """Scenes in inverted colours, which the base never saw."""
    inverted = [dataclasses.replace(each, read=partial(np.subtract, 255, each.read())) for each in examples]
    validate = partial(recall, examples=inverted)
    before = validate(load_yolo(PACKAGED_WEIGHTS / "demo_detector.safetensors").eval())
    result = train(base, inverted, tmp_path, validate=validate, epochs=60, image_size=256, mosaic=0.0, batch_size=2)
    assert result.score > before + 0.04 and result.curve[-1]["loss"] < 0.8 * result.curve[0]["loss"]


def recall(detector, examples):
    with torch.inference_mode():
        return box_recall(detector.fuse(verbose=False), 256, examples)


def test_nothing_is_written_beside_the_state(base, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(base, examples, tmp_path / "state", epochs=1)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["state"]
    assert not list((tmp_path / "state").rglob("last.pt"))
