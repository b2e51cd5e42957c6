"""What models can run on."""

from __future__ import annotations

import torch

from ..errors import ArgumentError


def available_devices() -> list[str]:
    """What models can run on here, best first: "cuda", Apple's "mps", "cpu"."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_there in there.items() if is_there]


def default_device() -> torch.device:
    """The best that there is."""
    return torch.device(available_devices()[0])


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; the best there is for None. Raises ValueError where it can't be used."""
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"device must be one that is here ({', '.join(available_devices())}), not {device!r}: "
            + str(error).partition("\n")[0]
        ) from error
    return found
