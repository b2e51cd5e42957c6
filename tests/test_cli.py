"""The command line: exit statuses, messages, and what a quickstart leaves behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import fiftyone as fo
import numpy as np
import pytest
from PIL import Image

from fiftyone_mobilesamv2 import cli, load_coco
from fiftyone_mobilesamv2.cli.parser import make_parser
from fiftyone_mobilesamv2.installed_photos import installed_photos
from fiftyone_mobilesamv2.modeling.checkpoints.trained import trained_models
from fiftyone_mobilesamv2.runs.record import recorded_runs
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene, write_coco

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "fiftyone_mobilesamv2.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
DATASET = "mobilesamv2-quickstart"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *(
            [command, "--help"]
            for command in ("quickstart", "segment", "reproduce", "evaluate", "train", "models", "doctor", "install")
        ),
    ],
)
def test_help_imports_neither_torch_nor_fiftyone(arguments):
    code = f"""
import sys
from fiftyone_mobilesamv2 import cli
try:
    cli.main({arguments!r})
finally:
    print(sorted({{"torch", "fiftyone", "numpy"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: fiftyone-mobilesamv2")
    assert result.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mobilesamv2-huge-torch"], "Unknown model 'mobilesamv2-huge-torch'; choose one of .*-demo-torch"),
        (["--images", "missing"], "missing is not a folder"),
        (["--images", "empty"], r"empty contains no images \(.*\.jpg"),
        (["--output", "file"], "file"),
    ],
    ids=["model", "missing folder", "empty folder", "output"],
)
def test_errors_are_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    (tmp_path / "file").write_text("in the way")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["quickstart", *arguments]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.search(f"^fiftyone-mobilesamv2: .*{message}", line)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was created


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["quickstart", "--scenes", "0"],
        ["quickstart", "--batch-size", "-1"],
        ["reproduce", "--annotations", "coco.json", "--images", "images"],
        ["reproduce", "--annotations", "coco.json", "--images", "images", "--model", "x", "--grids"],
        ["evaluate", "dataset", "proposals", "--ks", "0"],
        ["train", "dataset"],
        ["train", "dataset", "--name", "x", "--validation", "0.1", "--validation-tag", "x"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: fiftyone-mobilesamv2" in capsys.readouterr().err


def test_install_and_uninstall(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path / "zoo"))
    monkeypatch.setattr(fo.config, "plugins_dir", str(tmp_path / "plugins"))
    assert cli.main(["uninstall"]) == 0
    assert capsys.readouterr().out == "Nothing was installed.\n"
    assert cli.main(["install"]) == 0
    linked = capsys.readouterr().out
    assert f"Linked {tmp_path / 'plugins' / 'fiftyone_mobilesamv2'}\n" in linked
    assert cli.main(["uninstall"]) == 0
    assert capsys.readouterr().out == linked.replace("Linked", "Removed")

    (tmp_path / "plugins" / "fiftyone_mobilesamv2").mkdir()
    assert cli.main(["install"]) == 1
    captured = capsys.readouterr()
    assert "Move it elsewhere" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_segment_reports_failures_and_retries_them(dataset, tmp_path, capsys):
    for index in range(3):
        Image.fromarray(make_scene(TEST_SEED, index).image).save(tmp_path / f"{index}.png")
        dataset.add_sample(fo.Sample(str(tmp_path / f"{index}.png")))
    bad = tmp_path / "bad.png"
    dataset.add_sample(fo.Sample(str(bad)))
    command = ["segment", dataset.name, "--model", "mobilesamv2-demo-torch", "--device", "cpu", "--confidence", "0.3"]
    command += ["--masks-on-disk", "--mask-dir", str(tmp_path / "masks"), "--dtype", "bfloat16"]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    count = dataset.count("segmentations.detections")
    assert f"{count:,} objects in 3 of 4 images, in 'segmentations'" in captured.out
    assert f"failed: '{bad}' doesn't exist" in captured.err
    assert "Failed: 1 of 4. Run the command again to retry them." in captured.err
    paths = dataset.values("segmentations.detections.mask_path", unwind=True)
    assert len(paths) > 10 and all(Path(path).is_relative_to(tmp_path / "masks") for path in paths if path)
    (run,) = recorded_runs(dataset, "segmentations")
    assert (run.parameters["dtype"], run.parameters["confidence_thresh"]) == ("bfloat16", 0.3)
    Image.fromarray(make_scene(TEST_SEED, 3).image).save(bad)
    assert cli.main([*command, "--confidence", "0.4"]) == 1
    assert "confidence_thresh 0.3 then, 0.4 now" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert "in 1 of 1 images" in capsys.readouterr().out
    assert cli.main([*command, "--replace", "--max-prompts", "1", "--label-field", "other"]) == 0
    assert [len(labels) for labels in dataset.values("other.detections")] == [1] * 4


@pytest.fixture
def measurable(dataset):
    """Two objects in a 100x100 image; the field "both" contains both, "one" only the first."""
    sample = fo.Sample("image.png", metadata=fo.ImageMetadata(width=100, height=100))
    boxes = [[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.4, 0.4]]
    for name, count in (("ground_truth", 2), ("both", 2), ("one", 1)):
        sample[name] = fo.Detections(
            detections=[
                fo.Detection(
                    label="object",
                    bounding_box=box,
                    mask=np.ones([round(100 * side) for side in box[:1:-1]], bool),
                    confidence=0.9 - box[0],
                    predicted_iou=box[0],
                )
                for box in boxes[:count]
            ]
        )
    dataset.add_sample(sample)
    return dataset


def test_evaluate_stores_and_compares_results(measurable, capsys):
    assert cli.main(["evaluate", measurable.name, "one"]) == 0
    results = measurable.load_evaluation_results("ar")
    assert results.metrics()["AR@1000"] == 0.5
    assert results.config.use_masks
    assert str(results.report()) in capsys.readouterr().out

    command = ["evaluate", measurable.name, "both", "--eval-key", "key", "--ks", "1", "2", "--boxes"]
    assert cli.main([*command, "--rank-by", "predicted_iou", "--compare", "ar"]) == 0
    results = measurable.load_evaluation_results("key")
    assert (results.metrics()["AR@1"], results.metrics()["AR@2"]) == (0.5, 1)
    assert results.config.rank_by == "predicted_iou" and not results.config.use_masks
    printed = capsys.readouterr().out
    report, comparison = printed.split("\n\n")
    assert report.endswith(str(results.report()))
    rows = {line.split()[0]: line.split() for line in comparison.splitlines()[1:]}
    assert list(rows) == ["ar", "key"]
    assert "0.500" in rows["ar"] and "1.000" in rows["key"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{name}x", "both"], "There is no dataset '{name}x'"),
        (["{name}", "others"], "{name} has no field 'others' for the proposals.* both, ground_truth, one"),
        (["{name}", "both", "--gt-field", "objects"], "{name} has no field 'objects' for the ground truth"),
        (["{name}", "both", "--compare", "other"], "no evaluation.*other"),
        (
            ["{name}", "both", "--compare", "of_boxes"],
            "Evaluation 'of_boxes' of {name} is not an evaluation of proposals",
        ),
    ],
    ids=["dataset", "proposals", "objects", "run", "run of another kind"],
)
def test_errors_of_evaluate_are_one_clear_line(measurable, arguments, message, capsys):
    measurable.evaluate_detections("both", "ground_truth", eval_key="of_boxes", progress=False)
    capsys.readouterr()
    assert cli.main(["evaluate", *(argument.format(name=measurable.name) for argument in arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^fiftyone-mobilesamv2: .*{message.format(name=measurable.name)}", line)
    assert measurable.list_evaluations() == ["of_boxes"]


@pytest.fixture
def quickstart_dataset(mongod):
    """The name of the quickstart's dataset, which is deleted after the test."""
    yield DATASET
    for name in fo.list_datasets(f"{DATASET}*"):
        fo.delete_dataset(name)


def test_quickstart(quickstart_dataset, tmp_path, capsys):
    output = tmp_path / "new" / "output"
    command = ["quickstart", "--scenes", "5", "--batch-size", "2", "--output", str(output)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out

    dataset = fo.load_dataset(quickstart_dataset)
    photos = installed_photos()
    assert dataset.persistent
    assert len(photos) >= 8 and len(dataset) == len(photos) + 5
    assert dataset.values("filepath")[: len(photos)] == [str(path) for path in photos]
    assert [tags for (tags,) in dataset.values("tags")] == ["photo"] * len(photos) + ["scene"] * 5
    assert len(set(dataset.values("filepath"))) == len(dataset)
    assert all(Path(path).is_file() for path in dataset.values("filepath"))
    counts = [len(sample["segmentations"].detections) for sample in dataset]
    assert np.count_nonzero(counts[: len(photos)]) >= len(photos) - 2  # in a photo of towers at night it finds nothing
    assert min(counts[len(photos) :]) > 0
    assert [sample["ground_truth"] is None for sample in dataset] == [True] * len(photos) + [False] * 5
    assert min(len(sample["ground_truth"].detections) for sample in dataset.match_tags("scene")) > 0
    assert all(detection.mask.any() for sample in dataset for detection in sample["segmentations"].detections)

    assert re.search(rf"^{len(dataset)} images in \d+\.\d s \(\d+\.\d+ images/s\), 0 failed$", printed, re.M)
    assert re.search(rf"^{sum(counts)} objects: .* max {max(counts)}$", printed, re.M)
    stages = re.search(r"^Time per image: (.*)$", printed, re.M)[1]
    assert sorted(re.findall(r"(\w+) \d+ ms", stages)) == ["crop", "decode", "discover", "encode"]
    recall = {name: float(value) for name, value in re.findall(r"(AR@\d+) +([\d.]+)", printed)}
    assert list(recall) == ["AR@10", "AR@100", "AR@1000"]
    metrics = dataset.load_evaluation_results("ar").metrics()  # the App shows these, too
    assert {name: round(metrics[name], 3) for name in recall} == recall
    assert all(0 <= value <= 1 for value in recall.values())
    assert 0.2 < recall["AR@1000"]  # the model is trained on such scenes, too
    assert "Mask AR of the objects in 5 scenes, by size" in printed
    assert recall["AR@10"] <= recall["AR@100"] <= recall["AR@1000"]
    assert f"fiftyone app launch {quickstart_dataset}" in printed

    picture = cv2.imread(str(output / "overlays.png"))
    assert f"Overlays: {output / 'overlays.png'}" in printed
    tiles = [picture[:320, 320 * column : 320 * (column + 1)] for column in range(4)]
    assert all(tile.std() > 10 for tile in tiles)
    for tile, sample in zip(tiles, dataset):  # masks are drawn over the image
        image = cv2.imread(sample.filepath)
        scale = 316 / max(image.shape[:2])
        height, width = (int(side * scale) for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        assert np.abs(tile[:height, :width].astype(int) - image).mean() > 5

    # A second run replaces the dataset; a third one fails on its arguments before it does.
    assert cli.main([*command[:2], "2", *command[3:]]) == 0
    assert cli.main([*command, "--model", "mobilesamv2-huge-torch"]) == 1
    assert len(fo.load_dataset(quickstart_dataset)) == len(photos) + 2


def test_quickstart_with_images(quickstart_dataset, tmp_path, capsys):
    from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

    folder = tmp_path / "my images"
    (folder / "deeper").mkdir(parents=True)
    scene = make_scene(TEST_SEED, 1).image
    Image.fromarray(scene).save(folder / "colour.JPG", format="JPEG", quality=95)
    Image.fromarray(scene).resize((400, 260)).convert("RGBA").save(folder / "deeper" / "alpha.png")
    sixteen_bit = scene.mean(axis=2).astype(np.uint16) * 257
    Image.fromarray(sixteen_bit).save(folder / "sixteen_bit.tiff")
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (folder / "notes.txt").write_text("no image")
    shutil.copy(folder / "colour.JPG", os.fsencode(folder) + b"/caf\xe9.jpg")

    output = tmp_path / "output"
    assert cli.main(["quickstart", "--images", str(folder), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert r"my images/caf\udce9.jpg' is not UTF-8. Rename it." in captured.err
    printed = captured.out
    assert re.search(r"^4 images in .*, 1 failed$", printed, re.M)
    assert "AR@" not in printed  # there is no ground truth

    dataset = fo.load_dataset(f"{quickstart_dataset}-my images")
    assert dataset.persistent
    labels_by_name = {Path(sample.filepath).name: sample["segmentations"] for sample in dataset}
    assert labels_by_name.pop("damaged.png") is None
    assert sorted(labels_by_name) == ["alpha.png", "colour.JPG", "sixteen_bit.tiff"]
    assert all(labels.detections for labels in labels_by_name.values())
    picture = cv2.imread(str(output / "overlays.png"))
    tiles = [picture[:320, 320 * column : 320 * (column + 1)] for column in range(4)]
    assert [tile.std() > 10 for tile in tiles] == [True, True, True, False]


@pytest.mark.slow
def test_interrupted_quickstart_keeps_what_is_done(quickstart_dataset, tmp_path):
    """Ctrl-C reaches all processes of the terminal's foreground group, including workers."""
    command = [*COMMAND, "quickstart", "--scenes", "60", "--batch-size", "2", "--output", str(tmp_path)]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        start_new_session=True,
        # A shell's background jobs inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = threading.Timer(120, process.kill)
    deadline.start()
    output = b""
    while not re.search(rb"Segmenting: +[1-9]\d*%", output):  # progress bars end in \r, not in newlines
        piece = process.stdout.read1()
        assert piece, output.decode()
        output += piece
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    deadline.cancel()
    output = (output + rest).decode()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.rstrip().endswith("fiftyone-mobilesamv2: interrupted")

    dataset = fo.load_dataset(quickstart_dataset)
    total = len(installed_photos()) + 60
    assert len(dataset) == total
    done = len(dataset.exists("segmentations"))
    assert 0 < done < total


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_quickstart_passes_arguments_on():
    def printed(*arguments):
        result = subprocess.run(
            ["make", "--no-print-directory", "-n", "quickstart", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout.splitlines()[-1]

    command = ".venv/bin/python -m fiftyone_mobilesamv2.cli quickstart"
    assert printed().strip() == command
    assert printed("IMAGES=a b", "MODEL=x") == f'{command} --images "a b" --model "x"'


def test_delete_masks_and_repair(dataset, tmp_path, capsys):
    Image.fromarray(make_scene(TEST_SEED, 0).image).save(tmp_path / "0.png")
    dataset.add_sample(fo.Sample(str(tmp_path / "0.png")))
    masks, moved = tmp_path / "masks", tmp_path / "moved"
    command = ["segment", dataset.name, "--model", "mobilesamv2-demo-torch", "--device", "cpu", "--masks-on-disk"]
    assert cli.main([*command, "--mask-dir", str(masks)]) == 0
    count = dataset.count("segmentations.detections")
    assert cli.main(["repair", dataset.name]) == 0
    assert f"{dataset.name} is sound." in capsys.readouterr().out
    masks.rename(moved)
    assert cli.main(["repair", dataset.name]) == 1
    assert f"sample {dataset.first().id}: {count} masks have no file" in capsys.readouterr().err
    assert cli.main(["repair", dataset.name, "--mask-dir", str(moved)]) == 0
    assert f"masks found in {moved}: {count}" in capsys.readouterr().out
    assert cli.main(["delete-masks", dataset.name, "segmentations"]) == 0
    told = capsys.readouterr().out
    assert f"Would delete {count} masks of 1 images in 'segmentations', {count} of them in files" in told
    assert "Nothing was deleted" in told and dataset.count("segmentations.detections") == count
    assert cli.main(["delete-masks", dataset.name, "segmentations", "--yes"]) == 0
    assert f"Deleted {count} masks" in capsys.readouterr().out
    dataset.reload()
    assert not dataset.has_field("segmentations") and not any(path.is_file() for path in moved.rglob("*"))
    assert cli.main(["delete-masks", dataset.name, "segmentations"]) == 1
    assert "has no field 'segmentations'" in capsys.readouterr().err


@pytest.fixture
def labeled(mongod, tmp_path, monkeypatch):
    """Five scenes with masks, in a zoo without trained models."""
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path / "zoo"))
    dataset = load_coco(*write_coco(tmp_path, 5))
    yield dataset
    dataset.delete()


TRAIN = ["--base", "mobilesamv2-demo-torch", "--epochs", "1", "--batch-size", "2", "--device", "cpu"]


def test_choices_of_train_are_those_of_the_function():
    from fiftyone_mobilesamv2.training.arguments import CHOICES, PARTS

    commands = next(action for action in make_parser("train")._actions if action.dest == "command")
    choices = {action.dest: action.choices for action in commands.choices["train"]._actions}
    assert choices["part"] == PARTS and {name: choices[name] for name in CHOICES} == CHOICES


@pytest.mark.slow
def test_train_keeps_a_model_only_if_it_is_better_or_wanted(labeled, tmp_path, capsys):
    labeled.limit(1).tag_samples("held out")
    command = ["train", labeled.name, "--name", "cells", *TRAIN, "--validation-tag", "held out", "--size", "n"]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "It is not better than its base" in captured.out and "Traceback" not in captured.err
    assert not trained_models()
    assert cli.main([*command, "--keep-worse"]) == 0
    out = capsys.readouterr().out
    assert "before: AR@10 0." in out and "on 1 validation images" in out
    assert 'foz.load_zoo_model("cells")' in out
    assert trained_models()["cells"].dataset == labeled.name
    assert cli.main(["segment", labeled.name, "--model", "cells", "--device", "cpu"]) == 0
    assert cli.main([*command, "--output", str(tmp_path / "mine")]) == 1  # the name is that of a model
    assert "'cells' is already the name of the model in" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_errors_of_train_are_one_clear_line(labeled, capsys):
    for arguments, message in (
        ([f"{labeled.name}x", "--name", "cells"], f"There is no dataset '{labeled.name}x'"),
        ([labeled.name, "--name", "../cells"], "A model can't have the name '../cells'"),
        ([labeled.name, "--name", "cells", "--label-field", "x"], f"{labeled.name} has no field 'x'"),
        ([labeled.name, "--name", "cells", "--learn", "neck"], "learn applies only to part='masks'"),
        ([labeled.name, "--name", "cells", "--validation", "2"], "validation must be a share between 0 and 1"),
    ):
        assert cli.main(["train", *arguments, *TRAIN]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("fiftyone-mobilesamv2: ") and message in line


@pytest.mark.slow
def test_interrupted_train_says_how_to_go_on(labeled, tmp_path):
    command = [*COMMAND, "train", labeled.name, "--name", "cells", *TRAIN, "--epochs", "50"]
    environment = ENVIRONMENT | {"FIFTYONE_MODEL_ZOO_DIR": str(tmp_path / "zoo")}
    process = subprocess.Popen(
        command,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = threading.Timer(120, process.kill)
    deadline.start()
    output = b""
    while not re.search(rb"Epoch ([2-9]|\d\d) of 50, loss", output):  # the bar may not show every epoch
        piece = process.stdout.read1()
        assert piece, output.decode()
        output += piece
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    deadline.cancel()
    output = (output + rest).decode()
    assert process.returncode == 130 and "Traceback" not in output, output
    assert "Repeat the command to go on from the last save." in output
    assert (tmp_path / "zoo" / "mobilesamv2" / "trained" / "cells" / "training" / "discovery.pt").is_file()
