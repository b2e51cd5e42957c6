"""Training on the labels of a dataset, from labels to a model that the zoo loads."""

import json
import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import fiftyone as fo
import fiftyone.zoo as foz
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fiftyone_mobilesamv2 import load_coco, segment_everything
from fiftyone_mobilesamv2.errors import ArgumentError, Cancelled
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.modeling.checkpoints.trained import read_trained, trained_dir, trained_models
from fiftyone_mobilesamv2.modeling.embedding_discovery import EmbeddingDiscovery
from fiftyone_mobilesamv2.modeling.object_discovery import ObjectDiscovery
from fiftyone_mobilesamv2.training.scenes import VALIDATION_SEED, make_scene, write_coco
from fiftyone_mobilesamv2.training.train import WORK, train

BASE = "mobilesamv2-demo-torch"
COUNT = 6
QUICK = {"base": BASE, "epochs": 1, "batch_size": 2, "device": "cpu", "progress": False}


validation_scene = lru_cache(partial(make_scene, VALIDATION_SEED))


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A model zoo of this test's own."""
    folder = tmp_path / "zoo"
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(folder))
    monkeypatch.setenv("FIFTYONE_MODEL_ZOO_DIR", str(folder))
    return folder


@pytest.fixture
def scenes(mongod, zoo, tmp_path):
    name = f"scenes-{uuid.uuid4().hex[:8]}"
    dataset = load_coco(*write_coco(tmp_path / "scenes", COUNT, validation_scene), name=name)
    yield dataset
    dataset.delete()


# The new model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["discovery", pytest.param("masks", marks=pytest.mark.slow)])
def test_new_model_is_loaded_by_name(scenes, part):
    said = []
    run = train(
        scenes,
        name="my-scenes",
        part=part,
        validation=0.34,
        keep_worse=True,
        **QUICK | {"progress": lambda share, text: said.append((share, text))},
    )
    assert run.registered and run.folder == trained_dir() / "my-scenes" and list(trained_models()) == ["my-scenes"]
    assert run.counts["images to train on"] == 4 and run.counts["validation images"] == 2 == run.after.images
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[-1] == 1 and any("images/s" in text for _, text in said)
    names = {path.name for path in run.folder.iterdir()}
    trained = {"discovery": "detector.safetensors", "masks": "decoder.safetensors"}[part]
    wanted = {"config.json", "manifest.json", "__init__.py", "README.md", "curve.csv", "curve.png", trained}
    assert names - {"encoder.safetensors"} == wanted
    assert not any(b"\x80\x04" == path.read_bytes()[:2] for path in run.folder.iterdir())  # no pickle
    # The zoo's model has the weights that were measured, and segments.
    model = foz.load_zoo_model("my-scenes", device="cpu")
    assert type(model).__name__ == "MobileSAMv2Model"
    record = segment_everything(scenes, model, "own", progress=False)
    assert record.images == COUNT and scenes.count("own.detections") > 0
    config = json.loads((run.folder / "config.json").read_text())
    assert config["part"] == part and config["base"] == BASE and config["dataset"] == scenes.name
    recorded = config["training"]
    assert recorded["before"] == run.before.to_dict() and recorded["after"] == run.after.to_dict()
    ids = set(scenes.values("id"))
    assert len(recorded["validation"]) == 2 and set(recorded["validation"]) < ids
    assert {key: len(value) for key, value in recorded["contents"].items()} == {"trained_on": 4, "held_out": 2}
    assert f"{run.after.recalls[100]:.3f}" in (run.folder / "README.md").read_text()
    assert (run.folder / "curve.csv").read_text().splitlines()[0] == "epoch,loss,learning_rate,score"
    with Image.open(run.folder / "curve.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.slow
def test_part_that_is_not_trained_is_the_bases(scenes):
    run = train(scenes, name="found", part="discovery", keep_worse=True, **QUICK)
    files = read_trained(run.folder).model.weights
    assert files["encoder_checkpoint"].is_packaged and files["decoder_checkpoint"].is_packaged
    assert not files["detector_checkpoint"].is_packaged
    # A model that goes on from this one has its detector, also after it was deleted.
    second = train(scenes, name="both", part="masks", keep_worse=True, **QUICK | {"base": "found"})
    chance = ["With so few objects for validation, the difference may be due to chance."]
    assert run.caveats == second.caveats == chance
    recorded = [read_trained(each.folder).training for each in (run, second)]
    assert recorded[0]["validation"] == recorded[1]["validation"] and recorded[0]["contents"] == recorded[1]["contents"]
    for path in run.folder.iterdir():
        path.unlink()
    run.folder.rmdir()
    both = read_trained(second.folder)
    detector = second.folder / both.model.weights["detector_checkpoint"].filename
    assert detector.exists() and foz.load_zoo_model("both", device="cpu").model.discovery is not None
    assert (PACKAGED_WEIGHTS / "demo_detector.safetensors").exists()
    # One that is measured with what its base was trained on says so, and knows all that its bases were trained on.
    seen = scenes.exclude(recorded[0]["validation"])
    third = train(scenes, name="third", keep_worse=True, **QUICK | {"base": "both", "validation": seen})
    assert f"both was trained on {len(seen)} of the validation images" in str(third)
    assert len(read_trained(third.folder).training["contents"]["trained_on"]) == COUNT


@pytest.mark.slow
def test_discovery_in_the_embedding(scenes):
    """A detector in the embedding of a model that has none, trained further along with the masks."""
    arguments = {"keep_worse": True, **QUICK}
    first = train(
        scenes, name="in-embedding", discovery="embedding", **arguments | {"epochs": 4, "learning_rate": 0.01}
    )
    assert first.curve[-1]["loss"] < first.curve[0]["loss"]
    weights = read_trained(first.folder).model.weights
    assert weights["encoder_checkpoint"].is_packaged and not weights["detector_checkpoint"].is_packaged
    model = foz.load_zoo_model("in-embedding", device="cpu", confidence_thresh=0.0001, max_prompts=5)
    assert isinstance(model.model.discovery, EmbeddingDiscovery)
    assert segment_everything(scenes, model, "own", progress=False).images == COUNT
    # Training masks with the whole encoder also trains the base's detector.
    second = train(scenes, name="both", part="masks", **arguments | {"base": "in-embedding"})
    found = load_file(first.folder / "detector.safetensors"), load_file(second.folder / "detector.safetensors")
    assert any(not torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    # Detection goes on in the embedding, unless a detector of its own is asked for.
    third = train(scenes, name="third", **arguments | {"base": "both"})
    assert (third.folder / "detector.safetensors").stat().st_size < 3e6
    fourth = train(scenes, name="fourth", discovery="detector", **arguments | {"base": "both"})
    assert isinstance(foz.load_zoo_model("fourth", device="cpu").model.discovery, ObjectDiscovery) and fourth.registered


@pytest.mark.slow
def test_training_twice_gives_the_same_weights(scenes, tmp_path):
    one, two = (
        train(view, name=f"m{i}", keep_worse=True, output=tmp_path / f"m{i}", **QUICK)
        for i, view in enumerate((scenes, scenes.view()))
    )
    first, second = (load_file(run.folder / "detector.safetensors") for run in (one, two))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert set(trained_models()) == {"m0", "m1"}  # elsewhere, and known by a link
    assert (trained_dir() / "m0").resolve() == (tmp_path / "m0").resolve()


@pytest.mark.slow
def test_worse_model_is_not_registered(scenes, zoo):
    """A learning rate that destroys the detector."""
    hopeless = QUICK | {"epochs": 2, "learning_rate": 1.0}
    run = train(scenes, name="worse", **hopeless)
    assert not run.is_better and not run.registered and trained_models() == {}
    assert "It is not better than its base" in str(run)
    steps = []
    again = train(
        scenes, name="worse", keep_worse=True, **hopeless | {"progress": lambda share, text: steps.append(text)}
    )
    assert again.registered and list(trained_models()) == ["worse"] and again.after == run.after
    assert not any("Epoch" in text for text in steps)  # nothing was trained again
    with pytest.raises(ArgumentError, match="already holds a model"):
        train(scenes, name="worse", **QUICK)


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_unlabeled_objects_are_ignored_or_background(scenes):
    for sample in scenes.iter_samples(autosave=True):
        sample.ground_truth.detections = sample.ground_truth.detections[:2]
    runs = {
        choice: train(scenes, name=choice, unlabeled=choice, keep_worse=True, **QUICK)
        for choice in ("ignore", "background")
    }
    assert runs["ignore"].counts["ignored regions"] > 5 and runs["background"].counts["ignored regions"] == 0


@pytest.mark.slow
def test_teacher_labels_what_has_no_labels(scenes):
    labeled = scenes.limit(3).values("id")
    for sample in scenes.exclude(labeled).iter_samples(autosave=True):
        sample.ground_truth = None
    run = train(scenes, name="alone", keep_worse=True, validation=0.34, **QUICK)
    assert run.counts["images to train on"] == 2 and run.counts["images without labels"] == 3
    run = train(scenes, name="taught", keep_worse=True, validation=0.34, teacher=BASE, **QUICK)
    assert run.counts["images to train on"] == 5 and run.counts["validation images"] == 1
    assert run.counts["images without labels"] == 0 and run.counts["objects to train on"] > 20
    for sample in scenes.iter_samples(autosave=True):  # nothing but the teacher's
        sample.ground_truth = None
    run = train(scenes, name="distilled", keep_worse=True, teacher=BASE, size="n", **QUICK)
    assert run.counts["images to train on"] == 5 and run.after.objects > 0


@pytest.mark.slow
def test_bad_images_are_skipped_and_listed(scenes, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    scenes.add_sample(
        fo.Sample(
            str(tmp_path / "bad.png"),
            ground_truth=fo.Detections(detections=[fo.Detection(bounding_box=[0, 0, 0.5, 0.5])]),
            metadata=fo.ImageMetadata(width=100, height=100),
        )
    )
    run = train(scenes, name="skipping", keep_worse=True, **QUICK)
    (skipped,) = run.skipped
    assert skipped["filepath"].endswith("bad.png") and "is damaged or not an image" in skipped["cause"]
    assert "images skipped: 1" in (run.folder / "README.md").read_text() and "images skipped: 1" in str(run)


# Interruptions --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", ["discovery", "masks"])
def test_cancelled_training_goes_on(scenes, part, tmp_path):
    parameters = QUICK | {"epochs": 3, "part": part, "keep_worse": True}
    whole = train(scenes, name="whole", **parameters)

    def cancel(share, text):
        if text.startswith("Epoch 2"):
            raise Cancelled

    with pytest.raises(Cancelled):
        train(scenes, name="stopped", **parameters | {"progress": cancel})
    assert trained_models().keys() == {"whole"}
    epochs = []
    resumed = train(scenes, name="stopped", **parameters | {"progress": lambda share, text: epochs.append(text)})
    assert not any(text.startswith("Epoch 1") for text in epochs)
    for path in whole.folder.glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(resumed.folder / path.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (resumed.folder / WORK).exists()


@pytest.mark.slow
def test_killed_training_goes_on(scenes, zoo, mongod):
    """Killed at any moment, again and again."""
    script = (
        "import sys, fiftyone as fo; from fiftyone_mobilesamv2 import train\n"
        f"train(fo.load_dataset({scenes.name!r}), name='killed', base={BASE!r}, epochs=4, batch_size=2, device='cpu', "
        "keep_worse=True)"
    )
    scenes.persistent = True
    rng = np.random.default_rng(0)
    for seconds in rng.uniform(8, 30, 4):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.poll() is not None:  # it was complete before it was killed
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
    else:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    assert process.wait() == 0 or (trained_dir() / "killed" / "config.json").exists()  # killed in its last moment
    whole = train(scenes, name="whole", keep_worse=True, **QUICK | {"epochs": 4})
    ours, theirs = (load_file(trained_dir() / name / "detector.safetensors") for name in ("killed", "whole"))
    # Threads differ between the processes, and with them the last digits of sums.
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=0.05) for name in ours)
    assert not (trained_dir() / "killed" / WORK).exists() and whole.registered


@pytest.mark.slow
def test_training_that_was_killed_in_its_last_moment_is_completed(scenes, monkeypatch, tmp_path):
    arguments = {"name": "late", "output": tmp_path / "late", "keep_worse": True, **QUICK}

    class Killed(BaseException):
        pass

    def kill(folder):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("fiftyone_mobilesamv2.training.train.register", kill)
        train(scenes, **arguments)
    assert trained_models() == {} and (tmp_path / "late" / WORK).is_dir()
    with pytest.raises(ArgumentError, match="already holds a model"):
        train(scenes, **arguments)
    assert list(trained_models()) == ["late"] and not (tmp_path / "late" / WORK).exists()


@pytest.mark.slow
def test_two_trainings_of_one_name(scenes):
    def second(share, text):
        if text.startswith("Measuring the base"):
            with pytest.raises(ArgumentError, match="Another process is training 'twice'"):
                train(scenes, name="twice", **QUICK)

    assert train(scenes, name="twice", keep_worse=True, **QUICK | {"progress": second}).registered


@pytest.mark.slow
def test_full_disk_keeps_the_last_save(scenes, monkeypatch):
    from fiftyone_mobilesamv2.training import train as module

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_weights", full)
        with pytest.raises(OSError, match="No space left"):
            train(scenes, name="full", **QUICK)
    assert trained_models() == {}
    epochs = []
    run = train(scenes, name="full", keep_worse=True, **QUICK | {"progress": lambda share, text: epochs.append(text)})
    assert run.registered and not any(text.startswith("Epoch") for text in epochs)


# Bad input ------------------------------------------------------------------------------------------------------------


def without_labels(scenes):
    scenes.set_values("ground_truth", [fo.Detections()] * len(scenes))


def with_one_image(scenes):
    scenes.delete_samples(scenes.values("id")[1:])


def with_boxes(scenes):
    for sample in scenes.iter_samples(autosave=True):
        for label in sample.ground_truth.detections:
            label.mask = None


@pytest.mark.parametrize(
    "change, parameters, problem",
    [
        (without_labels, {}, "There are no labels in 'ground_truth'"),
        (with_one_image, {}, "There are no labels in 'ground_truth' to train on: at least two different images"),
        (with_boxes, {"part": "masks"}, "are boxes without masks, from which masks can't be learnt"),
        (None, {"gt_field": "other"}, "other"),
        (None, {"part": "detector"}, "part must be one of discovery, masks"),
        (None, {"unlabeled": "drop"}, "unlabeled must be one of ignore, background"),
        (None, {"size": "h"}, "size must be one of n, s, m, l, x"),
        (None, {"teacher": BASE, "part": "masks"}, "teacher applies only to part='discovery'"),
        (None, {"learn": "neck"}, "learn applies only to part='masks'"),
        (None, {"learn": "tail", "part": "masks"}, "learn must be one of"),
        (None, {"validation": 2}, "validation must be a share"),
        (None, {"epochs": 0}, "epochs must be a whole number of at least 1"),
        (None, {"batch_size": 1.5}, "batch_size must be a whole number"),
        (None, {"seed": -1}, "seed must be a whole number of at least 0"),
        (None, {"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        (None, {"base": "no-such-model"}, "Unknown model 'no-such-model'"),
        (None, {"name": BASE}, BASE),
        (None, {"name": "../up"}, "name"),
        (None, {"device": "tpu9"}, "device must be available"),
    ],
)
def test_invalid_arguments_are_refused(scenes, zoo, change, parameters, problem):
    if change is not None:
        change(scenes)
    with pytest.raises(ValueError, match=problem):
        train(scenes, **{"name": "bad", **QUICK, **parameters})
    assert not list(Path(zoo).rglob("bad"))  # nothing is left behind


def test_name_of_a_model_elsewhere_is_refused(scenes, tmp_path):
    (tmp_path / "model").mkdir()
    (trained_dir()).mkdir(parents=True)
    (trained_dir() / "mine").symlink_to(tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"'mine' is already the name of the model in .*/model: choose another one"):
        train(scenes, name="mine", output=tmp_path / "other", **QUICK)
    assert not (tmp_path / "other").exists()


def test_folder_with_other_files_is_refused(scenes, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(ArgumentError, match="notes has other files: choose a new or empty folder"):
        train(scenes, name="bad", output=tmp_path / "notes", **QUICK)
    assert [(path.name, path.read_text()) for path in (tmp_path / "notes").iterdir()] == [("README.md", "mine")]


def test_base_whose_weights_are_not_here(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="mobilesamv2-tinyvit-torch are missing"):
        train(scenes, name="bad", **QUICK | {"base": "mobilesamv2-tinyvit-torch"})


def test_read_only_folder(scenes, tmp_path):
    if os.geteuid() == 0:
        folder = Path("/proc/model")  # which root can't write to either
    else:
        (tmp_path / "read-only").mkdir(mode=0o500)
        folder = tmp_path / "read-only" / "model"
    with pytest.raises(OSError, match="model"):
        train(scenes, name="bad", output=folder, **QUICK)
