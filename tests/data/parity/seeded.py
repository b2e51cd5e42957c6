"""Deterministic weights and images, so that two implementations can be compared without sharing a checkpoint.

A tensor's values depend on its full name (prefix included) and its shape alone.
"""

import hashlib
import math

import numpy as np
import torch


def seeded_tensor(name, shape, salt=""):
    digest = hashlib.sha256((salt + name).encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    noise = generator.standard_normal(shape, dtype=np.float32) if len(shape) else np.float32(0)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0, dtype=torch.long)
    if name.endswith("positional_encoding_gaussian_matrix"):
        return torch.from_numpy(noise)
    if name.endswith("running_var"):
        return torch.from_numpy(1 + 0.1 * np.abs(noise))
    if name.endswith(("running_mean", "bias")):
        return torch.from_numpy(np.float32(0.05) * noise)
    if name.endswith("attention_biases"):
        return torch.from_numpy(np.float32(0.1) * noise)
    if len(shape) == 1:
        return torch.from_numpy(1 + np.float32(0.1) * noise)
    return torch.from_numpy(noise / np.float32(math.sqrt(np.prod(shape[1:]))))


def test_image(height, width, phase=0.0):
    """uint8 RGB [height, width, 3]"""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    red = 127.5 * (1 + np.sin(x / 17 + y / 31 + phase))
    green = 127.5 * (1 + np.sin(x / 7 - y / 13 + phase))
    blue = 127.5 * (1 + np.cos((x * x + y * y) / 9000 + phase))
    return np.clip(np.round(np.stack([red, green, blue], -1)), 0, 255).astype(np.uint8)
