"""The gradients of a step's images, on a CPU computed by one thread for each core.

torch shares each operation among its threads, which pays for large operations only. Those of a step are many and small:
with two cores, a step of the photo model's training at 256 px took 2.2 s, 1.8 s on one of the cores alone, and 1.0 s
with half of the images on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .networks import Networks
from .objective import Objective
from .prompted_images import PromptedImage


class Gradients:
    """Computes gradients; a context manager, which ends its threads.

    Sums are added in a fixed order, so the result depends on the number of threads, but not on which is the fastest.

    Args:
        networks: on `device`, in the modes in which they are trained.
        with_masks: whether masks count.
        device: where the networks are.
        batch_size: how many images a step has at most.
    """

    def __init__(self, networks: Networks, with_masks: bool, device: torch.device, batch_size: int) -> None:
        self._cores = torch.get_num_threads()
        count = min(self._cores, batch_size) if device.type == "cpu" else 1
        replicas = [networks.replica() for _ in range(count - 1)]
        self._objectives = [
            Objective(each.image_encoder, each.decoder, each.detector, with_masks, device)
            for each in (networks, *replicas)
        ]
        modules = [networks.modules, *(each.modules for each in replicas)]
        self._parameters = list(zip(*(each.parameters() for each in modules)))
        self._statistics = list(zip(*map(_statistics, modules)))
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Gradients:
        count = len(self._objectives)
        if count > 1:
            self._pool = ThreadPoolExecutor(count, "gradients", torch.set_num_threads, (self._cores // count,))
        for first, *others in self._statistics:
            for other in others:
                other.copy_(first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._cores)  # threads that start later have the number that was set last

    def backward(self, images: Sequence[PromptedImage], at_once: int) -> float:
        """Sets the parameters' gradients to those of the mean of the images' losses, and returns that.

        Args:
            at_once: how many images a thread may hold in memory.
        """
        for parameter in (each for same in self._parameters for each in same):
            parameter.grad = None
        if self._pool is None:
            return self._of_share(self._objectives[0], images, at_once, len(images))
        shares = [[images[i] for i in share] for share in np.array_split(np.arange(len(images)), len(self._objectives))]
        losses = list(
            self._pool.map(
                lambda objective, share: self._of_share(objective, share, at_once, len(images)),
                self._objectives,
                shares,
            )
        )
        self._put_together()
        return sum(losses)

    @staticmethod
    def _of_share(objective: Objective, images: Sequence[PromptedImage], at_once: int, count: int) -> float:
        return sum(
            objective.backward(images[start : start + at_once], count) for start in range(0, len(images), at_once)
        )

    @torch.no_grad()
    def _put_together(self) -> None:
        for first, *others in self._parameters:
            for other in others:
                if other.grad is not None:
                    first.grad = other.grad if first.grad is None else first.grad.add_(other.grad)
        for same in self._statistics:
            mean = torch.stack(same).mean(0)
            for each in same:
                each.copy_(mean)


def _statistics(modules: nn.ModuleDict) -> list[Tensor]:
    """The statistics of those batch norms that learn them."""
    learning = [each for each in modules.modules() if isinstance(each, _BatchNorm) and each.training]
    return [tensor for norm in learning for tensor in norm.buffers() if tensor.is_floating_point()]
