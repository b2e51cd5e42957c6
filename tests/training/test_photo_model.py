"""The trainer of the model for photos, on a few scenes in the layout of the photo sets."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.modeling.embedding_discovery import EmbeddingDetector
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config
from fiftyone_mobilesamv2.training import photo_model
from fiftyone_mobilesamv2.training.photo_model import DETECTOR, ENCODER, SAM, new_networks, photos
from fiftyone_mobilesamv2.training.scenes import write_coco

SETS = ("coco_mix", "coco_one_person", "facade", "ccp_fashion")


@pytest.fixture
def photo_sets(tmp_path):
    folder = tmp_path / "sets"
    for name in SETS:
        _, file = write_coco(folder / name, 3)
        content = json.loads(file.read_text())
        if name == "coco_mix":
            for number, image in enumerate(content["images"]):
                image["labels"] = "full" if number < 2 else "person only"
            content["annotations"][0]["iscrowd"] = 1
        (folder / name / "instances.json").write_text(json.dumps(content))
    return folder


def test_labels_mean_what_each_set_says(photo_sets, monkeypatch):
    monkeypatch.setattr(photo_model, "HELD_OUT", 1)
    training, held_out = photos(photo_sets)
    assert len(held_out) == 1 and held_out[0].id.startswith("coco_mix/")
    repeats = {}
    for example in training:
        repeats[example.id] = repeats.get(example.id, 0) + 1
    assert held_out[0].id not in repeats
    assert {name: sorted(n for id, n in repeats.items() if id.startswith(name)) for name in SETS} == {
        "coco_mix": [2, 4],
        "coco_one_person": [1, 1, 1],
        "facade": [1, 1, 1],
        "ccp_fashion": [1, 1, 1],
    }
    for example in training + held_out:
        height, width = example.read().shape[:2]
        whole = [0, 0, width, height]
        is_partial = whole in example.ignored.tolist()
        assert is_partial == (not example.id.startswith(("facade", "coco_mix")) or example.id == "coco_mix/002.png")
        assert example.masks and len(example.boxes) == (0 if "one_person" in example.id else len(example.masks))
    (crowd,) = [each for each in [*training, *held_out] if each.id == "coco_mix/000.png"][:1]
    assert len(crowd.ignored) == 1 and len(crowd.masks) == len(training[-3].masks) - 1


@pytest.mark.slow
def test_training_and_packaging(photo_sets, tmp_path, monkeypatch):
    monkeypatch.setattr(photo_model, "HELD_OUT", 1)
    monkeypatch.setattr(photo_model, "SCENES", 2)
    config = encoder_config(ENCODER)
    start = tmp_path / "start"
    start.mkdir()
    torch.manual_seed(0)
    decoder = photo_model.PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    encoder = {f"image_encoder.{name}": tensor for name, tensor in config.build().state_dict().items()}
    save_file(encoder | decoder.state_dict(), start / SAM)
    save_file(EmbeddingDetector(config.embed_dim, 16).state_dict(), start / DETECTOR)
    arguments = f"train --photo-sets {photo_sets} --start {start} --runs {tmp_path / 'runs'} --image-size 64 --epochs 1"
    monkeypatch.setattr(sys, "argv", ["photo_model", *arguments.split()])
    photo_model.main()
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    arguments = f"package --photo-sets {photo_sets} --runs {tmp_path / 'runs'} --output {packaged}"
    monkeypatch.setattr(sys, "argv", ["photo_model", *arguments.split()])
    photo_model.main()
    before, after = load_file(start / SAM), load_file(packaged / SAM)
    frozen = [name for name in before if name.startswith("image_encoder.backbone.blocks.0")]
    assert frozen and all(torch.equal(before[name].to(after[name].dtype), after[name]) for name in frozen)
    assert after["image_encoder.fine.conv.weight"].dtype == torch.float16
    assert not torch.equal(before["image_encoder.fine.conv.weight"].half(), after["image_encoder.fine.conv.weight"])
    assert sum(path.stat().st_size for path in packaged.iterdir()) < 20e6

    trained, shifted = load_file(tmp_path / "runs" / DETECTOR), load_file(packaged / DETECTOR)
    changed = [name for name in trained if not torch.equal(trained[name].half(), shifted[name].half())]
    assert sorted(changed) == [f"detect.cv3.{level}.2.bias" for level in range(3)]
    shifts = torch.cat([shifted[name].float() - trained[name] for name in changed])
    torch.testing.assert_close(shifts, shifts.mean().expand(3), atol=0.01, rtol=0)


def test_other_weights_than_the_expected_ones_are_refused(tmp_path):
    shutil.copy(__file__, path := tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="not the expected file, whose sha256 is 5793"):
        new_networks(path, encoder_config(ENCODER))
