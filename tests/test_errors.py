"""Messages for users: in words, with each file named once."""

import urllib.request
from urllib.error import URLError

import fiftyone as fo
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiftyone_mobilesamv2 import MobileSAMv2, evaluate_proposals, zoo
from fiftyone_mobilesamv2.cli import main
from fiftyone_mobilesamv2.curation.coverage import image_coverage
from fiftyone_mobilesamv2.errors import Failure, message_of, plain
from fiftyone_mobilesamv2.evaluation.average_recall import AverageRecall
from fiftyone_mobilesamv2.images import read_image
from fiftyone_mobilesamv2.modeling.checkpoints.downloads import explain
from fiftyone_mobilesamv2.operators.choices import skipped_text
from fiftyone_mobilesamv2.runs.segment import segment_everything

DEMO = "mobilesamv2-demo-torch"


def caught(call, *args):
    try:
        call(*args)
    except Exception as error:
        return error
    pytest.fail("no exception")


def test_messages_of_network_and_file_errors_are_words(tmp_path):
    refused = caught(urllib.request.urlopen, "http://127.0.0.1:9/")
    assert isinstance(refused, URLError) and "urlopen error" in str(refused)
    assert message_of(refused) == explain(refused) == "Connection refused"
    assert message_of(caught(urllib.request.urlopen, "nowhere://x")) == "unknown url type: nowhere"
    missing = caught((tmp_path / "x.json").read_text)
    assert message_of(missing) == f"No such file or directory: '{tmp_path}/x.json'"
    assert message_of(OSError(28, "No space left on device")) == "No space left on device"
    assert message_of(OSError()) == "OSError"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_failures_name_the_file_once(name):
    path = f"/folder/{name}"
    text = str(Failure(None, path, f"{path!r} is damaged"))
    assert text == f"{path!r} is damaged"
    assert str(Failure(None, path, "out of memory")) == f"{path}: out of memory"


@pytest.fixture
def damaged(dataset, tmp_path):
    """An image with a name that Python quotes in another way, and without readable pixels."""
    path = tmp_path / "a\\b'c\".png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    box = fo.Detection(label="x", bounding_box=[0.1, 0.1, 0.2, 0.2])
    dataset.add_sample(fo.Sample(str(path), boxes=fo.Detections(detections=[box])))
    return dataset


def named_once(text, dataset):
    path = dataset.first().filepath
    return text.count(repr(path)) + text.count(path) == 1 and "Error" not in text


def test_damaged_images_are_named_once(damaged):
    run = segment_everything(damaged, zoo.load_model(DEMO, device="cpu"), progress=False)
    (failure,) = run.failures
    assert named_once(str(failure), damaged) and "damaged or not an image" in str(failure)
    error = caught(read_image, damaged.first().filepath)
    assert named_once(message_of(error), damaged)
    error = caught(image_coverage, damaged, "boxes")
    assert named_once(str(error), damaged) and "No image could be used" in str(error)
    skipped = {"id": "", "filepath": damaged.first().filepath, "cause": message_of(caught(read_image, "/missing.png"))}
    assert skipped_text([skipped])[0].count("missing.png") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["reproduce", "--images", "{folder}", "--annotations", "{folder}/x.json", "--model", "mobilesamv2-demo-torch"],
        ["quickstart", "--images", "{folder}/none"],
    ],
)
def test_commands_report_missing_files_in_words(arguments, mongod, tmp_path, capsys):
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "Errno" not in error and "Error" not in error


class Shape(tuple):
    """A tuple of its own kind, as named tuples are."""


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float64(10.0), "10.0"),
        (np.int64(3), "3"),
        (np.bool_(True), "True"),
        (torch.tensor(2.5), "2.5"),
        ((1, np.float32(0.5)), "(1, 0.5)"),
        ([np.int64(1), [np.int64(2)]], "[1, [2]]"),
        ("x", "'x'"),
        (None, "None"),
        (Shape([1]), "(1,)"),
    ],
)
def test_plain_values(value, expected):
    assert repr(plain(value)) == expected


def test_messages_show_plain_numbers(dataset):
    model = MobileSAMv2.from_pretrained(DEMO, device="cpu")
    image = np.zeros((8, 8, 3), np.uint8)
    dataset.add_sample(fo.Sample("/x.png", a=fo.Detections(), b=fo.Detections()))
    for call in (
        lambda: model.discover([image], conf=np.float64(10.0)),
        lambda: model.segment_everything([image], max_prompts=np.int64(0)),
        lambda: zoo.load_model(DEMO, device="cpu", iou=np.float64(10.0)),
        lambda: AverageRecall([np.int64(0), np.float64(10.0)]),
        lambda: evaluate_proposals(dataset, "a", "b", ks=[np.float64(10.0)]),
        lambda: segment_everything(dataset, zoo.load_model(DEMO, device="cpu"), batch_size=np.int64(0)),
    ):
        text = str(caught(call))
        assert "10.0" in text or " 0" in text, text
        assert "np." not in text and "numpy" not in text, text
