"""Training of masks: it learns, an interrupted training ends as an uninterrupted one, and nothing single stops it."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from safetensors.torch import save_file
from torch import nn

from fiftyone_mobilesamv2.errors import ArgumentError, Cancelled, MobileSAMv2Error
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_decoder, load_encoder
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config
from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import PromptGuidedDecoder
from fiftyone_mobilesamv2.training import masks, objective
from fiftyone_mobilesamv2.training.masks import MaskSettings, train_masks
from fiftyone_mobilesamv2.training.networks import Networks

from .conftest import simple_example

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = PACKAGED_WEIGHTS / "demo_sam.safetensors"
SETTINGS = MaskSettings(
    epochs=2, batch_size=2, learning_rate=1e-3, learn="decoder", prompts_per_image=2, device="cpu", workers=0
)
CONFIG = encoder_config("resnet_demo")
EXAMPLES = [simple_example(i) for i in range(4)]


def ignore(step):
    pass


def demo_networks(**others):
    networks = Networks(CONFIG, load_encoder(WEIGHTS, "resnet_demo"), load_decoder(WEIGHTS, "resnet_demo"))
    return replace(networks, **others)


def train(folder, settings=SETTINGS, examples=EXAMPLES, report=ignore, validate=None):
    return train_masks(demo_networks(), examples, settings, folder, report, validate)


def assert_same(first, second):
    assert first.tensors.keys() == second.tensors.keys()
    for network, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[network].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.tensors[network][name]), name
    assert first.curve == second.curve
    assert (first.best_score, first.skipped, first.stopped) == (second.best_score, second.skipped, second.stopped)


def size_score(networks):
    """A score without a meaning, that differs between weights. It leaves the modules unusable, as callers may."""
    weight = networks.decoder.mask_decoder.iou_token.weight
    score = weight.abs().sum().item()
    assert not networks.image_encoder.training
    assert not any(parameter.requires_grad for parameter in networks.modules.parameters())
    with torch.no_grad():
        weight.fill_(math.nan)
    return score


def test_a_decoder_learns(tmp_path):
    before = load_decoder(WEIGHTS, "resnet_demo").state_dict()
    steps = []
    trained = train(tmp_path, replace(SETTINGS, epochs=3), report=steps.append)
    assert list(trained.tensors) == ["decoder"] and trained.stopped is None and trained.skipped == {}
    assert trained.tensors["decoder"].keys() == before.keys()
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained.tensors["decoder"].items())
    assert [row["epoch"] for row in trained.curve] == [1, 2, 3] and [row["step"] for row in trained.curve] == [2, 4, 6]
    assert trained.curve[-1]["loss"] < trained.curve[0]["loss"] and trained.curve[0]["score"] is None
    assert [(step.done, step.total, step.epoch, step.epochs) for step in steps] == [
        (done, 6, 1 + (done - 1) // 2, 3) for done in range(1, 7)
    ]
    assert all(step.images_per_second > 0 for step in steps) and steps[-1].seconds_left == 0


@pytest.mark.parametrize(("learn", "changing"), [("neck", ("neck", "norm")), ("encoder", ("neck", "norm", "backbone"))])
def test_the_encoder_learns(tmp_path, learn, changing):
    before = load_encoder(WEIGHTS, "resnet_demo").state_dict()
    trained = train(tmp_path, replace(SETTINGS, epochs=1, learn=learn))
    changed = {
        name for name, tensor in trained.tensors["image_encoder"].items() if not torch.equal(before[name], tensor)
    }
    assert {name.split(".")[0] for name in changed} == set(changing)
    assert not any("running" in name for name in changed)
    encoder = encoder_config("resnet_demo").build()
    encoder.load_state_dict(trained.tensors["image_encoder"])


def test_training_from_scratch_learns_statistics(tmp_path):
    networks = demo_networks(image_encoder=CONFIG.build())
    settings = replace(SETTINGS, epochs=1, learn="encoder", untrained=("image_encoder",))
    trained = train_masks(networks, EXAMPLES, settings, tmp_path, ignore, None)
    statistics = {name: tensor for name, tensor in trained.tensors["image_encoder"].items() if "running_mean" in name}
    assert statistics and all(tensor.any() for tensor in statistics.values())
    assert trained.tensors["image_encoder"]["backbone.bn1.num_batches_tracked"] == 2


@pytest.mark.parametrize(("learn", "at"), [("decoder", 1), ("encoder", 3)])
def test_cancelled_training_goes_on_as_if_it_had_not_been(tmp_path, learn, at):
    settings = replace(SETTINGS, learn=learn, untrained=("image_encoder",) if learn == "encoder" else ())
    whole = train(tmp_path / "whole", settings, validate=size_score)

    def cancel(step):
        if step.done == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        train(tmp_path / "cancelled", settings, report=cancel, validate=size_score)
    steps = []
    resumed = train(tmp_path / "cancelled", settings, report=steps.append, validate=size_score)
    assert steps[0].done == 1 if at == 1 else steps[0].done == 3  # it was saved after the first epoch, of two steps
    assert_same(resumed, whole)
    steps.clear()
    again = train(tmp_path / "cancelled", settings, report=steps.append, validate=size_score)
    assert not steps  # it is finished
    assert_same(again, whole)


@pytest.mark.slow
def test_long_epochs_are_saved_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "_SAVE_SECONDS", 0)
    monkeypatch.setattr(masks, "_MAX_SHARE_OF_SAVING", math.inf)
    settings = replace(SETTINGS, batch_size=1)
    whole = train(tmp_path / "whole", settings)

    def cancel(step):
        if step.done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        train(tmp_path / "cancelled", settings, report=cancel)
    steps = []
    assert_same(train(tmp_path / "cancelled", settings, report=steps.append), whole)
    assert steps[0].done == 4


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from dataclasses import replace
from tests.training.test_masks import SETTINGS, train
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import PromptGuidedDecoder
from fiftyone_mobilesamv2.training import masks, objective

masks._SAVE_SECONDS = 0
def report(step):
    print(step.done, flush=True)
train(Path({folder!r}), replace(SETTINGS, epochs=5, learn="encoder"), report=report)
"""


@pytest.mark.slow
def test_killed_training_goes_on_as_if_it_had_not_been(tmp_path):
    settings = replace(SETTINGS, epochs=5, learn="encoder")
    code = KILLED.format(root=str(ROOT), folder=str(tmp_path / "killed"))
    rng = np.random.default_rng(0)
    # The last bits depend on the number of threads; importing ultralytics sets the variable for later processes.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for kills_after in (3, 4):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for line in process.stdout:
            if int(line) >= kills_after:
                time.sleep(rng.uniform(0, 0.3))  # in the middle of a step, or of a save
                break
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    steps = []
    resumed = train(tmp_path / "killed", settings, report=steps.append)
    assert steps[0].done > 1
    assert_same(resumed, train(tmp_path / "whole", settings))


@pytest.mark.slow
def test_another_training_starts_afresh(tmp_path, caplog):
    train(tmp_path, replace(SETTINGS, epochs=1))
    for settings, examples in ((SETTINGS, EXAMPLES), (SETTINGS, EXAMPLES[:3])):
        steps = []
        caplog.clear()
        train(tmp_path, settings, examples, report=steps.append)
        assert steps[0].done == 1 and "starts afresh" in caplog.text
    steps = []
    train(tmp_path, replace(SETTINGS, workers=2), EXAMPLES[:3], report=steps.append)
    assert not steps  # threads make no difference


def test_the_best_weights_are_returned(tmp_path):
    scores = iter([1.0, 3.0, 2.0, math.nan])
    seen = []

    def validate(networks):
        seen.append({name: tensor.clone() for name, tensor in networks.decoder.state_dict().items()})
        return next(scores)

    trained = train(tmp_path, replace(SETTINGS, epochs=4), validate=validate)
    assert trained.best_score == 3 and [row["score"] for row in trained.curve[:3]] == [1, 3, 2]
    assert all(torch.equal(seen[1][name], tensor) for name, tensor in trained.tensors["decoder"].items())
    assert not torch.equal(seen[1]["mask_decoder.iou_token.weight"], seen[2]["mask_decoder.iou_token.weight"])


@pytest.mark.slow
def test_long_trainings_are_validated_ten_times(tmp_path):
    settings = replace(SETTINGS, epochs=21, batch_size=1, prompts_per_image=1)
    trained = train(tmp_path, settings, EXAMPLES[:1], validate=lambda networks: 0.0)
    validated = [row["epoch"] for row in trained.curve if row["score"] is not None]
    assert len(trained.curve) == 21 and len(validated) == 10 and validated[-1] == 21


def test_a_loss_of_nan_stops_the_training(tmp_path, monkeypatch):
    calls = []

    def losses(logits, iou, targets):
        calls.append(1)
        return masks_losses(logits, iou, targets) * (math.nan if len(calls) > 14 else 1)

    masks_losses = objective.mask_losses
    monkeypatch.setattr(objective, "mask_losses", losses)
    trained = train(tmp_path, replace(SETTINGS, epochs=5))  # 2 kinds of prompts, 2 images a step, so that of step 4
    assert "at step 4 of 10" in trained.stopped and "lower learning rate than 0.001" in trained.stopped
    assert [row["step"] for row in trained.curve] == [2, 3]
    assert all(tensor.isfinite().all() for tensor in trained.tensors["decoder"].values())
    steps = []
    assert_same(train(tmp_path, replace(SETTINGS, epochs=5), report=steps.append), trained)
    assert not steps


def test_unreadable_images_are_skipped(tmp_path):
    def fail():
        raise OSError("no such file")

    examples = [replace(EXAMPLES[0], name="broken.png", read=fail), *EXAMPLES[1:]]
    trained = train(tmp_path, examples=examples)
    assert trained.skipped == {"broken.png": "no such file"} and len(trained.curve) == 2
    with pytest.raises(ArgumentError, match=r"No image can be trained on\. broken\.png: no such file"):
        train(tmp_path / "all", examples=examples[:1])


def test_images_without_masks_are_left_out(tmp_path):
    empty, boxes_only = replace(EXAMPLES[0], masks=()), replace(EXAMPLES[1], masks=None)
    steps = []
    train(tmp_path / "one", examples=[empty, boxes_only, EXAMPLES[2]], report=steps.append)  # fewer than a batch
    assert steps[-1].total == 2
    with pytest.raises(ArgumentError, match="None of the images to train on has an object with a mask"):
        train(tmp_path / "none", examples=[empty, boxes_only])


def test_less_memory_makes_more_passes_of_the_same_step(tmp_path, monkeypatch, caplog):
    settings = replace(SETTINGS, epochs=1, batch_size=4)
    whole = train(tmp_path / "whole", settings)
    sizes = []

    class Small(nn.Module):
        """An encoder on a device that holds one image."""

        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, pixels):
            sizes.append(len(pixels))
            if len(pixels) > 1:
                raise torch.OutOfMemoryError
            return self.encoder(pixels)

        def get_submodule(self, name):
            return self.encoder.get_submodule(name)

    networks = demo_networks(image_encoder=Small(load_encoder(WEIGHTS, "resnet_demo")))
    trained = train_masks(networks, EXAMPLES, settings, tmp_path / "small", ignore, None)
    messages = [message for message in caplog.messages if "too little memory for" in message]
    assert [message.split(" images")[0].split()[-1] for message in messages] == ["4", "2"]
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert trained.curve[0]["loss"] == pytest.approx(whole.curve[0]["loss"], rel=1e-4)
    pairs = [(whole.tensors["decoder"][name], tensor) for name, tensor in trained.tensors["decoder"].items()]
    # The first step of AdamW goes by the sign of gradients, which for a few is a matter of rounding.
    assert torch.cat([(a - b).abs().flatten() for a, b in pairs]).mean() < 1e-6


def test_too_little_memory_for_one_image_is_an_error(tmp_path, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(objective, "mask_losses", no_memory)
    with pytest.raises(MobileSAMv2Error, match="too little memory to train on one image at a time"):
        train(tmp_path, replace(SETTINGS, batch_size=1))


@pytest.mark.slow
def test_mixed_precision_gives_about_the_same_loss(tmp_path, monkeypatch):
    settings = replace(SETTINGS, epochs=1, learn="neck")
    exact = train(tmp_path / "exact", settings, EXAMPLES[:1])
    monkeypatch.setattr(objective, "mixed_precision", lambda device: torch.autocast(device.type, torch.bfloat16))
    rounded = train(tmp_path / "rounded", settings, EXAMPLES[:1])
    assert rounded.curve[0]["loss"] != exact.curve[0]["loss"]
    assert rounded.curve[0]["loss"] == pytest.approx(exact.curve[0]["loss"], rel=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in rounded.tensors["decoder"].values())


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["neck", "encoder"])
@pytest.mark.parametrize("encoder", ["tiny_vit", "efficientvit_l0"])
def test_released_architectures_learn(tmp_path, encoder, learn):
    torch.manual_seed(0)
    config = encoder_config(encoder)
    networks = Networks(config, config.build(), PromptGuidedDecoder())
    settings = replace(SETTINGS, epochs=1, learn=learn)
    trained = train_masks(networks, EXAMPLES[:1], settings, tmp_path, ignore, size_score)
    assert trained.stopped is None and math.isfinite(trained.curve[0]["loss"])
    save_file(trained.tensors["image_encoder"], tmp_path / "encoder.safetensors")
    save_file(trained.tensors["decoder"], tmp_path / "decoder.safetensors")
    load_encoder(tmp_path / "encoder.safetensors", encoder)
    load_decoder(tmp_path / "decoder.safetensors", encoder)


@pytest.mark.slow
def test_an_untrained_decoder_learns_eight_images_by_heart(tmp_path):
    torch.manual_seed(0)
    decoder = PromptGuidedDecoder(CONFIG.embed_dim, CONFIG.embed_size, CONFIG.image_size)
    networks = demo_networks(decoder=decoder)
    examples = [simple_example(i) for i in range(8)]

    def mean_iou(networks):
        model = MobileSAMv2(networks.image_encoder, networks.decoder, CONFIG, device="cpu")
        ious = []
        for example in examples:
            segmentation = model.segment_anything([example.read()], boxes=[example.boxes])[0]
            ious.append(mask_utils.iou(segmentation.rle(), list(example.masks), [0])[0, 0])
        return np.mean(ious)

    assert mean_iou(networks.copied()) < 0.2
    settings = replace(SETTINGS, epochs=30, batch_size=4, prompts_per_image=4)
    trained = train_masks(networks, examples, settings, tmp_path, ignore, mean_iou)
    assert trained.best_score > 0.9
