"""Promotion to ground truth: what it changes and leaves alone, and that interrupted or concurrent calls are safe."""

from pathlib import Path

import cv2
import fiftyone as fo
import numpy as np
import pytest
from bson import ObjectId
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2 import evaluate_proposals
from fiftyone_mobilesamv2.curation import promote
from fiftyone_mobilesamv2.curation.promote import dismiss, promote_to_labels
from fiftyone_mobilesamv2.labels.documents import stored_images
from fiftyone_mobilesamv2.labels.masks import masks_of


@pytest.fixture
def shapes(rectangle):
    disc = rectangle(0, 0, 1, 1)
    disc = cv2.circle(disc.astype(np.uint8), (100, 60), 20, 1, -1).astype(bool)
    return [rectangle(10, 20, 30, 40), disc, rectangle(120, 90, 40, 30)]


@pytest.fixture
def labelled(dataset, add_image, detection, rectangle, shapes):
    """Three images: one label and three proposals; one proposal and no ground truth; neither labels nor proposals."""
    scores = {"confidence": 0.5, "predicted_iou": 0.75, "ar": "fn", "tags": ["unlabeled", "mine"]}
    add_image(
        ground_truth=[detection(rectangle(60, 5, 20, 20), label="dog")],
        proposals=[detection(shape, **scores) for shape in shapes],
    )
    add_image(proposals=[detection(shapes[1], **scores)])
    add_image(ground_truth=[], proposals=[])
    return dataset


def ids_of(samples):
    return samples.values("proposals.detections.id", unwind=True)


def masks(dataset, field):
    """{label id: full-image bool mask}"""
    full_masks = {}
    for stored in stored_images(dataset, [field]):
        labels = stored.labels(field)
        for label, mask in zip(labels, masks_of(labels, stored.size)):
            full_masks[str(label["_id"])] = mask_utils.decode(mask).astype(bool)
    return full_masks


def counts(result):
    return result.promoted, result.already, result.samples, result.missing, result.skipped


def test_proposals_become_labels(labelled, shapes):
    ids = ids_of(labelled)
    before = labelled.values("proposals.detections", unwind=True)
    result = promote_to_labels(labelled, [ids[1], ids[3]], "proposals", label="cat", progress=False)
    assert counts(result) == (2, 0, 2, [], [])
    first, second, third = labelled
    assert [label.label for label in first.ground_truth.detections] == ["dog", "cat"]
    assert third.ground_truth.detections == []
    for made, origin in ((first.ground_truth.detections[1], ids[1]), (second.ground_truth.detections[0], ids[3])):
        assert made.promoted_from == origin and made.id not in ids
        assert np.array_equal(masks(labelled, "ground_truth")[made.id], shapes[1])
        kept = {"id", "tags", "attributes", "label", "bounding_box", "mask", "promoted_from"}
        assert {name for name, value in made.iter_fields() if value is not None} == kept
        assert made.tags == []
    assert "promoted_from" in labelled.get_field_schema(flat=True)["ground_truth.detections"].field.get_field_schema()
    for old, new in zip(before, labelled.values("proposals.detections", unwind=True)):
        expected = ["mine", "promoted"] if new.id in (ids[1], ids[3]) else ["unlabeled", "mine"]
        assert new.tags == expected
        old.tags = new.tags
        assert old == new


def test_samples_in_memory_are_updated(labelled):
    held = labelled.first()
    promote_to_labels(labelled, ids_of(labelled)[:1], "proposals", label="cat", progress=False)
    assert [label.label for label in held.ground_truth.detections] == ["dog", "cat"]
    assert held.proposals.detections[0].tags == ["mine", "promoted"]
    held.save()
    assert labelled.count("ground_truth.detections") == 2


def test_proposal_is_promoted_only_once(labelled):
    ids = ids_of(labelled)
    promote_to_labels(labelled, ids[:1], "proposals", label="cat", progress=False)
    result = promote_to_labels(labelled, [*ids[:2], ids[0]], "proposals", label="bird", progress=False)
    assert counts(result) == (1, 1, 1, [], [])
    assert labelled.values("ground_truth.detections.label", unwind=True) == ["dog", "cat", "bird"]


def test_labels_outlive_proposals(labelled, shapes, tmp_path):
    sample = labelled.first()
    for number, label in enumerate(sample.proposals.detections):
        label.export_mask(str(tmp_path / f"{number}.png"), update=True)
    sample.save()
    promote_to_labels(labelled, ids_of(labelled), "proposals", label="cat", progress=False)
    for number in range(3):
        (tmp_path / f"{number}.png").unlink()
    labelled.delete_sample_field("proposals")
    made = labelled.first().ground_truth.detections[1:]
    full_masks = masks(labelled, "ground_truth")
    for label, shape in zip(made, shapes):
        assert Path(label.mask_path) == tmp_path / f"{label.id}.png"
        assert np.array_equal(full_masks[label.id], shape)


def test_new_field(labelled):
    ids = ids_of(labelled)
    promote_to_labels(labelled, ids, "proposals", "mine", label="cat", progress=False)
    assert labelled.get_field("mine").document_type is fo.Detections
    assert labelled.values("mine.detections.promoted_from", unwind=True) == ids
    assert labelled.last().mine is None
    assert labelled.count("ground_truth.detections") == 1
    # The evaluation finds each one at IoU 1.
    results = evaluate_proposals(labelled, "proposals", "mine", progress=False)
    assert results.metrics()["AR@10"] == 1


def test_boxes(labelled):
    sample = labelled.first()
    sample.proposals.detections[0].mask = None
    sample.save()
    promote_to_labels(labelled, ids_of(labelled)[:1], "proposals", label="cat", progress=False)
    made = labelled.first().ground_truth.detections[1]
    assert made.bounding_box == sample.proposals.detections[0].bounding_box and made.mask is None


def test_polylines(labelled, shapes):
    sample = labelled.first()
    sample.proposals.detections[0].mask = None
    sample["outlines"] = fo.Polylines(
        polylines=[fo.Polyline(label="dog", points=[[[0, 0], [1, 0], [1, 1]]], closed=True)]
    )
    sample.save()
    result = promote_to_labels(labelled, ids_of(labelled), "proposals", "outlines", label="cat", progress=False)
    assert counts(result) == (4, 0, 2, [], [])
    labels = labelled.first().outlines.polylines
    assert [label.label for label in labels] == ["dog", "cat", "cat", "cat"]
    full_masks = masks(labelled, "outlines")
    for label, shape, origin in zip(labels[1:], shapes, ids_of(labelled)):
        assert label.closed and label.filled and label.promoted_from == origin
        # FiftyOne's outlines run through the centres of border pixels, so they are up to 2 pixels off.
        assert (full_masks[label.id] & shape).sum() / (full_masks[label.id] | shape).sum() > 0.85
    assert labelled.skip(1).first().outlines.polylines[0].label == "cat"


def test_view_of_patches(labelled):
    ids = ids_of(labelled)
    patches = labelled.match_labels(tags="unlabeled").to_patches("proposals").match_labels(tags="unlabeled")
    result = promote_to_labels(patches, [ids[1], ids[3]], "proposals", label="cat", progress=False)
    assert counts(result) == (2, 0, 2, [], [])
    assert labelled.values("ground_truth.detections.label") == [["dog", "cat"], ["cat"], []]
    assert sorted(labelled.match_labels(tags="promoted").count_label_tags().items()) == sorted(
        {"unlabeled": 2, "mine": 4, "promoted": 2}.items()
    )
    assert patches.values("id") == [ids[0], ids[2]]  # the view no longer contains the promoted ones
    patches.reload()
    assert patches.values("id") == [ids[0], ids[2]]


def test_outdated_patches_use_the_current_dataset(labelled, detection, rectangle):
    """Since the view was made, one mask has changed and one proposal has been deleted."""
    patches = labelled.to_patches("proposals")
    sample = labelled.first()
    current = rectangle(1, 2, 3, 4)
    changed, gone = sample.proposals.detections[:2]
    changed.mask, changed.bounding_box = detection(current).mask, detection(current).bounding_box
    sample.proposals.detections.remove(gone)
    sample.save()
    result = promote_to_labels(patches, [changed.id, gone.id], "proposals", label="cat", progress=False)
    assert counts(result) == (1, 0, 1, [gone.id], [])
    made = labelled.first().ground_truth.detections[1]
    assert np.array_equal(masks(labelled, "ground_truth")[made.id], current)


def test_unknown_ids_are_reported_as_missing(labelled):
    ids = ids_of(labelled)
    unknown = str(ObjectId())
    asked = [ids[0], unknown, "nonsense", ids[3]]
    result = promote_to_labels(labelled.limit(1), asked, "proposals", label="cat", progress=False)
    assert counts(result) == (1, 0, 1, [unknown, "nonsense", ids[3]], [])
    nothing = promote_to_labels(labelled, [], "proposals", label="cat", progress=False)
    assert counts(nothing) == (0, 0, 0, [], [])
    assert counts(promote_to_labels(labelled.limit(0), ids[:1], "proposals", label="cat")) == (0, 0, 0, ids[:1], [])


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"bounding_box": [0.1, 0.1, -1, 0.1]}, "bounding_box"),
        ({"mask": np.zeros((40, 30), bool)}, "has an empty mask"),
        ({"mask": None, "mask_path": "/nowhere/mask.png"}, "can't be read"),
    ],
)
def test_unusable_proposal_skips_only_its_sample(labelled, changes, cause):
    sample = labelled.first()
    for name, value in changes.items():
        sample.proposals.detections[0][name] = value
    sample.save()
    result = promote_to_labels(labelled, ids_of(labelled), "proposals", label="cat", progress=False)
    assert (result.promoted, result.samples, result.missing) == (1, 1, [])
    assert [each["id"] for each in result.skipped] == [sample.id] and cause in result.skipped[0]["cause"]
    assert labelled.values("ground_truth.detections.label") == [["dog"], ["cat"], []]
    assert labelled.count_label_tags("proposals") == {"unlabeled": 3, "mine": 4, "promoted": 1}


def test_sample_is_skipped_if_its_document_would_be_too_large(labelled):
    noise = np.random.default_rng(0).integers(256, size=(1000, 1500), dtype=np.uint8)  # 1.5 MB, compressed too
    sample = labelled.first()
    whole = fo.Detection(label="object", bounding_box=[0, 0, 1, 1], mask=noise)
    sample.metadata = fo.ImageMetadata(height=1000, width=1500)
    sample.ground_truth = None
    sample.proposals.detections = [whole.copy() for _ in range(6)]
    sample.save()
    result = promote_to_labels(labelled, ids_of(labelled), "proposals", label="cat", progress=False)
    assert result.promoted == 1 and "16MB" in result.skipped[0]["cause"]
    assert labelled.values("ground_truth.detections.label") == [None, ["cat"], []]
    assert labelled.count_label_tags("proposals")["promoted"] == 1


def test_interrupted_promotion_can_be_continued(labelled):
    """After cancelling at the first image, its promoted proposals are tagged, and the same call does the rest."""

    class Stop(Exception):
        pass

    def progress(bar):
        if bar.iteration >= 1:
            raise Stop

    ids = ids_of(labelled)
    with pytest.raises(Stop):
        promote_to_labels(labelled, ids, "proposals", label="cat", progress=progress)
    assert labelled.values("ground_truth.detections.label") == [["dog", "cat", "cat", "cat"], None, []]
    assert labelled.match_labels(tags="promoted").values("id") == [labelled.first().id]
    result = promote_to_labels(labelled, ids, "proposals", label="cat", progress=False)
    assert counts(result) == (1, 3, 1, [], [])


def test_kill_between_label_and_tag_is_repaired(labelled, monkeypatch):
    ids = ids_of(labelled)
    with monkeypatch.context() as patched:
        patched.setattr(promote, "_tag", lambda *_: None)
        promote_to_labels(labelled, ids, "proposals", label="cat", progress=False)
    assert "promoted" not in labelled.count_label_tags("proposals")
    result = promote_to_labels(labelled, ids, "proposals", label="cat", progress=False)
    assert counts(result) == (0, 4, 0, [], [])
    assert labelled.count_label_tags("proposals") == {"mine": 4, "promoted": 4}


@pytest.mark.parametrize("number", [0, 3])  # in an image with labels and in one without
def test_concurrent_calls_promote_once(labelled, monkeypatch, number):
    ids = [ids_of(labelled)[number]]
    make = promote._detection

    def make_after_rival(*args):
        monkeypatch.setattr(promote, "_detection", make)
        promote_to_labels(labelled, ids, "proposals", label="first", progress=False)
        return make(*args)

    monkeypatch.setattr(promote, "_detection", make_after_rival)
    with pytest.raises(ValueError, match="changed at the same time"):
        promote_to_labels(labelled, ids, "proposals", label="second", progress=False)
    assert labelled.count_values("ground_truth.detections.label") == {"dog": 1, "first": 1}


def test_sample_deleted_meanwhile_is_skipped(labelled, monkeypatch):
    ids = ids_of(labelled)
    kept, gone = (labelled.match(fo.ViewField("proposals.detections").length() == count).first() for count in (3, 1))
    promote_one = promote._promote

    def promote_after_deletion(dataset, stored, *args):
        dataset._sample_collection.delete_one({"_id": gone._id})
        return promote_one(dataset, stored, *args)

    monkeypatch.setattr(promote, "_promote", promote_after_deletion)
    result = promote_to_labels(labelled, ids, "proposals", label="cat", progress=False)
    skipped = {"id": gone.id, "filepath": gone.filepath, "cause": "it has been deleted"}
    assert counts(result) == (3, 0, 1, [], [skipped])
    assert len(labelled[kept.id].ground_truth.detections) == 4


def test_invalid_input_is_refused(labelled, stored):
    labelled.add_sample_field("class", fo.EmbeddedDocumentField, embedded_doc_type=fo.Classification)
    labelled.add_sample_field("outlines", fo.EmbeddedDocumentField, embedded_doc_type=fo.Polylines)
    labelled.add_sample_field("locked", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    locked = labelled.get_field("locked")
    locked.read_only = True
    locked.save()
    before, ids = stored(), ids_of(labelled)

    def refused(match, pred_field="proposals", gt_field="ground_truth", label="cat", samples=labelled):
        with pytest.raises(ValueError, match=match):
            promote_to_labels(samples, ids, pred_field, gt_field, label=label, progress=False)
        assert stored() == before

    refused("has no field 'nothing' for the proposals", pred_field="nothing")
    refused("'outlines' contains Polylines; Detections were expected as proposals", pred_field="outlines")
    refused("'class' contains Classification", gt_field="class")
    refused("same field, 'proposals'", gt_field="proposals")
    refused("read-only", gt_field="locked")
    refused("read-only", pred_field="locked")
    refused("must be the name of a class", label=" ")
    refused("has no field 'proposals' for the proposals", samples=labelled.to_patches("ground_truth"))


# Labels as another program may have stored them -----------------------------------------------------------------------


def set_raw(dataset, sample, path, value):
    dataset._sample_collection.update_one({"_id": ObjectId(sample.id)}, {"$set": {path: value}})


@pytest.mark.parametrize("value", [7, "text", [], {"a": 1}, [None]])
@pytest.mark.parametrize("path", ["proposals", "proposals.detections"])
def test_samples_without_lists_of_labels_are_left_alone(labelled, add_image, detection, shapes, path, value):
    add_image(proposals=[detection(shapes[0])])
    ids = ids_of(labelled)
    last = labelled.last()
    set_raw(labelled, last, path, value)
    result = promote_to_labels(labelled, ids[:4], "proposals", label="cat", progress=False)
    assert counts(result) == (4, 0, 2, [], [])
    assert dismiss(labelled, ids[:4], "proposals") == 4
    document = labelled._sample_collection.find_one({"_id": ObjectId(last.id)})
    for part in path.split("."):
        document = document[part]
    assert document == value


@pytest.mark.parametrize("value", [7, "text", {"detections": "text"}, {"detections": {"promoted_from": ["a"]}}])
def test_ground_truth_that_is_no_list_of_labels_is_kept(labelled, value):
    sample = labelled.first()
    set_raw(labelled, sample, "ground_truth", value)
    result = promote_to_labels(labelled, ids_of(labelled), "proposals", label="cat", progress=False)
    assert (result.promoted, [each["id"] for each in result.skipped]) == (1, [sample.id])
    assert "'ground_truth'" in result.skipped[0]["cause"]
    assert labelled._sample_collection.find_one({"_id": ObjectId(sample.id)})["ground_truth"] == value


@pytest.mark.parametrize(
    ("value", "before"),
    [
        (None, []),
        ({"_cls": "Detections", "detections": None}, []),
        ({"_cls": "Detections"}, []),
        ({"_cls": "Detections", "detections": [None, {"promoted_from": [1]}]}, [None, {"promoted_from": [1]}]),
    ],
)
def test_ground_truth_without_labels_gets_them(labelled, value, before):
    set_raw(labelled, labelled.first(), "ground_truth", value)
    result = promote_to_labels(labelled, ids_of(labelled), "proposals", label="cat", progress=False)
    assert counts(result) == (4, 0, 2, [], [])
    labels = labelled._sample_collection.find_one({})["ground_truth"]["detections"]
    assert labels[:-3] == before and [label["label"] for label in labels[-3:]] == ["cat"] * 3


@pytest.mark.parametrize("tags", ["unlabeled", 5, {"a": 1}, [None], ""])
def test_tags_that_are_no_list_of_texts_cost_their_image(labelled, caplog, tags):
    first, second, _ = labelled
    set_raw(labelled, first, "proposals.detections.1.tags", tags)
    ids = ids_of(labelled)
    result = promote_to_labels(labelled, ids, "proposals", label="cat", progress=False)
    assert (result.promoted, [each["id"] for each in result.skipped]) == (1, [first.id])
    assert ids[1] in result.skipped[0]["cause"] and "has tags=" in result.skipped[0]["cause"]
    assert dismiss(labelled, ids, "proposals") == 1
    assert f"No proposal of {first.filepath} was dismissed: Detection {ids[1]} has tags=" in caplog.text
    documents = {str(document["_id"]): document for document in labelled._sample_collection.find({})}
    assert [each["tags"] for each in documents[first.id]["proposals"]["detections"]] == [
        ["unlabeled", "mine"],
        tags,
        ["unlabeled", "mine"],
    ]
    assert "dismissed" in documents[second.id]["proposals"]["detections"][0]["tags"]
