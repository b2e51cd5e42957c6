import json
from pathlib import Path

import fiftyone as fo
import numpy as np
from pycocotools.coco import COCO

NAME = "export_masks"


def test_form_has_defaults(plugin, scenes):
    form = plugin.form(NAME, scenes)
    assert form.errors == [] and "overwrite" not in form.inputs
    assert form.default("field") == "ground_truth"
    assert form.default("path") == str(Path(fo.config.default_dataset_dir, scenes.slug, "masks.json"))


def test_form_says_what_is_wrong(plugin, scenes, dataset, tmp_path):
    assert "Open a dataset" in plugin.form(NAME, None).errors[0]
    assert "has no samples" in plugin.form(NAME, dataset).errors[0]
    assert "view has no samples" in plugin.form(NAME, scenes.limit(0)).errors[0]
    assert "works on the whole dataset" in plugin.form(NAME, scenes.to_patches("ground_truth")).messages[0]
    assert "'filepath' is no longer available" in plugin.form(NAME, scenes, {"field": "filepath"}).errors[0]
    for path, error in (
        ("masks.json", "a full path was expected"),
        (f"{tmp_path}/masks.txt", "must end with .json"),
    ):
        assert error in plugin.form(NAME, scenes, {"path": path}).errors[0]
    for sample in scenes.iter_samples(autosave=True):
        for label in sample.ground_truth.detections:
            label.mask = None
    assert "'ground_truth' have no masks" in plugin.form(NAME, scenes).errors[0]
    dataset.add_sample(fo.Sample("/none/x.png"))
    assert "has no field of Detections or Polylines" in plugin.form(NAME, dataset).errors[0]


def test_existing_file_needs_overwrite(plugin, scenes, tmp_path):
    path = tmp_path / "masks.json"
    path.write_text("mine")
    form = plugin.form(NAME, scenes, {"path": str(path)})
    assert form.default("overwrite") is False and "exists" in form.errors[0]
    assert plugin.form(NAME, scenes, {"path": str(path), "overwrite": True}).errors == []
    plugin.call(NAME, scenes, path=str(path), overwrite=True)
    assert len(json.loads(path.read_text())["images"]) == 4


def test_home_folder_is_expanded(plugin, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plugin.call(NAME, scenes, path="~/masks.json")["path"] == str(tmp_path / "masks.json")


def test_exported_masks_equal_the_stored_ones(plugin, scenes, tmp_path):
    path = tmp_path / "new" / "masks.json"
    text, _ = plugin.run_to_the_end(NAME, scenes, {"path": str(path)})
    objects = scenes.count("ground_truth.detections")
    assert f"{objects} masks of 4 images" in text and str(path) in text and "identical to the stored masks" in text
    coco = COCO(str(path))
    for image, sample in zip(coco.dataset["images"], scenes):
        assert image["file_name"] == sample.filename
        for annotation, label in zip(coco.imgToAnns[image["id"]], sample.ground_truth.detections):
            x, y, w, h = map(int, annotation["bbox"])
            assert np.array_equal(coco.annToMask(annotation)[y : y + h, x : x + w], label.mask)
            assert annotation["area"] == label.mask.sum()
    assert len(coco.anns) == objects


def test_only_the_view_is_exported(plugin, scenes, tmp_path):
    result = plugin.call(NAME, scenes.limit(1), path=str(tmp_path / "masks.json"))
    assert result["images"] == 1 and result["annotations"] == len(scenes.first().ground_truth.detections)
    json.dumps(result)


def test_skipped_images_are_reported(plugin, scenes, tmp_path):
    first = scenes.first()
    first.ground_truth.detections[0].bounding_box = [0.5, 0.5, -1, 0.1]
    first.save()
    text, _ = plugin.run_to_the_end(NAME, scenes, {"path": str(tmp_path / "masks.json")})
    assert "of 3 images" in text and "1 image skipped" in text and "bounding_box" in text
