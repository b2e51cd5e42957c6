"""AR@K as a FiftyOne evaluation: figures equal pycocotools', results are stored, and nothing else changes."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import zlib

import cv2
import fiftyone as fo
import numpy as np
import pytest
from bson import ObjectId
from fiftyone import ViewField as F
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fiftyone_mobilesamv2 import evaluate_proposals
from fiftyone_mobilesamv2.evaluation.proposal_results import comparison_table
from fiftyone_mobilesamv2.evaluation.proposals import ProposalEvaluationConfig

HEIGHT, WIDTH = 120, 160
KS = (1, 5, 20)
PANEL_NAMES = {"AR", "AR@1", "AR@5", "AR@20"}


def detection(mask, **attributes):
    """A Detection for a full-image mask, stored cropped to its tight box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = mask.shape
    return fo.Detection(
        label=attributes.pop("label", "object"),
        bounding_box=[x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
        mask=mask[y0:y1, x0:x1],
        **attributes,
    )


def rectangle(x, y, w, h, size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, bool)
    mask[y : y + h, x : x + w] = True
    return mask


def ellipse(rng):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    center = int(rng.integers(20, WIDTH - 20)), int(rng.integers(20, HEIGHT - 20))
    axes = int(rng.integers(4, 45)), int(rng.integers(4, 45))
    cv2.ellipse(mask, center, axes, float(rng.integers(180)), 0, 360, 1, -1)
    return mask.astype(bool)


def shifted(mask, dx, dy):
    moved = np.zeros_like(mask)
    h, w = mask.shape
    moved[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)] = mask[
        max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)
    ]
    return moved if moved.any() else mask


def make_images(count=5, seed=0):
    """Returns the objects (one of them a crowd region) and proposals of each image, as lists of (mask, attributes)."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        objects = [(ellipse(rng), {"label": str(rng.choice(["cat", "dog"]))}) for _ in range(6)]
        objects[2][1]["iscrowd"] = True
        proposals = []
        for _ in range(30):
            source = objects[rng.integers(6)][0] if rng.random() < 0.8 else ellipse(rng)
            mask = shifted(source, int(rng.integers(-6, 7)), int(rng.integers(-6, 7)))
            # Coarse scores cause ties.
            scores = {"confidence": rng.random(), "predicted_iou": rng.random(), "stability": rng.random()}
            proposals.append((mask, {name: round(float(value), 1) for name, value in scores.items()}))
        images.append((objects, proposals))
    return images


def make_samples(images, folder):
    samples = []
    for index, (objects, proposals) in enumerate(images):
        path = folder / f"{index}.png"
        cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        sample = fo.Sample(str(path))
        sample["ground_truth"] = fo.Detections(detections=[detection(mask, **kw) for mask, kw in objects])
        sample["proposals"] = fo.Detections(detections=[detection(mask, **kw) for mask, kw in proposals])
        samples.append(sample)
    return samples


def coco_recall(images, score="confidence", iou_type="segm", areas=None):
    """COCOeval's recall [thresholds, areas, K] for the masks of `images`."""
    annotations, results = [], []
    for image_id, (objects, proposals) in enumerate(images, 1):
        for mask, attributes in objects:
            rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
            box = mask_utils.toBbox(rle).tolist()
            area = box[2] * box[3] if iou_type == "bbox" else float(mask_utils.area(rle))
            area = areas[len(annotations)] if areas else area
            common = {"image_id": image_id, "category_id": 1, "segmentation": rle, "bbox": box, "area": area}
            annotations.append(common | {"id": len(annotations) + 1, "iscrowd": int(attributes.get("iscrowd", 0))})
        for mask, attributes in proposals:
            rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
            common = {"image_id": image_id, "category_id": 1, "score": attributes[score]}
            shape = {"bbox": mask_utils.toBbox(rle).tolist()} if iou_type == "bbox" else {"segmentation": rle}
            results.append(common | shape)
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i + 1, "height": HEIGHT, "width": WIDTH} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(KS)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["recall"][:, 0]


def assert_equals_coco(results, recall):
    metrics = results.metrics()
    for column, name in enumerate(("AR", "ARs", "ARm", "ARl")):
        for row, k in enumerate(KS):
            expected = recall[:, column, row].mean()
            if expected < 0:  # COCOeval's -1 means that there is no such object
                assert math.isnan(metrics[f"{name}@{k}"])
            else:
                assert abs(metrics[f"{name}@{k}"] - expected) < 1e-12
    assert abs(metrics["AR"] - np.mean([recall[:, 0, row].mean() for row in range(3)])) < 1e-12


@pytest.fixture(scope="module")
def images():
    return make_images()


@pytest.fixture
def labeled(dataset, images, tmp_path):
    dataset.add_samples(make_samples(images, tmp_path), progress=False)
    return dataset


def stored(dataset):
    """The samples' raw documents, without times and metadata."""
    documents = list(dataset._sample_collection.find({}))
    for document in documents:
        document.pop("last_modified_at")
        document.pop("metadata", None)
    return documents


# Figures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_by", ["confidence", "predicted_iou", "stability"])
def test_equals_cocoeval(labeled, images, rank_by):
    results = evaluate_proposals(labeled, "proposals", ks=KS, rank_by=rank_by, progress=False)
    assert_equals_coco(results, coco_recall(images, rank_by))
    assert results.average_recall.images == len(images)
    assert results.average_recall.totals["all"] == 5 * len(images)


def test_rank_by_sams_mean(labeled, images):
    for _, proposals in images:
        for _, attributes in proposals:
            attributes["mean"] = (attributes["predicted_iou"] + attributes["stability"]) / 2
    results = evaluate_proposals(labeled, "proposals", ks=KS, rank_by="sam", progress=False)
    assert_equals_coco(results, coco_recall(images, "mean"))


def test_boxes_equal_cocoeval(labeled, images):
    results = evaluate_proposals(labeled, "proposals", ks=KS, use_masks=False, progress=False)
    assert_equals_coco(results, coco_recall(images, iou_type="bbox"))


def test_masks_on_disk_equal_cocoeval(labeled, images, tmp_path):
    for sample in labeled:
        for field in ("ground_truth", "proposals"):
            for number, label in enumerate(sample[field].detections):
                label.export_mask(str(tmp_path / f"{sample.id}-{field}-{number}.png"), update=True)
        sample.save()
    assert labeled.count("proposals.detections.mask") == 0
    results = evaluate_proposals(labeled, "proposals", ks=KS, progress=False)
    assert_equals_coco(results, coco_recall(images))


def test_polylines_equal_cocoeval(labeled, images):
    drawn = []
    for sample, (objects, proposals) in zip(labeled, images):
        polylines, masks = [], []
        for mask, attributes in objects:
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            half = [0.5, 0.5]
            points = [((contour[:, 0] + half) / [WIDTH, HEIGHT]).tolist() for contour in contours]
            # Two shapes: the object, and a corner of the image.
            points.append([[0, 0], [4 / WIDTH, 0], [4 / WIDTH, 4 / HEIGHT], [0, 4 / HEIGHT]])
            polylines.append(fo.Polyline(points=points, closed=True, filled=True, **attributes))
            flat = [(np.array(part) * [WIDTH, HEIGHT]).ravel().tolist() for part in points]
            whole = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(flat, HEIGHT, WIDTH)))
            masks.append((whole.astype(bool), attributes))
        sample["polygons"] = fo.Polylines(polylines=polylines)
        sample.save()
        drawn.append((masks, proposals))
    results = evaluate_proposals(labeled, "proposals", "polygons", ks=KS, eval_key="ar", progress=False)
    assert_equals_coco(results, coco_recall(drawn))
    polygon = labeled.first().polygons.polylines[0]
    assert polygon.ar in ("tp", "fn") and 0 <= polygon.ar_iou <= 1


def test_evaluate_detections_gives_the_same_results(labeled, images):
    results = labeled.evaluate_detections(
        "proposals", eval_key="ar", method="proposals", use_masks=True, ks=KS, progress=False
    )
    assert_equals_coco(results, coco_recall(images))
    same = evaluate_proposals(labeled, "proposals", eval_key="same", ks=KS, progress=False)
    for end in ("_tp", "_fp", "_fn", "_recall_at_5"):
        assert labeled.values(f"ar{end}") == labeled.values(f"same{end}")
    for path in ("ground_truth.detections.{}_rank", "ground_truth.detections.{}", "proposals.detections.{}_iou"):
        assert labeled.values(path.format("ar")) == labeled.values(path.format("same"))
    assert same.metrics() == pytest.approx(labeled.load_evaluation_results("ar").metrics(), nan_ok=True)
    assert labeled.get_evaluation_info("ar").config.method == "proposals"
    labeled.delete_evaluation("ar")
    assert not labeled.has_field("ar_tp") and labeled.has_field("same_tp")


@pytest.mark.parametrize("field", ["ground_truth", "proposals"])
def test_two_labels_of_one_id_cost_their_image(labeled, field):
    evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    second = labeled.skip(1).first()
    labels = second[field].detections
    second[field].detections = [*labels, labels[0].copy()]
    second[field].detections[-1].id = labels[0].id
    second.save()
    results = evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    (skipped,) = results.skipped
    assert skipped["id"] == second.id and f"2 labels in '{field}' have the id {labels[0].id}" in skipped["cause"]
    assert labeled.load_evaluation_results("ar").skipped == results.skipped


@pytest.mark.parametrize("count", [0, 2])
def test_results_print_as_their_table(labeled, count):
    results = evaluate_proposals(labeled.limit(count), "proposals", ks=KS, progress=False)
    assert str(results) == str(results.report()) and len(str(results).splitlines()) == len(KS) + 3
    assert repr(results) == f"<ProposalResults None of {len(results.ytrue)} objects>"


def test_areas_can_come_from_an_attribute(labeled, images):
    areas = []
    for sample in labeled:
        for label in sample.ground_truth.detections:
            areas.append(float(len(areas) * 97 % 12000))
            label["area"] = areas[-1]
        sample.save()
    results = evaluate_proposals(labeled, "proposals", ks=KS, area_field="area", progress=False)
    assert_equals_coco(results, coco_recall(images, areas=areas))


def test_frequency_groups(labeled, images):
    before = evaluate_proposals(labeled, "proposals", ks=KS, progress=False).metrics()
    letters = "rcf"
    for sample in labeled:
        for number, label in enumerate(sample.ground_truth.detections):
            label["frequency"] = letters[number % 3]
        sample.save()
    metrics = evaluate_proposals(labeled, "proposals", ks=KS, progress=False).metrics()
    assert "ARr" not in before and {"ARr", "ARc", "ARf"} < set(metrics)
    for number, letter in enumerate(letters):
        # By the SAM paper's definition, the ground truth contains only these categories.
        only = [(objects[number::3], proposals) for objects, proposals in images]
        recall = coco_recall(only)
        for row, k in enumerate(KS):
            assert abs(metrics[f"AR{letter}@{k}"] - recall[:, 0, row].mean()) < 1e-12


def test_evaluation_of_a_view_covers_what_it_shows(labeled, images):
    confident = [(o, [p for p in proposals if p[1]["confidence"] > 0.45]) for o, proposals in images]
    view = labeled.filter_labels("proposals", F("confidence") > 0.45)[1:]
    results = evaluate_proposals(view, "proposals", eval_key="ar", ks=KS, progress=False)
    assert_equals_coco(results, coco_recall(confident[1:]))
    true_positives = labeled.filter_labels("proposals", F("ar") == "tp")
    assert min(true_positives.values("proposals.detections.confidence", unwind=True)) > 0.45
    assert labeled.first().ar_tp is None
    assert labeled.count("proposals.detections") == 30 * len(images)
    assert len(labeled.load_evaluation_view("ar")) == len(images) - 1


def test_video_frames_are_evaluated(dataset, images):
    images = [images[0], (images[1][0][:3], images[1][1]), *images[2:]]
    samples = []
    for number, part in enumerate((images[:3], images[3:])):
        sample = fo.Sample(f"/nowhere/{number}.mp4")
        sample.metadata = fo.VideoMetadata(frame_width=WIDTH, frame_height=HEIGHT, total_frame_count=len(part))
        for frame_number, (objects, proposals) in enumerate(part, 1):
            sample.frames[frame_number] = fo.Frame(
                ground_truth=fo.Detections(detections=[detection(mask, **kw) for mask, kw in objects]),
                proposals=fo.Detections(detections=[detection(mask, **kw) for mask, kw in proposals]),
            )
        samples.append(sample)
    dataset.add_samples(samples, progress=False)
    results = evaluate_proposals(
        dataset, "frames.proposals", "frames.ground_truth", eval_key="ar", ks=KS, progress=False
    )
    assert_equals_coco(results, coco_recall(images))

    per_frame = dataset.values("frames.ar_tp")
    assert dataset.values("ar_tp") == [sum(counts) for counts in per_frame]
    states = dataset.values("frames.ground_truth.detections.ar", unwind=True)
    assert states.count("tp") == sum(dataset.values("ar_tp")) and states.count("fn") == sum(dataset.values("ar_fn"))
    # A video's recall averages over its objects; the second frame has fewer.
    frames = dataset.values("frames.ar_recall_at_5")
    expected = [np.average(frames[0], weights=[5, 2, 5]), np.mean(frames[1])]
    assert dataset.values("ar_recall_at_5") == pytest.approx(expected)
    assert (
        results.missed(k=5).count("frames.ground_truth.detections")
        == 22 - (results.ranks[:, 0] < 5)[results.ranks[:, 0] >= 0].sum()
    )

    loaded = dataset.load_evaluation_results("ar", cache=False)
    assert loaded.metrics() == pytest.approx(results.metrics(), nan_ok=True)
    dataset.rename_evaluation("ar", "renamed")
    assert dataset.values("frames.renamed_tp") == per_frame
    dataset.delete_evaluation("renamed")
    assert not [path for path in dataset.get_frame_field_schema(flat=True) if "renamed" in path]


def test_frames_view_is_evaluated(dataset, images, tmp_path):
    sample = fo.Sample("/nowhere/0.mp4")
    sample.metadata = fo.VideoMetadata(frame_width=WIDTH, frame_height=HEIGHT, total_frame_count=2)
    for number, (objects, proposals) in enumerate(images[:2], 1):
        path = tmp_path / f"{number}.png"
        cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        sample.frames[number] = fo.Frame(
            filepath=str(path),
            ground_truth=fo.Detections(detections=[detection(mask, **kw) for mask, kw in objects]),
            proposals=fo.Detections(detections=[detection(mask, **kw) for mask, kw in proposals]),
        )
    dataset.add_sample(sample)
    frames = dataset.to_frames()
    held = dataset.first().frames[1]
    results = evaluate_proposals(frames, "proposals", eval_key="ar", ks=KS, progress=False)
    assert_equals_coco(results, coco_recall(images[:2]))
    states = frames.values("ground_truth.detections.ar", unwind=True)
    assert states.count("tp") + states.count("fn") == 10
    # The results also appear in the video dataset and in new views of it.
    dataset.reload()
    assert dataset.values("frames.ground_truth.detections.ar", unwind=True) == states
    assert dataset.to_frames().values("ar_tp") == frames.values("ar_tp")
    assert held.ground_truth.detections[0].ar == states[0]
    dataset.rename_evaluation("ar", "new")
    assert dataset.values("frames.ground_truth.detections.new", unwind=True) == states
    dataset.delete_evaluation("new")
    assert not [path for path in dataset.get_frame_field_schema(flat=True) if "new" in path]

    # The old view can be evaluated again, in full and in part, and can delete the evaluation.
    evaluate_proposals(frames, "proposals", eval_key="ar", ks=KS, progress=False)
    evaluate_proposals(frames.limit(1), "proposals", eval_key="ar", ks=KS, progress=False)
    assert [state is None for state in dataset.values("frames.ar_tp")[0]] == [False, True]
    assert len([state for state in dataset.values("frames.proposals.detections.ar", unwind=True) if state]) > 0
    frames.delete_evaluation("ar")
    assert not [path for path in dataset.get_frame_field_schema(flat=True) if path.split(".")[-1].startswith("ar")]


def test_patches_are_evaluated(labeled, images):
    patches = labeled.to_patches("ground_truth", other_fields="proposals")
    results = evaluate_proposals(patches, "proposals", eval_key="ar", ks=KS, progress=False)
    alone = [([each], proposals) for objects, proposals in images for each in objects]
    assert_equals_coco(results, coco_recall(alone))
    assert len(labeled.exists("ground_truth.detections.ar")) == len(images)
    counted = [label for label in labeled.values("ground_truth.detections.ar", unwind=True) if label]
    assert len(counted) == 5 * len(images)  # crowds count neither as found nor as missed
    # A proposal that finds an object is also marked in its sample.
    finding = set(labeled.values("ground_truth.detections.ar_id", unwind=True)) - {None}
    true_positives = labeled.filter_labels("proposals", F("ar") == "tp").values("proposals.detections.id", unwind=True)
    assert finding == set(true_positives)
    assert not labeled.has_field("ar_tp")  # counts per patch are not counts per sample

    evaluate_proposals(patches.limit(1), "proposals", eval_key="ar", ks=KS, progress=False)
    assert len([s for s in labeled.values("ground_truth.detections.ar", unwind=True) if s]) == 1
    patches.delete_evaluation("ar")
    assert not labeled.has_field("ground_truth.detections.ar")
    evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)


def test_proposals_may_exist_only_in_the_patches(labeled):
    patches = labeled.to_patches("ground_truth")
    labels = [fo.Detections(detections=[label.copy()]) for label in patches.values("ground_truth")]
    for each in labels:
        each.detections[0].confidence = 0.5
    patches.set_values("mine", labels)
    assert not labeled.has_field("mine")
    results = evaluate_proposals(patches, "mine", eval_key="ar", ks=KS, progress=False)
    assert results.metrics()["recall"] == 1
    states = [state for state in labeled.values("ground_truth.detections.ar", unwind=True) if state]
    assert states == ["tp"] * len(results.ytrue)
    assert not labeled.has_field("mine")
    patches.delete_evaluation("ar")
    assert not labeled.has_field("ground_truth.detections.ar")


def test_clips_are_refused(dataset, images):
    sample = fo.Sample("/nowhere/0.mp4")
    sample.metadata = fo.VideoMetadata(frame_width=WIDTH, frame_height=HEIGHT, total_frame_count=2)
    for number, (objects, proposals) in enumerate(images[:2], 1):
        sample.frames[number] = fo.Frame(
            ground_truth=fo.Detections(detections=[detection(mask, **kw) for mask, kw in objects]),
            proposals=fo.Detections(detections=[detection(mask, **kw) for mask, kw in proposals]),
        )
    dataset.add_sample(sample)
    with pytest.raises(ValueError, match=r"Clips.*frames of the videos"):
        evaluate_proposals(dataset.to_clips([[[1, 2]]]), "frames.proposals", "frames.ground_truth", eval_key="ar")
    # Counts are stored even if the view hides their fields.
    view = dataset.select_fields(["frames.ground_truth", "frames.proposals"])
    evaluate_proposals(view, "frames.proposals", "frames.ground_truth", eval_key="ar", progress=False)
    assert dataset.values("ar_tp") == [sum(dataset.values("frames.ar_tp")[0])]


def test_group_slice_is_evaluated(dataset, images, tmp_path):
    dataset.add_group_field("group", default="left")
    samples = make_samples(images[:4], tmp_path)
    groups = [fo.Group(), fo.Group()]
    for number, sample in enumerate(samples):
        sample["group"] = groups[number // 2].element("left" if number % 2 == 0 else "right")
    dataset.add_samples(samples, progress=False)
    with pytest.raises(ValueError, match="group"):
        evaluate_proposals(dataset, "proposals", progress=False)
    view = dataset.select_group_slices("right")
    results = evaluate_proposals(view, "proposals", eval_key="ar", ks=KS, progress=False)
    assert_equals_coco(results, coco_recall([images[1], images[3]]))
    assert [value is None for value in dataset.select_group_slices(["left", "right"]).values("ar_tp")].count(True) == 2


def test_nested_labels_are_evaluated(labeled, images):
    for sample in labeled:
        sample["model"] = fo.DynamicEmbeddedDocument(found=sample.proposals)
        sample.save()
    labeled.add_dynamic_sample_fields()
    results = evaluate_proposals(labeled, "model.found", eval_key="ar", ks=KS, progress=False)
    assert_equals_coco(results, coco_recall(images))
    states = labeled.values("model.found.detections.ar", unwind=True)
    assert states.count("tp") == sum(labeled.values("ar_tp"))


# Stored results -----------------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(dataset, tmp_path):
    """Three objects and a crowd. Proposals: on the crowd, an exact copy, IoU 0.8, a stray one, IoU 0.4."""
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    sample = fo.Sample(str(path), tags=["kept"])
    sample["ground_truth"] = fo.Detections(
        detections=[
            detection(rectangle(0, 0, 40, 40), label="cat"),
            detection(rectangle(60, 60, 20, 20), label="dog"),
            detection(rectangle(100, 0, 60, 60), label="cat", iscrowd=1),
            detection(rectangle(0, 100, 10, 10), label="dog"),
        ]
    )
    sample["proposals"] = fo.Detections(
        detections=[
            detection(rectangle(130, 30, 10, 10), confidence=0.2),
            detection(rectangle(60, 60, 20, 20), confidence=0.3),
            detection(rectangle(0, 0, 40, 32), confidence=0.9),
            detection(rectangle(120, 80, 9, 9), confidence=0.8),
            detection(rectangle(0, 100, 10, 4), confidence=0.1),
        ]
    )
    empty = fo.Sample(str(path.with_name("other.png")))
    cv2.imwrite(empty.filepath, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    dataset.add_samples([sample, empty], progress=False)
    return dataset


def test_labels_and_samples_by_hand(by_hand):
    results = evaluate_proposals(by_hand, "proposals", eval_key="ar", ks=(1, 3), progress=False)
    sample, empty = by_hand
    objects, proposals = sample.ground_truth.detections, sample.proposals.detections
    assert [label.get_attribute_value("ar", None) for label in objects] == ["tp", "tp", None, "fn"]
    # The last proposal has rank 5, beyond the largest K.
    assert [label.get_attribute_value("ar_iou", None) for label in objects] == [0.8, 1.0, None, 0.0]
    assert [label.get_attribute_value("ar_rank", None) for label in objects] == [1, 3, None, None]
    assert objects[0].ar_id == proposals[2].id and objects[1].ar_id == proposals[1].id and objects[3].ar_id is None
    assert [label.get_attribute_value("ar", None) for label in proposals] == [None, "tp", "tp", None, None]
    assert proposals[1].ar_id == objects[1].id and proposals[1].ar_iou == 1.0 and proposals[1].ar_rank == 3
    assert (sample.ar_tp, sample.ar_fp, sample.ar_fn) == (2, 1, 1)
    # Rank 1 finds its object at 7 of 10 thresholds, rank 3 at all of them; three objects count.
    assert sample.ar_recall_at_1 == pytest.approx(0.7 / 3) and sample.ar_recall_at_3 == pytest.approx(1.7 / 3)
    assert (empty.ar_tp, empty.ar_fp, empty.ar_fn, empty.ar_recall_at_1) == (0, 0, 0, None)
    assert sample.tags == ["kept"]

    metrics = results.metrics()
    assert metrics["AR@1"] == pytest.approx(0.7 / 3) and metrics["AR@3"] == pytest.approx(1.7 / 3)
    assert metrics["AR"] == pytest.approx(1.2 / 3) and metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["support"] == 3 and results.mAR() == metrics["AR@3"]
    assert by_hand._get_label_field_path("proposals")  # the schema is intact
    for count in ("ar_tp", "ar_fp", "ar_fn"):
        assert isinstance(by_hand.get_field(count), fo.IntField)

    # A proposal on the crowd is not a false positive.
    evaluate_proposals(by_hand, "proposals", eval_key="ar", progress=False)
    assert by_hand.first().ar_fp == 2  # the stray proposal, and rank 5 with IoU 0.4
    assert by_hand.first().ground_truth.detections[3].ar_iou == pytest.approx(0.4)


def test_metrics_suit_the_model_evaluation_panel(by_hand):
    results = evaluate_proposals(by_hand, "proposals", eval_key="ar", ks=KS, progress=False)
    metrics = results.custom_metrics
    assert PANEL_NAMES < set(metrics)
    for name, metric in metrics.items():
        assert "." not in name and metric["key"] == metric["label"] == name and metric["lower_is_better"] is False
        assert isinstance(metric["value"], float) and math.isfinite(metric["value"])
    assert metrics["AR@20"]["value"] == results.metrics()["AR@20"]
    assert not [name for name in metrics if name.startswith(("ARl", "ARr"))]  # no such objects
    assert np.count_nonzero(results.ytrue == results.ypred) == 2
    assert np.count_nonzero(results.ypred == results.missing) == 1
    assert results.report()["dog"] == {"precision": None, "recall": 0.5, "support": 2}
    assert by_hand.get_evaluation_info("ar").config.type == "detection"


def test_evaluation_can_be_loaded_renamed_and_deleted(labeled):
    before = stored(labeled)
    schema = set(labeled.get_field_schema(flat=True))
    results = evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    assert labeled.list_evaluations(type="detection", method="proposals") == ["ar"]
    assert labeled.app_config.sidebar_groups is None or labeled._has_sidebar_group("ar")

    # A new process has not imported this package.
    labeled.persistent = True
    code = f"""
import json, fiftyone as fo
results = fo.load_dataset({labeled.name!r}).load_evaluation_results("ar")
print("REPORT", json.dumps([type(results).__name__, results.metrics(), results.ranks.tolist(), str(results.report())]))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    kind, metrics, ranks, report = json.loads(process.stdout.split("REPORT ", 1)[1])
    assert kind == "ProposalResults" and metrics == pytest.approx(results.metrics(), nan_ok=True)
    assert ranks == results.ranks.tolist() and report == str(results.report())

    labeled.rename_evaluation("ar", "renamed")
    assert labeled.list_evaluations() == ["renamed"]
    assert not [path for path in labeled.get_field_schema(flat=True) if path.split(".")[-1].startswith("ar")]
    assert labeled.count("renamed_tp") == len(labeled)
    # FiftyOne renames the evaluation even if a field's new name is taken; the fields keep their old names.
    labeled.set_values("taken_tp", [1] * len(labeled))
    labeled.rename_evaluation("renamed", "taken")
    labeled.delete_evaluation("taken")
    assert labeled.values("taken_tp") == [1] * len(labeled)
    labeled.delete_sample_field("taken_tp")
    assert labeled.list_evaluations() == [] and set(labeled.get_field_schema(flat=True)) == schema
    assert stored(labeled) == before


def test_failed_evaluation_leaves_the_earlier_one(labeled):
    first = evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    before = stored(labeled)

    sample = labeled.last()
    mask, sample.ground_truth.detections[0].mask = sample.ground_truth.detections[0].mask, None
    sample.save()
    broken = stored(labeled)
    with pytest.raises(ValueError, match="has no mask"):
        evaluate_proposals(labeled, "proposals", eval_key="ar", progress=False)
    assert stored(labeled) == broken
    assert labeled.load_evaluation_results("ar", cache=False).metrics() == pytest.approx(first.metrics(), nan_ok=True)
    sample.ground_truth.detections[0].mask = mask
    sample.save()

    def interrupt(bar):
        if bar.iteration > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_proposals(labeled, "proposals", eval_key="ar", ks=(1,), progress=interrupt)
    assert stored(labeled) == before

    # An evaluation under the same key replaces it, including fields that only the earlier one had.
    evaluate_proposals(labeled, "proposals", eval_key="ar", ks=(2,), progress=False)
    assert labeled.has_field("ar_recall_at_2") and not labeled.has_field("ar_recall_at_5")


def test_failed_evaluate_detections_leaves_the_earlier_evaluation(labeled):
    first = evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    before = stored(labeled)
    arguments = {"eval_key": "ar", "method": "proposals", "use_masks": True, "progress": False}
    with pytest.raises(ValueError, match="has no area"):
        labeled.evaluate_detections("proposals", area_field="area", **arguments)
    with pytest.raises(ValueError, match=r"iou=0\.75.*0\.5"):
        labeled.evaluate_detections("proposals", iou=0.75, **arguments)
    with pytest.raises(TypeError, match="rank_with"):
        labeled.evaluate_detections("proposals", rank_with="sam", **arguments)
    assert stored(labeled) == before
    assert labeled.load_evaluation_results("ar", cache=False).metrics() == pytest.approx(first.metrics(), nan_ok=True)


def test_evaluate_detections_counts_nothing_in_skipped_images(labeled):
    sample = labeled.last()
    sample.proposals.detections[7].confidence = float("nan")
    sample.save()
    results = labeled.evaluate_detections(
        "proposals", eval_key="ar", method="proposals", use_masks=True, progress=False
    )
    assert [skipped["id"] for skipped in results.skipped] == [sample.id]
    for end in ("_tp", "_fp", "_fn", "_recall_at_10"):
        *others, skipped = labeled.values(f"ar{end}")
        assert skipped is None and None not in others


def test_failed_write_leaves_no_evaluation(labeled, monkeypatch):
    before = stored(labeled)
    monkeypatch.setattr(fo.Dataset, "_bulk_write", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_proposals(labeled, "proposals", eval_key="ar", progress=False)
    monkeypatch.undo()
    assert labeled.list_evaluations() == [] and stored(labeled) == before
    assert not labeled.has_field("ar_tp")


def test_only_metadata_is_stored_without_a_key(labeled):
    labeled.set_values("metadata", [fo.ImageMetadata(width=WIDTH)] * len(labeled))
    before = stored(labeled)
    evaluate_proposals(labeled, "proposals", progress=False)
    assert stored(labeled) == before and labeled.list_evaluations() == []
    assert labeled.values("metadata.height") == [HEIGHT] * len(labeled)


# Using the results --------------------------------------------------------------------------------------------------


def test_missed_objects_and_comparison(by_hand):
    results = evaluate_proposals(by_hand, "proposals", eval_key="ar", progress=False)
    objects = [label.id for label in by_hand.first().ground_truth.detections]

    def ids(view):
        return view.values("ground_truth.detections.id", unwind=True)

    assert ids(results.missed()) == [objects[3]]
    assert ids(results.missed(iou=0.85)) == [objects[0], objects[3]]
    assert ids(results.missed(k=1)) == [objects[1], objects[3]]
    assert results.missed().count("proposals.detections") == 5  # all proposals stay visible
    with pytest.raises(ValueError, match=r"iou=0\.52.*0\.50, 0\.55"):
        results.missed(iou=0.52)
    assert ids(results.missed(k=1000)) == ids(results.missed())
    for k in (0, 1001):
        with pytest.raises(ValueError, match=f"k={k}.*1000"):
            results.missed(k=k)

    confident = evaluate_proposals(
        by_hand.filter_labels("proposals", F("confidence") > 0.5, only_matches=False), "proposals", progress=False
    )
    comparison = results.compare(confident)
    assert ids(comparison.gained) == [objects[1]] and ids(comparison.lost) == []
    assert ids(confident.compare(results).lost) == [objects[1]]
    assert ids(results.compare(confident, iou=0.85, k=1).gained) == []
    other = evaluate_proposals(by_hand.limit(1).filter_labels("ground_truth", F("label") == "cat"), "proposals")
    with pytest.raises(ValueError, match="different ground truth objects"):
        results.compare(other)

    table = comparison_table({"all": results, "confident": confident})
    assert list(table.index) == ["all", "confident"]
    assert table.loc["all", "AR@1000"] == results.metrics()["AR@1000"] > table.loc["confident", "AR@1000"]


def test_tables_and_plots(labeled):
    results = evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    metrics, recall = results.metrics(), results.average_recall
    table = results.report().table
    assert list(table.index) == ["AR@1", "AR@5", "AR@20", "AR", "objects"]
    assert list(table.columns) == ["all", "small", "medium", "large"]
    assert table.loc["AR@5", "small"] == metrics["ARs@5"] and table.loc["AR", "all"] == metrics["AR"]
    assert table.loc["objects"].tolist() == list(recall.totals.values())
    assert f"{metrics['AR@20']:.3f}" in str(results.report())
    assert re.search(r"^objects +25 ", str(results.report()), re.M)

    tidy = results.to_pandas()
    assert len(tidy) == 4 * 3 * 10
    mean = tidy.groupby(["group", "k"]).recall.mean()
    assert mean["all", 5] == pytest.approx(metrics["AR@5"]) and mean["small", 1] == pytest.approx(metrics["ARs@1"])

    figure = results.plot()
    curves = {trace.name: trace for trace in figure.data if trace.showlegend is not False}
    all_objects = curves["all (25)"]
    assert [all_objects.y[k - 1] for k in KS] == pytest.approx([metrics[f"AR@{k}"] for k in KS])
    both = results.plot(evaluate_proposals(labeled, "proposals", eval_key="two", rank_by="stability", progress=False))
    assert {trace.name for trace in both.data} == {"ar", "two"}
    unnamed = evaluate_proposals(labeled, "proposals", progress=False)
    assert len(unnamed.plot(unnamed).data) == 4

    parts = [evaluate_proposals(view, "proposals", ks=KS, progress=False) for view in (labeled[:2], labeled[2:])]
    merged = parts[0].average_recall + parts[1].average_recall
    assert merged.to_dict() == recall.to_dict()


def test_metrics_of_subsets(labeled):
    results = evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    whole = results.metrics()
    cats = results.ytrue == "cat"
    with results.use_subset({"type": "attribute", "field": "label", "value": "cat"}):
        metrics = results.metrics()
        assert metrics["support"] == cats.sum()
        assert results.report().table.loc["AR@5"].tolist() == [metrics["AR@5"]]
        assert results.report().table.loc["objects"].tolist() == [cats.sum()]
        assert set(results.to_pandas().objects) == {cats.sum()}
        missed = results.missed().values("ground_truth.detections.id", unwind=True)
        assert set(missed) == set(results.ytrue_ids[results.ypred == results.missing])
    expected = [((ranks >= 0) & (ranks < 5)).mean() for ranks in results.ranks[cats]]
    assert metrics["AR@5"] == pytest.approx(np.mean(expected))
    assert "ARs@5" not in metrics
    assert results.metrics() == pytest.approx(whole, nan_ok=True)


def test_metrics_of_classes(labeled, capsys):
    results = evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    with results.use_subset({"type": "attribute", "field": "label", "value": "cat"}):
        cats = results.metrics()
        assert results.metrics(classes=["cat"]) == pytest.approx(cats, nan_ok=True)
        assert results.metrics(classes=["dog"])["support"] == 0
    assert 0 < cats["support"] < results.metrics()["support"]
    # FiftyOne's own signature is accepted; average and beta don't affect recall.
    assert results.metrics(["cat"], "macro", 2.0) == results.metrics(classes=["cat"]) == pytest.approx(cats)
    both = results.metrics(classes=["cat", "dog"])
    assert both == pytest.approx({name: results.metrics()[name] for name in both})
    assert results.mAR(classes=["cat"]) == cats["AR@20"]
    assert math.isnan(results.metrics(classes=["bird"])["AR"])
    capsys.readouterr()
    results.print_metrics(classes=["cat"], average=None, beta=1.0, digits=2)
    printed = capsys.readouterr().out
    assert "AR@5" in printed and "ARs@5" not in printed


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pred_field": "gone"}, r"no field 'gone' for the proposals.*ground_truth, proposals"),
        ({"gt_field": "gone"}, "no field 'gone' for the ground truth"),
        ({"pred_field": "filepath"}, "'filepath' contains .*String.*detections or polylines"),
        ({"pred_field": "classes"}, "'classes' contains Classification"),
        ({"pred_field": "ground_truth"}, "the same field, 'ground_truth'"),
        ({"ks": (0, 10)}, "whole numbers from 1 to 100,000"),
        ({"ks": ()}, "whole numbers from 1 to 100,000"),
        ({"ks": (2.5,)}, "whole numbers from 1 to 100,000"),
        ({"rank_by": "size"}, "rank_by='size'.*'confidence'"),
        ({"rank_by": "predicted_iou"}, r"0\.png.*has no predicted_iou"),
        ({"area_field": "area"}, "has no area"),
        ({"eval_key": "not a name"}, "not a name"),
        ({"eval_key": "mine"}, "'mine_tp' exists"),
        ({"eval_key": "label"}, "'.*label' exists"),
        ({"eval_key": "undeclared"}, "'ground_truth.detections.undeclared' exists"),
    ],
)
def test_invalid_arguments_are_refused(dataset, tmp_path, arguments, message):
    (sample,) = make_samples(make_images(1), tmp_path)
    for label in sample.proposals.detections:
        del label["predicted_iou"]
    sample["mine_tp"] = 3
    sample.ground_truth.detections[2]["undeclared"] = 1
    sample["classes"] = fo.Classification(label="x")
    dataset.add_sample(sample)
    before = stored(dataset)
    with pytest.raises(ValueError, match=message):
        evaluate_proposals(dataset, **{"pred_field": "proposals", "eval_key": "ar", "progress": False} | arguments)
    assert stored(dataset) == before and dataset.list_evaluations() == []


def test_fields_hidden_by_a_view_are_not_overwritten(labeled):
    labeled.set_values("mine_tp", list(range(len(labeled))))
    labeled.set_values("text_tp", ["text"] * len(labeled))
    view = labeled.select_fields(["ground_truth", "proposals"])
    before = stored(labeled)
    for key in ("mine", "text"):
        with pytest.raises(ValueError, match=f"'{key}_tp' exists"):
            evaluate_proposals(view, "proposals", eval_key=key, progress=False)
    assert stored(labeled) == before
    # After an evaluation with fewer Ks, the user may add a field; the same key must not overwrite it with more Ks.
    evaluate_proposals(view, "proposals", eval_key="ar", ks=(1,), progress=False)
    labeled.set_values("ar_recall_at_7", [0.5] * len(labeled))
    with pytest.raises(ValueError, match="'ar_recall_at_7' exists"):
        evaluate_proposals(view, "proposals", eval_key="ar", ks=(7,), progress=False)
    evaluate_proposals(view, "proposals", eval_key="ar", ks=(2,), progress=False)
    labeled.delete_evaluation("ar")
    assert labeled.values("ar_recall_at_7") == [0.5] * len(labeled)


def test_read_only_labels_can_be_evaluated_only_without_a_key(labeled):
    field = labeled.get_field("proposals")
    field.read_only = True
    field.save()
    with pytest.raises(ValueError, match=r"'proposals' is read-only.*eval_key=None"):
        evaluate_proposals(labeled, "proposals", eval_key="ar", progress=False)
    assert evaluate_proposals(labeled, "proposals", progress=False).metrics()["support"] == 25


def test_evaluation_of_another_method_is_not_replaced(labeled):
    labeled.evaluate_detections("proposals", eval_key="coco", progress=False)
    with pytest.raises(ValueError, match="Cannot overwrite"):
        evaluate_proposals(labeled, "proposals", eval_key="coco", progress=False)
    assert labeled.get_evaluation_info("coco").config.method == "coco"


def test_missing_masks_in_the_ground_truth_are_reported(labeled):
    sample = labeled.last()
    sample.ground_truth.detections[1].mask = None
    sample.save()
    with pytest.raises(ValueError, match=rf"{sample.filepath}: .* has no mask.*prompt_field.*use_masks=False"):
        evaluate_proposals(labeled, "proposals", progress=False)
    evaluate_proposals(labeled, "proposals", use_masks=False, progress=False)


def spoil(label, how, tmp_path):
    if how == "no number":
        label.confidence = float("nan")
    elif how == "whole image":
        label.mask = np.ones((HEIGHT, WIDTH), bool)
    elif how == "outside":
        label.bounding_box = [1.5, 0.1, 0.2, 0.2]
    elif how == "no box":
        label.bounding_box = [0.1, float("nan"), 0.2, 0.2]
    elif how == "pixels":
        label.bounding_box = [10, 10, 40, 40]
    elif how == "empty box":
        label.bounding_box = [0.1, 0.1, 0.0, 0.2]
    elif how == "transposed":
        label.mask = np.ones((label.mask.shape[1] + 9, label.mask.shape[0]), bool)
    elif how == "crowd":
        label["iscrowd"] = "false"
    elif how in ("red", "transparent"):
        colors = np.zeros((*label.mask.shape, 4 if how == "transparent" else 3), np.uint8)
        colors[..., -1] = 255 * label.mask  # red in BGR, alpha in BGRA
        colors[0, 0, -1] = 0
        label.mask, label.mask_path = None, str(tmp_path / "colors.png")
        cv2.imwrite(label.mask_path, colors)
    elif how == "negative":
        label.mask = label.mask - 1.0
    elif how == "gone file":
        label.mask, label.mask_path = None, str(tmp_path / "gone.png")
    elif how == "no image":
        (tmp_path / "text.png").write_text("no image")
        label.mask, label.mask_path = None, str(tmp_path / "text.png")


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("no number", "confidence=nan"),
        ("whole image", f"mask of {WIDTH}x{HEIGHT} pixels.*cropped"),
        ("outside", "outside the image"),
        ("no box", "bounding_box=.*nan"),
        ("pixels", r"bounding_box=\[10.0, 10.0, 40.0, 40.0\].*relative"),
        ("empty box", "bounding_box=.*width, height"),
        ("transposed", "must be cropped to its box"),
        ("crowd", "iscrowd='false'"),
        ("red", "colours"),
        ("transparent", "transparency"),
        ("negative", "negative"),
        ("gone file", "gone.png"),
        ("no image", "text.png' is damaged or not an image"),
    ],
)
def test_bad_label_skips_only_its_image(labeled, images, tmp_path, caplog, how, cause):
    sample = labeled[labeled.values("id")[1]]
    # A proposal outside the image simply matches nothing, but an object there is an error.
    of_object = how in ("outside", "crowd", "red", "transparent", "negative", "transposed")
    label = sample.ground_truth.detections[3] if of_object else sample.proposals.detections[7]
    spoil(label, how, tmp_path)
    sample.save()
    results = evaluate_proposals(labeled, "proposals", eval_key="ar", ks=KS, progress=False)
    assert_equals_coco(results, coco_recall([image for i, image in enumerate(images) if i != 1]))
    (skipped,) = results.skipped
    assert skipped["id"] == sample.id and skipped["filepath"] == sample.filepath
    assert label.id in skipped["cause"]
    assert re.search(cause, skipped["cause"])
    assert "images skipped: 1;" in caplog.text and sample.filepath in caplog.text
    sample.reload()
    assert sample.ar_tp is None
    assert labeled.load_evaluation_results("ar", cache=False).skipped == results.skipped


@pytest.mark.parametrize("content", [b"", b"text", zlib.compress(b""), zlib.compress(b"\x93NUMPY\x01\x00\x10\x00{'de")])
def test_corrupt_mask_skips_its_image(labeled, images, content):
    label = labeled.first().ground_truth.detections[0]
    labeled._sample_collection.update_one(
        {"_id": ObjectId(labeled.first().id)}, {"$set": {"ground_truth.detections.0.mask": content}}
    )
    results = evaluate_proposals(labeled, "proposals", ks=KS, progress=False)
    assert_equals_coco(results, coco_recall(images[1:]))
    assert label.id in results.skipped[0]["cause"] and "can't be decoded" in results.skipped[0]["cause"]


@pytest.mark.parametrize("kind", [np.uint8, np.float32, "fortran", "one channel", "three channels"])
def test_masks_of_any_dtype_and_layout_are_read(labeled, images, kind):
    for sample in labeled:
        for label in sample.ground_truth.detections:
            if kind == "fortran":
                label.mask = np.asfortranarray(label.mask)
            elif kind in ("one channel", "three channels"):
                label.mask = np.repeat(label.mask[..., None], 1 if kind == "one channel" else 3, axis=2)
            else:
                label.mask = label.mask.astype(kind) * 255
        sample.save()
    assert_equals_coco(evaluate_proposals(labeled, "proposals", ks=KS, progress=False), coco_recall(images))


def test_image_of_unknown_size_is_skipped(labeled, images):
    sample = labeled.first()
    sample.filepath = "/nowhere/gone.png"
    sample.save()
    results = evaluate_proposals(labeled, "proposals", ks=KS, progress=False)
    assert_equals_coco(results, coco_recall(images[1:]))
    assert "size" in results.skipped[0]["cause"]
    with pytest.raises(ValueError, match=r"No image could be used.*gone\.png"):
        evaluate_proposals(labeled.limit(1), "proposals", progress=False)


def test_evaluation_without_images(dataset):
    dataset.add_sample_field("a", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    dataset.add_sample_field("b", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    results = evaluate_proposals(dataset, "a", "b", eval_key="ar", progress=False)
    assert math.isnan(results.metrics()["AR@10"]) and results.metrics()["support"] == 0
    assert len(results.missed()) == 0 and str(results.report())
    assert results.plot().data == ()


def test_masks_are_stretched_to_their_boxes(dataset, tmp_path):
    """This is how the App draws them; here, a coarse 2x3 mask lies in a 40x60 box."""
    (sample,) = make_samples([([], [])], tmp_path)
    coarse = np.array([[True, False], [True, True], [True, True]])
    box = [20 / WIDTH, 30 / HEIGHT, 40 / WIDTH, 60 / HEIGHT]
    sample["ground_truth"] = fo.Detections(detections=[fo.Detection(label="a", bounding_box=box, mask=coarse)])
    fine = rectangle(20, 30, 20, 60) | rectangle(20, 50, 40, 40)
    sample["proposals"] = fo.Detections(detections=[detection(fine, confidence=1.0)])
    dataset.add_sample(sample)
    evaluate_proposals(dataset, "proposals", eval_key="ar", progress=False)
    assert dataset.first().ground_truth.detections[0].ar_iou == 1.0


def test_masks_are_clipped_to_the_image(dataset, tmp_path):
    (sample,) = make_samples([([], [])], tmp_path)
    box = [-10 / WIDTH, 100 / HEIGHT, 40 / WIDTH, 40 / HEIGHT]
    mask = np.ones((40, 40), bool)
    sample["ground_truth"] = fo.Detections(detections=[fo.Detection(label="a", bounding_box=box, mask=mask)])
    sample["proposals"] = fo.Detections(detections=[detection(rectangle(0, 100, 30, 20), confidence=1.0)])
    dataset.add_sample(sample)
    evaluate_proposals(dataset, "proposals", eval_key="ar", progress=False)
    assert dataset.first().ground_truth.detections[0].ar_iou == 1.0


def test_labels_deleted_meanwhile_do_not_shift_attributes(labeled):
    """If another process deletes labels between reading and writing, no other label gets their attributes."""
    method = ProposalEvaluationConfig("proposals", "ground_truth", use_masks=True).build()
    method.register_run(labeled, "ar", progress=False)
    first = labeled.first()
    kept = [label.id for label in first.ground_truth.detections[1:]]
    labeled._sample_collection.update_one({"_id": ObjectId(first.id)}, {"$pop": {"ground_truth.detections": -1}})
    matched = dict(zip(method.results.ytrue_ids, method.results.ytrue == method.results.ypred))
    method.register_samples(labeled, "ar")
    labeled.reload()
    for label in labeled.first().ground_truth.detections:
        assert label.id in kept
        if not label.get_attribute_value("iscrowd", False):
            assert label.ar == ("tp" if matched[label.id] else "fn")


@pytest.mark.parametrize("use_masks", [True, False])
def test_values_of_other_types_cost_their_images(dataset, use_masks):
    """All are as another program may have stored them; the good image is found as if it were alone."""
    bad = {
        "ground_truth.detections.0.label": ["cat"],
        "ground_truth.detections.0.iscrowd": [0],
        "ground_truth.detections.0._id": {"a": 1},
        "ground_truth.detections.0": None,
        "ground_truth": 7,
        "proposals.detections": "text",
        "proposals.detections.0._id": "text",
        "proposals.detections.0.confidence": True,
        "proposals.detections.1.confidence": float("inf"),
        "proposals.detections.1.bounding_box": [True, False, True, True],
    }
    fine = {"proposals.detections.0.label": ["cat"], "proposals.detections.0.tags": 5, "ground_truth._cls": None}
    box = rectangle(10, 10, 40, 40)
    for number in range(len(bad) + len(fine) + 1):
        sample = fo.Sample(f"/nowhere/{number}.png", metadata=fo.ImageMetadata(width=WIDTH, height=HEIGHT))
        sample["ground_truth"] = fo.Detections(detections=[detection(box, label="cat")])
        proposals = [detection(box, confidence=0.5), detection(rectangle(0, 0, 9, 9), confidence=0.25)]
        sample["proposals"] = fo.Detections(detections=proposals)
        dataset.add_sample(sample)
    ids = dataset.values("_id")
    for id, (path, value) in zip(ids, (bad | fine).items()):
        dataset._sample_collection.update_one({"_id": id}, {"$set": {path: value}})
    for _ in range(2):  # the second run replaces the first
        results = evaluate_proposals(
            dataset, "proposals", eval_key="ar", ks=[1, 10], use_masks=use_masks, progress=False
        )
    assert [ObjectId(each["id"]) for each in results.skipped] == ids[: len(bad)]
    for path, each in zip(bad, results.skipped):
        assert path.split(".")[-1] in each["cause"] or path.split(".")[0] in each["cause"] or " id " in each["cause"]
    metrics = results.metrics()
    assert (metrics["AR@1"], metrics["AR@10"]) == (1, 1) and len(results.missed()) == 0
    stored = {document["_id"]: document for document in dataset._sample_collection.find({})}
    assert [stored[id].get("ar_tp") for id in ids] == [None] * len(bad) + [1] * (len(fine) + 1)
    dataset.delete_evaluation("ar")
    assert not any("ar_tp" in document for document in dataset._sample_collection.find({}))
    left = {document["_id"]: document for document in dataset._sample_collection.find({})}
    assert left[ids[4]]["ground_truth"] == 7 and left[ids[5]]["proposals"]["detections"] == "text"
