"""The figures before and after a training are those of an evaluation of the same masks."""

import uuid

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2 import evaluate_proposals, load_coco, zoo
from fiftyone_mobilesamv2.evaluation.average_recall import KS
from fiftyone_mobilesamv2.runs.segment import segment_anything, segment_everything
from fiftyone_mobilesamv2.training.labeled_images import read_labels
from fiftyone_mobilesamv2.training.measuring import CONFIDENCE, MAX_PROPOSALS, box_recall, mask_iou, measure
from fiftyone_mobilesamv2.training.scenes import write_coco

PARAMETERS = {"confidence_thresh": CONFIDENCE, "max_prompts": MAX_PROPOSALS}


@pytest.fixture
def model():
    return zoo.load_model("mobilesamv2-demo-torch", device="cpu", **PARAMETERS)


@pytest.fixture
def scenes(mongod, tmp_path):
    dataset = load_coco(*write_coco(tmp_path, 3), name=f"scenes-{uuid.uuid4().hex[:8]}")
    yield dataset
    dataset.delete()


def test_recall_is_that_of_an_evaluation(scenes, model, tmp_path):
    examples = read_labels(scenes, "ground_truth", tmp_path, False).examples
    shares = []
    measures = measure(model.model, examples, shares.append)
    segment_everything(scenes, model, "own", progress=False)
    results = evaluate_proposals(scenes, "own", "ground_truth", "eval", ks=KS, progress=False)
    assert measures.recalls == pytest.approx({k: results.metrics()[f"AR@{k}"] for k in KS}, abs=1e-9)
    assert measures.of_masks and measures.images == 3 and measures.objects == scenes.count("ground_truth.detections")
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    # The masks that each label's box prompts.
    model.config.confidence_thresh = None  # keeps every mask
    segment_anything(scenes, model, "ground_truth", "prompted", progress=False)
    ious = []
    for sample, example in zip(scenes, examples):
        for label, mask in zip(sample.prompted.detections, example.masks):
            whole = label.to_segmentation(frame_size=mask["size"][::-1]).mask > 0
            rle = mask_utils.encode(np.asfortranarray(whole, np.uint8))
            ious.append(mask_utils.iou([rle], [mask], [0])[0, 0])
    assert measures.iou == pytest.approx(np.mean(ious), abs=0.003)  # boxes relative to the image round pixels
    assert measures.iou == mask_iou(model.model, examples)


def test_boxes_without_masks(scenes, model, tmp_path):
    for sample in scenes.iter_samples(autosave=True):
        for label in sample.ground_truth.detections:
            label.mask = None
    examples = read_labels(scenes, "ground_truth", tmp_path, False).examples
    measures = measure(model.model, examples, lambda share: None)
    assert not measures.of_masks and measures.iou is None and 0.3 < measures.recalls[1000] < 1
    detector = model.model.discovery
    assert box_recall(detector.detector, detector.input_size, examples) == pytest.approx(measures.recall)
