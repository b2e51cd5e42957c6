"""Gradients reach what should learn and nothing else; rates and averages suit short trainings."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fiftyone_mobilesamv2.modeling.embedding_discovery import EmbeddingDetector
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import PromptGuidedDecoder
from fiftyone_mobilesamv2.training.learning import average_weights, parameter_groups, schedule, set_learning
from fiftyone_mobilesamv2.training.mask_losses import mask_losses, prompt_losses
from fiftyone_mobilesamv2.training.networks import Networks
from fiftyone_mobilesamv2.training.prompted_images import PromptedImages

from .conftest import simple_example

# Of the decoder: what reads mask prompts. Of TinyViT: its classifier. Neither takes part.
UNUSED = ("prompt_encoder.mask_downscaling.", "head.", "norm_head.")


def names_with_gradients(encoder, learn):
    """Of an encoder and its decoder, those that got gradients, and those that may and did not."""
    torch.manual_seed(0)
    config = encoder_config(encoder)
    image_encoder = config.build()
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    image_encoder.eval()  # TinyViT would otherwise not hold the biases that training must not use
    before = {name: buffer.clone() for name, buffer in image_encoder.named_buffers()}
    set_learning(Networks(config, image_encoder, decoder).modules, config, learn, untrained=(), frozen=())
    item = PromptedImages([simple_example(0)], config, 8, seed=0).item(0, 0)
    side = decoder.image_side(image_encoder(item.pixels[None])[0], decoder.positions())
    losses = []
    for prompts in item.prompts:
        tokens = decoder.embed_prompts(prompts.boxes, prompts.points, prompts.point_labels)
        logits, iou = decoder(side, tokens, prompts.masks)
        losses.append(prompt_losses(mask_losses(logits, iou, prompts.targets)))
    torch.cat(losses).mean().backward()
    for name, buffer in image_encoder.named_buffers():
        assert torch.equal(before[name], buffer), f"{name} changed"  # the statistics of batch norms
    parameters = [*image_encoder.named_parameters(), *((f"decoder.{n}", p) for n, p in decoder.named_parameters())]
    reached = {name for name, parameter in parameters if parameter.grad is not None}
    missed = {name for name, parameter in parameters if parameter.requires_grad} - reached
    return reached, {name for name in missed if not name.removeprefix("decoder.").startswith(UNUSED)}


def check_gradients(encoder, learn):
    reached, missed = names_with_gradients(encoder, learn)
    of_encoder = {name for name in reached if not name.startswith("decoder.")}
    in_neck = {name for name in of_encoder if name.split(".")[0] in encoder_config(encoder).neck}
    assert len(reached) > len(of_encoder)
    if learn == "decoder":
        assert not of_encoder
    elif learn == "neck":
        assert of_encoder == in_neck and in_neck
    else:
        assert of_encoder > in_neck
    assert not missed


@pytest.mark.parametrize("learn", ["decoder", "neck", "encoder"])
def test_gradients_reach_what_learns(learn):
    check_gradients("resnet_demo", learn)


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["decoder", "neck", "encoder"])
def test_gradients_reach_what_learns_of_tiny_vit(learn):
    check_gradients("tiny_vit", learn)


@pytest.mark.parametrize("name", ["tiny_vit", "efficientvit_l0", "sam_vit_b", "efficientnet_lite0", "resnet_demo"])
def test_the_neck_makes_the_embedding(name):
    """It is a small part of the encoder, and the embedding comes out of its last module."""
    encoder = encoder_config(name).build()
    necks = [encoder.get_submodule(part) for part in encoder_config(name).neck]
    size = sum(parameter.numel() for neck in necks for parameter in neck.parameters())
    assert 0 < size < 0.5 * sum(parameter.numel() for parameter in encoder.parameters())
    assert list(encoder.named_children())[-1][0] == encoder_config(name).neck[-1]


def networks(detector=True):
    config = encoder_config("efficientnet_lite0")
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    return Networks(config, config.build(), decoder, EmbeddingDetector(128, 16) if detector else None)


def test_batch_norms_learn_their_statistics_only_where_weights_are_untrained():
    of_model = networks()
    modules = of_model.modules

    def learning():
        named = modules.named_modules()
        return {name for name, part in named if isinstance(part, nn.BatchNorm2d) and part.training}

    set_learning(modules, of_model.config, "encoder", untrained=(), frozen=())
    fixed = {name for name, parameter in modules.named_parameters() if not parameter.requires_grad}
    assert not learning() and fixed == {"detector.detect.dfl.conv.weight"}
    set_learning(modules, of_model.config, "encoder", untrained=("image_encoder.fuse", "detector"), frozen=())
    assert {name.rsplit(".", 2)[0].split(".")[0] for name in learning()} == {"image_encoder", "detector"}
    assert all(name.startswith(("image_encoder.fuse.", "detector.")) for name in learning())


def test_detector_and_frozen_parts():
    of_model = networks()
    modules = of_model.modules

    def learning():
        return {name.split(".")[0] for name, parameter in modules.named_parameters() if parameter.requires_grad}

    set_learning(modules, of_model.config, "detector", untrained=(), frozen=())
    assert learning() == {"detector"} and not modules["image_encoder"].training
    set_learning(modules, of_model.config, "decoder", untrained=(), frozen=())
    assert learning() == {"detector", "decoder"}
    set_learning(modules, of_model.config, "encoder", untrained=(), frozen=("image_encoder.backbone",))
    assert learning() == {"detector", "decoder", "image_encoder"}
    assert not any(parameter.requires_grad for parameter in modules["image_encoder"].backbone.parameters())


def test_trained_weights_learn_less_beside_untrained_ones():
    of_model = networks()
    modules = of_model.modules
    set_learning(modules, of_model.config, "encoder", untrained=(), frozen=())
    (only,) = parameter_groups(modules, 0.1, untrained=())
    assert only["lr"] == 0.1 and len(only["params"]) == len(list(modules.parameters())) - 1  # the numbers of DFL's bins
    new, old = parameter_groups(modules, 0.1, untrained=("decoder",))
    assert (new["highest"], old["highest"]) == (0.1, pytest.approx(0.02))
    assert {id(each) for each in new["params"]} == {id(each) for each in modules["decoder"].parameters()}


def test_schedule_warms_up_and_decays():
    assert schedule(0, 2000) == pytest.approx(0.01) and schedule(100, 2000) == pytest.approx(1)
    assert schedule(0, 40) == pytest.approx(0.25) and schedule(4, 40) == pytest.approx(1)
    assert schedule(0, 1) == pytest.approx(1)
    assert schedule(2000, 2000) == pytest.approx(0.02)
    assert all(np.diff([schedule(step, 500) for step in range(50, 500)]) < 0)


def test_the_average_follows_short_trainings_and_smooths_long_ones():
    current = {"weight": torch.ones(3), "counter": torch.tensor(7)}
    averaged = {"weight": torch.zeros(3), "counter": torch.tensor(0)}
    short = copy.deepcopy(averaged)
    for step in range(1, 11):
        average_weights(short, current, step)
    assert short["weight"][0] > 0.999 and short["counter"] == 7
    average_weights(averaged, current, 100_000)
    assert averaged["weight"][0].item() == pytest.approx(0.005)
