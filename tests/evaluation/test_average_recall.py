"""AR@K compared with pycocotools' and LVIS's own evaluations."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fiftyone_mobilesamv2.evaluation.average_recall import (
    AREA_RANGES,
    KS,
    NOT_FOUND,
    AverageRecall,
    average_recall,
    ranking,
)

SIZE = 128  # of synthetic images; leaves room for areas above 96**2


@dataclass
class Image:
    """An image to evaluate. Shapes are RLEs or boxes [N, 4]; `areas` are those of the ground truth, None by default."""

    proposals: Sequence
    scores: Sequence[float]
    objects: Sequence
    is_crowd: Sequence[bool] | None = None
    areas: Sequence[float] | None = None
    frequencies: Sequence[str] | None = None

    def add_to(self, recall: AverageRecall):
        order = ranking(self.scores, len(self.scores))
        is_array = isinstance(self.proposals, np.ndarray)
        ranked = self.proposals[order] if is_array else [self.proposals[i] for i in order]
        return recall.add(ranked, self.objects, self.is_crowd, self.areas, self.frequencies)


def box_rle(box, size=SIZE):
    x, y, w, h = box
    mask = np.zeros((size, size), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask_utils.encode(mask)


def rles(*boxes):
    return [box_rle(box) for box in boxes]


def shape_fields(shape):
    """The fields of a COCO annotation for a box or mask; the area is what the shape covers."""
    if isinstance(shape, dict):
        return {"segmentation": shape, "area": float(mask_utils.area(shape))}
    return {"bbox": list(map(float, shape)), "area": float(shape[2] * shape[3])}


def run_cocoeval(images, iou_type, ks):
    objects, proposals = [], []
    for image_id, image in enumerate(images, 1):
        shared = {"image_id": image_id, "category_id": 1}
        for i, shape in enumerate(image.objects):
            annotation = {**shared, **shape_fields(shape), "id": len(objects) + 1}
            annotation["iscrowd"] = 0 if image.is_crowd is None else int(image.is_crowd[i])
            if image.areas is not None:
                annotation["area"] = image.areas[i]
            objects.append(annotation)
        for shape, score in zip(image.proposals, image.scores):
            proposals.append({**shared, **shape_fields(shape), "id": len(proposals) + 1, "score": float(score)})
    loaded = []
    with contextlib.redirect_stdout(io.StringIO()):
        for annotations in (objects, proposals):
            coco = COCO()
            coco.dataset = {
                "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(1, len(images) + 1)],
                "annotations": annotations,
                "categories": [{"id": 1, "name": "object"}],
            }
            coco.createIndex()
            loaded.append(coco)
        evaluation = COCOeval(*loaded, iou_type)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(ks)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def assert_recalls_equal(recall, group, ks, theirs):
    """`theirs`: [thresholds, K], with -1 for groups without objects."""
    theirs = np.where(theirs == -1, np.nan, theirs)
    for k, at_k in zip(ks, theirs.T):
        np.testing.assert_allclose(recall.recalls(k, group), at_k, rtol=0, atol=1e-12)
        np.testing.assert_allclose(recall.curve(group)[k - 1], at_k.mean(), rtol=0, atol=1e-12)
    name = {"all": "AR", "small": "ARs", "medium": "ARm", "large": "ARl"}[group]
    metrics = recall.metrics()
    np.testing.assert_allclose(
        [*(metrics[f"{name}@{k}"] for k in ks), metrics[name]], [*theirs.mean(0), theirs.mean()], rtol=0, atol=1e-12
    )


def assert_matches_equal(image, matches, theirs, ious):
    """`theirs`: COCOeval's result for the image, for all areas."""
    crowd = np.zeros(len(image.objects), bool) if image.is_crowd is None else np.array(image.is_crowd, bool)
    if theirs is None:
        assert not len(image.objects) and not len(image.proposals)
        theirs = {"gtIds": [], "dtIds": [], "gtMatches": np.zeros((10, 0))}
        theirs |= {"dtMatches": np.zeros((10, 0)), "dtIgnore": np.zeros((10, 0))}
    rank_of = {0: NOT_FOUND} | {proposal: rank for rank, proposal in enumerate(theirs["dtIds"])}
    # IDs ascend in the order of objects; COCOeval sorts crowds last.
    matched = theirs["gtMatches"][:, np.argsort(theirs["gtIds"])].reshape(10, len(crowd))
    ranks = np.vectorize(rank_of.get, otypes=[np.int64])(matched)
    ranks[:, crowd] = NOT_FOUND
    np.testing.assert_array_equal(matches.ranks, ranks)
    unmatched = (theirs["dtMatches"][0] == 0) & ~theirs["dtIgnore"][0].astype(bool)
    np.testing.assert_array_equal(matches.unmatched, unmatched)

    shape = len(theirs["dtIds"]), len(crowd)
    ious = np.array(ious).reshape(shape) if np.size(ious) else np.zeros(shape)
    np.testing.assert_array_equal(matches.ious, ious)
    np.testing.assert_array_equal(matches.best_ious, ious.max(0) if len(ious) else np.zeros(len(crowd)))


def has_rivals(matches, is_crowd):
    """Whether two objects share their first sufficiently overlapping proposal."""
    overlaps = matches.ious[:, ~np.array(is_crowd, bool)] >= 0.5
    first = overlaps.argmax(0)[overlaps.any(0)] if len(overlaps) else []
    return len(set(first)) < len(first)


def assert_equals_cocoeval(images, iou_type, ks):
    """Returns the indices of images in which objects compete for a proposal."""
    recall, evaluation = AverageRecall(ks), run_cocoeval(images, iou_type, ks)
    matches = [image.add_to(recall) for image in images]
    assert recall.images == len(images)
    for i, (image, match) in enumerate(zip(images, matches)):
        assert_matches_equal(image, match, evaluation.evalImgs[i], evaluation.ious[i + 1, -1])
    for group, theirs in zip(AREA_RANGES, np.moveaxis(evaluation.eval["recall"][:, 0], 1, 0), strict=True):
        assert_recalls_equal(recall, group, ks, theirs)
    return [i for i, (image, match) in enumerate(zip(images, matches)) if has_rivals(match, image.is_crowd)]


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark module, which makes proposals from the photos' objects."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "evaluation.py"
    spec = importlib.util.spec_from_file_location("benchmark_evaluation", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def annotated(photos, benchmark):
    """The 128 photos; only every fourth has more than 1000 proposals because COCOeval is slow."""
    counts = [1010 if i % 4 == 0 else 200 for i in range(128)]
    photos_read = benchmark.read_photos(photos, counts)
    assert len(photos_read) == 128 and sum(a["iscrowd"] for each in photos_read for a in each.annotations) == 13
    return photos_read


def image_of(photo, proposals, objects, **kwargs):
    is_crowd = [bool(a["iscrowd"]) for a in photo.annotations]
    return Image(proposals, photo.scores, objects, is_crowd, **kwargs)


@pytest.mark.slow
def test_masks_of_photos_equal_cocoeval(annotated):
    images = [image_of(p, p.proposals, p.objects, areas=[a["area"] for a in p.annotations]) for p in annotated[::4]]
    assert assert_equals_cocoeval(images, "segm", KS), "no rivals: this shows little"
    # By default, areas are those of the masks. Photos with few proposals save time.
    assert_equals_cocoeval([image_of(p, p.proposals, p.objects) for p in annotated[1::16]], "segm", KS)


@pytest.mark.slow
@pytest.mark.parametrize("areas_from", ["annotations", "boxes"])
def test_boxes_of_photos_equal_cocoeval(annotated, areas_from):
    rng = np.random.default_rng(0)
    images = []
    for photo in annotated[::2]:
        boxes = np.array([a["bbox"] for a in photo.annotations]).reshape(-1, 4)
        count = len(photo.proposals)
        near = boxes[rng.integers(len(boxes), size=count)] * rng.uniform(0.8, 1.25, (count, 4))
        anywhere = rng.uniform(0, 300, (count, 4))
        proposals = np.where(rng.random((count, 1)) < 0.7, near, anywhere)
        areas = [a["area"] for a in photo.annotations] if areas_from == "annotations" else None
        images.append(image_of(photo, proposals, boxes, areas=areas))
    assert assert_equals_cocoeval(images, "bbox", (1, 10, 100, 1000)), "no rivals: this shows little"


# 32x32 and 96x96 are the limits of the area ranges; an empty mask has area 0; 128 fills the image.
sides = st.sampled_from([0, 1, 2, 5, 16, 31, 32, 33, 95, 96, 97, SIZE])


@st.composite
def boxes(draw, near=()):
    """Boxes inside the image; boxes near others differ by a few pixels or not at all."""
    if near:
        steps = st.integers(-3, 3)
        x, y, w, h = (side + draw(steps) * draw(st.booleans()) for side in draw(st.sampled_from(near)))
    else:
        x, y, w, h = draw(st.integers(0, SIZE)), draw(st.integers(0, SIZE)), draw(sides), draw(sides)
    w, h = np.clip([w, h], 0, SIZE)
    return int(np.clip(x, 0, SIZE - w)), int(np.clip(y, 0, SIZE - h)), int(w), int(h)


@st.composite
def drawn_images(draw, iou_type):
    objects = draw(st.lists(boxes(), max_size=4))
    if objects:
        objects += draw(st.lists(boxes(objects), max_size=5))
    proposals = draw(st.lists(boxes(), max_size=3))
    if objects:
        proposals += draw(st.lists(boxes(objects), max_size=15))
    proposals = draw(st.permutations(proposals))
    scores = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(proposals), max_size=len(proposals)))
    of_each = {"min_size": len(objects), "max_size": len(objects)}
    is_crowd = draw(st.lists(st.sampled_from([False, False, False, True]), **of_each) | st.just([True] * len(objects)))
    areas = draw(st.none() | st.lists(st.sampled_from([0, 500, 32**2, 32.5**2, 96**2, 96.5**2]), **of_each))
    if iou_type == "segm":
        return Image(rles(*proposals), scores, rles(*objects), is_crowd, areas)
    return Image(np.array(proposals).reshape(-1, 4), scores, np.array(objects).reshape(-1, 4), is_crowd, areas)


kss = st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True).map(sorted)


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), ks=kss)
def test_random_shapes_equal_cocoeval(iou_type, data, ks):
    images = data.draw(st.lists(drawn_images(iou_type), min_size=1, max_size=3))
    rivals = assert_equals_cocoeval(images, iou_type, ks)
    event(f"rivals: {bool(rivals)}")
    event(f"crowds: {any(any(image.is_crowd) for image in images)}")


@pytest.mark.parametrize(
    "image",
    [
        Image([], [], []),
        Image([], [], rles((0, 0, 5, 5))),
        Image(rles((0, 0, 5, 5)), [1], []),
        Image(rles((0, 0, 5, 5), (9, 9, 5, 5)), [0, 1], rles((0, 0, 5, 5)), is_crowd=[True]),
        Image(rles((0, 0, 0, 0)), [1], rles((0, 0, 0, 0), (1, 1, 1, 1))),
        Image(rles((0, 0, SIZE, SIZE)), [1], rles((0, 0, SIZE, SIZE))),
    ],
    ids=["nothing", "no proposals", "no objects", "only a crowd", "empty masks", "whole image"],
)
def test_edge_cases_equal_cocoeval(image):
    assert_equals_cocoeval([image], "segm", (1, 5))


def test_area_at_a_limit_is_in_both_ranges():
    side = {"small": 32, "large": 96}
    recall = AverageRecall()
    for image in [Image(rles((0, 0, s, s)), [1], rles((0, 0, s, s))) for s in side.values()]:
        image.add_to(recall)
    assert recall.totals == {"all": 2, "small": 1, "medium": 2, "large": 1}
    assert recall.metrics()["ARs"] == recall.metrics()["ARm"] == recall.metrics()["ARl"] == 1


def test_areas_of_the_ground_truth_are_used():
    recall = AverageRecall()
    recall.add([], rles((0, 0, 5, 5), (0, 0, 6, 6)), areas=[50**2, 1000**2])
    assert recall.totals == {"all": 2, "small": 0, "medium": 1, "large": 1}


def test_competing_objects_equal_cocoeval():
    objects = rles((0, 0, 40, 40), (0, 0, 44, 40), (0, 0, 48, 40), (0, 0, 52, 40), (14, 0, 60, 40))
    proposals = rles((0, 0, 46, 40), (12, 0, 48, 40), (0, 0, 42, 40), (0, 0, 48, 40), (0, 0, 30, 40))
    image = Image(proposals, [5, 4, 3, 2, 1], objects, is_crowd=[False] * 5)
    assert assert_equals_cocoeval([image], "segm", (1, 2, 3, 4, 5)) == [0]
    # All objects but the fifth compete for the first proposal; the third wins with IoU 46/48. The second and the
    # fourth try the second proposal, which is nearer to the fifth, then compete with the first for the third one.
    assert image.add_to(AverageRecall()).ranks[0].tolist() == [4, 2, 0, 3, 1]


def test_last_of_equally_overlapping_objects_is_matched():
    """The other object stays unmatched because nothing else overlaps it."""
    image = Image(rles((10, 0, 20, 20), (40, 0, 5, 5)), [1, 0], rles((8, 0, 20, 20), (12, 0, 20, 20)), [False] * 2)
    assert assert_equals_cocoeval([image], "segm", (1, 2)) == [0]
    assert image.add_to(AverageRecall()).ranks[0].tolist() == [NOT_FOUND, 0]


def test_ignored_object_uses_up_no_proposal():
    """A crowd may match any number of proposals, and an object outside the area range gives way to one inside it."""
    crowd, inside = (0, 0, 100, 100), (10, 10, 20, 20)
    image = Image(
        rles((10, 10, 20, 20), (40, 40, 9, 9), (60, 60, 9, 9), (90, 90, 38, 38)),
        [4, 3, 2, 1],
        rles(crowd, inside),
        is_crowd=[True, False],
    )
    assert_equals_cocoeval([image], "segm", (1, 4))
    matches = image.add_to(AverageRecall())
    assert matches.unmatched.tolist() == [False, False, False, True]
    assert matches.ranks[:, 1].tolist() == [0] * 10

    # The proposal is nearer to the 33x33 object, which is not small.
    image = Image(rles((0, 0, 33, 33)), [1], rles((0, 0, 33, 33), (0, 0, 32, 32)), [False] * 2)
    assert_equals_cocoeval([image], "segm", (1,))
    recall = AverageRecall()
    image.add_to(recall)
    assert recall.metrics()["ARs@10"] == pytest.approx(0.9)  # IoU 0.940


def test_by_hand():
    objects = rles((0, 0, 10, 10), (30, 30, 10, 10))
    # The first proposal has IoU 0.8 with the first object, enough for 7 of the 10 thresholds. The third is exact.
    proposals = rles((0, 0, 10, 8), (50, 0, 5, 5), (30, 30, 10, 10))
    result = average_recall([(proposals, objects)], ks=(3, 1))
    expected = {"AR@1": 0.35, "AR@3": 0.85, "AR": 0.6, "ARs@1": 0.35, "ARs@3": 0.85, "ARs": 0.6}
    nans = dict.fromkeys(["ARm@1", "ARm@3", "ARm", "ARl@1", "ARl@3", "ARl"], np.nan)
    assert result == pytest.approx(expected | nans, rel=0, abs=1e-12, nan_ok=True)


def test_frequencies_by_hand():
    objects = rles((0, 0, 10, 10), (30, 30, 10, 10), (60, 60, 10, 10), (90, 90, 10, 10))
    image = Image(objects[:2], [2, 1], objects, [False, False, False, True], frequencies=["r", "f", "f", "c"])
    recall = AverageRecall((1, 10))
    image.add_to(recall)
    metrics = recall.metrics()
    assert recall.totals["rare"] == 1 and recall.totals["common"] == 0 and recall.totals["frequent"] == 2
    assert (metrics["ARr@1"], metrics["ARf@1"], metrics["ARf@10"]) == (1, 0, 0.5)
    assert np.isnan(metrics["ARc"])
    # Images without frequencies don't count in these groups.
    Image(objects, range(4), objects).add_to(recall)
    assert recall.totals["rare"] == 1 and recall.totals["all"] == 7


@pytest.fixture
def lvis(monkeypatch):
    import lvis

    monkeypatch.setattr(np, "float", float, raising=False)  # lvis uses it, but numpy removed it
    return lvis


def run_lviseval(lvis, images, folder, keep=None):
    """LVISEval's recall [thresholds, area ranges] for objects of one frequency or all, treated as one category."""
    objects, proposals, entries = [], [], []
    for image_id, image in enumerate(images, 1):
        height, width = image.objects[0]["size"]
        lists = {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
        entries.append({"id": image_id, "height": height, "width": width, **lists})
        shared = {"image_id": image_id, "category_id": 1}
        for rle, frequency, area in zip(image.objects, image.frequencies, image.areas):
            if keep in (None, frequency):
                text = {**rle, "counts": rle["counts"].decode()}
                objects.append({**shared, "id": len(objects) + 1, "segmentation": text, "area": area})
        for rle, score in zip(image.proposals, image.scores):
            proposals.append({**shared, "segmentation": rle, "score": float(score)})
    categories = [{"id": 1, "name": "object", "frequency": "f"}]
    path = folder / "lvis.json"
    path.write_text(json.dumps({"images": entries, "annotations": objects, "categories": categories}))
    truth = lvis.LVIS(str(path))
    evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, proposals, max_dets=1000), "segm")
    evaluation.params.max_dets = 1000
    evaluation.run()
    recall = evaluation.eval["recall"][:, 0]
    assert evaluation.results["AR@1000"] == pytest.approx(recall[:, 0].mean(), abs=1e-12)
    return recall


@pytest.mark.slow
def test_results_equal_lviseval(annotated, lvis, tmp_path):
    """LVIS has no crowds. AR of rare, common or frequent categories counts only their objects."""
    images = []
    for photo in annotated[::4]:
        frequencies = ["rcf"[a["category_id"] % 3] for a in photo.annotations]
        areas = [a["area"] for a in photo.annotations]
        images.append(Image(photo.proposals, photo.scores, photo.objects, None, areas, frequencies))
    recall = AverageRecall()
    for image in images:
        image.add_to(recall)
    everything = run_lviseval(lvis, images, tmp_path)
    for group, theirs in zip(AREA_RANGES, everything.T, strict=True):
        np.testing.assert_allclose(recall.recalls(1000, group), theirs, rtol=0, atol=1e-12)
    for group, frequency in {"rare": "r", "common": "c", "frequent": "f"}.items():
        theirs = run_lviseval(lvis, images, tmp_path, keep=frequency)[:, 0]
        np.testing.assert_allclose(recall.recalls(1000, group), theirs, rtol=0, atol=1e-12)
        assert 0 < theirs.mean() < 1


def parts_of(images, ks):
    parts = []
    for image in images:
        parts.append(AverageRecall(ks))
        image.add_to(parts[-1])
    return parts


@settings(max_examples=40, deadline=None)
@given(data=st.data(), ks=kss)
def test_merging_does_not_depend_on_the_order(data, ks):
    images = data.draw(st.lists(drawn_images("segm"), min_size=1, max_size=6))
    for image in images:
        some = st.sampled_from(["r", "c", "f", None])
        image.frequencies = data.draw(st.none() | st.just([data.draw(some) for _ in image.objects]))
    whole = AverageRecall(ks)
    for image in images:
        image.add_to(whole)
    parts = parts_of(images, ks)
    before = [part.to_dict() for part in parts]
    left = [AverageRecall(ks), *parts]
    while len(left) > 1:
        first, second, *left = data.draw(st.permutations(left))
        left.append(first + second)
    assert left[0].to_dict() == whole.to_dict()
    assert [part.to_dict() for part in parts] == before
    np.testing.assert_equal(left[0].metrics(), whole.metrics())


def test_merging_different_ks_is_refused():
    with pytest.raises(ValueError, match="can't be merged"):
        AverageRecall((10, 100)) + AverageRecall((10, 1000))


@pytest.mark.parametrize("ks", [(3, 1), np.array([1, 3])], ids=["tuple", "array"])
def test_json_round_trip(ks):
    objects = rles((0, 0, 10, 10), (30, 30, 10, 10))
    recall = AverageRecall(ks)
    recall.add(objects[:1], objects, frequencies=["r", None])
    restored = AverageRecall.from_dict(json.loads(json.dumps(recall.to_dict())))
    assert restored.ks == (1, 3) and restored.images == 1
    assert restored.to_dict() == recall.to_dict()
    np.testing.assert_equal(restored.metrics(), recall.metrics())
    assert (restored + recall).totals == {"all": 4, "small": 4, "medium": 0, "large": 0} | {
        "rare": 2,
        "common": 0,
        "frequent": 0,
    }
    restored.add(objects, objects)
    assert restored.images == 2


@pytest.mark.parametrize("ks", [(), (0,), (10, -1), (2.5,), (True,), (float("nan"),), (10.0,), ("10",), (None,)])
def test_invalid_ks_are_refused(ks):
    with pytest.raises(ValueError, match="whole numbers from 1 to 100,000"):
        AverageRecall(ks)


@pytest.mark.parametrize("k", [4, 0, -1])
def test_k_beyond_the_evaluated_ones_is_refused(k):
    with pytest.raises(ValueError, match=f"K={k}"):
        AverageRecall((1, 3)).recalls(k)


def test_proposals_beyond_the_largest_k_are_ignored():
    proposals = rles((0, 0, 5, 5), (10, 10, 10, 10))
    matches = AverageRecall((1,)).add(proposals, proposals[1:])
    assert matches.ious.shape == (1, 1) and matches.unmatched.tolist() == [True]


def test_curve():
    objects = rles((0, 0, 10, 10), (30, 30, 10, 10))
    recall = AverageRecall((4,))
    recall.add(rles((0, 0, 10, 8), (50, 0, 5, 5), (30, 30, 10, 10)), objects)
    np.testing.assert_allclose(recall.curve(), [0.35, 0.35, 0.85, 0.85], rtol=0, atol=1e-12)
    assert np.isnan(recall.curve("large")).all() and len(recall.curve("large")) == 4


def test_ranking_is_stable_and_limited():
    assert ranking([0.5, 1, 0.5, 0, 1], 4).tolist() == [1, 4, 0, 2]
    assert ranking([], 10).tolist() == []
    assert ranking([-np.inf, np.inf], 10).tolist() == [1, 0]
    many = np.random.default_rng(0).integers(0, 3, 1000)
    assert ranking(many, 1000).tolist() == sorted(range(1000), key=lambda i: -many[i])


@pytest.mark.parametrize("scores", [[0.5, None], [np.nan, 0.5]])
def test_ranking_refuses_missing_scores(scores):
    with pytest.raises(ValueError, match="1 of 2 scores are missing or NaN"):
        ranking(scores, 1)


def test_import_loads_neither_fiftyone_nor_torch():
    code = (
        "import sys, fiftyone_mobilesamv2.evaluation.average_recall;"
        "print([name for name in ('fiftyone', 'torch') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
