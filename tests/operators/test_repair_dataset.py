import shutil

import fiftyone.core.odm as foo

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.runs.segment import segment_everything

NAME = "repair_dataset"


def test_sound_dataset(plugin, scenes):
    form = plugin.form(NAME, scenes)
    assert form.errors == [] and form.default("mask_dir") is None
    text, _ = plugin.run_to_the_end(NAME, scenes)
    assert text == "**Nothing to repair**"


def test_lost_fields_and_moved_masks(plugin, scenes, tmp_path):
    masks = tmp_path / "masks"
    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu", masks_on_disk=True, mask_dir=str(masks))
    segment_everything(scenes.limit(1), model, "segmentations")
    count = scenes.count("segmentations.detections")
    change = {"$pull": {"sample_fields": {"name": "segmentations"}}}
    foo.get_db_conn().datasets.update_one({"_id": scenes._doc.id}, change)
    scenes.reload()
    shutil.move(masks, tmp_path / "moved")
    text, calls = plugin.run_to_the_end(NAME, scenes)
    assert "Declared again: `segmentations`" in text and f"**{count} masks of 1 sample have no file.**" in text
    button = calls["show_output"]["outputs"]["type"]["properties"]["button_0"]["view"]
    assert (button["label"], button["params"]["samples"]) == ("Show samples without files", [scenes.first().id])
    text, _ = plugin.run_to_the_end(NAME, scenes, {"mask_dir": str(tmp_path / "moved")})
    assert f"{count} masks found in the folder." in text and "no file" not in text
    scenes.reload()
    assert scenes.first().segmentations.detections[0].get_mask().any()


def test_folder_that_does_not_exist(plugin, scenes, tmp_path):
    (error,) = plugin.form(NAME, scenes, {"mask_dir": str(tmp_path / "none")}).errors
    assert error == f"mask_dir='{tmp_path / 'none'}' is not a folder."
