"""A worker process of a cluster.

Ray imports this module in the worker before it creates the worker. FiftyOne reads its settings when it is imported, so
nothing here may import it before the worker has set them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

    from .cluster import Collection
    from .shards import Shard

T = TypeVar("T")
# A function of a shard's samples and the shard; each worker builds it once.
Work = Callable[["SampleCollection", "Shard"], T]


class Worker:
    """A worker process of the cluster."""

    def __init__(self, environment: dict[str, str], work: bytes, threads: int) -> None:
        os.environ.update(environment)
        import torch

        torch.set_num_threads(threads)
        self._to_load = work
        self._work: Work[object] | None = None

    def is_ready(self) -> bool:
        return True

    def run(self, collection: Collection, shard: Shard) -> object:
        if self._work is None:  # not in __init__, where an error would be reported as the death of this process
            import ray

            make, arguments = ray.cloudpickle.loads(self._to_load)
            self._work = make(*arguments)
        return self._work(collection.load(), shard)
