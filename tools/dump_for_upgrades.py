"""Creates and dumps a small database and its files with one version of this package; later versions must read them.

    PYTHONPATH=<checkout of that version> python tools/dump_for_upgrades.py tests/data/upgrade

The dataset has scenes with two runs (one with masks in the database; one with masks in files, which is to be
continued), a sample that fails, an evaluation, and a promoted proposal. Uses the names of version 0.1.0.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Starts its own MongoDB and fills the folder given on the command line."""
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        process = start_database(Path(scratch))
        try:
            summary = fill(folder)
            dump(folder)
        finally:
            process.kill()
            process.wait()
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def start_database(scratch: Path) -> subprocess.Popen:
    """Starts MongoDB, and sets the environment so that FiftyOne uses it and none of the user's folders."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (fiftyone,) = importlib.util.find_spec("fiftyone").submodule_search_locations
    command = [Path(fiftyone) / "db" / "bin" / "mongod", "--dbpath", scratch, "--port", str(port), "--nounixsocket"]
    process = subprocess.Popen([*command, "--bind_ip", "127.0.0.1"], stdout=subprocess.DEVNULL)
    os.environ |= {
        "FIFTYONE_DATABASE_URI": f"mongodb://127.0.0.1:{port}/",
        "FIFTYONE_DATABASE_NAME": "upgrade",
        "FIFTYONE_DO_NOT_TRACK": "true",
        "FIFTYONE_DEFAULT_DATASET_DIR": str(scratch / "datasets"),
        "FIFTYONE_MODEL_ZOO_DIR": str(scratch / "zoo"),
        "FIFTYONE_PLUGINS_DIR": str(scratch / "plugins"),
        "YOLO_CONFIG_DIR": str(scratch / "ultralytics"),
    }
    time.sleep(3)
    return process


def fill(folder: Path) -> dict:
    """Creates the dataset. Returns the values that tests compare with."""
    import cv2
    import fiftyone as fo

    import fiftyone_mobilesamv2
    from fiftyone_mobilesamv2 import evaluate_proposals, load_coco, segment_everything, zoo
    from fiftyone_mobilesamv2.curation.promote import promote_to_labels
    from fiftyone_mobilesamv2.curation.unlabeled import find_unlabeled_objects
    from fiftyone_mobilesamv2.training.scenes import write_coco

    images, annotations = write_coco(folder, 3)
    for path in list(images.iterdir()):  # JPEG files are smaller
        picture = cv2.imread(str(path))
        path.unlink()
        cv2.imwrite(str(path.with_suffix(".jpg")), picture, [cv2.IMWRITE_JPEG_QUALITY, 60])
    annotations.write_text(annotations.read_text().replace(".png", ".jpg"))
    dataset = load_coco(images, annotations, name="upgrade", gt_field="ground_truth")
    annotations.unlink()
    dataset.persistent = True
    first = dataset.first()
    first.ground_truth.detections = first.ground_truth.detections[3:]  # the removed objects are unlabeled
    first.save()

    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu")
    segment_everything(dataset, model, "segmentations", progress=False)
    on_disk = zoo.load_model("mobilesamv2-demo-torch", device="cpu", masks_on_disk=True, mask_dir=str(folder / "masks"))
    segment_everything(dataset[:2], on_disk, "masks_on_disk", progress=False)
    (images / "broken.jpg").write_bytes(b"no image")
    dataset.add_sample(fo.Sample(str(images / "broken.jpg"), metadata=fo.ImageMetadata(width=10, height=10)))
    segment_everything(dataset, model, "segmentations", progress=False)
    good = dataset[:3]
    results = evaluate_proposals(good, "segmentations", "ground_truth", "ar", progress=False)
    find_unlabeled_objects(good, "segmentations", "ground_truth", progress=False)
    tagged = good.filter_labels("segmentations", fo.ViewField("tags").contains("unlabeled"))
    ids = tagged.values("segmentations.detections.id", unwind=True)
    promotion = promote_to_labels(dataset, ids[:1], "segmentations", label="thing", progress=False)
    fields = ("segmentations", "masks_on_disk", "ground_truth")
    labels = {name: [len(s[name].detections) if s[name] else None for s in dataset] for name in fields}
    return {
        "version": fiftyone_mobilesamv2.__version__,
        "labels": labels,
        "failed": "broken.jpg",
        "report": results.report(),
        "promoted": promotion.promoted,
    }


def dump(folder: Path) -> None:
    """Writes all documents of the database, with a placeholder for the folder."""
    import bson
    import fiftyone.core.odm as foo

    database = foo.get_db_conn()
    with gzip.open(folder / "database.bson.gz", "wb") as file:
        for name in sorted(database.list_collection_names()):
            for document in database[name].find():
                file.write(bson.encode({"collection": name, "document": without_folder(document, str(folder))}))


def without_folder(value: object, folder: str) -> object:
    """`value` with every mention of the folder replaced by "{folder}"."""
    if isinstance(value, dict):
        return {key: without_folder(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folder(each, folder) for each in value]
    return value.replace(folder, "{folder}") if isinstance(value, str) else value


if __name__ == "__main__":
    main()
