"""With a read-only database user, every operator ends with a clear message and changes nothing."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NAME = "fiftyone-read-only"
# The role `read` is not enough: FiftyOne 1.22 creates indexes and stores the time when it opens a dataset.
OPENING = [
    {"resource": {"db": NAME, "collection": "datasets"}, "actions": ["createIndex", "update"]},
    {"resource": {"db": NAME, "collection": ""}, "actions": ["find", "listIndexes", "listCollections", "collStats"]},
]

MAKE = """
import fiftyone as fo
from fiftyone_mobilesamv2 import load_coco
dataset = load_coco(*sys.argv[1:3], name="scenes")
dataset.clone_sample_field("ground_truth", "segmentations")
dataset.set_values("segmentations.detections.confidence", [[0.5] * n for n in dataset.values(NUMBER)])
boxes = [[fo.Detection(label="x", bounding_box=[0, 0, 1, 1]) for _ in range(2)] for _ in dataset]
dataset.set_values("boxes", [fo.Detections(detections=each) for each in boxes])
from fiftyone_mobilesamv2.runs.claims import on_record
from fiftyone_mobilesamv2.runs.record import SegmentationRun
with on_record(dataset, SegmentationRun("segmentations", {}, images=1)):
    pass
"""

RUN = """
import fiftyone as fo
dataset = fo.load_dataset("scenes")
plugin = conftest.Plugin(Path(fo.config.plugins_dir))
demo = {"model": "mobilesamv2-demo-torch", "device": "cpu"}
label = {"field": "segmentations", "sample_id": dataset.first().id}
selected = [label | {"label_id": dataset.first().segmentations.detections[0].id}]
runs = {
    "segment_everything": (demo | {"label_field": "new"}, {}),
    "segment_anything": (demo | {"prompt_field": "boxes"}, {}),
    "evaluate_proposals": ({}, {}),
    "compare_prompting": (demo | {"images": 1, "grid": "16"}, {}),
    "find_unlabeled_objects": ({"look_for": "labels", "pred_field": "boxes", "gt_field": "segmentations"}, {}),
    "find_duplicates": ({"field": "boxes"}, {}),
    "promote_to_labels": ({"label": "thing"}, {"selected_labels": selected}),
    "image_coverage": ({"field": "segmentations"}, {}),
    "train_on_labels": (demo | {"epochs": 1}, {}),
    "repair_dataset": ({}, {}),
    "delete_masks": ({"label_field": "segmentations", "confirm": True}, {}),
    "export_masks": ({"field": "segmentations", "path": sys.argv[1]}, {}),
}
for name, (params, request) in runs.items():
    *_, (_, last) = plugin.run_in_app(name, dataset, params, **request)
    error = last["outputs"]["type"]["properties"].get("error")
    print("TOLD", json.dumps([name, error and error["view"]["description"]]))
"""


def run(code, uri, folder, *arguments):
    head = f"""
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("conftest", {str(HERE / "conftest.py")!r})
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
from fiftyone import ViewField as F
NUMBER = F("segmentations.detections").length()
"""
    (folder / "plugins").mkdir(exist_ok=True)
    environment = os.environ | {
        "FIFTYONE_DATABASE_URI": uri,
        "FIFTYONE_DATABASE_NAME": NAME,
        "FIFTYONE_PLUGINS_DIR": str(folder / "plugins"),
    }
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return [json.loads(line[5:]) for line in result.stdout.splitlines() if line.startswith("TOLD ")]


@pytest.fixture
def database(tmp_path):
    """The URIs of a separate database, for an owner and for a read-only user."""
    from pymongo import MongoClient

    folder = Path(importlib.util.find_spec("fiftyone").submodule_search_locations[0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "db").mkdir()
    command = [folder / "db" / "bin" / "mongod", "--auth", "--dbpath", tmp_path / "db", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--bind_ip", "127.0.0.1", "--nounixsocket"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        MongoClient("127.0.0.1", port).admin.command("createUser", "owner", pwd="pw", roles=["root"])
        owner = f"mongodb://owner:pw@127.0.0.1:{port}/?authSource=admin"
        admin = MongoClient(owner).admin
        admin.command("createRole", "opener", privileges=OPENING, roles=[])
        admin.command("createUser", "reader", pwd="pw", roles=["opener", {"role": "read", "db": NAME}])
        yield owner, f"mongodb://reader:pw@127.0.0.1:{port}/?authSource=admin"
    finally:
        process.kill()
        process.wait(timeout=10)


def samples_of(uri):
    from pymongo import MongoClient

    database = MongoClient(uri)[NAME]
    (dataset,) = database.datasets.find({"name": "scenes"})
    return list(database[dataset["sample_collection_name"]].find())


@pytest.mark.slow
def test_operators_report_read_only_access_and_change_nothing(database, scene_files, tmp_path):
    owner, reader = database
    run(MAKE, owner, tmp_path, *scene_files)
    before = samples_of(owner)
    path = tmp_path / "masks.json"
    errors = dict(run(RUN, reader, tmp_path, path))
    assert errors.pop("export_masks") is None and len(json.loads(path.read_text())["images"]) == 4
    assert errors.pop("repair_dataset") is None  # there is nothing to repair
    assert errors.pop("train_on_labels") is None  # models are files
    for name, error in errors.items():
        assert error and error.startswith("This database user has read-only access"), (name, error)
    assert samples_of(owner) == before
