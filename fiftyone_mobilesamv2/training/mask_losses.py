"""SAM's losses for masks and their predicted IoU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The share of the mean in the loss of an ambiguous prompt; it keeps training the masks that aren't the best.
_SHARE_OF_MEAN = 0.1


def mask_losses(logits: Tensor, iou: Tensor, targets: Tensor) -> Tensor:
    """SAM's losses, 20 * focal + dice + the squared error of the predicted IoU (section 3 of the paper).

    Args:
        logits: [N, M, L, L].
        iou: [N, M].
        targets: [N, L, L] in 0..1.

    Returns:
        [N, M]
    """
    targets = targets[:, None].expand_as(logits)
    p = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = (p - targets).abs()
    # RetinaNet's alpha of 0.25 favours the background; these objects are small, so they get the larger weight.
    alpha = 0.75 * targets + 0.25 * (1 - targets)
    focal = (alpha * wrong**2 * cross_entropy).mean((2, 3))
    dice = 1 - (2 * (p * targets).sum((2, 3)) + 1) / (p.sum((2, 3)) + targets.sum((2, 3)) + 1)
    predicted, true = logits.detach() > 0, targets > 0.5
    actual = (predicted & true).sum((2, 3)) / (predicted | true).sum((2, 3)).clamp(min=1)
    return 20 * focal + dice + (iou - actual) ** 2


def prompt_losses(losses: Tensor) -> Tensor:
    """The loss of each prompt from those of its masks: the lowest, and a small share of the mean.

    One point is ambiguous: of its three masks, only the best should fit. A box or several points have one mask, whose
    loss is the prompt's.

    Args:
        losses: [N, M] from :func:`mask_losses`.

    Returns:
        [N]
    """
    return (1 - _SHARE_OF_MEAN) * losses.min(1).values + _SHARE_OF_MEAN * losses.mean(1)
