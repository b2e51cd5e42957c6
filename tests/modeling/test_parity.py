"""What the released MobileSAMv2 computes with seeded weights, every number within the tolerances of its README."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_detector
from fiftyone_mobilesamv2.modeling.grid_prompts import GridFilter
from fiftyone_mobilesamv2.modeling.image_encoders import ENCODERS as REGISTRY
from fiftyone_mobilesamv2.modeling.masks import Segmentation, crop_masks, upsample
from fiftyone_mobilesamv2.modeling.object_discovery import ObjectDiscovery, boxes_from_raw

ENCODERS = [
    "tiny_vit",
    pytest.param("efficientvit_l0", marks=pytest.mark.slow),  # seconds an image, as the next two
    pytest.param("efficientvit_l1", marks=pytest.mark.slow),
    pytest.param("efficientvit_l2", marks=pytest.mark.slow),
    pytest.param("sam_vit_b", marks=pytest.mark.slow),  # tens of seconds an image
    pytest.param("sam_vit_h", marks=pytest.mark.slow),  # 2.5 GB of weights
]


def test_no_encoder_is_forgotten():
    names = {encoder if isinstance(encoder, str) else encoder.values[0] for encoder in ENCODERS}
    # SAM's ViT-L is compared with Meta's code (checkpoints/test_catalog.py): the release has none. Two are ours.
    assert names | {"sam_vit_l", "efficientnet_lite0", "resnet_demo"} == set(REGISTRY)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoder_decoder_and_masks(seeded, encoder, record_property):
    model = seeded.model(encoder)
    recorded = np.load(seeded.path(f"{encoder}.npz"))
    for name, case in seeded.json(f"{encoder}.json")["cases"].items():
        image = seeded.image(case["height"], case["width"], case["phase"])
        boxes = np.array(case["boxes_xyxy"], np.float32)
        embedding = model.encode([image])
        assert embedding.input_sizes == [tuple(case["input_size"])]
        assert embedding.original_sizes == [(case["height"], case["width"])]
        deviation = np.abs(embedding.features[0, ::8, ::4, ::4].numpy() - recorded[f"{name}/embedding_sub"])
        assert deviation.max() <= 1e-3 * case["embedding_std"]
        record_property(f"{name} embedding", float(deviation.max() / case["embedding_std"]))

        (logits,), (iou,) = model.decode(embedding, [boxes])
        deviation = np.abs(logits[:, ::4, ::4].numpy() - recorded[f"{name}/low_res_logits_sub"])
        assert deviation.max() <= 1e-3 * case["logit_std"]
        record_property(f"{name} logits", float(deviation.max() / case["logit_std"]))
        np.testing.assert_allclose(iou.numpy(), recorded[f"{name}/iou_pred"][:, 0], atol=1e-4)

        size = image.shape[:2]
        cropped = crop_masks(logits, 1024, embedding.input_sizes[0], size)
        found = Segmentation(cropped[0], cropped[1], iou, iou, cropped[2], size)
        expected = [{"size": rle["size"], "counts": rle["counts"].encode()} for rle in case["masks_rle"]]
        ious = [mask_utils.iou([mine], [theirs], [0])[0, 0] for mine, theirs in zip(found.rle(), expected)]
        assert len(found) == len(expected)
        assert min(ious) >= 0.999
        record_property(f"{name} mask IoU", float(min(ious)))
        # ... and cropped masks are the whole maps' masks, to the pixel.
        full = upsample(logits, 1024, embedding.input_sizes[0], size).numpy() > 0
        assert all(np.array_equal(found.full_mask(i), full[i]) for i in range(len(found)))


def test_nms_snapping_and_scaling(seeded):
    recorded = np.load(seeded.path("object_discovery.npz"))
    sizes = seeded.json("object_discovery.json")
    settings = [key for key in recorded.files if key.endswith("/boxes")]
    assert len(settings) == 9
    for key in settings:
        case, setting, _ = key.split("/")
        conf, iou, max_prompts = setting.split("-")
        prompts = boxes_from_raw(
            torch.from_numpy(recorded[f"{case}/raw"][0]),
            tuple(sizes[case]["network"]),
            tuple(sizes[case]["original"]),
            float(conf),
            float(iou),
            int(max_prompts),
        )
        np.testing.assert_allclose(prompts.boxes.numpy(), recorded[key], atol=0.05)
        np.testing.assert_allclose(prompts.scores.numpy(), recorded[f"{case}/{setting}/scores"], atol=1e-6)


def test_released_detector_finds_the_stored_boxes(seeded):
    discovery = ObjectDiscovery(load_detector(seeded.detector_checkpoint))
    cases = seeded.json("object_aware_model_n_seeded.json")
    images = [seeded.image(case["height"], case["width"], case["phase"]) for case in cases.values()]
    for image, case in zip(images, cases.values()):
        with torch.inference_mode():
            prompts = discovery(image, conf=0.4, iou=0.9, max_prompts=300)
        assert len(prompts.boxes) == len(case["boxes_xyxy"])
        # Some scores are equal but for the last digits, where the order of float additions decides: each stored box is
        # found, once, with its score, wherever among its equals.
        away = np.abs(prompts.boxes.numpy()[:, None] - np.array(case["boxes_xyxy"])).max(axis=2)
        found = away.argmin(axis=0)
        assert len(set(found)) == len(found)
        assert away.min(axis=0).max() <= 0.05
        np.testing.assert_allclose(prompts.scores.numpy()[found], case["scores"], atol=1e-4)
        np.testing.assert_allclose(prompts.scores.numpy(), case["scores"], atol=1e-4)


def test_grid_search(seeded):
    recorded = seeded.json("grid_prompts.json")
    image = seeded.image(recorded["height"], recorded["width"], recorded["phase"])
    model = seeded.model(recorded["encoder"])
    for run in recorded["runs"]:
        settings = run["settings"]
        assert settings["points_per_batch"] == 64
        found = model.segment_everything(
            [image],
            prompting="grid",
            points_per_side=settings["points_per_side"],
            grid_filter=GridFilter(
                settings["pred_iou_thresh"], settings["stability_score_thresh"], settings["box_nms_thresh"]
            ),
        )[0]
        expected = run["masks"]
        assert len(found) == len(expected)
        np.testing.assert_allclose(found.predicted_iou, [mask["predicted_iou"] for mask in expected], atol=1e-4)
        np.testing.assert_allclose(found.stability, [mask["stability_score"] for mask in expected], atol=1e-4)
        np.testing.assert_allclose(found.points, [mask["point"] for mask in expected])
        # SAM's boxes are xywh between the centres of the first and the last pixel.
        x0, y0, x1, y1 = found.boxes.T
        np.testing.assert_array_equal(
            np.stack([x0, y0, x1 - x0 - 1, y1 - y0 - 1], 1), [mask["bbox"] for mask in expected]
        )
        for rle, mask in zip(found.rle(), expected):
            counts = mask["segmentation"]["counts"]
            theirs = {"size": mask["segmentation"]["size"], "counts": counts.encode()}
            assert mask_utils.iou([rle], [theirs], [0])[0, 0] >= 0.999
        np.testing.assert_allclose(found.areas, [mask["area"] for mask in expected], rtol=1e-3)
