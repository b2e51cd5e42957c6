"""A dataset that FiftyOne can't load any more, or whose masks were moved, is repaired."""

import shutil
from pathlib import Path

import fiftyone as fo
import fiftyone.core.odm as foo
import pytest
from PIL import Image

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.curation.coverage import image_coverage
from fiftyone_mobilesamv2.curation.repair import repair
from fiftyone_mobilesamv2.evaluation.proposals import evaluate_proposals
from fiftyone_mobilesamv2.runs.deletion import delete_masks
from fiftyone_mobilesamv2.runs.record import recorded_runs
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene


@pytest.fixture
def boxes(dataset):
    """Three images with objects and proposals."""
    labels = fo.Detections(detections=[fo.Detection(label="x", bounding_box=[0.1, 0.1, 0.5, 0.5], confidence=0.5)])
    size = fo.ImageMetadata(width=40, height=30)
    samples = [fo.Sample(f"/{i}.png", metadata=size, objects=labels.copy(), proposals=labels.copy()) for i in range(3)]
    dataset.add_samples(samples, progress=False)
    return dataset


def lose(dataset, *names):
    """Removes fields from the schema but not their values, as if two processes had changed it at the same time."""
    change = {"$pull": {"sample_fields": {"name": {"$in": names}}}}
    assert foo.get_db_conn().datasets.update_one({"_id": dataset._doc.id}, change).modified_count


def test_sound_dataset_is_not_changed(boxes):
    before = foo.get_db_conn().datasets.find_one({"_id": boxes._doc.id})["sample_fields"]
    result = repair(boxes, progress=False)
    assert result.is_sound and (result.declared, result.found, result.missing) == ([], 0, {})
    assert foo.get_db_conn().datasets.find_one({"_id": boxes._doc.id})["sample_fields"] == before


def test_lost_fields_are_declared_again(boxes):
    image_coverage(boxes, "objects", use_masks=False, progress=False)
    results = evaluate_proposals(boxes, "proposals", "objects", "ar", use_masks=False, progress=False)
    before = {name: str(field) for name, field in boxes.get_field_schema(flat=True).items()}
    values = {
        name: boxes.values(name) for name in ("objects_coverage", "ar_tp", "ar_recall_at_10", "objects.detections.ar")
    }
    lose(boxes, "proposals", "objects_coverage", "ar_tp", "ar_recall_at_10", "objects_median_area")
    with pytest.raises(Exception, match="do not exist on the document"):
        boxes.clear_cache()
        boxes.reload()
        list(boxes)
    result = repair(boxes, progress=False)
    assert set(result.declared) >= {"proposals", "objects_coverage", "ar_tp", "ar_recall_at_10", "objects_median_area"}
    assert {name: str(field) for name, field in boxes.get_field_schema(flat=True).items()} == before
    assert len(list(boxes)) == 3
    assert {name: boxes.values(name) for name in values} == values
    assert boxes.load_evaluation_results("ar").metrics() == pytest.approx(results.metrics(), nan_ok=True)
    image_coverage(boxes, "objects", use_masks=False, progress=False)  # it is known as an earlier measurement
    evaluate_proposals(boxes, "proposals", "objects", "ar", use_masks=False, progress=False)
    assert repair(boxes, progress=False).is_sound


def test_fields_of_fiftyones_own_evaluation_are_declared_again(boxes):
    boxes.evaluate_detections("proposals", "objects", "fifty", progress=False)
    before = {name: str(field) for name, field in boxes.get_field_schema(flat=True).items()}
    lose(boxes, "fifty_tp", "objects")
    repair(boxes, progress=False)
    assert {name: str(field) for name, field in boxes.get_field_schema(flat=True).items()} == before
    assert boxes.values("fifty_tp") == [1, 1, 1] and len(list(boxes)) == 3


@pytest.mark.parametrize(
    "value, kind",
    [
        (3, fo.IntField),
        (2.5, fo.FloatField),
        (True, fo.BooleanField),
        ("text", fo.StringField),
        ([1, 2], fo.ListField),
        ({"a": 1}, fo.DictField),
        (fo.Classification(label="x"), fo.EmbeddedDocumentField),
    ],
)
def test_types_of_lost_fields_are_those_of_their_values(boxes, value, kind):
    first = boxes.first()
    first["extra"] = value
    first.save()
    lose(boxes, "extra")
    assert repair(boxes, progress=False).declared == ["extra"]
    assert type(boxes.get_field("extra")) is kind
    assert boxes.values("extra")[1:] == [None, None] and len(list(boxes)) == 3
    if kind is not fo.EmbeddedDocumentField:
        assert boxes.first().extra == value


def test_undeclared_values_of_different_types_can_be_loaded(boxes):
    first, second, third = (each["_id"] for each in boxes._sample_collection.find())
    for id, value in ((first, 1), (second, "a"), (third, None)):
        boxes._sample_collection.update_one({"_id": id}, {"$set": {"extra": value, "nothing": None}})
    result = repair(boxes, progress=False)
    assert (result.declared, result.emptied) == (["extra"], ["nothing"])
    assert [sample["extra"] for sample in boxes] == [1, "a", None]


def test_moved_masks_are_found(dataset, tmp_path):
    for index in range(2):
        Image.fromarray(make_scene(TEST_SEED, index).image).save(tmp_path / f"{index}.png")
        dataset.add_sample(fo.Sample(str(tmp_path / f"{index}.png")))
    masks, moved = tmp_path / "masks", tmp_path / "moved"
    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu", masks_on_disk=True, mask_dir=str(masks))
    run = segment_everything(dataset, model, "own")
    pixels = [label.get_mask().tolist() for label in dataset.first().own.detections]
    shutil.move(masks, moved)
    result = repair(dataset, progress=False)
    assert sum(result.missing.values()) == run.objects and set(result.missing) == set(dataset.values("id"))
    with pytest.raises(ValueError, match="is not a folder"):
        repair(dataset, masks)
    next((moved / str(dataset._doc.id)).rglob("0.png")).unlink()
    result = repair(dataset, moved, progress=False)
    assert result.found == run.objects - 1 and sum(result.missing.values()) == 1
    paths = dataset.values("own.detections.mask_path", unwind=True)
    assert sum(Path(path).is_file() for path in paths) == run.objects - 1
    found = [label for label in dataset.first().own.detections if Path(label.mask_path).is_file()]
    assert [label.get_mask().tolist() for label in found] == [
        each for label, each in zip(dataset.first().own.detections, pixels) if label in found
    ]


def test_exported_dataset_has_its_masks_and_records(dataset, tmp_path):
    """FiftyOne exports the files of masks, and the labels tell which run made them."""
    Image.fromarray(make_scene(TEST_SEED, 0).image).save(tmp_path / "0.png")
    dataset.add_sample(fo.Sample(str(tmp_path / "0.png")))
    masks, export = tmp_path / "masks", tmp_path / "export"
    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu", masks_on_disk=True, mask_dir=str(masks))
    run = segment_everything(dataset, model, "own")
    dataset.export(export_dir=str(export), dataset_type=fo.types.FiftyOneDataset)
    delete_masks(dataset, "own", progress=False)
    moved = shutil.move(export, tmp_path / "elsewhere")
    imported = fo.Dataset.from_dir(str(moved), dataset_type=fo.types.FiftyOneDataset)
    try:
        paths = imported.values("own.detections.mask_path", unwind=True)
        assert len(paths) == run.objects and all(Path(path).is_relative_to(moved) for path in paths)
        assert repair(imported, progress=False).is_sound
        (recorded,) = recorded_runs(imported, "own")
        assert (recorded.run_id, recorded.parameters) == (run.run_id, run.parameters)
        with pytest.raises(ValueError, match="made with other parameters"):
            segment_everything(imported, zoo.load_model(model.config.name, device="cpu", max_masks=3), "own")
    finally:
        imported.delete()
