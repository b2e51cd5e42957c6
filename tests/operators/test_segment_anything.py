import fiftyone as fo
import numpy as np
import pytest
import torch

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.images import read_image
from fiftyone_mobilesamv2.labels.masks import masks_of

DEMO = {"model": "mobilesamv2-demo-torch", "device": "cpu"}


@pytest.fixture(scope="session")
def sam():
    return MobileSAMv2.from_pretrained("mobilesamv2-demo-torch", device="cpu")


@pytest.fixture
def boxed(scenes):
    """Scenes with three boxes per image in `boxes`, and points at their centres in `points`."""
    for sample in scenes:
        boxes = [[round(v, 3) for v in d.bounding_box] for d in sample.ground_truth.detections[:3]]
        sample["boxes"] = fo.Detections(
            detections=[fo.Detection(label=f"thing {i}", bounding_box=box, color="red") for i, box in enumerate(boxes)]
        )
        sample["points"] = fo.Keypoints(
            keypoints=[fo.Keypoint(label="thing", points=[(x + w / 2, y + h / 2)]) for x, y, w, h in boxes]
        )
        sample.save()
    return scenes


def pixels(detection, size):
    from pycocotools import mask as mask_utils

    return mask_utils.decode(masks_of([detection.to_mongo()], size)[0]).astype(bool)


def expected_masks(sam, sample, prompts):
    image = read_image(sample.filepath)
    scale = np.array([image.shape[1], image.shape[0]] * 2)
    boxes = np.array([d.bounding_box for d in prompts], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    (segmentation,) = sam.segment_anything([image], boxes=[boxes * scale])
    return [segmentation.full_mask(i) for i in range(len(segmentation))], image.shape[:2]


def test_boxes_of_a_field_get_masks(plugin, boxed, sam):
    before = {d.id: d for sample in boxed for d in sample.boxes.detections}
    form = plugin.form("segment_anything", boxed, {"prompt_field": "boxes"})
    assert form.errors == [] and form.default("place") == "labels"
    result = plugin.call("segment_anything", boxed, prompt_field="boxes", **DEMO)
    assert (result["images"], result["objects"]) == (4, 12)
    for sample in boxed:
        detections = sample.boxes.detections
        masks, (height, width) = expected_masks(sam, sample, detections)
        for detection, mask in zip(detections, masks):
            old = before[detection.id]
            assert (detection.bounding_box, detection.label, detection.color) == (old.bounding_box, old.label, "red")
            assert detection.confidence is None  # a box drawn by a person gets no confidence
            x, y, w, h = np.array(detection.bounding_box) * [width, height, width, height]
            inside = np.zeros_like(mask)
            inside[round(y) : round(y + h), round(x) : round(x + w)] = True
            assert np.array_equal(pixels(detection, (height, width)), mask & inside)
            assert detection.area_px == (mask & inside).sum() > 0


def test_masks_are_stored_in_a_new_field(plugin, boxed, sam):
    plugin.call("segment_anything", boxed, prompt_field="boxes", place="new", label_field="masks", **DEMO)
    for sample in boxed:
        masks, size = expected_masks(sam, sample, sample.boxes.detections)
        detections = sample.masks.detections
        assert [(d.id, d.label, d.color) for d in detections] == [
            (d.id, d.label, "red") for d in sample.boxes.detections
        ]
        assert all(np.array_equal(pixels(d, size), mask) for d, mask in zip(detections, masks))
        assert all(d.mask is None for d in sample.boxes.detections)


@pytest.mark.slow
def test_precision_is_that_of_the_model(plugin, boxed):
    params = {"prompt_field": "boxes", "place": "new", **DEMO}
    for dtype in ("float32", "bfloat16"):
        plugin.call("segment_anything", boxed, label_field=dtype, dtype=dtype, **params)
        model = MobileSAMv2.from_pretrained("mobilesamv2-demo-torch", "cpu", getattr(torch, dtype))
        for sample in boxed:
            masks, size = expected_masks(model, sample, sample.boxes.detections)
            assert all(np.array_equal(pixels(d, size), mask) for d, mask in zip(sample[dtype].detections, masks))
    scores = [boxed.values(f"{dtype}.detections.predicted_iou", unwind=True) for dtype in ("float32", "bfloat16")]
    assert len(scores[0]) == 12 and set(scores[0]).isdisjoint(scores[1])


def test_points_get_masks(plugin, boxed, sam):
    form = plugin.form("segment_anything", boxed, {"prompt_field": "points"})
    assert form.choices("place") == ["new"]
    plugin.call("segment_anything", boxed, prompt_field="points", label_field="masks", **DEMO)
    for sample in boxed:
        image = read_image(sample.filepath)
        points = [np.array(k.points) * image.shape[1::-1] for k in sample.points.keypoints]
        (segmentation,) = sam.segment_anything([image], points=[points])
        assert [d.id for d in sample.masks.detections] == [k.id for k in sample.points.keypoints]
        for i, detection in enumerate(sample.masks.detections):
            assert np.array_equal(pixels(detection, image.shape[:2]), segmentation.full_mask(i))


def selected(sample, field, indices):
    detections = sample[field].detections
    return [{"label_id": detections[i].id, "sample_id": sample.id, "field": field} for i in indices]


def test_only_selected_labels_get_masks(plugin, boxed, sam):
    sample = boxed.first()
    labels = selected(sample, "boxes", [0, 2])
    form = plugin.form("segment_anything", boxed, selected_labels=labels)
    assert form.errors == [] and form.default("prompts") == "selected"
    result = plugin.call("segment_anything", boxed, selected_labels=labels, **DEMO)
    assert (result["images"], result["objects"]) == (1, 2)
    boxed.reload()
    assert [d.mask is not None for d in boxed.first().boxes.detections] == [True, False, True]
    assert all(d.mask is None for sample in boxed[1:] for d in sample.boxes.detections)
    # A second run segments the field's other labels, but none twice.
    assert any(
        "10 of 12 labels have no mask yet" in m
        for m in plugin.form("segment_anything", boxed, {"prompt_field": "boxes"}).messages
    )
    first = boxed.first().boxes.detections[0].mask
    assert plugin.call("segment_anything", boxed, prompt_field="boxes", **DEMO)["objects"] == 10
    assert np.array_equal(boxed.first().boxes.detections[0].mask, first)
    assert (
        "'boxes' has 12 labels here, all with masks"
        in plugin.form("segment_anything", boxed, {"prompt_field": "boxes"}).errors[0]
    )


def test_selected_labels_are_added_to_existing_ones(plugin, boxed):
    sample = boxed.first()
    ids = [d.id for d in sample.boxes.detections]
    common = {"place": "new", "label_field": "masks", **DEMO}
    plugin.call("segment_anything", boxed, selected_labels=selected(sample, "boxes", [0]), **common)
    plugin.call("segment_anything", boxed, selected_labels=selected(sample, "boxes", [1, 0]), **common)
    boxed.reload()
    assert [d.id for d in boxed.first().masks.detections] == [ids[0], ids[1]]
    result = plugin.call(
        "segment_anything", boxed, selected_labels=selected(sample, "boxes", [0]), replace=True, **common
    )
    assert result["objects"] == 1
    assert sorted(d.id for d in boxed.first().masks.detections) == sorted(ids[:2])


@pytest.mark.parametrize(
    "hide",
    [
        lambda boxed: boxed.exclude_fields("masks"),
        lambda boxed: boxed.filter_labels("masks", fo.ViewField("label") == "other", only_matches=False),
    ],
)
def test_masks_hidden_by_a_view_are_not_replaced(plugin, boxed, hide):
    params = {"prompt_field": "boxes", "place": "new", "label_field": "masks", **DEMO}
    plugin.call("segment_anything", boxed, **params)
    boxed.set_values("masks.detections.note", [["mine"] * 3] * 4, dynamic=True)
    assert plugin.call("segment_anything", hide(boxed), **params)["objects"] == 0
    assert boxed.count_values("masks.detections.note") == {"mine": 12}


def test_existing_labels_without_masks_get_them(plugin, boxed):
    boxed.clone_sample_field("boxes", "masks")
    params = {"prompt_field": "boxes", "place": "new", "label_field": "masks", **DEMO}
    assert plugin.call("segment_anything", boxed, **params)["objects"] == 12
    assert all(d.mask is not None for sample in boxed for d in sample.masks.detections)
    assert boxed.count("masks.detections") == 12


def test_boxes_with_masks_are_not_taken_for_proposals(plugin, boxed):
    plugin.call("segment_anything", boxed, prompt_field="boxes", **DEMO)
    plugin.call("segment_everything", boxed, **DEMO)
    form = plugin.form("evaluate_proposals", boxed)
    assert form.default("pred_field") == "segmentations"


def test_labels_hidden_by_a_view_are_not_prompts(plugin, boxed):
    view = boxed.filter_labels("boxes", fo.ViewField("label") == "thing 1")
    assert plugin.call("segment_anything", view, prompt_field="boxes", **DEMO)["objects"] == 4
    for sample in boxed:
        assert [d.mask is not None for d in sample.boxes.detections] == [False, True, False]


def test_replace_renews_existing_masks(plugin, scenes):
    form = plugin.form("segment_anything", scenes, {"prompt_field": "ground_truth"})
    assert "all with masks" in form.errors[0]
    params = {"prompt_field": "ground_truth", "replace": True}
    form = plugin.form("segment_anything", scenes, params)
    total = scenes.count("ground_truth.detections")
    assert form.errors == [] and any(f"The masks of {total} labels" in message for message in form.messages)
    before = scenes.values("ground_truth.detections.mask", unwind=True)
    plugin.call("segment_anything", scenes, **params, **DEMO)
    after = scenes.values("ground_truth.detections.mask", unwind=True)
    assert len(after) == total and any(not np.array_equal(a, b) for a, b in zip(before, after))


def test_masks_can_be_stored_on_disk(plugin, boxed, sam):
    plugin.call("segment_anything", boxed, prompt_field="boxes", storage="disk", **DEMO)
    for sample in boxed:
        _, size = expected_masks(sam, sample, sample.boxes.detections)
        for detection in sample.boxes.detections:
            assert detection.mask is None and detection.mask_path
            assert pixels(detection, size).sum() == detection.area_px


def test_bad_box_fails_only_its_image(plugin, boxed):
    sample = boxed.first()
    sample.boxes.detections[1].bounding_box = [0.1, float("nan"), 0.2, 0.2]
    sample.save()
    text, _ = plugin.run_to_the_end("segment_anything", boxed, {"prompt_field": "boxes", **DEMO})
    assert "1 image failed" in text and "the unusable bounding box" in text
    assert [all(d.mask is not None for d in s.boxes.detections) for s in boxed] == [False, True, True, True]


def test_unreadable_prompts_fail_only_their_image(plugin, boxed):
    ids = boxed.values("_id")
    boxed._sample_collection.update_one({"_id": ids[0]}, {"$set": {"boxes.detections.0.tags": 5}})
    boxed._sample_collection.update_one({"_id": ids[3]}, {"$unset": {"boxes.detections.0._id": ""}})
    result = plugin.call("segment_anything", boxed, prompt_field="boxes", replace=True, **DEMO)
    assert [each["sample_id"] for each in result["failures"]] == [str(ids[0]), str(ids[3])]
    assert "can't be read" in result["failures"][0]["error"] and "has no id" in result["failures"][1]["error"]
    assert result["objects"] == 6
    assert all(d.mask is not None for sample in boxed[1:3] for d in sample.boxes.detections)


def test_full_document_is_reported(plugin, boxed):
    sample = boxed.first()
    size = {"n": {"$bsonSize": "$$ROOT"}}
    (document,) = boxed._sample_collection.aggregate([{"$match": {"_id": sample._id}}, {"$project": size}])
    sample["large"] = "x" * (16 * 2**20 - document["n"] - 200)
    sample.save()
    for params in ({}, {"place": "new", "label_field": "masks"}):
        result = plugin.call("segment_anything", boxed, prompt_field="boxes", **params, **DEMO)
        assert [each["sample_id"] for each in result["failures"]] == [sample.id]
        assert result["failures"][0]["error"].startswith("its masks can't be stored")
    boxed.reload()
    assert [d.mask is not None for sample in boxed for d in sample.boxes.detections] == [False] * 3 + [True] * 9
    assert [labels is not None for labels in boxed.values("masks")] == [False, True, True, True]


def test_label_changed_meanwhile_gets_no_outdated_mask(boxed, monkeypatch):
    """Another process changes it while the model is at work."""
    from fiftyone_mobilesamv2 import zoo
    from fiftyone_mobilesamv2.runs import segment as segmentation

    boxed.add_sample_field("one", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detection)
    for sample in boxed:
        sample["one"] = sample.boxes.detections[0].copy()
        sample.save()
    other = fo.Detection(label="other", bounding_box=[0.5, 0.5, 0.1, 0.1])
    ids = boxed.values("_id")
    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu")
    segment_all = model.segment_all

    def segment_and_interfere(items):
        segmentations = segment_all(items)
        boxed._sample_collection.update_one({"_id": ids[0]}, {"$set": {"one": other.to_dict()}})
        boxed._sample_collection.update_one({"_id": ids[1]}, {"$set": {"one": None, "boxes": None}})
        return segmentations

    monkeypatch.setattr(model, "segment_all", segment_and_interfere)
    for field in ("one", "boxes"):
        run = segmentation.segment_anything(boxed, model, field)
        assert run.failures == [] and not run.cancelled
    boxed.reload()
    labels = boxed.values("one")
    assert labels[0].label == "other" and labels[0].mask is None and labels[1] is None
    assert all(label.mask is not None for label in labels[2:])


def test_form_says_what_is_wrong(plugin, boxed, dataset):
    def errors(samples, params=None, **request):
        return plugin.form("segment_anything", samples, params, **request).errors[0]

    assert "has no samples" in errors(dataset)
    same = {"prompt_field": "boxes", "place": "new", "label_field": "boxes"}
    assert "'boxes' holds the prompts" in errors(boxed, same)
    assert "is no longer available" in errors(boxed, {"prompt_field": "gone"})
    form = plugin.form("segment_anything", boxed.to_patches("boxes"), {"prompt_field": "boxes"})
    assert form.errors == [] and "works on the whole dataset" in form.messages[0]
    sample = boxed.first()
    mixed = selected(sample, "boxes", [0]) + selected(sample, "ground_truth", [0])
    assert "in several fields: boxes, ground_truth" in errors(boxed, selected_labels=mixed)
    gone = [{"label_id": "0" * 24, "sample_id": sample.id, "field": "boxes"}]
    assert "no longer exist" in errors(boxed, selected_labels=gone)
    never = [{"label_id": "0" * 24, "sample_id": sample.id, "field": "deleted"}]
    assert "no longer exist" in errors(boxed, selected_labels=never)
    boxed.clear_sample_field("boxes")
    assert "'boxes' has no labels here" in errors(boxed, {"prompt_field": "boxes"})
    dataset.add_sample(fo.Sample("image.png"))
    assert "has no field of Detections or Keypoints" in errors(dataset)


def test_read_only_field_is_refused(plugin, boxed):
    field = boxed.get_field("boxes")
    field.read_only = True
    field.save()
    assert "'boxes' is read-only" in plugin.form("segment_anything", boxed, {"prompt_field": "boxes"}).errors[0]
    field.read_only = False
    field.save()
