"""Deleting the masks of runs, with their files."""

from pathlib import Path

import fiftyone as fo
import pytest
from PIL import Image

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.curation.promote import promote_to_labels
from fiftyone_mobilesamv2.errors import FieldBusyError
from fiftyone_mobilesamv2.runs import deletion
from fiftyone_mobilesamv2.runs.claims import on_record
from fiftyone_mobilesamv2.runs.deletion import delete_masks, made_masks
from fiftyone_mobilesamv2.runs.record import SegmentationRun, collection, recorded_runs
from fiftyone_mobilesamv2.runs.segment import segment_anything, segment_everything
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

MODEL = "mobilesamv2-demo-torch"
COUNT = 2


@pytest.fixture
def images(dataset, tmp_path):
    for index in range(COUNT):
        Image.fromarray(make_scene(TEST_SEED, index).image).save(tmp_path / f"{index}.png")
        dataset.add_sample(fo.Sample(str(tmp_path / f"{index}.png")))
    return dataset


@pytest.fixture
def on_disk(tmp_path):
    return zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path / "masks"))


def files_in(tmp_path):
    return [path for path in (tmp_path / "masks").rglob("*") if path.is_file()]


def test_field_is_deleted_with_its_files_and_records(images, on_disk, tmp_path):
    run = segment_everything(images, on_disk, "own")
    made = made_masks(images, "own")
    assert (made.images, made.masks, made.files, made.runs) == (COUNT, run.objects, run.objects, 1)
    assert (made.others, made.only_masks, made.evaluations) == (0, False, [])
    assert len(files_in(tmp_path)) == run.objects
    assert delete_masks(images.limit(1), "own", progress=False) == made
    assert not images.has_field("own") and files_in(tmp_path) == []
    assert images._sample_collection.count_documents({"own": {"$exists": True}}) == 0
    assert images.list_runs() == [] and collection().count_documents({"dataset_id": images._doc.id}) == 0
    assert len(list(images)) == COUNT
    assert segment_everything(images, on_disk, "own").images == COUNT  # from the beginning


def test_files_that_other_labels_refer_to_are_kept(images, on_disk, tmp_path):
    segment_everything(images, on_disk, "own")
    first = images.first().own.detections[0].id
    promote_to_labels(images, [first], "own", label="thing", progress=False)
    images.limit(1).clone_sample_field("own", "copy")
    delete_masks(images, "own", progress=False)
    paths = images.values("ground_truth.detections.mask_path", unwind=True)
    paths += images.values("copy.detections.mask_path", unwind=True)
    paths = [path for path in paths if path]
    assert len(paths) > 5 and all(Path(path).is_file() for path in paths)


def test_labels_of_users_are_kept(images, on_disk, tmp_path):
    segment_everything(images, on_disk, "own")
    sample = images.first()
    sample.own.detections.append(fo.Detection(label="mine", bounding_box=[0, 0, 0.5, 0.5]))
    sample.save()
    made = delete_masks(images, "own", progress=False)
    assert made.others == 1
    assert images.values("own.detections.label") == [["mine"], None] and files_in(tmp_path) == []
    assert segment_everything(images, on_disk, "own").images == 1  # the other image, as if for the first time
    assert images.values("own.detections.label")[0] == ["mine"]


def test_labels_that_got_masks_are_kept_even_without_a_record(images, on_disk, tmp_path):
    for sample in images:
        sample["boxes"] = fo.Detections(detections=[fo.Detection(label="box", bounding_box=[0.1, 0.1, 0.6, 0.6])])
        sample.save()
    segment_anything(images, on_disk, "boxes")
    images.delete_runs()
    collection().delete_many({"dataset_id": images._doc.id})
    assert made_masks(images, "boxes").only_masks
    delete_masks(images, "boxes", progress=False)
    assert images.values("boxes.detections.label") == [["box"]] * COUNT and files_in(tmp_path) == []


@pytest.mark.parametrize("single", [False, True])
def test_labels_that_got_masks_lose_only_these(images, on_disk, tmp_path, single):
    box = fo.Detection(label="box", bounding_box=[0.1, 0.1, 0.6, 0.6], mood="good")
    for sample in images:
        sample["boxes"] = box.copy() if single else fo.Detections(detections=[box.copy()])
        sample.save()
    ids = images.values("boxes.id" if single else "boxes.detections.id")
    segment_anything(images, on_disk, "boxes")
    assert len(files_in(tmp_path)) == COUNT
    made = delete_masks(images, "boxes", progress=False)
    assert made.only_masks and (made.masks, made.files, made.others) == (COUNT, COUNT, 0)
    assert files_in(tmp_path) == [] and images.values("boxes.id" if single else "boxes.detections.id") == ids
    label = images.first().boxes if single else images.first().boxes.detections[0]
    assert (label.label, label.mood, label.mask_path) == ("box", "good", None)
    assert recorded_runs(images, "boxes") == []
    assert segment_anything(images, on_disk, "boxes").objects == COUNT


def test_interrupted_deletion_is_completed_by_the_next_run(images, on_disk, tmp_path, monkeypatch):
    segment_everything(images, on_disk, "own")

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deletion, "settle", interrupt)
        with pytest.raises(KeyboardInterrupt):
            delete_masks(images, "own", progress=False)
    assert len(files_in(tmp_path)) > 10
    segment_everything(images, on_disk, "other")
    referred = images.values("other.detections.mask_path", unwind=True)
    assert {str(path) for path in files_in(tmp_path)} == set(referred)


def test_field_in_use_is_not_deleted(images, on_disk):
    segment_everything(images, on_disk, "own")
    with on_record(images, SegmentationRun("own", {})), pytest.raises(FieldBusyError):
        delete_masks(images, "own", progress=False)
    assert images.count("own.detections") > 5


def test_invalid_fields_are_refused(images):
    with pytest.raises(ValueError, match="has no field 'nothing'"):
        delete_masks(images, "nothing")
