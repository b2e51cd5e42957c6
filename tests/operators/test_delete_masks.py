import fiftyone as fo
import pytest

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.runs.segment import segment_everything

NAME = "delete_masks"


@pytest.fixture
def segmented(scenes, tmp_path):
    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu", masks_on_disk=True, mask_dir=str(tmp_path))
    segment_everything(scenes.limit(2), model, "segmentations")
    return scenes


def test_nothing_to_delete(plugin, scenes):
    (error,) = plugin.form(NAME, scenes).errors
    assert error == f"No run has stored masks in {scenes.name}."


def test_form_says_what_is_deleted(plugin, segmented):
    masks = segmented.count("segmentations.detections")
    form = plugin.form(NAME, segmented.limit(1))
    assert form.choices("label_field") == ["segmentations"]
    (error,) = form.errors
    assert error == (
        f"Confirm that these should be deleted: {masks} masks of 2 images, {masks} of them with their files, and the "
        f"field 'segmentations'."
    )
    segmented.evaluate_detections("segmentations", "ground_truth", "fifty", progress=False)
    sample = segmented.first()
    sample.segmentations.detections.append(fo.Detection(label="mine", bounding_box=[0, 0, 1, 1]))
    sample.save()
    form = plugin.form(NAME, segmented, {"confirm": True})
    assert form.errors == []
    assert form.messages == ["These evaluations keep their figures, but not these masks: fifty."]
    (error,) = plugin.form(NAME, segmented).errors
    assert "1 other label of 'segmentations' is kept" in error


def test_masks_are_deleted(plugin, segmented, tmp_path):
    masks = segmented.count("segmentations.detections")
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == masks
    text, _ = plugin.run_to_the_end(NAME, segmented, {"confirm": True})
    assert text == f"**{masks} masks deleted** from `segmentations`."
    segmented.reload()
    assert not segmented.has_field("segmentations") and not any(path.is_file() for path in tmp_path.rglob("*"))
