"""Scenes of a style that the demo model was not trained on: many small speckled things on a grainy, dark background."""

from __future__ import annotations

import cv2
import numpy as np

from fiftyone_mobilesamv2.training.scenes import Scene

SEED = 77  # of this set


def make_other_scene(index: int) -> Scene:
    """Scene number `index`: sides of 300 to 640 px, 15 to 60 rods, rings and pairs of discs, of 8 to 45 px."""
    rng = np.random.default_rng((SEED, index))
    height, width = (int(side) for side in rng.integers(300, 641, 2))
    image = _grain(rng, height, width, 25, 12) + rng.uniform(0, 20, 3)
    labels = np.zeros((height, width), np.uint8)
    hue = rng.uniform(0.2, 1, 3)
    for _ in range(int(rng.integers(15, 61))):
        shape = _shape(rng, height, width)
        count = int(shape.sum())
        if count < 60 or (labels[shape > 0] > 0).any():  # they touch, but don't overlap
            continue
        number = int(labels.max()) + 1
        labels[shape > 0] = number
        color = hue * rng.uniform(70, 200) + rng.normal(0, 15, 3)
        speckle = _grain(rng, height, width, 0, 35)
        image[shape > 0] = (color + speckle)[shape > 0]
    image = cv2.GaussianBlur(image, (5, 5), 0.9) + rng.normal(0, 5, image.shape)
    return Scene(np.clip(np.round(image), 0, 255).astype(np.uint8), labels)


def _grain(rng: np.random.Generator, height: int, width: int, mean: float, strength: float) -> np.ndarray:
    """float64 [H, W, 3]: noise at three scales, the same in each channel."""
    total = np.zeros((height, width))
    for scale in (1, 3, 9):
        noise = rng.normal(0, strength / 2, (height // scale + 1, width // scale + 1))
        total += cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.repeat((mean + total)[..., None], 3, 2)


def _shape(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [H, W], 1 inside."""
    shape = np.zeros((height, width), np.uint8)
    x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
    size = float(np.exp(rng.uniform(np.log(4), np.log(22))))
    turn = rng.uniform(0, 180)
    kind = rng.integers(0, 3)
    if kind == 0:  # a rod
        cv2.ellipse(shape, (x, y), (int(size * 1.6), max(3, int(size * 0.4))), turn, 0, 360, 1, -1)
    elif kind == 1:  # a ring
        cv2.circle(shape, (x, y), int(size), 1, max(3, int(size * 0.5)))
    else:  # two discs that have not come apart
        ends = size * 0.8 * np.array([np.cos(np.radians(turn)), np.sin(np.radians(turn))])
        for sign in (-1, 1):
            center = int(x + sign * ends[0]), int(y + sign * ends[1])
            cv2.circle(shape, center, max(4, int(size * 0.8)), 1, -1)
    return shape
