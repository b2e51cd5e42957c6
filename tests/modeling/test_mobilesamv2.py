"""The whole model: results don't depend on the batch, prompts keep their order, and errors name the wrong input."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_detector
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config, preprocess
from fiftyone_mobilesamv2.modeling.masks import Segmentation, upsample
from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.modeling.object_discovery import ObjectDiscovery
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import PromptGuidedDecoder

SIZES = [(64, 64), (48, 100), (1, 90), (120, 40)]
FEW = {"conf": 0.001, "max_prompts": 3}  # the detector finds little in these images of waves


@pytest.fixture(scope="module")
def model(seeded) -> MobileSAMv2:
    """The demo model's architecture with random weights, and the demo detector."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = encoder_config("resnet_demo")
        encoder = config.build()
        decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    with torch.no_grad():
        for mlp in decoder.mask_decoder.output_hypernetworks_mlps:  # spreads the logits as in a trained model
            mlp.layers[-1].weight *= 100
        decoder.mask_decoder.iou_prediction_head.layers[-1].bias[1] -= (
            5  # so that the first of three masks is never the best
        )
    detector = load_detector(PACKAGED_WEIGHTS / "demo_detector.safetensors")
    return MobileSAMv2(encoder, decoder, config, ObjectDiscovery(detector, 320), "cpu")


@pytest.fixture(scope="module")
def images(seeded) -> list[np.ndarray]:
    return [seeded.image(*size, phase) for phase, size in enumerate(SIZES)]


def assert_same(found: Segmentation, expected: Segmentation) -> None:
    assert found.size == expected.size and len(found) == len(expected)
    for name in ("boxes", "confidence", "predicted_iou", "stability"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found.masks, expected.masks))


# Independence of the batch ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(model, images) -> list[Segmentation]:
    return [model.segment_everything([image], **FEW)[0] for image in images]


def test_results_of_single_images_differ(alone):
    assert [segmentation.size for segmentation in alone] == SIZES
    # The tests of batches below prove nothing unless results differ. Images without masks don't count.
    shown = [segmentation.predicted_iou.tobytes() for segmentation in alone if len(segmentation)]
    assert len(set(shown)) == len(shown) >= 2


@pytest.mark.parametrize("order", [(3, 1, 0, 2), (2, 3, 1, 0), (0, 0, 1)], ids=str)
def test_result_does_not_depend_on_the_batch(model, images, alone, order):
    for i, found in zip(order, model.segment_everything([images[i] for i in order], **FEW), strict=True):
        assert_same(found, alone[i])


def test_grid_does_not_depend_on_the_batch(model, images):
    few = [images[0], images[2]]
    together = model.segment_everything(few, prompting="grid", points_per_side=2)
    for image, found in zip(few, together, strict=True):
        assert_same(found, model.segment_everything([image], prompting="grid", points_per_side=2)[0])


def test_confidence_comes_from_the_detector(model, images, alone):
    """There is one mask per box, most confident first, without the empty ones."""
    for image, found in zip(images, alone):
        (prompts,) = model.discover([image], **FEW)
        whole = model.segment_anything([image], boxes=[prompts.boxes])[0]
        kept = np.flatnonzero(whole.areas)
        np.testing.assert_array_equal(found.confidence, prompts.scores.numpy()[kept])
        np.testing.assert_array_equal(found.predicted_iou, whole.predicted_iou[kept])
        np.testing.assert_array_equal(found.boxes, whole.boxes[kept])


def test_no_objects_found(model, images):
    found = model.segment_everything([images[0], images[1]], conf=1.0)
    for segmentation, image in zip(found, images):
        assert len(segmentation) == 0 and segmentation.size == image.shape[:2]
        assert segmentation.boxes.shape == (0, 4) and segmentation.confidence.shape == (0,)
        assert segmentation.rle() == []


def test_no_images(model):
    assert model.segment_everything([]) == model.segment_everything([], prompting="grid") == []
    assert model.segment_anything([], boxes=[]) == model.discover([]) == []
    embeddings = model.encode([])
    assert len(embeddings) == 0 and embeddings.features.shape == (0, 128, 32, 32)
    assert model.decode(embeddings, []) == ([], [])


# SegAny -------------------------------------------------------------------------------------------------------------


def decode_with_sam(
    model, image, box=None, points=None, labels=None, multimask=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full-size logits [M, H, W] and predicted IoU [M] of one prompt, computed with SAM's own modules."""
    _, input_size = preprocess(image, 256)
    scale = np.array([input_size[1] / image.shape[1], input_size[0] / image.shape[0]], np.float32)
    prompt_encoder = model.decoder.prompt_encoder
    with torch.inference_mode():
        sparse, dense = prompt_encoder(
            points=None if points is None else (torch.tensor(points * scale)[None], torch.tensor(labels)[None]),
            boxes=None if box is None else torch.tensor(box.reshape(2, 2) * scale).reshape(1, 4),
            masks=None,
        )
        logits, iou = model.decoder.mask_decoder(
            model.encode([image]).features, prompt_encoder.get_dense_pe(), sparse, dense, multimask
        )
        return upsample(logits[0], 256, input_size, image.shape[:2]), iou[0]


def assert_mask(found: Segmentation, index: int, logits: torch.Tensor, iou: torch.Tensor) -> None:
    logits = logits.numpy()
    assert abs(found.predicted_iou[index] - float(iou)) < 1e-4
    assert found.confidence[index] == found.predicted_iou[index]
    certain = np.abs(logits) > 1e-4 * np.abs(logits).max()  # the others depend on the order of float additions
    assert certain.mean() > 0.95
    np.testing.assert_array_equal(found.full_mask(index)[certain], (logits > 0)[certain])


def prompts_in(image: np.ndarray, seed: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Five boxes, and five prompts with varying numbers of foreground and background points."""
    generator = np.random.default_rng(seed)
    size = np.array(image.shape[1::-1], np.float32)
    corners = np.sort(generator.random((5, 2, 2), np.float32), axis=1) * size
    points = [generator.random((count, 2), np.float32) * size for count in (1, 3, 1, 2, 3)]
    labels = [generator.integers(0, 2, len(p)) for p in points]
    return corners.reshape(5, 4), points, labels


def test_boxes_give_the_single_mask(model, images):
    boxes = [prompts_in(image, seed)[0] for seed, image in enumerate(images)]
    boxes[1] = boxes[1][:0]
    for image, image_boxes, found in zip(images, boxes, model.segment_anything(images, boxes=boxes), strict=True):
        assert len(found) == len(image_boxes)
        for i, box in enumerate(image_boxes):
            logits, iou = decode_with_sam(model, image, box)
            assert_mask(found, i, logits[0], iou[0])


def test_prompts_may_differ_in_their_number_of_points(model, images):
    """A single point gives the best of three masks, several points give the single mask; prompts keep their order."""
    few = images[:2]
    _, points, labels = zip(*(prompts_in(image, seed) for seed, image in enumerate(few)))
    for image, p, v, found in zip(few, points, labels, model.segment_anything(few, points=points, point_labels=labels)):
        assert len(found) == len(p)
        for i in range(len(p)):
            logits, iou = decode_with_sam(model, image, points=p[i], labels=v[i], multimask=len(p[i]) == 1)
            best = int(iou.argmax())
            assert_mask(found, i, logits[best], iou[best])


def test_point_labels_change_the_mask(model, images):
    image, points = images[0], [np.float32([[20, 20], [40, 40]])]
    inside = model.segment_anything([image], points=[points])[0]
    explicit = model.segment_anything([image], points=[points], point_labels=[[np.array([1, 1])]])[0]
    outside = model.segment_anything([image], points=[points], point_labels=[[np.array([1, 0])]])[0]
    assert_same(inside, explicit)
    assert_same(inside, model.segment_anything([image], points=[points], point_labels=[[np.array([True, True])]])[0])
    assert inside.predicted_iou[0] != outside.predicted_iou[0]


def test_boxes_combined_with_points(model, images):
    """With a box, even a single point gives the single mask; a box needs no point."""
    image = images[1]
    boxes, points, labels = prompts_in(image, 3)
    points[2], labels[2] = points[2][:0], labels[2][:0]
    (found,) = model.segment_anything([image], boxes=[boxes], points=[points], point_labels=[labels])
    assert len(found) == 5
    for i in range(5):
        logits, iou = decode_with_sam(model, image, boxes[i], points[i] if i != 2 else None, labels[i])
        assert_mask(found, i, logits[0], iou[0])


def test_many_prompts_keep_their_order(model, images):
    """There are more prompts than one pass decodes."""
    generator = np.random.default_rng(0)
    points = [point[None] for point in generator.random((70, 2), np.float32) * 64]
    (found,) = model.segment_anything([images[0]], points=[points])
    for i in (0, 33, 63, 64, 69):
        (one,) = model.segment_anything([images[0]], points=[[points[i]]])
        assert abs(found.predicted_iou[i] - one.predicted_iou[0]) < 1e-4
    assert len(set(found.predicted_iou.round(4))) > 5


def test_decode_returns_the_low_res_logits_of_segment_anything(model, images):
    boxes = [prompts_in(image, seed)[0] for seed, image in enumerate(images[:2])]
    embeddings = model.encode(images[:2])
    logits, iou = model.decode(embeddings, boxes)
    found = model.segment_anything(images[:2], boxes=boxes)
    for i in range(2):
        assert logits[i].shape == (5, 128, 128)
        np.testing.assert_array_equal(iou[i].numpy(), found[i].predicted_iou)
        whole = upsample(logits[i], 256, embeddings.input_sizes[i], embeddings.original_sizes[i]).numpy() > 0
        for j in range(5):
            np.testing.assert_array_equal(found[i].full_mask(j), whole[j])


# Invalid input ------------------------------------------------------------------------------------------------------

GOOD = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    "image, message",
    [
        (GOOD.astype(np.float32), r"not float32 \(32, 32, 3\)"),
        (GOOD[..., 0], r"not uint8 \(32, 32\)"),
        (GOOD[..., [0, 1, 2, 0]], r"not uint8 \(32, 32, 4\)"),
        (GOOD.tolist(), "not list"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), "not Tensor"),
        (GOOD[:0], "has no pixels"),
    ],
    ids=["float", "grey", "RGBA", "list", "tensor", "empty"],
)
def test_errors_name_the_wrong_image(model, image, message):
    for call in (
        model.encode,
        model.discover,
        model.segment_everything,
        lambda images: model.segment_anything(images, boxes=[np.zeros((0, 4))] * 2),
    ):
        with pytest.raises(ValueError, match=f"Image 1 .*{message}"):
            call([GOOD, image])


POINT, BOX = np.float32([[5, 5]]), np.float32([[2, 2, 9, 9]])


@pytest.mark.parametrize(
    "prompts, words",
    [
        ({}, "needs prompts: boxes, points, or both"),
        ({"boxes": [BOX]}, "boxes must hold one entry for each of the 2 images, not 1"),
        ({"points": [[POINT]] * 3}, "points must hold one entry for each of the 2 images, not 3"),
        ({"points": [[POINT]] * 2, "point_labels": [[[1]]]}, "point_labels must hold one entry"),
        ({"boxes": [BOX] * 2, "point_labels": [[[1]]] * 2}, "point_labels requires points"),
        ({"boxes": [BOX, np.zeros((4, 5))]}, r"Image 1: boxes must be finite numbers .*, not an array \(4, 5\)"),
        ({"boxes": [BOX, BOX * np.nan]}, "Image 1: boxes must be finite"),
        ({"points": [[POINT], [np.zeros((2, 3))]]}, r"Image 1: points must be finite numbers \[N, 2\]"),
        ({"points": [[POINT], [POINT]], "point_labels": [[[1]], [[1, 0]]]}, "Image 1: every prompt needs as many"),
        ({"points": [[POINT], [POINT]], "point_labels": [[[1]], [[2]]]}, "Image 1: point labels must be 1"),
        ({"boxes": [BOX, BOX], "points": [[POINT], []]}, "Image 1: every prompt needs .* one array of points for each"),
        ({"points": [[POINT], [POINT, POINT[:0]]]}, "Image 1: prompt 1 has neither a box nor a point"),
    ],
)
def test_errors_name_the_image_with_wrong_prompts(model, prompts, words):
    with pytest.raises(ValueError, match=words):
        model.segment_anything([GOOD, GOOD], **prompts)


def test_decode_checks_its_boxes(model):
    embeddings = model.encode([GOOD, GOOD])
    with pytest.raises(ValueError, match="boxes must hold one entry for each of the 2 images, not 1"):
        model.decode(embeddings, [BOX])
    with pytest.raises(ValueError, match=r"Image 1: boxes must be .* \(4, 5\)"):
        model.decode(embeddings, [BOX, np.zeros((4, 5))])


def test_unknown_names_are_refused(model):
    with pytest.raises(ValueError, match="Unknown prompting 'Grid'; choose one of object_aware, grid"):
        model.segment_everything([GOOD], prompting="Grid")
    with pytest.raises(ValueError, match="Unknown image encoder 'vit'; choose one of tiny_vit, "):
        MobileSAMv2.from_checkpoints("vit", "a", "b")


def test_model_without_a_detector(model):
    bare = MobileSAMv2(model.image_encoder, model.decoder, model.config, device="cpu")
    for call in (bare.discover, bare.segment_everything):
        with pytest.raises(RuntimeError, match=r'detector_checkpoint=\.\.\., or use prompting="grid"'):
            call([GOOD])
    assert len(bare.segment_anything([GOOD], boxes=[BOX])[0]) == 1
    assert isinstance(bare.segment_everything([GOOD], prompting="grid", points_per_side=1)[0], Segmentation)


# Imports ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, not_loaded",
    [
        ("fiftyone_mobilesamv2", ["torch", "fiftyone", "ultralytics", "timm"]),
        ("fiftyone_mobilesamv2.modeling.mobilesamv2", ["fiftyone"]),
    ],
)
def test_imports_are_light(module, not_loaded):
    program = f"import sys, {module}; print(*[name for name in {not_loaded} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
