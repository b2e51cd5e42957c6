"""Data stored by an earlier version can be read, continued, shown and deleted.

tests/data/upgrade is a database with its files, created by version 0.1.0 with tools/dump_for_upgrades.py: two runs (one
with masks in the database; an unfinished one with masks in files), a failed sample, an evaluation, a promoted label.
"""

import gzip
import json
import shutil
from pathlib import Path

import bson
import fiftyone as fo
import fiftyone.core.odm as foo
import pytest

from fiftyone_mobilesamv2 import segment_everything
from fiftyone_mobilesamv2.curation.promote import promote_to_labels
from fiftyone_mobilesamv2.runs.record import failed_samples, recorded_runs
from fiftyone_mobilesamv2.zoo.config import MobileSAMv2ModelConfig

DATA = Path(__file__).parent / "data" / "upgrade"
SUMMARY = json.loads((DATA / "summary.json").read_text())


def restored(value: object, folder: Path) -> object:
    if isinstance(value, dict):
        return {key: restored(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [restored(each, folder) for each in value]
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


@pytest.fixture
def old(mongod, tmp_path):
    """The dataset as it is just after an upgrade."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    with gzip.open(tmp_path / "database.bson.gz") as file:
        entries = bson.decode_all(file.read())
    database = foo.get_db_conn()
    own = ("fs.", "mobilesamv2.", "runs", "datasets", "samples.", "views", "stages")
    inserted = []
    for entry in entries:
        if entry["collection"].startswith(own):
            database[entry["collection"]].insert_one(restored(entry["document"], tmp_path))
            inserted.append((entry["collection"], entry["document"]["_id"]))
    yield fo.load_dataset("upgrade")
    if fo.dataset_exists("upgrade"):
        fo.delete_dataset("upgrade")
    for collection, id in inserted:
        database[collection].delete_one({"_id": id})


def counts(dataset: fo.Dataset, field: str) -> list[int | None]:
    return [None if sample[field] is None else len(sample[field].detections) for sample in dataset]


def test_labels_and_records_are_read(old):
    for field, expected in SUMMARY["labels"].items():
        assert counts(old, field) == expected
    first, second = recorded_runs(old, "segmentations")
    assert (first.images, first.num_failures, second.num_failures) == (3, 0, 1)
    assert first.objects == sum(SUMMARY["labels"]["segmentations"][:3])
    (failed,) = failed_samples(old, "segmentations")
    assert Path(failed.filepath).name == SUMMARY["failed"]
    detection = old.first().segmentations.detections[0]
    assert detection.mask.any() and detection.area_px == detection.mask.sum() and 0 <= detection.stability <= 1
    on_disk = old.first().masks_on_disk.detections
    assert all(Path(detection.mask_path).is_file() for detection in on_disk)


def test_run_can_be_continued(old):
    """It continues only with the same parameters and weights."""
    parameters = {"name": "mobilesamv2-demo-torch", "device": "cpu", "masks_on_disk": True}
    mask_dir = recorded_runs(old, "masks_on_disk")[0].mask_dir
    with pytest.raises(ValueError, match="made with other parameters"):
        segment_everything(old, MobileSAMv2ModelConfig(parameters | {"max_prompts": 5}), "masks_on_disk")
    before = old.first().masks_on_disk.detections[0].id
    config = MobileSAMv2ModelConfig(parameters | {"mask_dir": mask_dir})
    run = segment_everything(old, config, "masks_on_disk", progress=False)
    assert (run.images, run.num_failures) == (2, 1)
    assert counts(old, "masks_on_disk") == counts(old, "segmentations")
    assert old.first().masks_on_disk.detections[0].id == before
    assert [each.images for each in recorded_runs(old, "masks_on_disk")] == [2, 2]


def test_evaluation_is_loaded_and_deleted(old):
    results = old.load_evaluation_results("ar")
    assert results.report() == SUMMARY["report"]
    metrics = results.metrics()
    assert metrics["support"] == SUMMARY["report"]["object"]["support"] and 0 < metrics["AR"] < 1
    assert old.load_evaluation_view("ar").count("ground_truth.detections") == sum(SUMMARY["labels"]["ground_truth"][:3])
    old.delete_evaluation("ar")
    assert old.list_evaluations() == [] and "ar" not in old.first()


def test_promoted_label_is_not_promoted_again(old):
    (promoted,) = [
        (detection.promoted_from, detection.label)
        for sample in old
        for detection in (sample.ground_truth.detections if sample.ground_truth else ())
        if getattr(detection, "promoted_from", None)
    ]
    assert promoted[1] == "thing"
    promotion = promote_to_labels(old, [promoted[0]], "segmentations", label="again", progress=False)
    assert (promotion.promoted, promotion.already) == (0, 1)


def test_everything_can_be_deleted(old):
    old.delete_sample_fields(["segmentations", "masks_on_disk"])
    assert recorded_runs(old, "segmentations") == []
    for key in old.list_runs():
        old.delete_run(key)
    old.delete()
    assert not fo.dataset_exists("upgrade")
