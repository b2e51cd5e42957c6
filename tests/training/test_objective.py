"""The joint objective: its gradients are those of the losses' sum, and ignored regions don't count."""

import copy
from dataclasses import replace

import pytest
import torch
from ultralytics.utils import IterableSimpleNamespace
from ultralytics.utils.loss import v8DetectionLoss

from fiftyone_mobilesamv2.modeling.embedding_discovery import EmbeddingDetector
from fiftyone_mobilesamv2.training.mask_losses import mask_losses, prompt_losses
from fiftyone_mobilesamv2.training.objective import Objective
from fiftyone_mobilesamv2.training.prompted_images import PromptedImages

from .conftest import simple_example
from .test_masks import CONFIG, demo_networks

DEVICE = torch.device("cpu")


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return demo_networks(detector=EmbeddingDetector(128, 8))


@pytest.fixture
def images():
    of_two = PromptedImages([simple_example(i) for i in range(2)], CONFIG, 4, seed=0)
    return [of_two.item(0, i) for i in range(2)]


def objective(networks, with_masks=True):
    networks.modules.eval()  # batch norms would otherwise see other batches
    networks.detector.detect.train()
    return Objective(networks.image_encoder, networks.decoder, networks.detector, with_masks, DEVICE)


def gradients(networks):
    return {name: each.grad.clone() for name, each in networks.modules.named_parameters() if each.grad is not None}


def discovery_loss(networks, embeddings, images):
    """ultralytics' own, for images without ignored regions."""
    model = copy.copy(networks.detector)
    model.args, model.model = IterableSimpleNamespace(box=7.5, cls=0.5, dfl=1.5), [networks.detector.detect]
    boxes = torch.cat([image.boxes for image in images]) / CONFIG.image_size
    batch = {
        "batch_idx": torch.cat([torch.full((len(image.boxes),), float(i)) for i, image in enumerate(images)]),
        "cls": torch.zeros(len(boxes), 1),
        "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1),
    }
    return v8DetectionLoss(model)(networks.detector(embeddings), batch)[0].sum()


def test_gradients_are_those_of_the_sum(networks, images):
    assert all(len(image.boxes) == 1 and not len(image.ignored) for image in images)
    total = objective(networks).backward(images[:1], 2) + objective(networks).backward(images[1:], 2)
    found = gradients(networks)
    networks.modules.zero_grad()
    embeddings = networks.image_encoder(torch.stack([image.pixels for image in images]))
    losses = []
    for embedding, image in zip(embeddings, images):
        side = networks.decoder.image_side(embedding, networks.decoder.positions())
        of_image = []
        for prompts in image.prompts:
            tokens = networks.decoder.embed_prompts(prompts.boxes, prompts.points, prompts.point_labels)
            logits, iou = networks.decoder(side, tokens, prompts.masks)
            of_image.append(prompt_losses(mask_losses(logits, iou, prompts.targets)))
        losses.append(torch.cat(of_image).mean())
        losses.append(0.5 * discovery_loss(networks, embedding[None], [image]))
    loss = sum(losses) / 2
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-4)
    wanted = gradients(networks)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


def test_without_masks_only_discovery_counts(networks, images):
    networks.modules.requires_grad_(False)
    networks.detector.requires_grad_(True)
    objective(networks, with_masks=False).backward(images, 2)
    assert {name.split(".")[0] for name in gradients(networks)} == {"detector"}


def test_false_finds_in_ignored_regions_do_not_count(networks, images):
    no_boxes = torch.zeros(0, 4)
    bare = replace(images[0], boxes=no_boxes, ignored=no_boxes)
    whole = replace(bare, ignored=torch.tensor([[0.0, 0.0, 256.0, 256.0]]))
    of_bare, of_whole = (objective(networks, with_masks=False).backward([each], 1) for each in (bare, whole))
    assert of_bare > 0 and of_whole < 0.2 * of_bare  # boxes that reach out of the image still count
