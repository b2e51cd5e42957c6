"""Training of the demo model: prompts fit their targets, losses are SAM's, and an interrupted run can be resumed."""

import numpy as np
import pytest
import torch

from fiftyone_mobilesamv2.training import decoder
from fiftyone_mobilesamv2.training.decoder import PROMPTS_PER_IMAGE, DemoTrainer, PromptedScenes, mask_losses, schedule


def test_prompts_fit_their_targets():
    scenes = PromptedScenes(20, image_size=256, logit_size=128)
    for index in range(6):
        pixels, targets, outlines, boxes, points = scenes[index]
        half = PROMPTS_PER_IMAGE // 2
        assert pixels.shape == (3, 256, 256) and targets.shape == (PROMPTS_PER_IMAGE, 128, 128)
        assert outlines.shape == (128, 128) and 0 < outlines.mean() < 0.5
        for target, box in zip(targets[:half], boxes):
            rows, columns = np.nonzero(target.numpy() > 0.5)
            tight = 2 * np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            sides = np.tile(tight[2:] - tight[:2], 2)
            assert (
                np.abs(box.numpy() - tight) <= 0.3 * sides + 4
            ).all()  # tolerance for jitter, and for targets sampled at half the size
        for target, point in zip(targets[half:], points[:, 0].numpy()):
            x, y = np.clip(point / 2, 0, 127).astype(int)
            assert target[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max() > 0
        again = scenes[index]
        assert all(torch.equal(a, b) for a, b in zip((pixels, targets, outlines, boxes, points), again))


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


def test_schedule_warms_up_and_decays():
    assert schedule(0, 1000) == pytest.approx(0.01)
    assert schedule(100, 1000) == pytest.approx(1)
    assert schedule(1000, 1000) == pytest.approx(0.02)


@pytest.mark.slow
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "SAVE_EVERY", 1)
    torch.use_deterministic_algorithms(True)
    try:
        whole = DemoTrainer(tmp_path / "whole", 2, 1, 1e-3, "cpu")
        whole.run()
        killed = DemoTrainer(tmp_path / "killed", 2, 1, 1e-3, "cpu")
        save = killed.save

        def save_and_die():
            save()
            raise KeyboardInterrupt

        killed.save = save_and_die
        with pytest.raises(KeyboardInterrupt):
            killed.run()
        resumed = DemoTrainer(tmp_path / "killed", 2, 1, 1e-3, "cpu")
        resumed.restore()
        assert resumed.step == 1
        resumed.run()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in whole.ema.state_dict().items():
        torch.testing.assert_close(resumed.ema.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
