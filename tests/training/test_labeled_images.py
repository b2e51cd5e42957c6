"""Labels of a dataset become examples, and validation images are never trained on."""

import os
import shutil

import fiftyone as fo
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2.training.examples import Seen
from fiftyone_mobilesamv2.training.labeled_images import read_labels, split

WIDTH, HEIGHT = 80, 60


@pytest.fixture
def dataset(mongod):
    dataset = fo.Dataset()
    yield dataset
    dataset.delete()


def add(dataset, folder, number, labels=None, **fields):
    """Adds an image of its own content."""
    path = folder / f"{number}.png"
    pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    sample = fo.Sample(str(path), ground_truth=labels, **fields)
    dataset.add_sample(sample)
    return sample


def detection(box=(0.25, 0.25, 0.5, 0.5), **attributes):
    return fo.Detection(label="thing", bounding_box=list(box), **attributes)


def detections(*labels):
    return fo.Detections(detections=list(labels) or [detection()])


def read(samples, folder, field="ground_truth"):
    return read_labels(samples, field, folder / "frames", False)


def test_labels_become_boxes_masks_and_ignored_regions(dataset, tmp_path):
    mask = np.zeros((30, 40), bool)
    mask[5:, :20] = True
    labels = [detection(mask=mask), detection((0, 0, 0.1, 0.1), mask=np.ones((6, 8), bool))]
    crowd = detection((0.5, 0, 0.5, 1), mask=np.ones((60, 40), bool), iscrowd=1)
    tagged = detection((0, 0.5, 0.25, 0.5), tags=["ignore"])  # without a mask
    add(dataset, tmp_path, 0, detections(*labels, crowd, tagged))
    (example,) = read(dataset, tmp_path).examples
    assert example.boxes.tolist() == [[20, 15, 60, 45], [0, 0, 8, 6]] and example.boxes.dtype == np.float32
    assert example.ignored.tolist() == [[40, 0, 80, 60], [0, 30, 20, 60]]
    decoded = mask_utils.decode(list(example.masks))
    assert decoded.shape == (HEIGHT, WIDTH, 2)
    assert np.array_equal(decoded[15:45, 20:60, 0], mask) and decoded[..., 0].sum() == mask.sum()
    assert np.array_equal(example.read(), np.asarray(Image.open(dataset.first().filepath)))


def test_boxes_alone_and_polylines(dataset, tmp_path):
    add(dataset, tmp_path, 0, detections(detection(), detection(mask=np.ones((30, 40), bool))))
    (example,) = read(dataset, tmp_path).examples
    assert example.masks is None and len(example.boxes) == 2
    triangle = fo.Polyline(points=[[(0.25, 0.25), (0.75, 0.25), (0.25, 0.75)]], closed=True, filled=True)
    for sample in dataset.iter_samples(autosave=True):
        sample["outlines"] = fo.Polylines(polylines=[triangle])
    (example,) = read(dataset, tmp_path, "outlines").examples
    assert example.boxes.tolist() == [[20, 15, 60, 45]]
    area = mask_utils.area(example.masks[0])
    assert area == pytest.approx(40 * 30 / 2, rel=0.1)


def test_no_labels_are_not_the_same_as_no_value(dataset, tmp_path):
    add(dataset, tmp_path, 0, fo.Detections())
    add(dataset, tmp_path, 1, None)
    add(dataset, tmp_path, 2, detections())
    found = read(dataset, tmp_path)
    ids = dataset.values("id")
    assert [each.id for each in found.examples] == [ids[0], ids[2]] and [each.id for each in found.unlabeled] == [
        ids[1]
    ]
    assert found.num_objects == 1 and len(found.contents) == 3


def test_bad_images_are_skipped_with_a_cause(dataset, tmp_path):
    add(dataset, tmp_path, 0, detections())
    causes = {}
    for number, (labels, cause) in enumerate(
        [
            (detections(detection((1.2, 0, 0.5, 0.5))), "lies outside the image"),
            (detections(detection((0.2, 0.2, 0, 0.5))), "has bounding_box="),
            (detections(detection((float("nan"), 0, 0.5, 0.5))), "has bounding_box="),
            (detections(detection(mask=np.ones((200, 30), bool))), "has a mask of 30x200 pixels"),
            (detections(detection(iscrowd="0")), "has iscrowd='0'"),
        ],
        1,
    ):
        causes[add(dataset, tmp_path, number, labels).filepath] = cause
    gone = add(dataset, tmp_path, 9, detections(), metadata=fo.ImageMetadata(width=WIDTH, height=HEIGHT))
    os.remove(gone.filepath)
    causes[gone.filepath] = "doesn't exist"
    found = read(dataset, tmp_path)
    assert len(found.examples) == 1 and len(found.skipped) == len(causes)
    for skipped in found.skipped:
        assert causes[skipped["filepath"]] in skipped["cause"], skipped


def test_frames_of_videos(dataset, tmp_path):
    import cv2

    path = str(tmp_path / "video.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 5, (WIDTH, HEIGHT))
    for number in range(6):
        writer.write(np.full((HEIGHT, WIDTH, 3), 40 * number, np.uint8))
    writer.release()
    sample = fo.Sample(path)
    for number in (2, 5, 40):
        sample.frames[number] = fo.Frame(ground_truth=detections())
    dataset.add_sample(sample)
    found = read(dataset, tmp_path, "frames.ground_truth")
    assert [each.name for each in found.examples] == [f"{path}, frame 2", f"{path}, frame 5"]
    for example, value in zip(found.examples, (40, 160)):
        assert abs(int(example.read().mean()) - value) < 8 and example.boxes.tolist() == [[20, 15, 60, 45]]
    assert [each["cause"] for each in found.skipped] == ["the video has no such frame"]
    assert len(set(found.contents.values())) == 1  # a video's frames stay together


# Validation -----------------------------------------------------------------------------------------------------------


def ids(examples):
    return {example.id for example in examples}


def many(dataset, folder, count=20):
    for number in range(count):
        add(dataset, folder, number, detections(), tags=["val"] if number % 4 == 0 else [])


def test_share_is_the_same_in_any_order(dataset, tmp_path):
    many(dataset, tmp_path)
    training, held_out = split(dataset, "ground_truth", 0.25, tmp_path, False)
    assert len(held_out.examples) == 5 and len(training.examples) == 15
    assert not ids(training.examples) & ids(held_out.examples)
    for view in (dataset.shuffle(seed=3), dataset.sort_by("filepath", reverse=True)):
        assert ids(split(view, "ground_truth", 0.25, tmp_path, False)[1].examples) == ids(held_out.examples)
    larger = split(dataset, "ground_truth", 0.5, tmp_path, False)[1]
    assert ids(held_out.examples) < ids(larger.examples)
    paths = {sample.id: sample.filepath for sample in dataset}
    copy = fo.Dataset()  # other ids, other paths
    for sample in dataset.shuffle(seed=5):
        shutil.copy(sample.filepath, moved := f"{sample.filepath}-moved.png")
        copy.add_sample(fo.Sample(moved, ground_truth=detections()))
    again = split(copy, "ground_truth", 0.25, tmp_path, False)[1]
    assert {each.name for each in again.examples} == {f"{paths[id]}-moved.png" for id in ids(held_out.examples)}
    copy.delete()


def test_what_the_base_was_trained_on_is_not_for_validation(dataset, tmp_path):
    many(dataset, tmp_path, 10)
    first, first_held_out = split(dataset, "ground_truth", 0.2, tmp_path, False)
    seen = Seen(first.example_contents, first_held_out.example_contents)
    assert ids(split(dataset, "ground_truth", 0.2, tmp_path, False, seen)[1].examples) == ids(first_held_out.examples)
    for number in range(10, 30):  # with these, other images of the first ten would be chosen
        add(dataset, tmp_path, number, detections())
    fresh = split(dataset, "ground_truth", 0.4, tmp_path, False)[1]
    assert ids(fresh.examples) & ids(first.examples)
    training, held_out = split(dataset, "ground_truth", 0.4, tmp_path, False, seen)
    assert len(held_out.examples) == 12 and ids(first_held_out.examples) < ids(held_out.examples)
    assert not ids(held_out.examples) & ids(first.examples) and not ids(held_out.examples) & ids(training.examples)


def test_base_that_was_trained_on_everything(dataset, tmp_path):
    many(dataset, tmp_path, 5)
    everything = Seen(split(dataset, "ground_truth", 0.2, tmp_path, False)[0].example_contents | {"more"})
    view = dataset.select(list(ids(split(dataset, "ground_truth", 0.2, tmp_path, False)[0].examples)))
    training, held_out = split(view, "ground_truth", 0.5, tmp_path, False, everything)
    assert len(training.examples) == len(held_out.examples) == 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_duplicates_are_on_one_side(dataset, tmp_path, share):
    many(dataset, tmp_path, 10)
    for number in (0, 3, 7):
        path = dataset.match(fo.ViewField("filepath").ends_with(f"/{number}.png")).first().filepath
        shutil.copy(path, copied := str(tmp_path / f"copy of {number}.png"))
        dataset.add_sample(fo.Sample(copied, ground_truth=detections()))
    training, held_out = split(dataset, "ground_truth", share, tmp_path, False)
    sides = [{training.contents[each.id] for each in part.examples} for part in (training, held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10
    assert len(training.examples) + len(held_out.examples) == 13


def test_tags_and_views(dataset, tmp_path):
    many(dataset, tmp_path)
    tagged = set(dataset.match_tags("val").values("id"))
    first = dataset.match_tags("val").first().filepath
    shutil.copy(first, copied := str(tmp_path / "copy.png"))  # of a validation image, without its tag
    dataset.add_sample(fo.Sample(copied, ground_truth=detections()))
    for validation in ("val", ["val", "other"], dataset.match_tags("val")):
        training, held_out = split(dataset, "ground_truth", validation, tmp_path, False)
        assert ids(held_out.examples) == tagged and len(training.examples) == 15
    # A view beside the one to train on.
    view = dataset.match(~fo.ViewField("tags").contains("val"))
    training, held_out = split(view, "ground_truth", dataset.match_tags("val"), tmp_path, False)
    assert ids(held_out.examples) == tagged and len(training.examples) == 15


@pytest.mark.parametrize("validation", [0, 1, 1.5, -0.1, True, None, "", [], [1], {"a": 1}, float("nan")])
def test_invalid_validation_is_refused(dataset, tmp_path, validation):
    many(dataset, tmp_path, 2)
    with pytest.raises(ValueError, match="validation must be a share between 0 and 1, tags of samples, or a view"):
        split(dataset, "ground_truth", validation, tmp_path, False)
