"""Devices that models can run on."""

from __future__ import annotations

import torch

from ..errors import ArgumentError


def available_devices() -> list[str]:
    """The devices of this machine, fastest first: "cuda", Apple's "mps", "cpu"."""
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, available in is_available.items() if available]


def default_device() -> torch.device:
    """The fastest available device."""
    return torch.device(available_devices()[0])


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; the fastest available one for None. Raises ValueError if it can't be used."""
    if device is None:
        return default_device()
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).cpu()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"device must be available on this machine ({', '.join(available_devices())}), not {device!r}: "
            + str(error).partition("\n")[0]
        ) from error
    return usable
