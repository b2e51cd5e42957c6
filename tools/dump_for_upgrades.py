"""Makes a small database with the version of the package that is on PYTHONPATH, and dumps it: what an upgrade has to read.

PYTHONPATH=<checkout of the old version> python make_dump.py <folder>
"""

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

folder = Path(sys.argv[1]).resolve()
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True)
scratch = Path(tempfile.mkdtemp())
with socket.create_server(("127.0.0.1", 0)) as s:
    port = s.getsockname()[1]
spec = importlib.util.find_spec("fiftyone")
mongod = Path(list(spec.submodule_search_locations)[0]) / "db" / "bin" / "mongod"
(scratch / "db").mkdir()
process = subprocess.Popen(
    [mongod, "--dbpath", scratch / "db", "--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"],
    stdout=subprocess.DEVNULL,
)
os.environ |= {
    "FIFTYONE_DATABASE_URI": f"mongodb://127.0.0.1:{port}/",
    "FIFTYONE_DATABASE_NAME": "upgrade",
    "FIFTYONE_DO_NOT_TRACK": "true",
    "FIFTYONE_DEFAULT_DATASET_DIR": str(scratch / "datasets"),
    "FIFTYONE_MODEL_ZOO_DIR": str(scratch / "zoo"),
    "FIFTYONE_PLUGINS_DIR": str(scratch / "plugins"),
    "YOLO_CONFIG_DIR": str(scratch / "yolo"),
}
time.sleep(3)
import bson
import cv2
import fiftyone as fo
import fiftyone.core.odm as foo

import fiftyone_mobilesamv2
from fiftyone_mobilesamv2 import evaluate_proposals, segment_everything, zoo
from fiftyone_mobilesamv2.curation.promote import promote_to_labels
from fiftyone_mobilesamv2.curation.unlabeled import find_unlabeled_objects
from fiftyone_mobilesamv2.evaluation.coco import load_coco
from fiftyone_mobilesamv2.training.scenes import write_coco

print(fiftyone_mobilesamv2.__file__)
images, annotations = write_coco(folder, 3)
for path in list(images.iterdir()):  # smaller files
    picture = cv2.imread(str(path))
    path.unlink()
    cv2.imwrite(str(path.with_suffix(".jpg")), picture, [cv2.IMWRITE_JPEG_QUALITY, 60])
annotations.write_text(annotations.read_text().replace(".png", ".jpg"))
dataset = load_coco(images, annotations, name="upgrade", gt_field="ground_truth")
dataset.persistent = True
first = dataset.first()
first.ground_truth.detections = first.ground_truth.detections[3:]  # which are to be found
first.save()
(images / "broken.jpg").write_bytes(b"no image")
model = zoo.load_model("mobilesamv2-demo-torch", device="cpu")
segment_everything(dataset, model, "segmentations", progress=False)
on_disk = zoo.load_model("mobilesamv2-demo-torch", device="cpu", masks_on_disk=True, mask_dir=str(folder / "masks"))
segment_everything(dataset[:2], on_disk, "masks_on_disk", progress=False)  # to be continued
dataset.add_sample(fo.Sample(str(images / "broken.jpg"), metadata=fo.ImageMetadata(width=10, height=10)))
run = segment_everything(dataset, model, "segmentations", progress=False)
print(run.num_failures, run.failures)
evaluated = dataset[:3]
results = evaluate_proposals(evaluated, "segmentations", "ground_truth", "ar", progress=False)
found = find_unlabeled_objects(evaluated, "segmentations", "ground_truth", progress=False)
print(found)
ids = evaluated.values("segmentations.detections.id", unwind=True)
tagged = evaluated.match_labels(tags="unlabeled", fields="segmentations").filter_labels(
    "segmentations", fo.ViewField("tags").contains("unlabeled")
)
ids = tagged.values("segmentations.detections.id", unwind=True)
promotion = promote_to_labels(dataset, ids[:1], "segmentations", "ground_truth", label="thing", progress=False)
print(promotion)
summary = {
    "version": fiftyone_mobilesamv2.__version__,
    "labels": {
        name: [len(s[name].detections) if s[name] else None for s in dataset]
        for name in ("segmentations", "masks_on_disk", "ground_truth")
    },
    "failed": "broken.jpg",
    "recall": {str(k): results.summary()[k] if k in results.summary() else None for k in results.summary()}
    if hasattr(results, "summary")
    else None,
    "report": results.report(),
    "promoted": promotion.promoted,
}
db = foo.get_db_conn()


def moved(value):
    """With a placeholder for the folder, wherever it is named."""
    if isinstance(value, dict):
        return {key: moved(each) for key, each in value.items()}
    if isinstance(value, list):
        return [moved(each) for each in value]
    return value.replace(str(folder), "{folder}") if isinstance(value, str) else value


with gzip.open(folder / "database.bson.gz", "wb") as file:
    for name in sorted(db.list_collection_names()):
        for document in db[name].find():
            file.write(bson.encode({"collection": name, "document": moved(document)}))
(folder / "summary.json").write_text(json.dumps(summary, indent=1, default=str))
process.kill()
