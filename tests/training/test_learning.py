"""Gradients reach what should learn and nothing else; rates and averages suit short trainings."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import PromptGuidedDecoder
from fiftyone_mobilesamv2.training.learning import average_weights, schedule, set_learning
from fiftyone_mobilesamv2.training.mask_losses import mask_losses, prompt_losses
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
    set_learning(encoder, image_encoder, decoder, learn, from_scratch=False)
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


@pytest.mark.parametrize("name", ["tiny_vit", "efficientvit_l0", "sam_vit_b", "resnet_demo"])
def test_the_neck_makes_the_embedding(name):
    """It is a small part of the encoder, and the embedding comes out of its last module."""
    encoder = encoder_config(name).build()
    necks = [encoder.get_submodule(part) for part in encoder_config(name).neck]
    size = sum(parameter.numel() for neck in necks for parameter in neck.parameters())
    assert 0 < size < 0.5 * sum(parameter.numel() for parameter in encoder.parameters())
    assert list(encoder.named_children())[-1][0] == encoder_config(name).neck[-1]


def test_batch_norms_learn_their_statistics_only_from_scratch():
    encoder = encoder_config("resnet_demo").build()
    decoder = nn.Linear(1, 1)
    norms = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    set_learning("resnet_demo", encoder, decoder, "encoder", from_scratch=False)
    assert not any(norm.training for norm in norms) and all(norm.weight.requires_grad for norm in norms)
    set_learning("resnet_demo", encoder, decoder, "encoder", from_scratch=True)
    assert all(norm.training for norm in norms)


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
