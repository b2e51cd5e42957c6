"""Losses of masks are SAM's."""

import math

import pytest
import torch

from fiftyone_mobilesamv2.training.mask_losses import mask_losses, prompt_losses


def test_losses_by_hand():
    target = torch.zeros(1, 4, 4)
    target[0, :2] = 1
    sure, wrong = 20 * (2 * target - 1), -20 * (2 * target - 1)
    logits = torch.stack([sure, wrong], 1)
    right_loss, wrong_loss = mask_losses(logits, torch.tensor([[1.0, 0.0]]), target)[0]
    assert right_loss == pytest.approx(0, abs=1e-6)
    # Focal: half of the pixels have weight 0.75 and half 0.25, with (1 - p)^2 = 1 and cross-entropy 20. Dice: 8 + 8
    # pixels without overlap, smoothed by 1. The predicted IoU of 0 is correct.
    assert wrong_loss.item() == pytest.approx(20 * 0.5 * 20 + 1 - 1 / 17, rel=1e-4)


def test_an_undecided_mask_by_hand():
    target = torch.tensor([[[1.0, 0.0]]])
    # p = 1/2 everywhere, so no pixel is predicted: focal is (0.75 + 0.25) / 2 * 1/4 * ln 2, dice 1 - (2 * 1/2 + 1) /
    # (1 + 1 + 1), and the IoU is 0 where 0.4 was predicted.
    loss = mask_losses(torch.zeros(1, 1, 1, 2), torch.tensor([[0.4]]), target)
    assert loss.item() == pytest.approx(20 * 0.5 * 0.25 * math.log(2) + 1 / 3 + 0.16)


def test_only_the_best_mask_of_a_point_counts():
    losses = torch.tensor([[3.0, 1.0, 2.0], [0.0, 6.0, 0.0]], requires_grad=True)
    assert prompt_losses(losses).tolist() == pytest.approx([0.9 * 1 + 0.1 * 2, 0.1 * 2])
    prompt_losses(losses).sum().backward()
    assert losses.grad[0].tolist() == pytest.approx([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3])


def test_the_mask_of_a_box_counts_in_full():
    assert prompt_losses(torch.tensor([[2.0], [5.0]])).tolist() == pytest.approx([2, 5])
