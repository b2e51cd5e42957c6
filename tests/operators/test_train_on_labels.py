"""Training on the labels of a dataset: the form, and trainings with the demo model on real scenes."""

import warnings

import fiftyone as fo
import fiftyone.zoo as foz
import pytest
import torch

from fiftyone_mobilesamv2 import load_coco
from fiftyone_mobilesamv2.modeling.checkpoints.trained import read_trained, trained_dir, trained_models
from fiftyone_mobilesamv2.operators import app_work, train_on_labels
from fiftyone_mobilesamv2.training.arguments import CHOICES, PARTS
from fiftyone_mobilesamv2.training.scenes import write_coco

NAME = "train_on_labels"
PLUGIN = "@mobilesamv2/fiftyone_mobilesamv2"
DEMO = {"model": "mobilesamv2-demo-torch"}
QUICK = DEMO | {"epochs": 1, "batch_size": 4, "device": "cpu"}


@pytest.fixture(autouse=True)
def models_folder(tmp_path, monkeypatch):
    """A zoo without trained models."""
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path / "zoo"))
    return trained_dir()


@pytest.fixture(scope="module")
def labeled(mongod, tmp_path_factory):
    """Eight scenes with masks as `ground_truth`, and one image without a value in it."""
    dataset = load_coco(*write_coco(tmp_path_factory.mktemp("scenes"), 9), name="cells & more")
    last = dataset.last()
    last.ground_truth = None
    last.save()
    yield dataset
    dataset.delete()


@pytest.fixture
def boxes(scenes):
    """Scenes whose labels have no masks."""
    for sample in scenes:
        for label in sample.ground_truth.detections:
            label.mask = None
        sample.save()
    return scenes


def test_form_has_defaults_and_says_what_is_labeled(plugin, labeled):
    form = plugin.form(NAME, labeled)
    assert form.errors == []
    assert (form.default("gt_field"), form.default("part"), form.default("share")) == ("ground_truth", "discovery", 0.2)
    assert form.default("name") == "cells-more"
    assert "validation" not in form.inputs and "epochs" not in form.inputs
    objects = labeled.count("ground_truth.detections")
    text = (
        f"8 of 9 images have labels in 'ground_truth', {objects} objects: about 6 to train on, about 2 for validation."
    )
    assert text in form.messages
    assert any("Training takes a while" in message for message in form.messages)
    form = plugin.form(NAME, labeled.limit(1))
    assert "there must be some to train on" in form.errors[0]


def test_choices_are_those_of_train():
    assert tuple(train_on_labels.PARTS) == PARTS
    assert tuple(train_on_labels.UNLABELED) == CHOICES["unlabeled"]
    assert tuple(train_on_labels.LEARN) == CHOICES["learn"]
    assert tuple(train_on_labels.SIZES) == (
        train_on_labels.SAME_SIZE,
        train_on_labels.IN_EMBEDDING,
        *CHOICES["size"],
    )


def test_boxes_train_object_discovery_only(plugin, boxes):
    form = plugin.form(NAME, boxes, DEMO)
    assert form.errors == []
    assert any("only object discovery can be trained" in message for message in form.messages)
    form = plugin.form(NAME, boxes, DEMO | {"part": "masks"})
    assert any("'Segment from prompts' turns boxes into masks" in error for error in form.errors)


def test_validation_by_tag(plugin, scenes):
    ids = scenes.values("id")
    scenes.select(ids[:1]).tag_samples("held [out](http://x)")
    form = plugin.form(NAME, scenes, {"validation": "tag"})
    assert form.errors == [] and form.choices("tag") == ["held [out](http://x)"] and "share" not in form.inputs
    assert any(": 3 to train on, 1 for validation." in message for message in form.messages)
    scenes.tag_samples("all")
    form = plugin.form(NAME, scenes, {"validation": "tag", "tag": "all"})
    assert "there must be some to train on, and some for validation" in form.errors[0]
    scenes.untag_samples(["all", "held [out](http://x)"])
    assert any(
        "'tag' is no longer available" in error for error in plugin.form(NAME, scenes, {"validation": "tag"}).errors
    )


@pytest.mark.parametrize(
    "params, error",
    [
        ({"name": "../x"}, "Name of the new model: A model can't have the name"),
        ({"name": "mobilesamv2-demo-torch"}, "already has the name"),
        ({"share": 0}, "a number from 0.01 to 0.9 was expected, not 0"),
        ({"epochs": 0}, "a whole number of at least 1 was expected, not 0"),
        ({"learning_rate": 2}, "a number from 1e-08 to 1 was expected, not 2"),
        ({"gt_field": "x"}, "'x' is no longer available"),
        ({"advanced": True, "teacher": "x"}, "'x' is no longer available"),
    ],
)
def test_invalid_inputs_are_refused(plugin, scenes, params, error):
    assert error in plugin.form(NAME, scenes, params).errors[0]


def test_form_knows_earlier_trainings(plugin, labeled, models_folder):
    (models_folder / "cells-more" / "training").mkdir(parents=True)
    form = plugin.form(NAME, labeled)
    assert form.default("name") == "cells-more"
    assert any("goes on from its last save" in message for message in form.messages)
    (models_folder / "cells-more" / "config.json").touch()
    form = plugin.form(NAME, labeled)
    assert form.default("name") == "cells-more-2" and form.errors == []
    form = plugin.form(NAME, labeled, {"name": "cells-more"})
    assert "the trained model 'cells-more' exists" in form.errors[0]


def test_form_says_what_a_teacher_does_and_needs(plugin, labeled, tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(tmp_path))
    params = DEMO | {"teacher": "mobilesamv2-tinyvit-torch"}
    form = plugin.form(NAME, labeled, params)
    assert form.errors == []
    assert "The teacher labels the other 1 image." in form.messages
    assert any("196 MB will be downloaded" in message for message in form.messages)
    form = plugin.form(NAME, labeled.skip(8), params)
    assert form.errors == [] and not any("to train on" in message for message in form.messages)
    params = {"model": "mobilesamv2-tinyvit-torch", "teacher": "mobilesamv2-tinyvit-torch"}
    messages = plugin.form(NAME, labeled, params).messages
    assert sum("will be downloaded" in message for message in messages) == 1


def test_frames_of_videos_are_counted(plugin, dataset):
    for number in range(2):
        video = fo.Sample(f"/nowhere/{number}.mp4", metadata=fo.VideoMetadata(frame_width=10, frame_height=10))
        for frame in range(1, 4):
            labels = fo.Detections(detections=[fo.Detection(label="x", bounding_box=[0, 0, 1, 1])])
            video.frames[frame] = fo.Frame(ground_truth=labels if frame < 3 else None)
        dataset.add_sample(video)
    form = plugin.form(NAME, dataset)
    assert form.default("gt_field") == "frames.ground_truth"
    text = (
        "4 of 6 frames have labels in 'frames.ground_truth', 4 objects, in 2 videos: about 1 to train on, about 1 for"
    )
    assert any(text in each for each in form.messages)
    form = plugin.form(NAME, dataset.limit(1))
    assert "2 objects, in 1 video: there must be some to train on" in form.errors[0]


@pytest.mark.slow
def test_training_makes_a_model_that_segments(plugin, labeled, models_folder):
    """Object discovery, then masks from it, then all that the next forms offer."""
    view = labeled.match({"ground_truth": {"$ne": None}})
    params = QUICK | {"name": "cells", "share": 0.3, "keep_worse": True}
    text, calls = plugin.run_to_the_end(NAME, view, params)
    trained = read_trained(models_folder / "cells")
    assert (trained.part, trained.base, trained.dataset) == ("discovery", "mobilesamv2-demo-torch", labeled.name)
    before, after = trained.training["before"], trained.training["after"]
    for k in (10, 100, 1000):
        assert f"| AR@{k} of masks | {before[f'AR@{k}']:.3f} | {after[f'AR@{k}']:.3f} |" in text
    assert f"`{trained.folder}`" in text and "Trained on 6 images with" in text and "2 other images with" in text
    assert calls["open_panel"]["name"] == "segevery"

    buttons = [each["view"] for each in calls["show_output"]["outputs"]["type"]["properties"].values()]
    buttons = {each["label"]: each for each in buttons if each.get("operator")}
    segment, masks = buttons["Segment the view with it"], buttons["Train masks next"]
    assert segment["operator"] == f"{PLUGIN}/segment_everything" and segment["prompt"]
    assert masks["operator"] == f"{PLUGIN}/{NAME}" and masks["prompt"]
    assert masks["params"] == {"gt_field": "ground_truth", "share": 0.3, "part": "masks", "model": "cells"}
    form = plugin.form("segment_everything", view, segment["params"])
    assert form.errors == []
    result = plugin.call("segment_everything", view, **segment["params"], device="cpu")
    assert result["objects"] > 0 and not result["failures"]

    form = plugin.form(NAME, view, masks["params"])
    assert form.errors == [] and form.default("name") == "cells-more"
    result = plugin.call(
        NAME, view, **masks["params"], **{k: v for k, v in QUICK.items() if k != "model"}, keep_worse=True
    )
    assert (result["part"], result["base"], result["name"]) == ("masks", "cells", "cells-more")
    assert set(trained_models()) == {"cells", "cells-more"}
    assert foz.load_zoo_model("cells-more").config.name == "cells-more"


@pytest.mark.slow
def test_cancelled_training_goes_on(plugin, labeled):
    params = QUICK | {"name": "cells", "epochs": 3}
    for operator, call in plugin.run_in_app(NAME, labeled, params):
        text = call["results"]["text"] if operator == "show_output" else ""
        for work in app_work.running.values():
            if work.progress.label.startswith("Epoch 2 of 3, loss "):
                plugin.operators["cancel"].execute(plugin.context("cancel", labeled, {"work": work.id}))
    assert text.endswith("Repeat it with the same settings to go on from the last save.")
    assert any("goes on from its last save" in message for message in plugin.form(NAME, labeled, params).messages)
    assert not trained_models()
    result = plugin.call(NAME, labeled, **params, keep_worse=True)
    assert [point["epoch"] for point in result["curve"]] == [1, 2, 3]
    assert set(trained_models()) == {"cells"}


@pytest.mark.slow
def test_model_that_is_not_better_is_not_kept(plugin, labeled):
    """A new detector can't be, after one epoch; what it has learned is kept for the same training with `keep_worse`."""
    params = QUICK | {"name": "cells", "size": "n"}
    text, calls = plugin.run_to_the_end(NAME, labeled, params)
    assert "is not better than `mobilesamv2-demo-torch`. It was not kept." in text
    assert "Keep the model even if it is not better" in text
    labels = [each["view"].get("label") for each in calls["show_output"]["outputs"]["type"]["properties"].values()]
    assert not {"Segment the view with it", "Train masks next"} & set(labels)
    assert not trained_models()
    torch.rand(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that it starts afresh
        text, _ = plugin.run_to_the_end(NAME, labeled, params | {"keep_worse": True})
    assert "It was kept all the same." in text and set(trained_models()) == {"cells"}


@pytest.mark.slow
def test_skipped_images_are_named(plugin, labeled, tmp_path):
    copy = labeled.clone()
    first = copy.first()
    first.filepath = str(tmp_path / "![](http:/x).png")
    first.save()
    text, calls = plugin.run_to_the_end(NAME, copy, QUICK | {"name": "cells"})
    assert f"**1 image skipped.** The first: `'{first.filepath}' doesn't exist" in text
    shown = [each["view"] for each in calls["show_output"]["outputs"]["type"]["properties"].values()]
    assert [each["params"] for each in shown if each.get("label") == "Show skipped samples"] == [
        {"samples": [first.id]}
    ]
    copy.delete()
