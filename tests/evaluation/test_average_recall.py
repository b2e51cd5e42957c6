"""AR@K against pycocotools' own evaluation."""

import contextlib
import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fiftyone_mobilesamv2.evaluation.average_recall import average_recall

SIZE = 64
KS = (1, 3, 10)


def box_rle(box):
    x, y, w, h = box
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask_utils.encode(mask)


def coco_average_recall(images):
    annotations, results = [], []
    for image_id, (proposals, objects) in enumerate(images, 1):
        for rle in objects:
            area = float(mask_utils.area(rle))
            shared = {"image_id": image_id, "category_id": 1, "segmentation": rle, "bbox": [0, 0, 1, 1]}
            annotations.append({**shared, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
        for rank, rle in enumerate(proposals):
            results.append({"image_id": image_id, "category_id": 1, "segmentation": rle, "score": 1 - rank / 100})
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i + 1, "height": SIZE, "width": SIZE} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(KS)
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0, 0, :]  # thresholds x K, all areas
    return {f"AR@{k}": float(recall[:, i].mean()) for i, k in enumerate(KS)}


boxes = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 24), st.integers(1, 24))


@st.composite
def image(draw):
    """Objects, and proposals that are boxes at random or shifted copies of objects, so that they overlap them."""
    objects = draw(st.lists(boxes, min_size=1, max_size=5))
    shifts = st.tuples(st.sampled_from(objects), st.integers(-3, 3), st.integers(-3, 3))
    near = [(max(0, x + dx), max(0, y + dy), w, h) for (x, y, w, h), dx, dy in draw(st.lists(shifts, max_size=12))]
    proposals = draw(st.permutations(near + draw(st.lists(boxes, max_size=4))))
    return [box_rle(box) for box in proposals], [box_rle(box) for box in objects]


@settings(max_examples=60, deadline=None)
@given(st.lists(image(), min_size=1, max_size=4).filter(lambda images: any(proposals for proposals, _ in images)))
def test_equals_cocoeval(images):
    mine, theirs = average_recall(images, KS), coco_average_recall(images)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert abs(mine[name] - theirs[name]) < 1e-12


def test_by_hand():
    objects = [box_rle((0, 0, 10, 10)), box_rle((30, 30, 10, 10))]
    # The first has IoU 0.8 with the first object: recalled at 0.50 .. 0.80, 7 of 10 thresholds. The third is exact.
    proposals = [box_rle((0, 0, 10, 8)), box_rle((50, 0, 5, 5)), box_rle((30, 30, 10, 10))]
    result = average_recall([(proposals, objects)], ks=(1, 3))
    assert abs(result["AR@1"] - 0.35) < 1e-12
    assert abs(result["AR@3"] - 0.85) < 1e-12


def test_nothing_found_and_nothing_there():
    assert average_recall([([], [box_rle((0, 0, 5, 5))])], ks=(10,)) == {"AR@10": 0.0}
    assert np.isnan(average_recall([([box_rle((0, 0, 5, 5))], [])], ks=(10,))["AR@10"])
